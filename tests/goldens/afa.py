"""AFA's goldens: its small network as a method of ours."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.config import RunConfig, load_config
from model import build_method
from model.afa.affinity import near_pairs
from model.method import Method
from utils.images import IGNORE

MEAN, STD = np.array((123.675, 116.28, 103.53)), np.array((58.395, 57.12, 57.375))


def golden_afa(golden, arrays, overrides: Sequence[str] = ()) -> tuple[Method, RunConfig]:
    """AFA with the goldens' weights, and its config; the size is read from the `cfg_*` entries of `arrays`."""
    args = {name: arrays[f"cfg_{name}"].tolist() for name in ("embed_dims", "num_heads", "depths", "sr_ratios")}
    own = [f"model.backbone_args={args}", f"model.strides={arrays['cfg_stride'].tolist()}"]
    own += [f"model.decoder_channels={int(arrays['cfg_embedding_dim'])}", "model.drop_path=0", "model.dropout=0"]
    config = load_config("afa_voc", [*own, *overrides])
    method = build_method(config, int(arrays["cfg_num_classes"]) - 1)
    method.load_state_dict(method.from_official(golden("afa/network_state_dict.safetensors")))
    return method.eval(), config


def normalized(images_u8: np.ndarray) -> Tensor:
    """RGB uint8 (..., H, W, 3) -> the network's input (..., 3, H, W), in float32 arithmetic."""
    images = (images_u8.astype(np.float32) - MEAN.astype(np.float32)) / STD.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3)))


def affinity_target(labels: Tensor, radius: int) -> Tensor:
    """Token labels (B, h, w) -> (B, N, N): 1 same, 0 different, 255 ignored or farther apart than `radius`, if any."""
    flat = labels.flatten(1)
    known = (flat[:, :, None] != IGNORE) & (flat[:, None] != IGNORE)
    if radius:
        known &= near_pairs(labels.shape[1:], radius, labels.device)
    return torch.where(known, (flat[:, :, None] == flat[:, None]).long(), IGNORE)


def cases(arrays) -> list[str]:
    return [str(name) for name in arrays["case_names"]]
