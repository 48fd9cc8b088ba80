"""One config for each run: the method's defaults, its YAML (`base: NAME` builds on another), then key=value.

`method` is read first: the sections below and those of that method are the schema, a key that it does not have is an
error, and so is a value of another type or range. The object is typed and is not changed after it was resolved.
"""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from datasets.config import Data
from model import METHODS
from model.method import Method
from utils.config import COMMAND_LINE, Layers, flatten, read_yaml, save_yaml, shown, without_folders
from utils.errors import UserError, did_you_mean
from utils.files import ROOT
from utils.schema import (
    Count,
    FilePath,
    Flag,
    Index,
    NotNegative,
    Positive,
    Scales,
    ScalesOf,
    Section,
    Share,
    Text,
    key,
)

CONFIGS = ROOT / "configs"
CLASSIFIER = "classifier"   # value of evaluate.predict_from
DEFAULT_METHOD = "more"   # also of the runs and rows of early versions, which do not name theirs
SCHEMA = 2   # raise it when keys are renamed or dropped, and tell RENAMED of it
# keys of earlier schemas, or (key, value) where a value has another name; methods have their own
RENAMED = {
    ("data.augmentation", "voc"): "resized_crop",
    ("data.augmentation", "coco"): "scale_and_pad",
}


class Train(Section):
    iterations: Count | None = key(20000, "paper of MoRe", resets={"epochs": None})
    epochs: Count | None = key(None, "ours: in place of iterations", resets={"iterations": None})
    batch_size: Count = key(4, "paper of MoRe: all processes together")
    optimizer: Literal["adamw", "sgd"] = key("adamw", "paper of MoRe")
    lr: NotNegative = key(6e-5, "paper of MoRe")
    head_lr_factor: NotNegative = key(10.0, "code of MoRe: of what does not start from trained weights")
    warmup_iterations: Index = key(1500, "paper of MoRe")
    warmup_ratio: NotNegative = key(1e-6, "code of MoRe")
    power: NotNegative = key(0.9, "code of MoRe")
    weight_decay: NotNegative = key(0.01, "code of MoRe")
    betas: tuple[Share, Share] = key((0.9, 0.999), "code of MoRe: of adamw")
    momentum: Share = key(0.9, "ours: of sgd")
    precision: Literal["auto", "fp32", "bf16"] = key(
        "auto", "ours: bf16 on a GPU that computes in it, else fp32; bf16 is autocast, losses stay fp32"
    )
    tf32: Flag = key(False, "ours: GPU, float32 matrix products in TF32 too, as convolutions are")
    compile: Flag = key(False, "ours: torch.compile, slow first iterations")
    log_every: Count = key(20, "ours: iterations between lines of metrics.jsonl and the log")
    picture_every: Count = key(1000, "ours: iterations between TensorBoard pictures")
    checkpoint_every: Count = key(1000, "ours: and before a validation")
    keep_checkpoints: Count | None = key(2, "ours: the newest ones, beside the best weights; null: all")
    on_nonfinite: Literal["stop", "skip"] = key("stop", "ours: at a loss or gradient that is not finite")
    max_nonfinite: Count = key(10, "ours: more steps skipped than so many since the start end the run")
    validate_every: Count = key(2000, "code of MoRe")
    timeout: Positive | None = key(1800.0, "ours: seconds until a run that hangs is ended; null: never")
    validate_images: Count | None = key(None, "ours: null: the whole split; a number: the first that many")

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.iterations is None) == (self.epochs is None):
            self.refuse("iterations", "exactly one of train.iterations and train.epochs")
        return self


