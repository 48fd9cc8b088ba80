"""What the data side hands to a method."""

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """One training batch.

    names: image names, length B.
    images: float32 (B, 3, H, W), normalised with the ImageNet mean and std.
    labels: float32 (B, K), multi-hot image-level labels without background.
    valid: bool (B, H, W), False where a crop was padded; no pixel loss reads there.
    seeds: int64 (B,), one seed a drawn sample: every random draw about a sample comes from it,
        so that nothing depends on the number of processes or workers.
    """

    names: list[str]
    images: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    seeds: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return Batch(self.names, *(t.to(device, non_blocking=True) for t in self[1:]))
