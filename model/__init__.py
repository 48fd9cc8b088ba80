"""Networks, losses and methods; knows nothing of files, ranks or loggers."""

from omegaconf import DictConfig
from torch import nn

from model.more.method import MoRe

METHODS = {"more": MoRe}


def build_method(config: DictConfig, num_classes: int) -> nn.Module:
    """The method named by config.method for K = num_classes classes (without background)."""
    return METHODS[config.method](config, num_classes)
