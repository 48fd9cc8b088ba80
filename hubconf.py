"""Entry points for torch.hub: torch.hub.load(FOLDER_OR_REPOSITORY, "more", weights=...)."""

dependencies = [
    "cv2", "filelock", "huggingface_hub", "numpy", "omegaconf", "PIL", "safetensors", "tensorboard", "timm", "torch",
    "torchvision", "tqdm", "yaml",
]  # fmt: skip


def more(weights: str, overrides: list[str] | tuple[str, ...] = (), config: str | None = None):
    """MoRe with trained weights, in evaluation mode on the CPU.

    weights: a weights file, a released folder, a name of weights/registry.yaml, or owner/name on the Hugging Face Hub.
    overrides: key=value settings on top of its config. config: a file of configs/ or a YAML in its place.
    The result has classify(images), localize(images, kind, scales, flip), segment(images, scales, flip) and `classes`;
    called with images it gives segmentation logits (B, K+1, H, W).
    """
    from engine.checkpoints.hub import HubMethod  # after the check above

    return HubMethod.from_checkpoint(weights, overrides, config)
