"""Networks, losses and methods; knows nothing of files, ranks or loggers.

The contract of a method, all that the engine knows of it: an `nn.Module(config, num_classes)` with

    losses(batch, iteration) -> dict[str, Tensor]      unweighted terms, fp32 scalars; `forward` is the same
    loss_weights(iteration) -> dict[str, float]        a weight for every term
    param_groups(lr) -> list[dict]                     for the optimizer
    localize(images, kind, scales, flip)               maps (B, K, H, W) in [0, 1]; kind: cam, lam, ...
    segment(images, scales, flip, out_size=None)       logits (B, K+1, H, W)
    classify(images)                                   class logits (B, K)
    load_start_weights(weights), from_official(weights)
    ratio                                              attribute: divides a sum by a count, over all processes

images are (B, 3, H, W), normalised with ImageNet mean and std.
"""

from omegaconf import DictConfig
from torch import nn

from model.more.method import MoRe

METHODS = {"more": MoRe}


def build_method(config: DictConfig, num_classes: int) -> nn.Module:
    """The method named by config.method for K = num_classes classes (without background)."""
    return METHODS[config.method](config, num_classes)
