"""The precision a method computes in: fp32, or bf16 by autocast, in which it keeps in fp32 what needs that."""

import torch

from engine.config import RunConfig

BF16_FROM = 8, 0   # compute capability: earlier GPUs only emulate it


def precision_on(device: torch.device, wanted: str) -> str:
    """fp32 or bf16. wanted: one of them, or auto: bf16 on a GPU that computes in it, else fp32."""
    if wanted != "auto":
        return wanted
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= BF16_FROM
    return "bf16" if able else "fp32"


def settled(config: RunConfig, device: torch.device) -> RunConfig:
    """The config with the precision that a run on this device has: what it writes says so, and later use follows it."""
    precision = precision_on(device, config.train.precision)
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def autocast(device: torch.device, wanted: str, cache: bool = True) -> torch.autocast:
    """cache: of weights in bf16, which all threads share: False where several compute, each with its own stream."""
    on = precision_on(device, wanted) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on, cache_enabled=cache)
