"""Dense CRF as post-processing of one image (Krähenbühl, Koltun, NeurIPS 2011): ours, or the package pydensecrf."""

import numpy as np
import torch
from torch import Tensor

from bilateralfilter import DenseCRF
from utils.errors import UserError


def dense_crf(image: np.ndarray, prob: Tensor, *, backend: str = "lattice", **settings: float) -> Tensor:
    """Refines class probabilities so that near and alike-coloured pixels agree.

    image: uint8 (H, W, 3), RGB. prob: float (C, H, W), class scores in [0, 1]; they need not sum to 1 (CAM and LAM do
    not). backend: `lattice`, bilateralfilter.DenseCRF on the device of `prob`, or `pydensecrf`. settings: `iterations`,
    `pos_xy_std`, `pos_w`, `bi_xy_std`, `bi_rgb_std`, `bi_w`, as DenseCRF has them.
    Returns float32 (C, H, W) on the device of `prob`, probabilities that sum to 1 over C.
    Raises ValueError for shapes, types or values that do not fit, UserError where pydensecrf is asked for and missing.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"dense_crf: the image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
    if prob.ndim != 3 or prob.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"dense_crf: prob must be (C, H, W) with H, W of the image {image.shape}, not {tuple(prob.shape)}"
        )
    if backend == "pydensecrf":
        if not prob.isfinite().all():
            raise ValueError("dense_crf: prob holds NaN or infinity")
        refined = _pydensecrf(image, prob.float().cpu().numpy(), **settings)
        return torch.from_numpy(refined).to(prob.device)
    if backend != "lattice":
        raise ValueError(f"dense_crf: backend must be lattice or pydensecrf, not {backend}")
    pixels = torch.from_numpy(np.ascontiguousarray(image)).to(prob.device).permute(2, 0, 1)
    return DenseCRF(**settings)(pixels[None], prob[None])[0]


def _pydensecrf(
    image: np.ndarray,
    prob: np.ndarray,
    iterations: int,
    pos_xy_std: float,
    pos_w: float,
    bi_xy_std: float,
    bi_rgb_std: float,
    bi_w: float,
) -> np.ndarray:
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise UserError("crf.backend=pydensecrf needs the package: pip install pydensecrf2, or leave it out") from error
    classes, height, width = prob.shape
    unary = -np.log(np.clip(prob, 1e-5, 1))
    crf = DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(classes, -1)))
    crf.addPairwiseGaussian(sxy=pos_xy_std, compat=pos_w)
    crf.addPairwiseBilateral(sxy=bi_xy_std, srgb=bi_rgb_std, rgbim=np.ascontiguousarray(image), compat=bi_w)
    return np.array(crf.inference(iterations), dtype=np.float32).reshape(classes, height, width)
