"""Dense CRF as post-processing (Krähenbühl, Koltun, NeurIPS 2011), through pydensecrf."""

import numpy as np

from utils.errors import UserError


def dense_crf(
    image: np.ndarray,
    prob: np.ndarray,
    iterations: int,
    pos_xy_std: float,
    pos_w: float,
    bi_xy_std: float,
    bi_rgb_std: float,
    bi_w: float,
) -> np.ndarray:
    """Refines class probabilities so that near and alike-coloured pixels agree.

    image: uint8 (H, W, 3), RGB. prob: (C, H, W), class scores in [0, 1]; they need not sum to 1 (CAM and LAM do not).
    pos_*: smoothness kernel, bi_*: appearance kernel; *_xy_std in pixels, bi_rgb_std in grey levels, *_w weights.
    Returns float32 (C, H, W), probabilities that sum to 1 over C.
    Raises ValueError for shapes, types or values that do not fit, UserError where pydensecrf is not installed.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"dense_crf: the image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
    if prob.ndim != 3 or prob.shape[1:] != image.shape[:2]:
        raise ValueError(f"dense_crf: prob must be (C, H, W) with H, W of the image {image.shape}, not {prob.shape}")
    if not np.isfinite(prob).all():
        raise ValueError("dense_crf: prob holds NaN or infinity")
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise UserError("the dense CRF needs pydensecrf: pip install pydensecrf2, or evaluate.crf=false") from error
    classes, height, width = prob.shape
    unary = -np.log(np.clip(prob, 1e-5, 1).astype(np.float32))
    crf = DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(classes, -1)))
    crf.addPairwiseGaussian(sxy=pos_xy_std, compat=pos_w)
    crf.addPairwiseBilateral(sxy=bi_xy_std, srgb=bi_rgb_std, rgbim=np.ascontiguousarray(image), compat=bi_w)
    return np.array(crf.inference(iterations), dtype=np.float32).reshape(classes, height, width)
