"""Networks, losses and methods; knows nothing of files, ranks or loggers. model/method.py has the contract."""

from typing import Any

from model.acr.method import ACR
from model.afa.method import AFA
from model.deeplab.method import DeepLab
from model.method import Method
from model.more.method import MoRe

METHODS: dict[str, type[Method]] = {"more": MoRe, "afa": AFA, "acr": ACR, "deeplab": DeepLab}


def build_method(config: Any, num_classes: int) -> Method:
    """The method named by config.method for K = num_classes classes (without background)."""
    return METHODS[config.method](config, num_classes)
