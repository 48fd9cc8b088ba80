"""One config a run: configs/default.yaml, then the run's YAML, then key=value from the command line.

default.yaml is the schema: a key it does not have is an error, and so is a value of another type than its own.
What its values cannot say (keys that may be null, choices, ranges) stands in the tables below.
"""

import difflib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import UserError
from utils.files import ROOT

CONFIGS = ROOT / "configs"
COMMAND_LINE = "on the command line"

# Keys that may be null, with the type of their other values.
OPTIONAL: dict[str, type | list[type]] = {
    "tag": str,
    "resume": str,
    "data.root": str,
    "data.val_split": str,
    "data.image_labels": str,
    "data.classes": [str],
    "data.workers": int,
    "model.weights": str,
    "train.validate_images": int,
    "evaluate.base_size": int,
    "evaluate.images": int,
    "evaluate.images_at_once": int,
    "evaluate.save_labels": str,
    "evaluate.save_overlays": str,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("more",),
    "resume": ("auto",),
    "data.name": ("voc", "coco", "shapes"),
    "data.augmentation": ("voc", "coco"),
    "train.precision": ("fp32", "bf16"),
    "evaluate.image_labels": ("given", "predicted"),
    "evaluate.predict_from": ("classifier", "segmentation"),
    "crf.backend": ("lattice", "pydensecrf"),
}
# Smallest and largest value (None: no limit), of every element where the value is a list.
RANGES: dict[str, tuple[float, float | None]] = {
    "seed": (0, None),
    "data.crop_size": (1, None),
    "data.workers": (0, None),
    "model.registers": (0, None),
    "model.token_ratio": (0, 1),
    "model.decoder_channels": (1, None),
    "pseudo_labels.high": (0, 1),
    "pseudo_labels.low": (0, 1),
    "pseudo_labels.certain.aux": (0, 1),
    "pseudo_labels.certain.main": (0, 1),
    "pseudo_labels.uncertain.aux": (0, 1),
    "pseudo_labels.uncertain.main": (0, 1),
    "pseudo_labels.par_iterations": (0, None),
    "pseudo_labels.par_dilations": (1, None),
    "loss.uncertain_tokens": (1, None),
    "train.iterations": (1, None),
    "train.batch_size": (1, None),
    "train.lr": (0, None),
    "train.head_lr_factor": (0, None),
    "train.warmup_iterations": (0, None),
    "train.weight_decay": (0, None),
    "train.betas": (0, 1),
    "train.log_every": (1, None),
    "train.picture_every": (1, None),
    "train.checkpoint_every": (1, None),
    "train.validate_every": (1, None),
    "train.validate_images": (1, None),
    "evaluate.base_size": (1, None),
    "evaluate.min_pixels": (1, None),
    "evaluate.bkg": (0, 1),
    "evaluate.images": (1, None),
    "evaluate.images_at_once": (1, None),
    "evaluate.report_images": (0, None),
    "crf.iterations": (0, None),
    "crf.pos_w": (0, None),
    "crf.bi_w": (0, None),
}
POSITIVE = (
    "data.resize_range",
    "pseudo_labels.cam_scales",
    "loss.certain_temperature",
    "loss.token_temperature",
    "loss.energy_sigma_rgb",
    "loss.energy_sigma_xy",
    "loss.energy_scale",
    "evaluate.cam_scales",
    "evaluate.lam_scales",
    "evaluate.multi_scales",
    "evaluate.seg_scales",
    "crf.pos_xy_std",
    "crf.bi_xy_std",
    "crf.bi_rgb_std",
)
PAIRS_HIGH_LOW = (
    "pseudo_labels.certain.aux",
    "pseudo_labels.certain.main",
    "pseudo_labels.uncertain.aux",
    "pseudo_labels.uncertain.main",
)
PAIRS = ("data.resize_range", "train.betas", *PAIRS_HIGH_LOW)
TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "pydensecrf2", "safetensors")


