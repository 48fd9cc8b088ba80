"""Weights (safetensors, what one shares) and state (what an interrupted run needs to go on exactly)."""

import functools
import hashlib
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datasets.classes import CONTROL
from model import METHODS
from model.backbones.start_weights import check_keys
from model.method import Released
from utils.errors import UserError
from utils.files import hash_of, replacing
from utils.log import NAME
from utils.tensors import load_tensors

STATE = "iter_{:06d}.state.pt"
WEIGHTS = "iter_{:06d}.weights.safetensors"
BEST = "best.weights.safetensors"
# a weights file's header has one entry, META, as several come in another order each time; its JSON ends with the hashes
# of the tensors (TENSORS) and of the text before (SEAL), which earlier files do not have
META, TENSORS, SEAL = "meta", "tensors_sha256", re.compile(r', "sha256": "([0-9a-f]{64})"\}\Z')
# what is given in the place of weights, by how the file begins or by what torch says of it, and what is to be done
OTHERS = {
    rb"\Z": "an empty file: copy or download it again",
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself: run 'git lfs pull' where it is from",
    rb"\s*<": "a web page, not the file itself: download it again",
    rb"\s*[{\[]": "JSON, no weights",
    rb"\x80[\x03-\x05]": "a pickle of Python objects, which could run code: save the state_dict() of a model alone",
    rb"\x93NUMPY": "a NumPy array, no weights",
    rb"\x1f\x8b|.{257}ustar": "an archive: unpack it, and give the weights file in it",
    rb".{4}\0{4}{": "a safetensors file that is cut short or damaged: copy or download it again",
    rb"[^\x00-\x08]+\Z": "a text, no weights; of a run they are in checkpoints/, and --config takes a config",
}
REFUSED = {
    "TorchScript": "a TorchScript file: save the state_dict() of what torch.jit.load gives",
    "(?i)unsupported (global|class)":
        "other Python objects than tensors, which could run code: save state_dict() alone",
    "central directory": "a torch file or zip archive that is cut short: copy or download it again",
    "PytorchStreamReader|archive": "a zip archive, or arrays of NumPy: unpack it, and give the weights file in it",
}


def save_weights(path: str | os.PathLike, method: nn.Module, meta: dict) -> None:
    """Writes the method's weights; `meta` goes into the header.

    meta: JSON values. Those of a training are method, classes, config (the tag), settings (the resolved config,
    `engine.config.portable`), iterations (of all the training), train_images, train_masks, iteration and,
    of the best weights, val.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in method.state_dict().items()}
    text = json.dumps({**meta, TENSORS: _digest(tensors)})
    header = {META: f'{text[:-1]}, "sha256": "{_hash(text)}"}}'}
    with replacing(path) as part:
        save_file(tensors, part, metadata=header)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}\0{value.dtype}{tuple(value.shape)}".encode())
        digest.update(memoryview(value.contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def read_meta(path: str | os.PathLike) -> dict:
    """The `meta` of a weights file of ours, {} for other files. Raises UserError where there is no file, and where it
    is damaged."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    meta = _header(path) if _is_safetensors(path) else {}
    return {name: value for name, value in meta.items() if name != TENSORS}


def _header(path: str | os.PathLike) -> dict:
    """What META of a .safetensors file holds, as it was written; {} where there is none. Raises UserError."""
    with _naming_what_it_is(path), safe_open(path, "pt") as file:
        entries = file.metadata() or {}
        text = entries.pop(META, "{}")
        if seal := SEAL.search(text):
            text = text[: seal.start()] + "}"
        unsealed = [*entries.values(), *([] if seal else [text])]
        if (seal and seal[1] != _hash(text)) or any(TENSORS in other for other in unsealed):
            raise ValueError("its checksum differs")
        meta = json.loads(text)
        kinds = (("classes", list), ("settings", dict), ("val", dict))
        if not isinstance(meta, dict) or any(not isinstance(meta.get(key, kind()), kind) for key, kind in kinds):
            raise ValueError("its note is none of ours")
        for name in meta.get("classes", ()):   # they become names of folders, and parts of a page
            if not isinstance(name, str) or CONTROL.search(name) or not name.strip(". "):
                raise ValueError(f"its note has the class {name!r}")
        return meta