class Evaluate(Section):
    maps: tuple[Text, ...] | None = key(None, "the method's kinds")
    scales: ScalesOf = key({}, "the method's: scales of each kind; 1 where none are given")
    multi_scale: Flag = key(False, "ours: maps that a threshold decides over multi_scales")
    multi_scales: Scales = key((1.0, 0.5, 0.75, 1.25, 1.5, 1.75, 2.0), "code of MoRe")
    base_size: Count | None = key(
        448, "code of MoRe: images become squares of this side; null: long_side, or native size", {"long_side": None}
    )
    long_side: Count | None = key(
        None, "ours (AFA's inference): of the image without change of shape; null: base_size", {"base_size": None}
    )
    flip: Flag = key(True, "code of MoRe")
    image_labels: Literal["given", "predicted"] = key("given", "ours: whose image labels restrict the maps")
    predict_from: Text = key(CLASSIFIER, "ours: or a kind of map with background, such as seg")
    min_pixels: Count = key(5, "code of MoRe: a class counts from this many pixels of the coarse map")
    bkg: Share = key(0.5, "code of MoRe: background threshold")
    crf: Flag = key(False, "ours")
    images: Count | None = key(None, "ours: null: the whole split; a number: the first that many")
    precision: Literal["auto", "fp32", "bf16"] | None = key(None, "ours: null: that of the run, train.precision")
    images_at_once: Count | None = key(None, "ours: of one size; null: 1 on a CPU, 8 on a GPU")
    save_labels: FilePath | None = key(None, "ours: folder for palette PNGs; null: none")
    save_overlays: FilePath | None = key(None, "ours: folder for pictures; null: none")
    report_images: Index = key(4, "ours: so many of the best and worst images are kept for the report")

    @model_validator(mode="after")
    def _one_size(self) -> "Evaluate":
        if self.base_size and self.long_side:
            self.refuse("long_side", "at most one of evaluate.base_size and evaluate.long_side")
        return self


class Crf(Section):
    """Dense CRF of the evaluation."""

    backend: Literal["lattice", "pydensecrf"] = key("lattice", "ours: our own, or the package pydensecrf")
    iterations: Index = key(10, "code of MoRe on VOC")
    pos_xy_std: Positive = key(1.0, "code of MoRe on VOC")
    pos_w: NotNegative = key(3.0, "code of MoRe on VOC")
    bi_xy_std: Positive = key(67.0, "code of MoRe on VOC")
    bi_rgb_std: Positive = key(3.0, "code of MoRe on VOC")
    bi_w: NotNegative = key(4.0, "code of MoRe on VOC")
    background_power: Positive = key(1.0, "code of ACR, MoRe's: 1; without background of its own (1 - map) ** power")

    def settings(self) -> dict:
        """Those of `dense_crf`."""
        return self.model_dump(exclude={"background_power"})


class RunConfig(Section):
    """What every run has; the sections of its method come to it (`schema_of`)."""

    method: Text = key(DEFAULT_METHOD, "ours")
    seed: Index = key(0, "ours")
    output: FilePath = key("runs", "ours: a run's folder is output/tag")
    tag: Text | None = key(None, "set by run_train.sh")
    resume: Literal["auto"] | None = key(None, "ours: auto continues the run of this tag where it stopped")
    data: Data = Data()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    crf: Crf = Crf()

    @model_validator(mode="after")
    def _tag_is_a_name(self) -> "RunConfig":
        if "=" in (self.tag or ""):
            self.refuse("tag", "a name; was TAG left out before the key=value arguments?")
        return self

    @model_validator(mode="after")
    def _kinds_exist(self) -> "RunConfig":
        kinds, evaluate = METHODS[self.method].kinds, self.evaluate
        with_background = [kind for kind, declared in kinds.items() if declared.background]
        if evaluate.maps is not None and not (evaluate.maps and set(evaluate.maps) <= set(kinds)):
            self.refuse("evaluate.maps", f"a list of one or more of {', '.join(kinds)}")
        for unknown in evaluate.scales.keys() - kinds.keys():
            self.refuse(f"evaluate.scales.{unknown}", f"a kind of map out of {', '.join(kinds)}")
        if evaluate.predict_from not in (CLASSIFIER, *with_background):
            self.refuse("evaluate.predict_from", " or ".join([CLASSIFIER, *with_background]))
        return self