def load_config(name: str | os.PathLike | None = None, overrides: Sequence[str] = ()) -> DictConfig:
    """The resolved config of a run.

    name: a file of configs/ without its ending ('more_voc'), the path of a YAML, or None for the defaults alone.
    overrides: key=value pairs with dotted keys, the last one wins.
    Raises UserError for an unknown file or key (with the nearest known one), a wrong type or a value out of range.
    """
    if name is None:
        return _resolve([], overrides)
    path = find_config(name)
    return _resolve([(f"in {path}", _read_yaml(path))], overrides)


def load_settings(settings: Mapping, source: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The same from settings that are at hand, as `portable` gives them; source: where they are from, for errors."""
    return _resolve([(f"in {source}", settings)], overrides)


def portable(config: DictConfig) -> dict:
    """The resolved config as plain values, to share: without the place of the data and the folders of this machine.

    Of an absolute path, one from a home (~) or from outside (..), the last part stays.
    """
    settings = _without_folders(OmegaConf.to_container(config, resolve=True))
    return {**settings, "resume": None, "data": {**settings["data"], "root": None}}


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "..")) or PureWindowsPath(value).drive):
        return PureWindowsPath(value).name
    return value


def _resolve(layers: list[tuple[str, Mapping]], overrides: Sequence[str]) -> DictConfig:
    default = _read_yaml(CONFIGS / "default.yaml")
    layers = [*layers, *((COMMAND_LINE, _parse_override(item, default)) for item in overrides)]
    config = OmegaConf.create(default)
    for source, layer in layers:
        checked = _check_mapping(layer, default, "", source)
        config = OmegaConf.merge(config, checked)
    _check_values(OmegaConf.to_container(config), ", ".join(dict.fromkeys(source for source, _ in layers)))
    return config


def split_config(argv: Sequence[str], default: str | None) -> tuple[str | None, list[str]]:
    """Takes config=NAME out of a script's arguments: (the config's name or path, the other arguments)."""
    names = [item.removeprefix("config=") for item in argv if item.startswith("config=")]
    return (names or [default])[-1], [item for item in argv if not item.startswith("config=")]


def find_config(name: str | os.PathLike) -> Path:
    """The YAML that `name` means: an existing path, or a file of configs/. Raises UserError with the nearest name."""
    text = os.fspath(name)
    path = Path(text)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        raise UserError(f"config file {text} does not exist")
    known = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    if text not in known:
        raise UserError(f"no config named '{text}': did you mean '{_nearest(text, known)}'? (have {', '.join(known)})")
    return CONFIGS / f"{text}.yaml"


def save_config(config: DictConfig, path: str | os.PathLike) -> None:
    """Writes the resolved config as YAML; an interrupted call leaves the former file whole."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
    os.replace(part, path)


def save_provenance(config: DictConfig, folder: str | os.PathLike) -> None:
    """Writes what a run came from into its folder.

    config.yaml: the resolved config. provenance.jsonl: one line a start (a resumed run adds one) with the time,
    the command line, the git commit (null outside of git) and the versions of Python and of the packages.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    start = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": [sys.executable, *sys.argv],
        **_git_commit(),
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}},
    }
    with open(folder / "provenance.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def _read_yaml(path: Path) -> dict:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"config file {path} holds no mapping of keys to values")
    return content


def _parse_override(item: str, default: dict) -> dict:
    """'a.b=1' -> {'a': {'b': 1}}; where the default is a text the value is taken as typed (tag=007 stays '007')."""
    key, equals, text = item.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"'{item}' on the command line is not key=value")
    if not text:
        raise UserError(f"{key}= on the command line has no value; write {key}=null for none")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{key}={text} on the command line cannot be read: {_one_line(error)}") from error
    known = dict(leaves(default))
    if _kind(key, known.get(key)) is str and not isinstance(value, str | None):
        value = text
    for part in reversed(parts):
        value = {part: value}
    return value


def _check_mapping(layer: Mapping, default: Mapping, prefix: str, source: str) -> dict:
    """`layer` with its values checked against `default` (and integers made floats where floats are due)."""
    checked = {}
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if name not in default:
            raise UserError(f"unknown key '{key}' {source}: did you mean '{_nearest_key(key.lstrip('-'))}'?")
        expected = default[name]
        if not isinstance(expected, Mapping):
            checked[name] = _check_value(key, value, _kind(key, expected), source)
        elif not isinstance(value, Mapping):
            raise UserError(f"{key} = {value!r} {source}: expected a mapping of keys to values")
        else:  # an empty mapping in default.yaml takes any keys
            checked[name] = _check_mapping(value, expected, f"{key}.", source) if expected else dict(value)
    return checked


def _kind(key: str, default: Any) -> type | list[type] | None:
    """The type of a key's values: bool, int, float or str, [element type] for a list, None for any."""
    if key in OPTIONAL:
        return OPTIONAL[key]
    if isinstance(default, list):
        return [type(default[0])]
    return None if default is None else type(default)


