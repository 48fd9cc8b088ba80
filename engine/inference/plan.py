"""What is made of an image, and how: the plan of an evaluation, of a validation, of predictions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from engine.config import RunConfig
from engine.precision import precision_on
from model import METHODS
from model.method import MapKind, MapPlan
from model.multi_scale import with_scale_1
from utils.config import flatten

Row = tuple[str, bool]     # the kind of a map, with or without CRF


class Plan(NamedTuple):
    """What is made of an image, and how.

    kinds: of the maps wanted, with what each is. maps: how each is made.
    base_size: side of the square the image becomes. long_side: of the image without change of shape. None for both:
    native size.
    predicted: None for given image labels, else where they come from: `classifier`, or a kind with background.
    min_pixels: a class of that kind counts from this many pixels of its coarse scores.
    crf: settings of `dense_crf`, None for none; with them every label map is made without and with CRF.
    background_power: of the background that the CRF of kinds without one starts from; 1 without CRF.
    class_logits: whether the classifier's logits are wanted, whatever image labels come from.
    precision: fp32, bf16, or auto (engine/precision.py).
    settings: by kind the `map_keys` of the method that are not at their defaults.
    """

    kinds: dict[str, MapKind]
    maps: dict[str, MapPlan]
    base_size: int | None
    predicted: str | None = None
    min_pixels: int = 1
    crf: dict | None = None
    class_logits: bool = False
    precision: str = "fp32"
    long_side: int | None = None
    background_power: float = 1.0
    settings: dict[str, dict] | None = None

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """What an image of this size becomes."""
        return MapPlan(side=self.base_size, long_side=self.long_side).input_size(height, width)

    @property
    def rows(self) -> list[Row]:
        """The label maps that come of it."""
        return [(kind, crf) for kind in self.kinds for crf in ((False, True) if self.crf else (False,))]

    def on(self, device: torch.device) -> "Plan":
        """The plan with the precision that it has on this device."""
        return self._replace(precision=precision_on(device, self.precision))

    def only(self, kind: str) -> "Plan":
        """The plan of one of its kinds."""
        return self._replace(kinds={kind: self.kinds[kind]})


def row_name(row: Row) -> str:
    """`KIND`, or with CRF `KIND_crf`."""
    return row[0] + ("_crf" if row[1] else "")


def evaluation_plan(config: RunConfig) -> Plan:
    """The plan of the tools: sections `evaluate` and `crf`."""
    c, declared = config.evaluate, METHODS[config.method].kinds
    wanted = tuple(declared) if c.maps is None else tuple(dict.fromkeys(c.maps))
    predicted = c.predict_from if c.image_labels == "predicted" else None
    maps = {kind: _map_plan(config, kind, declared[kind]) for kind in declared if kind in wanted}
    crf, power = (config.crf.settings(), config.crf.background_power) if c.crf else (None, 1.0)
    how = {"predicted": predicted, "min_pixels": c.min_pixels, "crf": crf, "precision": precision_of(config)}
    how |= {"background_power": power, "settings": _own_settings(config, wanted)}
    return Plan({kind: declared[kind] for kind in wanted}, maps, c.base_size, long_side=c.long_side, **how)


def _own_settings(config: RunConfig, kinds: Sequence[str]) -> dict[str, dict]:
    method = METHODS[config.method]
    given, defaults = flatten(config.model_dump()), flatten(method.Config().model_dump())
    keys = {kind: [key for key in method.map_keys.get(kind, ()) if given[key] != defaults[key]] for kind in kinds}
    return {kind: {key: given[key] for key in own} for kind, own in keys.items() if own}


def validation_plan(config: RunConfig) -> Plan:
    """The plan of the validation in training: as the method says, given labels, no CRF.

    Without evaluate.base_size the squares have the side of the crops.
    """
    method = METHODS[config.method]
    plans = method.validation_plans(config)
    kinds = {kind: method.kinds[kind] for kind in plans}
    return Plan(kinds, plans, config.evaluate.base_size or config.data.crop_size, precision=precision_of(config))


def precision_of(config: RunConfig) -> str:
    """In what evaluations and predictions are computed: evaluate.precision, by default that of the run."""
    return config.evaluate.precision or config.train.precision


def seed_kind(config: RunConfig) -> str:
    """The kind that pseudo masks are made from unless one is named: the last that image labels restrict."""
    kinds = METHODS[config.method].kinds
    named = [kind for kind in config.evaluate.maps or kinds if kind in kinds]
    return [kind for kind in named if kinds[kind].uses_labels or kind == named[0]][-1]


def best_kind(config: RunConfig) -> str:
    """The kind that predictions are made from unless one is named: that whose validation picks the best checkpoint."""
    return METHODS[config.method].best_by


def maps_setting(kinds: Sequence[str]) -> str:
    """The key=value pair that asks for these kinds of maps."""
    return f"evaluate.maps=[{','.join(kinds)}]"


def kinds_of(method: str) -> Mapping[str, MapKind]:
    """The kinds of map of a method, in the order of tables; none of a method that this version does not know."""
    return METHODS[method].kinds if method in METHODS else {}


def title_of(method: str, kind: str) -> str:
    """What a kind of map is called in print: its title, its name where the method does not declare it."""
    declared = kinds_of(method).get(kind)
    return declared.title if declared else kind


def _map_plan(config: RunConfig, kind: str, declared: MapKind) -> MapPlan:
    c = config.evaluate
    scales = c.scales.get(kind, (1.0,))
    if not declared.background:
        scales = with_scale_1(c.multi_scales if c.multi_scale else scales)
    return MapPlan(tuple(scales), c.flip, c.base_size, 0.0 if declared.background else c.bkg, long_side=c.long_side)
