"""Opens a checkpoint for use: a method with its weights, the names of its classes and the config they belong to.

    opened = open_checkpoint("runs/train_voc/checkpoints/best.weights.safetensors")
    opened.method.classify(images)      # (B, K); model/method.py has the contract
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE

from datasets import class_names
from engine.checkpoints.files import check_classes, load_weights, read_meta, recognise, run_folder
from engine.config import RunConfig, load_config, load_settings, portable
from model import build_method
from model.method import Method
from utils.config import flatten, unflatten
from utils.download import fetch, registry
from utils.errors import UserError
from utils.offline import is_offline

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")   # owner/name
ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")   # of files: what ends so is no name on the Hub
# where an evaluation writes is said by who starts it, never by the checkpoint
UNASKED = ["evaluate.save_labels=null", "evaluate.save_overlays=null"]
DEFAULT = "more_voc"   # config of a file that does not say what it is
SUMS = "SHA256SUMS"   # a folder that holds it is a release, and stays as it is


class Opened(NamedTuple):
    """method: in evaluation mode, on the CPU. classes: K names, no background. config_name: where config is from."""

    method: Method
    classes: tuple[str, ...]
    config: RunConfig
    config_name: str


def open_checkpoint(path: str, overrides: Sequence[str] = (), config: str | None = None) -> Opened:
    """The method of a checkpoint; no data is needed.

    path: what `find_checkpoint` takes. overrides, config: as `checkpoint_config` takes them.
    Raises UserError for a file that cannot be found or read, and for weights that do not fit the config.
    """
    file = find_checkpoint(path)
    settings, name = checkpoint_config(file, overrides, config)
    classes = checkpoint_classes(file, settings)
    method = build_method(settings, len(classes))
    load_weights(file, method)
    return Opened(method.eval(), classes, settings, name)


def find_checkpoint(path: str) -> str:
    """The weights file that `path` means.

    path: a file; a folder that is released or shared; a name of weights/registry.yaml; `owner/name` on the Hub. The
    last two are downloaded where they are not here yet; the Hub is not asked where a folder `owner` is here.
    Raises UserError where there is none.
    """
    if Path(path).is_dir():
        return _in_folder(Path(path))
    if Path(path).is_file():
        return path
    entry = registry().get(path)
    if entry is not None and entry.kind != "checkpoint":
        raise UserError(f"{path}: names {entry.kind} of weights/registry.yaml, no checkpoint")
    if entry is not None:
        return str(fetch(path))
    if HUB_ID.fullmatch(path) and Path(path).suffix not in ENDINGS and not Path(path).parent.is_dir():
        return from_hub(path)
    raise UserError(f"{path}: no such checkpoint")


def checkpoint_config(
    file: str, overrides: Sequence[str] = (), config: str | None = None, default: str | None = None
) -> tuple[RunConfig, str]:
    """The config a weights file is used with, and where it is from.

    It is the one named by `config`, else the settings in the file's own header, else the config.yaml of its run, else
    what the released file is, else `default`. overrides: key=value pairs on top.
    """
    beside = run_folder(file) / "config.yaml"
    settings = read_meta(file).get("settings")
    overrides = [*(UNASKED if config is None else []), *overrides]
    if config is None and settings is not None:
        return load_settings(_with_paths(settings, file, beside), file, overrides), file
    if config is None and beside.is_file():
        config = str(beside)
    released = None if settings is not None else recognise(file)
    if released:   # trained in float32
        overrides = ["train.precision=fp32", *overrides]
    if settings is not None and "normalize" not in settings.get("model", {}):   # before that key
        overrides = ["model.normalize=imagenet", *overrides]
    name = config or (released[1].config if released else default or DEFAULT)
    return load_config(name, overrides), name


def checkpoint_classes(file: str, config: RunConfig) -> tuple[str, ...]:
    """The class names of a weights file: its own note's, else those of the config's data, if their number is right."""
    noted = read_meta(file).get("classes")
    if noted is not None:
        return tuple(noted)
    classes = class_names(config.data)
    check_classes(file, classes)
    return classes


def from_hub(name: str, **how) -> str:
    """The weights file of `owner/name` on the Hub, from its cache if it is there. how: for hf_hub_download."""
    try:
        return hf_hub_download(name, SAFETENSORS_SINGLE_FILE, **{"local_files_only": is_offline(), **how})
    except Exception as error:   # its own, those of its HTTP client and of the file system
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{name}: no such checkpoint here, and the Hub does not give it: {reason}") from None


def _with_paths(settings: dict, file: str, beside: Path) -> dict:
    """The settings of a header with the paths, cut by `portable`, of the config.yaml beside it, if it is that run's."""
    try:
        header, run = load_settings(settings, file), load_config(beside)
    except UserError:   # no such file, or anything else; the header's mistakes are named later
        return settings
    if (run.method, run.tag) != (header.method, header.tag):
        return settings
    own, whole, cut = flatten(portable(header)), flatten(run.model_dump(mode="json")), flatten(portable(run))
    return unflatten({key: whole[key] if key in whole and cut[key] == own[key] else own[key] for key in own})


def _in_folder(folder: Path) -> str:
    """The weights file of a folder: as the Hub names it, else the only one."""
    files = sorted(folder.glob("*.safetensors"))
    shared = folder / SAFETENSORS_SINGLE_FILE
    if shared in files:
        return str(shared)
    if len(files) != 1:
        found = f"{len(files)} .safetensors files" if files else "no .safetensors file"
        raise UserError(f"{folder}: {found} in this folder; give the weights file itself (of a run, in checkpoints/)")
    return str(files[0])
