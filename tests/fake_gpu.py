"""Tensors on a GPU that is not there: shapes, types and devices are followed, nothing is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from benchmarks.measure import Counter
from bilateralfilter import _extension, crf
from model import par
from utils import images

GPU = torch.device("cuda", 0)
CACHES = par._position_weights, crf._smoothness, crf._smoothness_stencil, images._kept_column   # of tensors


class Watch(Counter):
    """Names what it counts: `waits`, for which the host waits, `transfers`, what moves between host and device, and
    `enlarged`, the channels of what is resized."""

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.transfers, self.enlarged = [], [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads, name = self.host_reads, str(function)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if self.host_reads > reads:
            self.waits.append(name)
        if name.startswith("aten.upsample_bilinear2d"):
            self.enlarged.add(result.shape[1])
        devices = {x.device.type for x in (*args, result) if isinstance(x, Tensor)}
        if name.startswith(("aten._to_copy", "aten.copy_")) and len(devices) > 1:
            self.transfers.append(f"{name} {tuple(result.shape)} to {result.device.type}")
        return result


@contextmanager
def on_fake(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it tensors are fake, and those of `module` on `device`; what mixes devices or meets a real tensor raises.

    The module is of no use afterwards but for this.
    """
    load = _extension.load
    for cached in CACHES:
        cached.cache_clear()
    try:
        with (
            patch.object(_extension, "load", lambda kind: kind == "cuda" or load(kind)),
            patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            patch.object(torch.cuda, "is_bf16_supported", lambda: True),
            FakeTensorMode(allow_non_fake_inputs=False, shape_env=ShapeEnv()),
        ):
            for part in module.modules():
                for name, value in part._parameters.items():
                    if value is not None:
                        part._parameters[name] = nn.Parameter(torch.empty(value.shape, device=device))
                for name, value in part._buffers.items():
                    if value is not None:
                        part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
            yield
    finally:
        for cached in CACHES:
            cached.cache_clear()
