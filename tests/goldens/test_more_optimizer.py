"""Learning rates and AdamW steps."""

import numpy as np
import torch

from engine.config import Train
from engine.training.optimizer import build_optimizer, set_lr


def test_rates_and_parameters(golden):
    arrays = golden("more/optimizer.npz")
    train = Train(
        betas=arrays["betas"].tolist(), weight_decay=float(arrays["weight_decay"]),
        warmup_iterations=int(arrays["warmup_iter"]), iterations=int(arrays["max_iter"]),
        warmup_ratio=float(arrays["warmup_ratio"]), power=float(arrays["power"]),
    )
    parameters = [torch.nn.Parameter(torch.from_numpy(arrays[f"param{i}_init"].copy())) for i in (1, 2)]
    groups = [{"params": [p], "lr": float(lr)} for p, lr in zip(parameters, arrays["group_lr"], strict=True)]
    optimizer = build_optimizer(groups, train)
    for step, rates in enumerate(arrays["lr"]):
        set_lr(optimizer, step, train, train.iterations)
        np.testing.assert_allclose([g["lr"] for g in optimizer.param_groups], rates, rtol=1e-6, err_msg=str(step))
        for i, parameter in enumerate(parameters, 1):
            parameter.grad = torch.from_numpy(arrays[f"grad{i}"][step].copy())
        optimizer.step()
        for i, parameter in enumerate(parameters, 1):
            theirs = arrays[f"param{i}"][step]
            np.testing.assert_allclose(parameter.detach(), theirs, rtol=0, atol=5e-6, err_msg=str(step))
