"""AFA's training and evaluation at full size, on a GPU that is not there."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from engine.config import load_config
from engine.distributed import Ranks
from engine.inference import batch
from engine.inference.batch import evaluation_mode, predict_batch
from engine.inference.plan import evaluation_plan, validation_plan
from engine.precision import autocast
from engine.training.step import Trainer
from model import build_method, multi_scale
from tests.engine.training.test_on_fake_gpu import Brought, full_batch
from tests.fake_gpu import GPU, Watch, on_fake
from tests.model.test_afa import SIDE, afa, batch_of

CPU = torch.device("cpu")
BOXES = [(0, 512, 0, 512), (3, 400, 0, 512), (0, 512, 17, 300), (100, 301, 50, 512)]
LATE = 16_000   # labels come from the random walk
OPERATORS = 2100


@pytest.fixture(scope="module")
def method():
    return build_method(load_config("afa_voc", ["model.weights=random"]), 20).train()


def crops(method, device):
    return full_batch(method.num_classes, device, size=512)._replace(boxes=BOXES)


@pytest.mark.parametrize("iteration, precision", [(0, "bf16"), (5500, "bf16"), (LATE, "fp32"), (LATE, "bf16")])
def test_losses(method, iteration, precision):
    """In every stage all tensors are on the GPU, and the host neither reads from it nor sends to it."""
    with on_fake(method, GPU):
        given = crops(method, GPU)
        for watch in (Watch(), Watch()):   # constants are sent once
            with watch, autocast(GPU, precision):
                terms = method(given, iteration)
    assert watch.waits == watch.transfers == []
    assert {(term.device, term.dtype, term.shape) for term in terms.values()} == {(GPU, torch.float32, ())}


def test_step(method, monkeypatch):
    monkeypatch.setattr(multi_scale, "PIXELS_AT_ONCE", 1 << 40)
    with on_fake(method, CPU):
        trainer, given = Trainer(method, method.config, Ranks(0, 1, CPU)), crops(method, CPU)
        trainer.iteration = LATE
        trainer.step(given)
        with Watch() as watch:
            trainer.step(given)
    assert watch.waits == []
    assert 1000 < watch.operators < OPERATORS


@pytest.mark.parametrize("plan", [
    [], ["evaluate.base_size=448", "evaluate.multi_scale=true"], None,
    ["evaluate.image_labels=predicted", "evaluate.predict_from=affinity_cam"],
], ids=["long side", "squares", "validation", "labels from the affinity CAM"])
def test_maps_of_a_batch(method, plan, monkeypatch):
    def brought(ids, finite, *others):
        assert (ids.dtype, ids.device, ids.shape) == (torch.uint8, GPU, (3, 4, 375, 500))
        raise Brought

    monkeypatch.setattr(batch, "to_host", brought)
    config = method.config
    plan = validation_plan(config) if plan is None else evaluation_plan(load_config("afa_voc", plan))
    with on_fake(method, GPU), evaluation_mode(method):
        images, labels = torch.empty(4, 3, 375, 500, device=GPU), torch.empty(4, method.num_classes, device=GPU)
        with Watch() as watch, pytest.raises(Brought):
            predict_batch(method, images, labels, plan._replace(precision="bf16"), ["a"] * 4)
    assert watch.waits == watch.transfers == []


def test_graphs_of_a_compiled_training():
    """One for the training forward, one for each scale and one for the mirrors of scale 1; no more at later stages."""
    method = afa("pseudo_labels.cam_scales=[1.0,0.5,1.5,0.75]", "train.iterations=100")
    counter = CompileCounter()
    method.compile(backend=counter)
    trainer = Trainer(method.train(), method.config, Ranks(0, 1, CPU))
    for iteration in (0, 3, 6):
        trainer.iteration = iteration
        trainer.step(batch_of())
        method.eval()
        for side in (40, 48, 56, 64, 72, 80):
            method.classify(torch.zeros(2, 3, side, SIDE))
        method.train()
    assert counter.frame_count <= 2 + 2 * 4
