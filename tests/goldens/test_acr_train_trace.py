"""ACR's released training loop, followed term by term by the real trainer's step.

As released, the value meant as weight decay is the momentum of SGD, and one step more is done than the schedule has, at
the rate of the one before.
"""

import numpy as np
import pytest
import torch

from engine.distributed import Ranks
from engine.training.step import Trainer
from model.acr.official import BACKBONE, UNUSED, official_name
from tests.goldens.acr import golden_acr
from utils.batch import Batch

TERMS = {
    "cls_loss_1": "cls", "cls_loss_2": "cls_mirror", "cls_align_loss": "consistency_class",
    "aff_align_loss": "consistency_affinity", "loss": "total",
}


def official(named: dict) -> dict:
    """The tensors of our network under the released names."""
    positions = torch.cat([named["backbone.token_pos"], named["backbone.patch_pos"]], 1)
    tokens = {f"{BACKBONE}cls_token": named["backbone.tokens"], f"{BACKBONE}pos_embed": positions}
    others = {name: value for name, value in named.items() if "backbone.token" not in name and "patch_pos" not in name}
    return {**{official_name(name): value for name, value in others.items()}, **tokens}


@pytest.fixture(scope="module")
def trace(golden):
    """Arrays of the reference, and the same things of ours, made by Trainer.step."""
    arrays = golden("acr/train_trace.npz")
    alpha = float(arrays["alpha"])
    method, config = golden_acr(golden, arrays, overrides=[
        f"loss.weights.consistency_class={alpha}", f"loss.weights.consistency_affinity={alpha}",
        f"train.lr={float(arrays['lr0'])}", f"train.momentum={float(arrays['weight_decay_argument'])}",
        "train.weight_decay=0", f"train.iterations={int(arrays['max_step'])}", "train.precision=fp32",
    ])
    trainer = Trainer(method.train(), config, Ranks(0, 1, torch.device("cpu")))
    network = method.network
    start = official({name: p.detach().clone() for name, p in network.named_parameters()})
    ours = {name: [] for name in ("terms", "lr", "cls", "grad_norm")}
    network.register_forward_hook(lambda *args: ours["cls"].append(torch.stack(args[2][:2]).detach()))
    names = [str(name) for name in arrays["param_names"]]
    for crops, labels in zip(arrays["input"], arrays["cls_label"], strict=True):
        images = torch.from_numpy(crops.astype(np.float32))
        valid = torch.ones(len(images), *images.shape[-2:], dtype=torch.bool)
        batch = Batch([""] * len(images), images, torch.from_numpy(labels), valid, torch.zeros(len(images)).long())
        terms = trainer.step(batch)
        ours["terms"].append([float(terms[TERMS[str(name)]]) for name in arrays["term_names"]])
        ours["lr"].append(trainer.optimizer.param_groups[0]["lr"])
        grads = official({name: p.grad for name, p in network.named_parameters()})
        ours["grad_norm"].append([float(grads[name].norm()) if name in grads else np.nan for name in names])
    final = official({name: p.detach() for name, p in network.named_parameters()})
    return arrays, ours, start, final


def test_loss_terms(trace):
    arrays, ours, *_ = trace
    np.testing.assert_allclose(ours["terms"][0], arrays["loss_terms"][0], rtol=1e-5)
    np.testing.assert_allclose(ours["terms"], arrays["loss_terms"], rtol=1e-3, atol=1e-3)


def test_learning_rates(trace):
    arrays, ours, *_ = trace
    np.testing.assert_allclose(ours["lr"], arrays["lr"], rtol=1e-6)


def test_class_logits(trace):
    arrays, ours, *_ = trace
    np.testing.assert_allclose(torch.stack(ours["cls"]), arrays["cls"], rtol=0, atol=3e-2)


def test_gradient_norms(trace):
    arrays, ours, *_ = trace
    mine, theirs = np.array(ours["grad_norm"]), arrays["grad_norm"]
    assert np.array_equal(np.isnan(mine), np.isnan(theirs))
    assert {str(name) for name, none in zip(arrays["param_names"], np.isnan(theirs[0]), strict=True) if none} == UNUSED
    np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-4)
    np.testing.assert_allclose(mine, theirs, rtol=5e-2, atol=0.5)


def test_final_parameters(trace):
    arrays, _, start, final = trace
    for row, name in enumerate(str(name) for name in arrays["param_names"]):
        if name not in UNUSED:
            mine, update = final[name].flatten(), float((final[name] - start[name]).norm())
            np.testing.assert_allclose(float(mine.norm()), arrays["final_norm"][row], rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(update, arrays["update_norm"][row], rtol=1e-2, atol=2e-5, err_msg=name)
            theirs = arrays["final_slice"][row][: len(mine)]
            np.testing.assert_allclose(mine[: len(theirs)], theirs, rtol=0, atol=2e-5, err_msg=name)
