"""The weights a backbone starts from, by what model.weights says."""

from pathlib import Path

import timm
from torch import Tensor

from engine.checkpoints.files import read_meta, read_tensors, recognise
from engine.distributed import main_first
from model.method import TIMM, Method, ModelSection
from utils.download import fetch, find, registry
from utils.errors import UserError
from utils.files import ROOT

RANDOM = "random"
WRAPPINGS = ("model", "state_dict")   # keys some files hold their weights under, DeiT's the first


def load_start_weights(method: Method, model: ModelSection) -> None:
    """Starts the method from what model.weights names. Raises UserError where that does not fit model.backbone."""
    weights = start_weights(model.weights, model)
    if weights is not None:
        try:
            method.load_start_weights(weights)
        except UserError as error:
            file = None if model.weights == TIMM else _file(model.weights)
            if file and (read_meta(file) or recognise(file)):
                what = "a trained method, no start weights of a backbone; resume=auto goes on with its run"
                raise UserError(f"model.weights={file}: {what}") from None
            raise UserError(
                f"model.weights={model.weights} do not fit model.backbone={model.backbone}: {error}; give others, or "
                f"model.weights={TIMM} or {RANDOM}"
            ) from None


def start_weights(spec: str | None, model: ModelSection) -> dict[str, Tensor] | None:
    """The tensors a backbone starts from, by name; None for a random start.

    spec: `random`, `timm` (what timm itself has for model.backbone), a file, or a start_weights row of
    weights/registry.yaml, which is downloaded where it is absent. Rank 0 downloads, the others wait.
    Raises UserError that names `spec`.
    """
    if spec is None:
        raise UserError(
            "model.weights is not set: give start weights of the backbone, a file or a name that "
            f"`tools/download.py list` shows, or model.weights={TIMM} (timm's own), or model.weights={RANDOM}"
        )
    if spec == RANDOM:
        return None
    try:
        return _of_timm(model) if spec == TIMM else _unwrapped(read_tensors(_file(spec)))
    except UserError as error:
        raise UserError(f"model.weights={spec}: {error}") from None


def _file(spec: str) -> Path:
    path = _found(spec)
    if path.is_dir():
        raise UserError("a folder; give the weights file itself")
    if path.is_file():
        return path
    by_file = {entry.file: entry.name for entry in registry().values()}
    if spec in by_file:
        raise UserError(f"no such weights file; model.weights={by_file[spec]} fetches it")
    if path.suffix or path.name != spec:
        return path   # for the error of a file that is not there
    if find(spec).kind != "start_weights":
        raise UserError(f"names a {find(spec).kind} of weights/registry.yaml, no start weights")
    with main_first():
        return fetch(spec)


def _found(path: str) -> Path:
    """A path as given, else from the project's folder, where its configs name the weights it ships."""
    shipped = ROOT / path
    return shipped if shipped.is_file() and not Path(path).is_file() else Path(path)


def _of_timm(model: ModelSection) -> dict[str, Tensor]:
    with main_first():
        try:
            return timm.create_model(model.backbone, pretrained=True, num_classes=0, **model.backbone_args).state_dict()
        except Exception as error:   # of timm, huggingface_hub, its HTTP client or urllib, whichever fails
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"timm gives no weights for model.backbone={model.backbone}: {reason}") from None


def _unwrapped(weights: dict) -> dict[str, Tensor]:
    return next((weights[key] for key in WRAPPINGS if isinstance(weights.get(key), dict)), weights)
