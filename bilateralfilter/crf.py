"""Dense CRF: mean-field inference with a Gaussian and a bilateral kernel.

Krähenbühl, Koltun: Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials, NeurIPS 2011. Parameters
and the symmetric normalisation of the kernels are those of the package pydensecrf.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._extension import load as compiled
from .lattice import Lattice, bilateral_features, grid_features, mean_field, stencil_of

LEAST = 1e-5  # probabilities below count as this


class DenseCRF:
    """Refines class probabilities so that near and alike-coloured pixels agree.

    pos_*: the smoothness kernel, bi_*: the appearance kernel; *_xy_std in pixels, bi_rgb_std in grey levels, *_w their
    weights. compatibility: None for the Potts model (a class costs nothing beside itself), else (C, C): what the label
    of the row pays next to that of the column, times the kernels' weights; Potts is -torch.eye(C), up to a constant.
    Raises ValueError for deviations that are not positive or a compatibility that is not square.
    """

    def __init__(
        self,
        iterations: int = 10,
        pos_xy_std: float = 1.0,
        pos_w: float = 3.0,
        bi_xy_std: float = 67.0,
        bi_rgb_std: float = 3.0,
        bi_w: float = 4.0,
        compatibility: Tensor | None = None,
    ) -> None:
        for name, value in (("pos_xy_std", pos_xy_std), ("bi_xy_std", bi_xy_std), ("bi_rgb_std", bi_rgb_std)):
            if not 0 < value < float("inf"):
                raise ValueError(f"DenseCRF: {name} must be positive, not {value}")
        for name, value in (("pos_w", pos_w), ("bi_w", bi_w), ("iterations", iterations)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"DenseCRF: {name} must be 0 or more, not {value}")
        if compatibility is not None and (compatibility.ndim != 2 or compatibility.shape[0] != compatibility.shape[1]):
            raise ValueError(f"DenseCRF: compatibility must be (C, C), not {tuple(compatibility.shape)}")
        self.iterations = int(iterations)
        self.pos_xy_std, self.pos_w = pos_xy_std, pos_w
        self.bi_xy_std, self.bi_rgb_std, self.bi_w = bi_xy_std, bi_rgb_std, bi_w
        self.compatibility = compatibility

    @torch.no_grad()
    def __call__(self, images: Tensor, prob: Tensor) -> Tensor:
        """images: (N, 3, H, W), RGB 0..255. prob: (N, C, H, W), scores in [0, 1]; they need not sum to 1.

        Any type of numbers and one device for both. Returns float32 (N, C, H, W); sums over C are 1.
        Raises ValueError for shapes, devices or types that do not fit, and for values that are not finite.
        """
        self._check(images, prob)
        if prob.numel() == 0:
            return prob.float()
        with torch.autocast(prob.device.type, enabled=False):
            return self._infer(images.float(), prob.float())

    def _check(self, images: Tensor, prob: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"DenseCRF: images must be (N, 3, H, W), not {tuple(images.shape)}")
        if prob.ndim != 4 or prob.shape[1] == 0 or (prob.shape[0], *prob.shape[2:]) != (len(images), *images.shape[2:]):
            raise ValueError(
                f"DenseCRF: prob must be (N, C, H, W) with N, H, W of the images {tuple(images.shape)}, "
                f"not {tuple(prob.shape)}"
            )
        if not prob.is_floating_point():
            raise ValueError(f"DenseCRF: prob must be floating-point numbers, not {prob.dtype}")
        if images.device != prob.device:
            raise ValueError(f"DenseCRF: images are on {images.device}, prob on {prob.device}")
        if self.compatibility is not None and len(self.compatibility) != prob.shape[1]:
            raise ValueError(
                f"DenseCRF: compatibility is for {len(self.compatibility)} classes, prob has {prob.shape[1]}"
            )
        for name, tensor in (("images", images), ("prob", prob)):
            if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                raise ValueError(f"DenseCRF: {name} hold NaN or infinity")

    def _infer(self, images: Tensor, prob: Tensor) -> Tensor:
        classes, height, width = prob.shape[1:]
        kept, copies = self._different(prob)
        chosen = (prob if len(kept) == classes else prob[:, kept]).flatten(2)
        kernels = []
        if self.bi_w:
            kernels.append(Lattice(bilateral_features(images, self.bi_rgb_std, self.bi_xy_std)).normalized(self.bi_w))
        smoothness = (height, width, self.pos_xy_std, self.pos_w, images.device)
        stencil = None
        # a narrow kernel is written out, which the CPU computes faster
        narrow = images.device.type == "cpu" and _reach(self.pos_xy_std) <= 3 and compiled("cpu")
        if self.pos_w and self.compatibility is None and narrow:
            stencil = _smoothness_stencil(*smoothness)
        elif self.pos_w:
            stream = torch.cuda.current_stream(images.device).cuda_stream if images.device.type == "cuda" else 0
            kernels.append(_smoothness(*smoothness, stream))
        if self.compatibility is None:
            q = mean_field(chosen, LEAST, kernels, stencil, width, copies, self.iterations)
        else:
            q = self._mean_field(chosen.clamp(LEAST, 1).log(), kernels)
        if len(kept) < classes:
            source = torch.full((classes,), len(kept) - 1, device=q.device)
            source[kept] = torch.arange(len(kept), device=q.device)
            q = q[:, source]
        return q.view(prob.shape)

    def _different(self, prob: Tensor) -> tuple[Tensor, int]:
        """The classes to compute, and how many the last of them stands for.

        Classes at LEAST everywhere have equal energies at the start, and so, in the Potts model, after every iteration:
        one of them stands for all.
        """
        everyone = torch.arange(prob.shape[1], device=prob.device)
        absent = prob.amax((0, 2, 3)) <= LEAST
        if self.compatibility is not None or absent.sum() < 2:
            return everyone, 1
        return torch.cat([everyone[~absent], everyone[absent][:1]]), int(absent.sum())

    def _mean_field(self, log_prob: Tensor, kernels: list[Lattice]) -> Tensor:
        """As `mean_field`, with the compatibility matrix."""
        classes = len(self.compatibility)
        costs = self.compatibility.to(log_prob).T
        # rows of a multiple of 8 channels, as `add_to` wants them
        q = F.pad(log_prob.softmax(dim=1).transpose(1, 2), (0, -classes % 8)).contiguous()
        for _ in range(self.iterations):
            message = torch.zeros_like(q)
            for kernel in kernels:
                kernel.add_to(message, q)
            q[..., :classes] = (log_prob.transpose(1, 2) - message[..., :classes] @ costs).softmax(dim=-1)
        return q[..., :classes].transpose(1, 2).contiguous()


def _reach(std: float) -> int:
    """How many pixels a kernel of two dimensions reaches: less than 4 deviations.

    A pixel lies less than one side of a simplex, which is one deviation, from each of its vertices; the blur along the
    three directions moves by two sides at most.
    """
    return math.ceil(4 * std) - 1


@functools.lru_cache(maxsize=8)
def _smoothness_stencil(height: int, width: int, std: float, weight: float, device: torch.device) -> Tensor:
    """The same kernel, written out; its lattice is not kept."""
    return stencil_of(_smoothness.__wrapped__(height, width, std, weight, device), height, width, _reach(std))


@functools.lru_cache(maxsize=8)
def _smoothness(height: int, width: int, std: float, weight: float, device: torch.device, stream: int = 0) -> Lattice:
    """The Gaussian kernel, which depends on the size alone: kept for the next images of that size on that stream."""
    return Lattice(grid_features(height, width, std, torch.empty(0, device=device))).normalized(weight)
