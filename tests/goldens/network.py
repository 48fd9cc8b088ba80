"""The goldens' small network as a method of ours."""

from omegaconf import DictConfig
from torch import nn

from model import build_method
from utils.config import load_config


def golden_method(golden, arrays) -> tuple[nn.Module, DictConfig]:
    """MoRe with the goldens' weights, and its config; the size is read from the `cfg_*` entries of `arrays`."""
    size = {name: int(arrays[f"cfg_{name}"]) for name in ("embed_dim", "depth", "num_heads", "img_size", "patch_size")}
    config = load_config(None, [f"model.aux_block={int(arrays['cfg_aux_layer'])}"])
    config.model.backbone_args = size
    classes = int(arrays["cfg_num_classes"]) - 1
    config.model.registers = int(arrays["cfg_num_attri"]) - classes
    method = build_method(config, classes)
    method.load_state_dict(method.from_official(golden("more/network_state_dict.safetensors")))
    return method.eval(), config
