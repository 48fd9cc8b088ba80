"""What training does to the backbone of any method."""

import torch
from torch import nn


def norms_apart(backbone: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Its parameters without `norm` in their names, and those with it, as the released optimizers tell them apart."""
    named = dict(backbone.named_parameters())
    return [p for name, p in named.items() if "norm" not in name], [p for name, p in named.items() if "norm" in name]


def compile_backbone(backbone: nn.Module, graphs: int, **options) -> None:
    """torch.compile of it, where nearly all the time goes, with room for so many graphs of other sizes and modes."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, graphs)
    backbone.compile(dynamic=False, **options)
