"""Weights (safetensors, what one shares) and state (what an interrupted run needs to go on exactly)."""

import json
import math
import os
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.backbones.start_weights import check_keys
from utils.errors import UserError
from utils.files import replacing

STATE = "iter_{:06d}.state.pt"
WEIGHTS = "iter_{:06d}.weights.safetensors"
BEST = "best.weights.safetensors"


def save_weights(path: str | os.PathLike, method: nn.Module, meta: dict) -> None:
    """Writes the method's weights; `meta` goes into the header.

    meta: JSON values. Those of a training are method, classes, config (the tag), settings (the resolved config,
    `utils.config.portable`), iteration and, of the best weights, val.
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


def classifier_rows(path: str | os.PathLike) -> int | None:
    """How many classes a weights file's classifier has, ours or released; None where there is no classifier."""
    weights = read_tensors(path)
    weights = weights.get("model_state_dict", weights)
    rows = [len(value) for key, value in weights.items() if key.split(".")[-2:] == ["classifier", "weight"]]
    return rows[0] if rows else None


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


def best_score(folder: Path) -> float:
    """The validation score `seg` of the best weights so far, -inf where there are none."""
    path = folder / BEST
    return read_meta(path)["val"]["seg"] if path.is_file() else -math.inf


def save_state(folder: Path, iteration: int, method: nn.Module, optimizer: torch.optim.Optimizer, meta: dict) -> None:
    """Writes weights and state after `iteration` steps; earlier states go, their weights stay."""
    save_weights(folder / WEIGHTS.format(iteration), method, {**meta, "iteration": iteration})
    state = {"iteration": iteration, "optimizer": optimizer.state_dict()}
    with replacing(folder / STATE.format(iteration)) as part:
        torch.save(state, part)
    for path in folder.glob("iter_*.state.pt"):
        if path.name != STATE.format(iteration):
            path.unlink()


def load_state(folder: Path, method: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
    """Continues from the newest complete state in `folder`: iterations done, None where there is none."""
    states = sorted(folder.glob("iter_*.state.pt"), key=lambda p: int(re.findall(r"\d+", p.name)[0]), reverse=True)
    for path in states:
        weights = path.with_name(path.name.replace(".state.pt", ".weights.safetensors"))
        if weights.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            load_weights(weights, method)
            # moments and step counts; rates and the like are what the config says now
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
            return state["iteration"]
    return None
