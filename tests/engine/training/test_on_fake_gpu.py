"""The step of training at full size, on a GPU that is not there: what would stop it or make the host wait for it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from engine.config import load_config
from engine.distributed import Ranks
from engine.evaluation.evaluate import validate
from engine.inference.pictures import training_picture
from engine.precision import autocast
from engine.training.step import Trainer
from model import build_method, multi_scale
from tests.engine.training.test_train import more_training
from tests.fake_gpu import GPU, Watch, on_fake
from utils.batch import Batch

CPU = torch.device("cpu")
CLASSES = {"more_voc": 20, "more_coco": 80}
LATE = 12_000   # every term has a weight


@pytest.fixture(scope="module", params=CLASSES)
def more(request):
    config = load_config(request.param, ["model.weights=random", "train.precision=bf16"])
    return config, build_method(config, CLASSES[request.param]).train()


def full_batch(classes, device, size=448, count=4):
    images, valid = torch.empty(count, 3, size, size), torch.empty(count, size, size, dtype=torch.bool)
    batch = Batch(["a"] * count, images, torch.empty(count, classes), valid, torch.empty(count, dtype=torch.int64), 4)
    return batch.to(device)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("iteration", [0, LATE])
def test_losses(more, iteration, precision):
    """In every stage all tensors are on the GPU, and the host neither reads from it nor sends to it."""
    config, method = more
    with on_fake(method, GPU):
        batch = full_batch(method.num_classes, GPU)
        for watch in (Watch(), Watch()):   # constants are sent once
            with watch, autocast(GPU, precision):
                terms = method(batch, iteration)
    assert watch.waits == watch.transfers == []
    assert {(term.device, term.dtype, term.shape) for term in terms.values()} == {(GPU, torch.float32, ())}


def test_step(more, monkeypatch):
    """The backward and the optimizer too, which fake tensors have on a CPU alone; images go through as on a GPU."""
    config, method = more
    monkeypatch.setattr(multi_scale, "PIXELS_AT_ONCE", 1 << 40)
    with on_fake(method, CPU):
        trainer, batch = Trainer(method, config, Ranks(0, 1, CPU)), full_batch(method.num_classes, CPU)
        trainer.iteration = LATE
        trainer.step(batch)
        with Watch() as watch:
            trainer.step(batch)
    assert watch.waits == []
    assert 500 < watch.operators.total() < 3000, watch.operators


def test_graphs_of_a_compiled_training():
    """One for the training forward and one for each scale of the CAM pass, whatever happens between the steps: stages,
    pictures, validation; none is compiled twice, or given up."""
    training, batch = more_training("pseudo_labels.cam_scales=[1.0,0.5,0.75,1.25,1.5,1.75,2.0,2.25]")
    counter = CompileCounter()
    training.method.compile(backend=counter)
    for iteration in (0, 3000, LATE):
        training.iteration = iteration
        training.step(batch)
        training_picture(training.method, batch, list("abcd"), training.config)
        training.method.eval()
        for side in (32, 40, 48, 56, 72, 80):
            training.method.classify(torch.zeros(2, 3, side, side))
        training.method.train()
    assert counter.frame_count == 9
