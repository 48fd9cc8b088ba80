"""Weights (safetensors, what one shares) and state (what an interrupted run needs to go on exactly)."""

import json
import math
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import METHODS
from model.backbones.start_weights import check_keys
from model.method import Released
from utils.errors import UserError
from utils.files import replacing

STATE = "iter_{:06d}.state.pt"
WEIGHTS = "iter_{:06d}.weights.safetensors"
BEST = "best.weights.safetensors"


def save_weights(path: str | os.PathLike, method: nn.Module, meta: dict) -> None:
    """Writes the method's weights; `meta` goes into the header.

    meta: JSON values. Those of a training are method, classes, config (the tag), settings (the resolved config,
    `engine.config.portable`), iterations (of the whole training), iteration and, of the best weights, val.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in method.state_dict().items()}
    with replacing(path) as part:
        save_file(tensors, part, metadata={"meta": json.dumps(meta)})


def read_meta(path: str | os.PathLike) -> dict:
    """The `meta` of a weights file of ours, {} for other files. Raises UserError where there is no file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("meta", "{}"))
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def recognise(path: str | os.PathLike) -> tuple[str, Released] | None:
    """Which method released a weights file, and what it is; None for a file of ours and of nobody we know."""
    weights = read_tensors(path)
    weights = weights.get("model_state_dict", weights)
    shapes = {key: tuple(value.shape) for key, value in weights.items() if isinstance(value, Tensor)}
    found = ((name, method.recognise(shapes)) for name, method in METHODS.items())
    return next(((name, released) for name, released in found if released is not None), None)


def check_classes(path: str | os.PathLike, classes: Sequence[str]) -> None:
    """Raises UserError where the checkpoint was made for other classes than the data's, or for another order of them.

    They come from the weights file's own note; of a released file there is their number alone.
    """
    own = read_meta(path).get("classes")
    released = recognise(path) if own is None else None
    count = len(own) if own is not None else released[1].classes if released else None
    if count not in (None, len(classes)):
        raise UserError(
            f"{path} has {count} classes, the data has {len(classes)}: give its own data (data.name, data.classes)"
        )
    for index, (theirs, ours) in enumerate(zip(own or classes, classes, strict=True), start=1):
        if theirs != ours:
            raise UserError(f"{path}: class {index} is '{theirs}', in the data '{ours}': give its own data.classes")


def run_folder(path: str | os.PathLike) -> Path:
    """The folder of the run a checkpoint belongs to: the parent of checkpoints/, else the checkpoint's own folder."""
    folder = Path(path).parent
    return folder.parent if folder.name == "checkpoints" else folder


def load_weights(path: str | os.PathLike, method: nn.Module) -> None:
    """Loads a weights file of ours (.safetensors) or one released by a method's authors (.pth), strictly.

    Raises UserError naming the file and the first missing, unexpected or misshaped key.
    """
    weights = read_tensors(path)
    own = method.state_dict()
    try:
        if set(weights) & set(own):
            check_keys(weights, {name: value.shape for name, value in own.items()}, "weights")
        else:
            weights = method.from_official(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    method.load_state_dict(weights)


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file; no code of the file is run. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such weights file")
    if str(path).endswith(".state.pt"):
        weights = Path(path).name.replace(".state.pt", ".weights.safetensors")
        raise UserError(f"{path}: the state of an interrupted run; its weights are in {weights}")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable weights file ({reason})") from None
    if not isinstance(weights, dict):
        raise UserError(f"{path}: holds a {type(weights).__name__}, no weights by name")
    return weights


def best_score(folder: Path, kind: str) -> float:
    """The validation score of a kind of map of the best weights so far, -inf where there are none."""
    path = folder / BEST
    return read_meta(path)["val"][kind] if path.is_file() else -math.inf


def save_state(folder: Path, iteration: int, method: nn.Module, optimizer: torch.optim.Optimizer, meta: dict) -> None:
    """Writes weights and state after `iteration` steps; earlier states go, their weights stay."""
    save_weights(folder / WEIGHTS.format(iteration), method, {**meta, "iteration": iteration})
    state = {"iteration": iteration, "optimizer": optimizer.state_dict(), "kind": type(optimizer).__name__}
    with replacing(folder / STATE.format(iteration)) as part:
        torch.save(state, part)
    for path in folder.glob("iter_*.state.pt"):
        if path.name != STATE.format(iteration):
            path.unlink()


def newest_state(folder: Path) -> dict | None:
    """The newest state in `folder` that has its weights: `iteration`, the iterations done, and `optimizer`."""
    states = sorted(folder.glob("iter_*.state.pt"), key=lambda p: int(re.findall(r"\d+", p.name)[0]), reverse=True)
    for path in states:
        if path.with_name(path.name.replace(".state.pt", ".weights.safetensors")).is_file():
            return torch.load(path, map_location="cpu", weights_only=True)
    return None


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Takes moments and step counts from a state; rates and the like are what the config says now."""
    kind, wanted = state.get("kind", "AdamW"), type(optimizer).__name__   # earlier states are of AdamW
    if kind != wanted:
        raise UserError(f"train.optimizer: the run was made with {kind}, not {wanted}: give its own, or another tag")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
