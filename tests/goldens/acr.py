"""ACR's goldens: its small networks as methods of ours."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.config import RunConfig, load_config
from model import build_method
from model.method import Method

MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
CONFIGS = {"hybrid": "acr_voc", "plain": "acr_voc_vit"}


def golden_acr(golden, arrays, backbone: str = "hybrid", overrides: Sequence[str] = ()) -> tuple[Method, RunConfig]:
    """ACR with the goldens' weights, and its config; the size is read from the `cfg_*` entries of `arrays`."""
    args = {name: int(arrays[f"cfg_{name}"]) for name in ("embed_dim", "depth", "num_heads", "img_size")}
    if backbone == "hybrid":
        args["resnet_layers"] = arrays["cfg_resnet_layers"].tolist()
        args["resnet_width_factor"] = float(arrays["cfg_resnet_width_factor"])
    else:
        args["patch_size"] = int(arrays["cfg_patch_size"])
    config = load_config(CONFIGS[backbone], [f"model.backbone_args={args}", *overrides])
    method = build_method(config, int(arrays["cfg_num_classes"]))
    method.load_state_dict(method.from_official(golden(f"acr/{backbone}_state_dict.safetensors")))
    return method.eval(), config


def normalized(image_u8: np.ndarray) -> Tensor:
    """RGB uint8 (H, W, 3) -> the network's input (1, 3, H, W), in float64 arithmetic."""
    image = ((image_u8 / 255 - MEAN) / STD).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]


def cases(arrays) -> list[str]:
    return [str(name) for name in arrays["case_names"]]
