"""AdamW with linear warm-up and polynomial decay (MoRe, section 4.1)."""

import torch
from omegaconf import DictConfig


def lr_factor(step: int, warmup: int, iterations: int, ratio: float, power: float) -> float:
    """Share of the base rate at 0-based `step`: linear from `ratio`, then poly counted from step 0, not from the
    end of the warm-up; past the last iteration it stays where it was.
    """
    if step < warmup:
        return 1 - (1 - step / warmup) * (1 - ratio)
    return (1 - min(step, iterations - 1) / iterations) ** power


def build_optimizer(groups: list[dict], config: DictConfig) -> torch.optim.AdamW:
    """AdamW over a method's parameter groups. config: the section `train`."""
    optimizer = torch.optim.AdamW(
        groups, betas=tuple(config.betas), weight_decay=config.weight_decay, eps=1e-8, fused=True
    )
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, step: int, config: DictConfig) -> None:
    """Sets every group's rate for 0-based `step`. config: the section `train`."""
    factor = lr_factor(step, config.warmup_iterations, config.iterations, config.warmup_ratio, config.power)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