def load_config(name: str | os.PathLike | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved config of a run.

    name: a file of configs/ without its ending ('more_voc'), the path of a YAML, or None for the defaults alone.
    overrides: key=value pairs with dotted keys, the last one wins.
    Raises UserError for an unknown file or key (with the nearest known one), a wrong type or a value out of range.
    """
    return layers_of(name, overrides).resolve()


def load_settings(settings: Mapping, source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The same from settings that are at hand, as `portable` gives them; source: where they are from, for errors."""
    return _stacked([({"schema": 1, **settings}, f"in {source}")], overrides).resolve()


def layers_of(name: str | os.PathLike | None, overrides: Sequence[str] = ()) -> Layers:
    """The layers of `load_config`, which say where each value is from."""
    return _stacked([] if name is None else list(_files(find_config(name), ())), overrides)


def schema_of(method: str, source: str = "by default") -> type[RunConfig]:
    """The keys of a run with this method. source: who names it. Raises UserError for an unknown one."""
    if method not in METHODS:
        known = " or ".join(f"'{name}'" for name in METHODS)
        raise UserError(f"method = {method} {source}: expected {known}")
    return _combined(METHODS[method])


@functools.cache
def _combined(method: type[Method]) -> type[RunConfig]:
    name = f"{method.__name__}Run"
    globals()[name] = type(name, (method.Config, RunConfig), {"__module__": __name__})   # found there by pickle
    return globals()[name]


def portable(config: RunConfig) -> dict:
    """The resolved config as plain values, to share: without the place of the data and the folders of this machine."""
    settings = without_folders(config)
    return {"schema": SCHEMA, **settings, "resume": None, "data": {**settings["data"], "root": None}}


def save_config(config: RunConfig, path: str | os.PathLike) -> None:
    """Writes the resolved config as YAML, with the number of its schema."""
    save_yaml({"schema": SCHEMA, **config.model_dump(mode="json")}, path)


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
        raise UserError(f"no config named '{text}'{did_you_mean(text, known)} (have {', '.join(known)})")
    return CONFIGS / f"{text}.yaml"


def _files(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[dict, str]]:
    """A YAML after the one that its `base` names, each with its source."""
    content = read_yaml(path)
    base = content.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"config file {path}: base = {shown(base)}: expected the name of one config")
    if base is not None:
        beside = path.parent / f"{base}.yaml"
        try:
            file = beside if beside.is_file() else find_config(base)
        except (UserError, OSError, ValueError) as error:   # the latter of a name that no file can have
            raise UserError(f"config file {path}: base: {error}") from None
        if file.resolve() in [one.resolve() for one in (*above, path)]:
            raise UserError(f"config file {path}: base {base} builds on {path.name} itself")
        yield from _files(file, (*above, path))
    yield content, f"in {path}"


def _stacked(layers: list[tuple[Mapping, str]], overrides: Sequence[str]) -> Layers:
    """The layers under the schema of the method that the last of them names."""
    given = [(item.partition("=")[2], COMMAND_LINE) for item in overrides if item.startswith("method=")]
    named = [(str(content["method"]), source) for content, source in layers if content.get("method")]
    method, source = [(DEFAULT_METHOD, "by default"), *named, *given][-1]
    result = Layers(schema_of(method, source), _renamed(method))
    result.add(flatten(METHODS[method].defaults), f"default of {method}")
    for content, source in layers:
        result.add(up_to_date(content, source, method), source)
    result.add_overrides(overrides)
    return result


def up_to_date(content: Mapping, source: str, method: str) -> dict:
    """Nested settings of any earlier schema, flat, under today's names. Raises UserError for those of a later one."""
    content, renamed = dict(content), _renamed(method)
    resolved = "schema" in content   # by a run, and not written by hand
    number = str(content.pop("schema", 1))
    if not number.isdecimal():
        raise UserError(f"schema = {number} {source}: expected an integer")
    if int(number) > SCHEMA:
        raise UserError(f"the config {source} is of schema {number}, this version knows {SCHEMA}: use a newer version")
    flat = {renamed.get(full, full): value for full, value in flatten(content).items()}
    if resolved:
        flat.setdefault("model.normalize", "imagenet")   # all there was before that key
    return {full: renamed.get((full, str(value)), value) for full, value in flat.items()}


def _renamed(method: str) -> dict:
    """Today's names by those of earlier schemas, of a method that may be unknown."""
    return {**RENAMED, **(METHODS[method].renamed if method in METHODS else {})}
