"""Training and evaluation at full size, on a GPU that is not there: what would stop them, or make the host wait."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from engine.config import load_config
from engine.distributed import Ranks
from engine.inference import batch
from engine.inference.batch import evaluation_mode, predict_batch
from engine.inference.pictures import training_picture
from engine.inference.plan import evaluation_plan, validation_plan
from engine.precision import autocast
from engine.training.step import Trainer
from model import build_method, multi_scale
from tests.engine.training.test_train import more_training
from tests.fake_gpu import GPU, Watch, on_fake
from utils.batch import Batch

CPU = torch.device("cpu")
CLASSES = {"more_voc": 20, "more_coco": 80}
OPERATORS = {20: 2000, 80: 2200}   # of a step, at most; COCO has one scale more
LATE = 12_000   # every term has a weight


@pytest.fixture(scope="module", params=CLASSES)
def more(request):
    config = load_config(request.param, ["model.weights=random", "train.precision=bf16"])
    return config, build_method(config, CLASSES[request.param]).train()


def full_batch(classes, device, size=448, count=4):
    images, valid = torch.empty(count, 3, size, size), torch.empty(count, size, size, dtype=torch.bool)
    labels, seeds = torch.empty(count, classes), torch.empty(count, dtype=torch.int64)
    return Batch(["a"] * count, images, labels, valid, seeds, 4).to(device)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("iteration", [0, LATE])
def test_losses(more, iteration, precision):
    """In every stage all tensors are on the GPU, and the host neither reads from it nor sends to it."""
    _, method = more
    with on_fake(method, GPU):
        given = full_batch(method.num_classes, GPU)
        for watch in (Watch(), Watch()):   # constants are sent once
            with watch, autocast(GPU, precision):
                terms = method(given, iteration)
    assert watch.waits == watch.transfers == []
    if iteration:   # two CAMs of the four classes that an image of the batch has at most
        assert 8 in watch.enlarged and not watch.enlarged & {method.num_classes, 2 * method.num_classes}
    assert {(term.device, term.dtype, term.shape) for term in terms.values()} == {(GPU, torch.float32, ())}


def test_step(more, monkeypatch):
    """The backward and the optimizer too, which fake tensors have on a CPU alone; images go through as on a GPU."""
    config, method = more
    monkeypatch.setattr(multi_scale, "PIXELS_AT_ONCE", 1 << 40)
    with on_fake(method, CPU):
        trainer, given = Trainer(method, config, Ranks(0, 1, CPU)), full_batch(method.num_classes, CPU)
        trainer.iteration = LATE
        trainer.step(given)
        with Watch() as watch:
            trainer.step(given)
    assert watch.waits == []
    assert 1000 < watch.operators < OPERATORS[method.num_classes]


class Brought(Exception):
    """What a batch made of it comes to the host."""


@pytest.mark.parametrize("plan", [
    pytest.param(["evaluate.multi_scale=true"], id="seven scales"),
    pytest.param(["evaluate.image_labels=predicted", "evaluate.predict_from=seg"], id="labels from seg"),
    pytest.param(["evaluate.base_size=null"], id="native size"),
    pytest.param(None, id="validation"),
])
def test_maps_of_a_batch(more, plan, monkeypatch):
    """All kinds of maps and their label maps, in the precision of the run: read once, at the end."""
    config, method = more

    def brought(ids, finite, *others):
        assert (ids.dtype, ids.device, ids.shape) == (torch.uint8, GPU, (len(plan.kinds), 8, 375, 500))
        assert finite.shape == (len(plan.kinds), 8)
        raise Brought

    monkeypatch.setattr(batch, "to_host", brought)
    plan = validation_plan(config) if plan is None else evaluation_plan(load_config("more_voc", plan))
    with on_fake(method, GPU), evaluation_mode(method):
        images = torch.empty(8, 3, 375, 500, device=GPU)
        labels = torch.empty(8, method.num_classes, device=GPU)
        with Watch() as watch, pytest.raises(Brought):
            predict_batch(method, images, labels, plan._replace(precision="bf16"), ["a"] * 8)
    assert watch.waits == watch.transfers == []


def test_graphs_of_a_compiled_training():
    """One for the training forward and one for each scale of the CAM pass, whatever happens between the steps: stages,
    pictures, validation; none is compiled twice, or given up."""
    training, given = more_training("pseudo_labels.cam_scales=[1.0,0.5,0.75,1.25,1.5,1.75,2.0,2.25]")
    counter = CompileCounter()
    training.method.compile(backend=counter)
    for iteration in (0, 3000, LATE):
        training.iteration = iteration
        training.step(given)
        training_picture(training.method, given, list("abcd"), training.config)
        training.method.eval()
        for side in (32, 40, 48, 56, 72, 80):
            training.method.classify(torch.zeros(2, 3, side, side))
        training.method.train()
    assert counter.frame_count == 9
