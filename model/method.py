"""The contract of a method: all that the engine, the tools and the report know of it.

A method is a package of `model/` with a subclass of `Method` and a line in `METHODS` (model/__init__.py).
images are float (B, 3, H, W), normalised with ImageNet mean and std; labels multi-hot float (B, K).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn

from torch import Tensor, nn

from model.losses.ratio import local_ratio
from utils.batch import Batch
from utils.errors import UserError
from utils.schema import FilePath, Free, Section, Text, key


class MapKind(NamedTuple):
    """What a kind of map is.

    title: as printed. background: True for scores (B, K+1, H, W) whose argmax decides, False for maps (B, K, H, W) in
    [0, 1] that a threshold turns into labels. uses_labels: whether image-level labels, given or predicted, restrict it.
    """

    title: str
    background: bool
    uses_labels: bool


class MapPlan(NamedTuple):
    """How a map is made.

    side: of the square an image becomes, in pixels; long_side: of the image without change of shape; None for both: its
    own size. bkg: the threshold. at_own_size: whether the maps of the scales are brought to the image's own size before
    they become one, and not after.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    side: int | None = None
    bkg: float = 0.0
    at_own_size: bool = False
    long_side: int | None = None

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """What an image of this size becomes at scale 1."""
        if self.side:
            return self.side, self.side
        factor = self.long_side / max(height, width) if self.long_side else 1
        return max(1, int(factor * height)), max(1, int(factor * width))


class Released(NamedTuple):
    """A file that a method's authors released: the name of its config, and its number of classes."""

    config: str
    classes: int


TIMM = "timm"   # value of model.weights


class ModelSection(Section):
    """The keys of `model` that every method has: the engine fetches and loads the start weights."""

    backbone: Text | None = key(None, "each method's own")
    backbone_args: Free = key({}, "ours: for timm, such as {depth: 6, patch_size: 8}")
    weights: FilePath | None = key(None, "ours: a name of weights/registry.yaml, a file, timm, or random")
    normalize: Literal["imagenet", "timm"] | None = key(
        None, "ours: whose mean and std the backbone gets; null: timm's for a backbone NAME.TAG or weights of timm"
    )

    @property
    def timm_statistics(self) -> bool:
        """Whether the backbone gets images with the mean and std that timm states for it, and not ImageNet's."""
        by_name = "." in (self.backbone or "") or self.weights == TIMM
        return self.normalize == "timm" or (self.normalize is None and by_name)


class Method(nn.Module):
    """What a method offers; what it cannot do without raises an error that names it.

    Config: the sections of the config that are the method's own, with a `model` that is a ModelSection.
    defaults: of shared keys, nested, where the method's differ. renamed: keys of earlier schemas, see engine/config.py.
    kinds: every kind of map it makes, in the order of tables. best_by: the kind whose validation mIoU picks the best
    checkpoint. map_keys: by kind the keys of the method's own, `model` aside, that its map is made with.
    ratio(numerator, count, eps): divides sums by counts in losses; the engine puts one here that counts over all
    processes, so every process calls it equally often.
    learns_from_masks: whether `losses` reads `Batch.masks`; a training then needs data.masks, and else refuses it.
    Integer keys of the config named `*_after`, or in `loss.start_after`, are iterations: the report marks them.
    """

    Config: ClassVar[type[Section]] = Section
    defaults: ClassVar[Mapping[str, Any]] = {}
    renamed: ClassVar[Mapping[str, Any]] = {}
    kinds: ClassVar[dict[str, MapKind]]
    best_by: ClassVar[str]
    map_keys: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    learns_from_masks: ClassVar[bool] = False

    def __init__(self, config: Any, num_classes: int) -> None:
        """config: the whole config. num_classes: K, without background."""
        super().__init__()
        self.config, self.num_classes, self.ratio = config, num_classes, local_ratio

    def forward(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        return self.losses(batch, iteration)

    def losses(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Unweighted terms of the objective, fp32 scalars; iteration counts from 0.

        Every parameter gets a gradient in every step.
        """
        self._lacks("losses")

    def loss_weights(self, iteration: int) -> dict[str, float]:
        """The weight of every term: `loss.weights`, 0 until iteration > `loss.start_after`."""
        loss = self.config.loss
        start_after = dict(loss.start_after)
        return {term: weight if iteration > start_after[term] else 0.0 for term, weight in loss.weights}

    def param_groups(self, train: Any) -> list[dict]:
        """Groups for the optimizer, each with `name`, `params` and `lr`. train: the section of the config."""
        return [{"name": "all", "params": list(self.parameters()), "lr": train.lr}]

    def maps(self, images: Tensor, kinds: Mapping[str, MapPlan], labels: Tensor | None) -> dict[str, Tensor]:
        """The maps of every kind at the size of `images`; kinds share the forward passes they can share.

        labels: image-level labels (B, K) for methods whose maps need them; None where there are none.
        """
        self._lacks("maps")

    def coarse_scores(self, images: Tensor, kind: str) -> Tensor:
        """Scores (B, K+1, h, w) of a kind with background in one pass, at the size that its network gives them.

        The pixels of a class in their argmax are counted where image labels are predicted from this kind.
        """
        return self.maps(images, {kind: MapPlan()}, None)[kind]

    def classify(self, images: Tensor) -> Tensor:
        """Class logits (B, K)."""
        self._lacks("classify")

    def load_start_weights(self, weights: dict[str, Tensor]) -> None:
        """Starts the backbone from the tensors of `model.weights`, by name. Raises UserError where they do not fit."""
        self._lacks("load_start_weights")

    def from_official(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of this module from a file that the authors released. Raises UserError for another file."""
        raise UserError(f"no weights of {type(self).__name__}, and it knows no released files")

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> Released | None:
        """What a released file of this method is, by the shapes of its keys; None for every other file."""
        return None

    @classmethod
    def validation_plans(cls, config: Any) -> dict[str, MapPlan]:
        """How the validation in training makes its maps: by default every kind at scale 1, without flip."""
        side = config.evaluate.base_size or config.data.crop_size
        return {kind: MapPlan(side=side, bkg=config.evaluate.bkg) for kind in cls.kinds}

    @classmethod
    def sure_above(cls, config: Any) -> tuple[float, float]:
        """(high, low) of exported pseudo masks: a class above high, background below low, 255 in between."""
        return config.evaluate.bkg, config.evaluate.bkg

    def _lacks(self, name: str) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} has no `{name}`; model/method.py says what it must do")
