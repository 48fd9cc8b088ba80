"""SGD and its rates: with the weight decay that the released arguments mean, and as the released code steps."""

import numpy as np
import pytest
import torch

from engine.config import load_config
from engine.training.optimizer import build_optimizer, set_lr


@pytest.mark.parametrize("released", [True, False])
def test_rates_and_parameters(golden, released):
    arrays = golden("acr/optimizer.npz")
    argument, name = float(arrays["weight_decay_argument"]), "param" if released else "intended_param"
    assert (float(arrays["effective_momentum"]), float(arrays["effective_weight_decay"])) == (argument, 0)
    how = [f"train.momentum={argument}", "train.weight_decay=0"] if released else [f"train.weight_decay={argument}"]
    length = int(arrays["max_step"])
    train = load_config("acr_voc", [f"train.lr={float(arrays['lr0'])}", f"train.iterations={length}", *how]).train
    parameters = [torch.nn.Parameter(torch.from_numpy(arrays[f"param{i}_init"].copy())) for i in (1, 2)]
    optimizer = build_optimizer([{"params": parameters, "lr": train.lr}], train)
    for step, rate in enumerate(arrays["lr"]):
        set_lr(optimizer, step, train, length)
        np.testing.assert_allclose(optimizer.param_groups[0]["lr"], rate, rtol=1e-6, err_msg=str(step))
        for i, parameter in enumerate(parameters, 1):
            parameter.grad = torch.from_numpy(arrays[f"grad{i}"][step].copy())
        optimizer.step()
        for i, parameter in enumerate(parameters, 1):
            theirs = arrays[f"{name}{i}"][step]
            np.testing.assert_allclose(parameter.detach(), theirs, rtol=0, atol=1e-6, err_msg=str(step))
