"""A method as one shares it: on the Hugging Face Hub, in a folder, through torch.hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, PyTorchModelHubMixin
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from torch import Tensor, nn

from engine.checkpoints.files import read_meta, save_weights
from engine.checkpoints.opening import Opened, find_checkpoint, from_hub, open_checkpoint
from engine.config import portable
from model.method import MapKind, MapPlan
from utils.files import replacing

CARD = """---
{{ card_data }}
---

# {{ method }}, {{ backbone }}

Weakly supervised semantic segmentation: learned from image-level labels, without masks. Method `{{ method }}`, backbone
`{{ backbone }}`, {{ classes | length }} classes and background.

In a checkout of the project's code, NAME being this repository's or a folder:

```python
from engine.checkpoints.hub import HubMethod

model = HubMethod.from_pretrained(NAME)
model.classify(images)                    # (B, K) class logits
model.maps(images, ["{{ best }}"])        # {"{{ best }}": its maps}, at one scale, without flip
model(images)                             # these maps alone
```

| kind of map | | |
|---|---|---|
{{ kinds }}

For other scales, give kinds as a mapping to `MapPlan` (model/method.py). `labels`, multi-hot (B, K), is for methods
whose maps need image-level labels.

`images` are (B, 3, H, W), RGB from 0 to 1, normalised with ImageNet's mean and standard deviation.
`bash run_evaluate_voc.sh cpu 1 NAME data.root=FOLDER` scores the model. `{{ weights }}` holds the weights and, in its
header, the names of the classes and the whole config.

Classes, by their ids from 1 on: {{ classes | join(", ") }}.
"""


class HubMethod(
    nn.Module, PyTorchModelHubMixin, pipeline_tag="image-segmentation", library_name="pytorch",
    tags=["semantic-segmentation", "weakly-supervised-semantic-segmentation"], model_card_template=CARD,
):  # fmt: skip
    """An opened checkpoint with `from_pretrained`, `save_pretrained` and `push_to_hub` of huggingface_hub.

    opened: of `open_checkpoint`. note: what the header of its weights file says beyond its config and classes.
    `classify` and `maps` are the method's own (model/method.py).
    A saved folder holds the weights as a run writes them, so that this file opens by itself, too.
    """

    def __init__(self, opened: Opened, note: dict) -> None:
        super().__init__()
        self.method, self.classes, self.config = opened.method, opened.classes, opened.config
        self.classify = self.method.classify
        self.meta = {
            **note, "method": self.config.method, "classes": list(self.classes), "settings": portable(self.config),
        }
        self.eval()

    @classmethod
    def from_checkpoint(cls, path: str, overrides: Sequence[str] = (), config: str | None = None) -> "HubMethod":
        """From whatever `open_checkpoint` opens, with its arguments."""
        file = find_checkpoint(path)
        return cls(open_checkpoint(file, overrides, config), read_meta(file))

    def forward(self, images: Tensor) -> Tensor:
        """The map of the kind `best_by` of images (B, 3, H, W): one scale, no flip, no image-level labels."""
        return self.maps(images, [self.method.best_by])[self.method.best_by]

    def maps(
        self, images: Tensor, kinds: Mapping[str, MapPlan] | Sequence[str], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`Method.maps`, in fp32 unless autocast says otherwise. kinds: how each is made, or names alone: one scale, no
        flip."""
        plans = kinds if isinstance(kinds, Mapping) else {kind: MapPlan() for kind in kinds}
        return self.method.maps(images, plans, labels)

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """The card of a saved folder. kwargs go on top of what stands in CARD."""
        facts = {"method": self.config.method, "backbone": self.config.model.backbone, "classes": self.classes}
        facts |= {"best": self.method.best_by, "kinds": "\n".join(map(_row, self.method.kinds.items()))}
        return super().generate_model_card(*args, **{**facts, "weights": SAFETENSORS_SINGLE_FILE, **kwargs})

    def _save_pretrained(self, save_directory: Path) -> None:
        save_weights(save_directory / SAFETENSORS_SINGLE_FILE, self.method, self.meta)
        with replacing(save_directory / CONFIG_NAME) as part:
            part.write_text(json.dumps(self.meta, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, overrides: Sequence[str] = (), **how) -> "HubMethod":
        """The mixin's hook. how: revision, cache_dir, token and the like, for a download."""
        return cls.from_checkpoint(model_id if Path(model_id).is_dir() else from_hub(model_id, **how), overrides)


def _row(kind: tuple[str, MapKind]) -> str:
    """A kind of map as a line of a table."""
    name, declared = kind
    shape = "(B, K+1, H, W) scores, background first" if declared.background else "(B, K, H, W) in [0, 1]"
    return f"| `{name}` | {declared.title} | {shape} |"
