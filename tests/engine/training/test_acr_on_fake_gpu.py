"""ACR's training and evaluation at full size, on a GPU that is not there."""

from functools import partial

import pytest
import torch

from engine.config import load_config
from engine.inference import batch
from engine.inference.batch import evaluation_mode, predict_batch
from engine.inference.plan import evaluation_plan, validation_plan
from engine.precision import autocast
from model import build_method, pseudo_labels
from model.acr import method as acr
from tests.engine.training.test_on_fake_gpu import Brought, full_batch
from tests.fake_gpu import GPU, Watch, on_fake

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def method():
    return build_method(load_config("acr_voc", ["model.weights=random"]), 20).train()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses(method, precision):
    """All tensors are on the GPU, and the host neither reads from it nor sends to it."""
    with on_fake(method, GPU):
        given = full_batch(method.num_classes, GPU, size=384)
        for watch in (Watch(), Watch()):   # constants are sent once
            with watch, autocast(GPU, precision):
                terms = method(given, 0)
    assert watch.waits == watch.transfers == []
    assert {(term.device, term.dtype, term.shape) for term in terms.values()} == {(GPU, torch.float32, ())}


@pytest.mark.parametrize("plan", [[], ["evaluate.multi_scale=true"], None], ids=["one scale", "several", "validation"])
def test_maps_of_a_batch(method, plan, monkeypatch):
    """The number of present classes is read, which tensors without values cannot tell; nothing else is. On the CPU: the
    backward pass of a GPU needs one."""
    def brought(ids, finite, *others):
        assert (ids.dtype, ids.device, ids.shape) == (torch.uint8, CPU, (2, 4, 375, 500))
        raise Brought

    monkeypatch.setattr(batch, "to_host", brought)
    monkeypatch.setattr(acr, "present_first", partial(pseudo_labels.present_first, most=2))
    plan = validation_plan(method.config) if plan is None else evaluation_plan(load_config("acr_voc", plan))
    with on_fake(method, CPU), evaluation_mode(method):
        images, labels = torch.empty(4, 3, 375, 500), torch.empty(4, method.num_classes)
        with Watch() as watch, pytest.raises(Brought):
            predict_batch(method, images, labels, plan._replace(precision="bf16"), ["a"] * 4)
    assert watch.waits == watch.transfers == []
