"""The step of training, on a method of a few lines."""

import pytest
import torch
from torch import nn

from engine.distributed import Ranks
from engine.train import Trainer
from utils.batch import Batch
from utils.config import load_config
from utils.errors import UserError


class Method(nn.Module):
    """Two terms: (x - 1)^2 and (x - 3)^2."""

    def __init__(self, weights):
        super().__init__()
        self.x, self.weights = nn.Parameter(torch.zeros(())), weights

    def forward(self, batch, iteration):
        return {"one": (self.x - 1) ** 2, "three": (self.x - 3) ** 2}

    def loss_weights(self, iteration):
        return self.weights

    def param_groups(self, lr):
        return [{"name": "all", "params": [self.x], "lr": lr}]


def trainer(weights):
    config = load_config("more_shapes", ["train.lr=0.1", "train.warmup_iterations=1", "train.weight_decay=0.0"])
    return Trainer(Method(weights), config, Ranks(0, 1, torch.device("cpu")))


BATCH = Batch(["a"], torch.zeros(1, 3, 8, 8), torch.zeros(1, 6), torch.ones(1, 8, 8, dtype=torch.bool), torch.zeros(1))


def test_the_weighted_sum_is_minimised():
    training = trainer({"one": 1.0, "three": 3.0})
    for _ in range(300):
        terms = training.step(BATCH)
    assert training.iteration == 300
    assert abs(training.method.x.item() - 2.5) < 0.05          # where 1 (x - 1) + 3 (x - 3) = 0
    torch.testing.assert_close(terms["total"], terms["one"] + 3 * terms["three"])
    assert not any(term.requires_grad for term in terms.values())


def test_a_term_without_a_weight_is_named():
    with pytest.raises(UserError, match=r"'three' has no weight: add it to loss\.weights"):
        trainer({"one": 1.0}).step(BATCH)
