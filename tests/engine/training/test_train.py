"""The step of training, on a method of a few lines."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.baselines.plain_step import PlainMoRe
from benchmarks.measure import Counter
from bilateralfilter import bilateral_filter
from engine.config import load_config
from engine.distributed import Ranks
from engine.training.nonfinite import NonFinite
from engine.training.step import Trainer
from model import build_method
from model.method import Method
from utils.batch import Batch
from utils.errors import UserError


class TwoTerms(Method):
    """(x - 1)^2 and (x - 3)^2."""

    def __init__(self, weights):
        super().__init__(None, 1)
        self.x, self.weights = nn.Parameter(torch.zeros(())), weights

    def losses(self, batch, iteration):
        return {"one": (self.x - 1) ** 2, "three": (self.x - 3) ** 2}

    def loss_weights(self, iteration):
        return self.weights


def trainer(weights):
    config = load_config("more_shapes", ["train.lr=0.1", "train.warmup_iterations=1", "train.weight_decay=0.0"])
    return Trainer(TwoTerms(weights), config, Ranks(0, 1, torch.device("cpu")))


BATCH = Batch(["a"], torch.zeros(1, 3, 8, 8), torch.zeros(1, 6), torch.ones(1, 8, 8, dtype=torch.bool), torch.zeros(1))


def test_the_weighted_sum_is_minimised():
    training = trainer({"one": 1.0, "three": 3.0})
    for _ in range(300):
        terms = training.step(BATCH)
    assert training.iteration == 300
    assert abs(training.method.x.item() - 2.5) < 0.05          # where 1 (x - 1) + 3 (x - 3) = 0
    torch.testing.assert_close(terms["total"], terms["one"] + 3 * terms["three"])
    assert not any(term.requires_grad for term in terms.values())


def test_draws_follow_from_iteration_and_rank(monkeypatch):
    """The same after a restart, others on another process and in another iteration."""
    monkeypatch.setattr(TwoTerms, "losses", lambda self, *_: {"one": self.x * 0 + torch.rand(())})

    def draws(rank, start):
        training = trainer({"one": 1.0})
        training.ranks, training.iteration = training.ranks._replace(rank=rank), start
        return [training.step(BATCH)["one"].item() for _ in range(start, 4)]

    first = draws(0, 0)
    assert draws(0, 2) == first[2:] and len({*first, *draws(1, 0)}) == 8


def test_a_term_without_a_weight_is_named():
    with pytest.raises(UserError, match=r"'three' has no weight: add it to loss\.weights"):
        trainer({"one": 1.0}).step(BATCH)


def more_training(*overrides, size=64):
    """MoRe on a small ViT in its last stage, and a batch of images of smooth colours."""
    small = "{embed_dim: 48, depth: 3, num_heads: 3, img_size: 64, patch_size: 8}"
    settings = [f"model.backbone_args={small}", "model.decoder_channels=16", "pseudo_labels.par_dilations=[1,2]"]
    config = load_config("more_voc", [*settings, "pseudo_labels.par_iterations=2", *overrides])
    torch.manual_seed(0)
    training = Trainer(build_method(config, 4).train(), config, Ranks(0, 1, torch.device("cpu")))
    training.iteration = 3000
    images = F.interpolate(torch.randn(3, 3, 6, 6), size, mode="bicubic")
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    valid = torch.ones(3, size, size, dtype=torch.bool)
    return training, Batch(["a", "b", "c"], images, labels, valid, torch.arange(3), 2)


def test_a_step_reads_nothing_back():
    """A read of one number would make the CPU wait for the GPU; what needs counts gets them with the batch."""
    training, batch = more_training()
    training.step(batch)   # constants are made once
    with Counter() as counter:
        training.step(batch)
    assert counter.operators > 500 and counter.host_reads == 0
    with Counter() as counter:
        training.step(batch._replace(most_classes=None))
    assert counter.host_reads > 0, "the counter sees what it should"


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu(tmp_path):
    training, batch = more_training()
    training.method.cuda()
    training = Trainer(training.method, training.config, Ranks(0, 1, torch.device("cuda", 0)))
    batch = batch.to(torch.device("cuda", 0))
    seen = NonFinite(tmp_path, training, {})
    for _ in range(2):
        seen.see(batch, training.step(batch))
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen.see(batch, training.step(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_parameter_gets_a_gradient():
    """In every stage, so that DDP need not search for those that have none."""
    for iteration in (0, 3000, 12000):
        training, batch = more_training()
        training.iteration = iteration
        training.step(batch)
        assert all(p.grad is not None for p in training.method.parameters())


@pytest.mark.parametrize("iteration", [0, 3000, 12000])
def test_the_plain_step_follows(iteration):
    """The formulation of the release, which benchmarks/benchmark.py compares with, step by step."""
    training, batch = more_training()
    plain, _ = more_training()
    plain.method.__class__ = PlainMoRe
    plain.method.host_filter = bilateral_filter
    training.iteration = plain.iteration = iteration
    for _ in range(3):
        ours, theirs = training.step(batch), plain.step(batch)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-4, atol=2e-6, msg=name)


def test_compiled_steps_are_the_same():
    few_graphs = "pseudo_labels.cam_scales=[1.0, 0.5]", "model.backbone_args.depth=2", "model.aux_block=-2"
    plain, batch = more_training(*few_graphs)
    compiled, _ = more_training(*few_graphs, "train.compile=true")
    names = compiled.method.state_dict().keys()
    for _ in range(2):
        ours, theirs = compiled.step(batch), plain.step(batch)
        torch.testing.assert_close(ours["total"], theirs["total"], rtol=1e-4, atol=1e-6)
    assert compiled.method.state_dict().keys() == names == plain.method.state_dict().keys()
    assert compiled.method.network.backbone._compiled_call_impl is not None
