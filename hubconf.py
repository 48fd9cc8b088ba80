"""Entry points for torch.hub: torch.hub.load(FOLDER_OR_REPOSITORY, "load", weights=...)."""

dependencies = [
    "cv2", "huggingface_hub", "numpy", "omegaconf", "PIL", "pydantic", "safetensors", "tensorboard", "timm",
    "torch", "torchvision", "tqdm", "yaml",
]  # fmt: skip


def load(weights: str, overrides: list[str] | tuple[str, ...] = (), config: str | None = None):
    """A method with trained weights, in evaluation mode on the CPU.

    weights: a weights file, a released folder, a name of weights/registry.yaml, or owner/name on the Hugging Face Hub.
    overrides: key=value settings on top of its config. config: a file of configs/ or a YAML in its place.
    The result has classify(images), maps(images, kinds, labels) and `classes`; called with images it gives the maps of
    the method's best kind (engine/checkpoints/hub.py).
    """
    from engine.checkpoints.hub import HubMethod  # after the check above

    return HubMethod.from_checkpoint(weights, overrides, config)


def more(weights: str, overrides: list[str] | tuple[str, ...] = (), config: str | None = None):
    """`load`, under the name of the method MoRe."""
    return load(weights, overrides, config)
