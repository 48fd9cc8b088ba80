"""What the data side hands to a method."""

from typing import NamedTuple

import torch


def most_classes(labels: torch.Tensor) -> int:
    """The largest number of classes an image of the multi-hot (B, K) has, rounded up to 1, 2, 4, 8, ..., at most K: few
    sizes occur. Reading it waits for a GPU."""
    most = max(int(labels.sum(1).max()), 1)
    return min(1 << (most - 1).bit_length(), labels.shape[1])


def boxes_of(valid: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of the rectangle that is True in each of bool (B, H, W), 0, 0, 0, 0 where there is
    none. Reading it waits for a GPU."""
    ends = [_ends(valid.any(dim)) for dim in (2, 1)]
    return [(*rows, *columns) for rows, columns in zip(*ends, strict=True)]


def _ends(inside: torch.Tensor) -> list[list[int]]:
    """[first, last + 1] of what is True in each row, [0, 0] where nothing is."""
    length, some = inside.shape[1], inside.any(1)
    first, behind = inside.int().argmax(1), length - inside.flip(1).int().argmax(1)
    return torch.stack([first, behind * some], 1).tolist()


class Batch(NamedTuple):
    """One training batch.

    names: image names, length B.
    images: float32 (B, 3, H, W), normalised with the ImageNet mean and std.
    labels: float32 (B, K), multi-hot image-level labels without background.
    valid: bool (B, H, W), False where a crop was padded; no pixel loss reads there.
    seeds: int64 (B,), one seed a drawn sample: every random draw about a sample comes from it,
        so that nothing depends on the number of processes or workers.
    most_classes: of `labels`, as the function of that name; None: whoever needs it reads it there.
    boxes: of `valid`, as `boxes_of`; None: whoever needs them reads them there.
    masks: uint8 (B, H, W), the masks to learn from (data.masks): ids 0..K, 255 = ignore, also in padding; None: none.
    skipped: (name, why) of each image that could not be read, and in whose place another one is here (data.on_error).
    """

    names: list[str]
    images: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    seeds: torch.Tensor
    most_classes: int | None = None
    boxes: list[tuple[int, int, int, int]] | None = None
    masks: torch.Tensor | None = None
    skipped: tuple[tuple[str, str], ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        tensors = (t.to(device, non_blocking=True) for t in (self.images, self.labels, self.valid, self.seeds))
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        return Batch(self.names, *tensors, self.most_classes, self.boxes, masks, self.skipped)