def recognise(path: str | os.PathLike) -> tuple[str, Released] | None:
    """Which method released a weights file, and what it is; None for a file of ours and of nobody we know."""
    return _recognise(path, os.stat(path).st_mtime_ns) if Path(path).is_file() else None


@functools.lru_cache(maxsize=1)
def _recognise(path: str | os.PathLike, _time: int) -> tuple[str, Released] | None:
    """Kept, as a large file is asked for several times."""
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
        known = set(weights) & set(own) or recognise(path)
        hint = "" if known else "; no checkpoint of this method: start weights of a backbone go to model.weights"
        raise UserError(f"{path}: {error}{hint}") from None
    method.load_state_dict(weights)


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file; no code of the file is run. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such weights file")
    with _naming_what_it_is(path), open(path, "rb") as file:   # by its name torch would take it for another format
        weights = _load_whole(path) if _is_safetensors(path) else load_tensors(file)
    if not isinstance(weights, dict):
        raise UserError(f"{path}: holds a {type(weights).__name__}, no weights by name")
    if {"iteration", "optimizer"} <= weights.keys() <= {"iteration", "optimizer", "kind", "weights", "rest"}:
        own = WEIGHTS.format(weights["iteration"])
        raise UserError(f"{path}: the state of an interrupted run; its weights are in {own}")
    return weights


