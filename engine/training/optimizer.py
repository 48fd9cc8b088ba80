"""The optimizer, and its learning rate: linear warm-up, then polynomial decay (MoRe, section 4.1)."""

import torch

from engine.config import Train


def lr_factor(step: int, warmup: int, iterations: int, ratio: float, power: float) -> float:
    """Share of the base rate at 0-based `step`: linear from `ratio`, then poly counted from step 0, not from the
    end of the warm-up; past the last iteration it stays where it was.
    """
    if step < warmup:
        return 1 - (1 - step / warmup) * (1 - ratio)
    return (1 - min(step, iterations - 1) / iterations) ** power


def build_optimizer(groups: list[dict], train: Train) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names, over a method's parameter groups."""
    how = {"weight_decay": train.weight_decay, "fused": True}
    if train.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, train.lr, momentum=train.momentum, **how)
    else:
        optimizer = torch.optim.AdamW(groups, betas=train.betas, eps=1e-8, **how)
    if train.optimizer == "sgd" and train.momentum:   # else a first step that is left out leaves them uninitialised
        for parameter in (one for group in optimizer.param_groups for one in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, step: int, train: Train, iterations: int) -> None:
    """Sets every group's rate for 0-based `step` of a training of so many iterations."""
    factor = lr_factor(step, train.warmup_iterations, iterations, train.warmup_ratio, train.power)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
