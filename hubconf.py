"""Entry points for torch.hub: torch.hub.load(FOLDER_OR_REPOSITORY, "more", weights=...)."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent
PACKAGES = ("bilateralfilter", "datasets", "engine", "model", "utils")
for name in PACKAGES:
    place = getattr(sys.modules.get(name), "__file__", None)
    if place and ROOT not in pathlib.Path(place).resolve().parents:
        raise ImportError(f"{place} is imported already and hides this project's package '{name}': load it before that")

from engine.hub import HubMethod as _HubMethod  # noqa: E402

dependencies = [
    "cv2", "filelock", "huggingface_hub", "numpy", "omegaconf", "PIL", "safetensors", "tensorboard", "timm", "torch",
    "torchvision", "tqdm", "yaml",
]  # fmt: skip


def more(weights: str, overrides: list[str] | tuple[str, ...] = (), config: str | None = None) -> _HubMethod:
    """MoRe with trained weights, in evaluation mode on the CPU.

    weights: a weights file, a released folder, a name of weights/registry.yaml, or owner/name on the Hugging Face Hub.
    overrides: key=value settings on top of its config. config: a file of configs/ or a YAML in its place.
    The result has classify(images), localize(images, kind, scales, flip), segment(images, scales, flip) and `classes`;
    called with images it gives segmentation logits (B, K+1, H, W).
    """
    return _HubMethod.from_checkpoint(weights, overrides, config)