def _check_value(key: str, value: Any, kind: type | list[type] | None, source: str) -> Any:
    if kind is None or (value is None and key in OPTIONAL):
        return value
    if isinstance(kind, list):
        fits = isinstance(value, list) and all(_fits(element, kind[0]) for element in value)
        name = f"a list, each element {TYPE_NAMES[kind[0]]}"
    else:
        fits = _fits(value, kind)
        name = TYPE_NAMES[kind]
    if not fits:
        null = " or null" if key in OPTIONAL else ""
        raise UserError(f"{key} = {value!r} {source}: expected {name}{null}")
    if kind == [float]:
        return [float(element) for element in value]
    return float(value) if kind is float else value


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _check_values(config: dict, sources: str) -> None:
    """Choices, ranges and lengths of the merged config."""
    values = {key: value for key, value in leaves(config) if value is not None}

    def refuse(key: str, expected: str) -> None:
        raise UserError(f"{key} = {values[key]!r} ({sources or 'in configs/default.yaml'}): expected {expected}")

    for key, allowed in CHOICES.items():
        if key in values and values[key] not in allowed:
            refuse(key, " or ".join(allowed) + (" or null" if key in OPTIONAL else ""))
    for key, (low, high) in RANGES.items():
        if any(v < low or (high is not None and v > high) for v in _elements(values.get(key))):
            refuse(key, f"at least {low}" if high is None else f"{low} to {high}")
    for key in POSITIVE:
        if key in values and (values[key] == [] or any(v <= 0 for v in _elements(values[key]))):
            refuse(key, "numbers above 0" if isinstance(values[key], list) else "a number above 0")
    for key in PAIRS:
        if key in values and len(values[key]) != 2:
            refuse(key, "two numbers")
    for key in PAIRS_HIGH_LOW:
        if key in values and values[key][0] < values[key][1]:
            refuse(key, "[high, low] with high >= low")
    if "=" in values.get("tag", ""):
        refuse("tag", "a name; was TAG left out before the key=value arguments?")
    classes = values.get("data.classes", [])
    if len({"background", *classes}) != len(classes) + 1:
        refuse("data.classes", "names that differ, without background")
    if values["data.resize_range"][0] > values["data.resize_range"][1]:
        refuse("data.resize_range", "[smallest, largest]")
    if values["pseudo_labels.high"] < values["pseudo_labels.low"]:
        refuse("pseudo_labels.high", f"at least pseudo_labels.low = {values['pseudo_labels.low']}")


def _elements(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def leaves(mapping: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; an empty mapping counts as a leaf."""
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nearest_key(key: str) -> str:
    """The known key most like `key`; one with the same last part is nearest of all."""
    known = [name for name, _ in leaves(_read_yaml(CONFIGS / "default.yaml"))]
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    if "." in key:
        return _nearest(key, same or known)
    return _nearest(key, same) if same else max(known, key=lambda name: _likeness(key, name.rpartition(".")[2]))


def _nearest(name: str, known: Sequence[str]) -> str:
    return max(known, key=lambda other: _likeness(name, other))


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _git_commit() -> dict[str, Any]:
    """{'commit': hash or None, 'changed': whether tracked files differ from it} of the folder this code lies in."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return {"commit": None, "changed": None}
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed": None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
