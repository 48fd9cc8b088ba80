"""Bilateral filter on the permutohedral lattice (Adams, Baek, Davis, Eurographics 2010); compiled on first use."""

import torch
from torch import Tensor

from ._extension import load_extension

__all__ = ["bilateral_filter"]


@torch.no_grad()
def bilateral_filter(images: Tensor, maps: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
    """Sums every map over the pixels around, weighted by nearness in position and colour.

    out[n, k, p] is close in form to the sum over pixels q of exp(-|f_p - f_q|^2 / 2) maps[n, k, q], with
    f = (x / sigma_xy, y / sigma_xy, r / sigma_rgb, g / sigma_rgb, b / sigma_rgb), but only about 0.4 to 0.5 of it, as
    what is blurred to lattice vertices that no pixel touches is lost. It is not divided by the filtered 1.

    images: (N, 3, H, W), 0..255. maps: (N, K, H, W). Any floating type and device; the work is done on the CPU in
    float32, threads share the images. sigma_rgb in grey levels, sigma_xy in pixels, both > 0.
    Returns float32 (N, K, H, W) on the device of `maps`; no gradient flows through.
    Raises ValueError for shapes that do not fit, values that are not finite and sigmas that are not positive (or so
    small that the lattice cannot be numbered), UserError where the extension is not there and cannot be compiled.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"bilateral_filter: images must be (N, 3, H, W), not {tuple(images.shape)}")
    if maps.ndim != 4 or (maps.shape[0], *maps.shape[2:]) != (images.shape[0], *images.shape[2:]):
        raise ValueError(
            f"bilateral_filter: maps must be (N, K, H, W) with N, H, W of the images {tuple(images.shape)}, "
            f"not {tuple(maps.shape)}"
        )
    if not (0 < sigma_rgb < float("inf") and 0 < sigma_xy < float("inf")):
        raise ValueError(f"bilateral_filter: sigmas must be positive, not sigma_rgb={sigma_rgb}, sigma_xy={sigma_xy}")
    arguments = [tensor.to("cpu", torch.float32) for tensor in (images, maps)]
    for name, tensor in zip(("images", "maps"), arguments, strict=True):
        if not tensor.isfinite().all():
            raise ValueError(f"bilateral_filter: {name} hold NaN or infinity")
    load_extension()
    return torch.ops.bilateralfilter.filter(*arguments, float(sigma_rgb), float(sigma_xy)).to(maps.device)
