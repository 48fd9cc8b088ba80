"""The bilateral filter of images: positions and colours as features."""

import torch
from torch import Tensor

from .lattice import Lattice, bilateral_features


def bilateral_filter(
    images: Tensor, maps: Tensor, sigma_rgb: float, sigma_xy: float, valid: Tensor | None = None
) -> Tensor:
    """Sums every map over the pixels around, weighted by nearness in position and colour.

    out[n, k, p] is close in form to the sum over pixels q of exp(-|f_p - f_q|^2 / 2) maps[n, k, q], with
    f = (x / sigma_xy, y / sigma_xy, r / sigma_rgb, g / sigma_rgb, b / sigma_rgb), but only about 0.4 to 0.5 of it, as
    what is blurred to lattice vertices that no pixel touches is lost. It is not divided by the filtered 1.

    images: (N, 3, H, W), 0..255, any type. maps: (N, K, H, W), any floating type, on the same device.
    sigma_rgb in grey levels, sigma_xy in pixels, both > 0. valid: bool (N, H, W), False where a pixel takes no part, as
    if the image did not have it; the result there is 0. None: all are valid.
    Returns (N, K, H, W), float64 where maps are, else float32, also under autocast. Differentiable in `maps` alone.
    Values of maps that are not finite spread to what they touch.
    Raises ValueError for shapes and devices that do not fit, sigmas that are not positive, and images that are not
    finite or sigmas so small that the lattice cannot be numbered (on a GPU such pixels give NaN).
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"bilateral_filter: images must be (N, 3, H, W), not {tuple(images.shape)}")
    if maps.ndim != 4 or (maps.shape[0], *maps.shape[2:]) != (images.shape[0], *images.shape[2:]):
        raise ValueError(
            f"bilateral_filter: maps must be (N, K, H, W) with N, H, W of the images {tuple(images.shape)}, "
            f"not {tuple(maps.shape)}"
        )
    if not maps.is_floating_point():
        raise ValueError(f"bilateral_filter: maps must be floating-point numbers, not {maps.dtype}")
    for name, tensor in (("maps", maps), ("valid", valid)):
        if tensor is not None and tensor.device != images.device:
            raise ValueError(f"bilateral_filter: images are on {images.device}, {name} on {tensor.device}")
    if not (0 < sigma_rgb < float("inf") and 0 < sigma_xy < float("inf")):
        raise ValueError(f"bilateral_filter: sigmas must be positive, not sigma_rgb={sigma_rgb}, sigma_xy={sigma_xy}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (len(maps), *maps.shape[2:])):
        raise ValueError(f"bilateral_filter: valid must be bool (N, H, W), not {valid.dtype} {tuple(valid.shape)}")
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    features = bilateral_features(images.to(dtype), sigma_rgb, sigma_xy)
    if valid is not None and valid.numel():
        invalid = ~valid.flatten(1)[..., None]
        first = valid.flatten(1).byte().argmax(dim=1)  # its features are there anyway: they add no vertices
        there = features[torch.arange(len(features), device=features.device), first][:, None]
        features = torch.where(invalid, there, features)
        maps = maps.masked_fill(~valid[:, None], 0)
    lattice = Lattice(features, None if valid is None else valid.flatten(1))
    out = lattice.filter(maps.flatten(2).transpose(1, 2))
    if valid is not None and valid.numel():
        out = out.masked_fill(invalid, 0)
    return out.transpose(1, 2).reshape(maps.shape)