def _load_whole(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; ValueError where they are not those that were written."""
    tensors, written = load_file(path), _header(path).get(TENSORS)
    if written and written != _digest(tensors):
        raise ValueError("its checksum differs")
    return tensors


def _is_safetensors(path: str | os.PathLike) -> bool:
    """By its content: copies and files of the Hub's cache have all kinds of names."""
    with open(path, "rb") as file:
        return file.read(9)[4:] == b"\0\0\0\0{"   # behind the length of its header


@contextmanager
def _naming_what_it_is(path: str | os.PathLike) -> Iterator[None]:
    """Whatever is raised in reading a file that holds no weights becomes a UserError that says what the file is."""
    try:
        yield
    except Exception as error:   # libraries raise many kinds, of which their documentation says nothing
        with open(path, "rb") as file:
            head = file.read(512)
        found = [what for begin, what in OTHERS.items() if re.match(begin, head, re.DOTALL)]
        found += [what for words, what in REFUSED.items() if re.search(words, str(error))]
        found += [f"not a readable weights file ({str(error).partition('. ')[0][:80] or type(error).__name__})"]
        raise UserError(f"{path}: {found[0]}") from None


def best_score(folder: Path, kind: str) -> float:
    """The validation score of a kind of map of the best weights so far, -inf where there are none. Raises UserError."""
    path = folder / BEST
    if not path.is_file():
        return -math.inf
    score = read_meta(path).get("val", {}).get(kind)
    if score is None:
        raise UserError(f"{path}: holds no validation score of '{kind}', so is none of this run: move it away")
    return score


def save_state(
    folder: Path, iteration: int, method: nn.Module, optimizer: torch.optim.Optimizer, meta: dict, rest: object = None
) -> None:
    """Writes weights and state after `iteration` steps. rest: numbers, lists and dicts to keep in the state."""
    weights = folder / WEIGHTS.format(iteration)
    save_weights(weights, method, {**meta, "iteration": iteration})
    state = {"iteration": iteration, "optimizer": optimizer.state_dict(), "kind": type(optimizer).__name__}
    state |= {"weights": hash_of(weights), "rest": rest}
    with replacing(folder / STATE.format(iteration)) as part:
        torch.save(state, part)


def drop_older(folder: Path, keep: int | None) -> None:
    """Removes states with their weights but for the newest `keep`; None keeps all.

    Weights without a state stay: earlier versions kept all weights of a run, and the newest state alone.
    """
    iterations = sorted(_by_iteration(folder, STATE), reverse=True)
    for iteration in [] if keep is None else iterations[keep:]:
        for kind in (WEIGHTS, STATE):   # in this order: weights alone would stay after a kill between the two
            (folder / kind.format(iteration)).unlink(missing_ok=True)


def drop_newer(folder: Path, iteration: int) -> None:
    """Removes the states after `iteration`: they are not whole where a run goes on from there, which writes them again.
    """
    for newer, path in _by_iteration(folder, STATE).items():
        if newer > iteration:
            path.unlink(missing_ok=True)


def _by_iteration(folder: Path, kind: str) -> dict[int, Path]:
    """The files of STATE or WEIGHTS by their iteration."""
    ending = kind.partition("}")[2]
    named = ((path.name.removeprefix("iter_").removesuffix(ending), path) for path in folder.glob(f"iter_*{ending}"))
    return {int(number): path for number, path in named if number.isdecimal()}


def last_weights(folder: Path) -> Path | None:
    """The weights of the latest iteration in a run's checkpoints, None where there are none."""
    return max(_by_iteration(folder, WEIGHTS).items(), default=(0, None))[1]


def newest_state(folder: Path) -> dict | None:
    """The newest whole state in `folder` with whole weights: `iteration`, the iterations done, and `optimizer`.

    None where there are neither states nor weights. Raises UserError where none is whole, which is no reason to begin
    anew.
    """
    states = _by_iteration(folder, STATE)
    faults = [f"{folder}: holds weights, but no state"] if any(folder.glob("*.weights.safetensors")) else []
    for iteration, path in sorted(states.items(), reverse=True):
        try:
            return _read_state(path, iteration)
        except UserError as error:
            faults.append(str(error))
            logging.getLogger(NAME).warning("%s; an earlier state is taken, if one is whole", error)
    if faults:
        raise UserError(f"{faults[-1]}: there is nothing whole to go on with; put it back, or begin with another tag")
    return None


def _read_state(path: Path, iteration: int) -> dict:
    weights = path.with_name(WEIGHTS.format(iteration))
    read_meta(weights)   # raises where they are missing or cut
    try:
        with zipfile.ZipFile(path) as archive:   # torch does not ask for its checksums
            if archive.testzip() is not None:
                raise ValueError("damaged after it was written, its checksums say")
        state = load_tensors(path)
    except Exception as error:   # whatever a file that was cut, or is another, makes of it
        raise UserError(f"{path}: not a readable state ({str(error).partition('.')[0] or 'empty'})") from None
    if not isinstance(state, dict) or state.get("iteration") != iteration or "optimizer" not in state:
        raise UserError(f"{path}: not the state of iteration {iteration}")
    if "weights" in state and state["weights"] != hash_of(weights):   # earlier states do not say it
        raise UserError(f"{weights}: not what the run wrote with {path.name}")
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Takes moments and step counts from a state; rates and the like are what the config says now. Raises UserError."""
    groups, theirs = optimizer.state_dict()["param_groups"], state["optimizer"]
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    try:
        fits = state.get("kind", "AdamW") == type(optimizer).__name__   # earlier states are of AdamW
        fits &= [len(group["params"]) for group in groups] == [len(group["params"]) for group in theirs["param_groups"]]
        kept = ((shapes[i], value) for i, values in theirs["state"].items() for value in values.values())
        fits &= all(value.shape == shape for shape, value in kept if isinstance(value, Tensor) and value.dim())
    except (AttributeError, LookupError, TypeError):
        fits = False
    if not fits:
        name = STATE.format(state["iteration"])
        raise UserError(f"{name} is of another network or optimizer: give the run's own, or another tag")
    optimizer.load_state_dict({"state": theirs["state"], "param_groups": groups})
