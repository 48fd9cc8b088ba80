"""Batches are a function of the seed and the iteration alone."""

import pytest

from engine.config import Train
from engine.training.sampler import GlobalBatches
from engine.training.train import training_length


def flat(batches):
    return [pair for batch in batches for pair in batch]


def test_processes_share_the_global_batch():
    alone = list(GlobalBatches(10, 4, 12, seed=3))
    first, second = (list(GlobalBatches(10, 4, 12, seed=3, rank=r, world=2)) for r in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone


def test_a_restart_goes_on():
    assert list(GlobalBatches(10, 4, 12, seed=3, start=5)) == list(GlobalBatches(10, 4, 12, seed=3))[5:]
    assert len(GlobalBatches(10, 4, 12, seed=3, start=5)) == 7


@pytest.mark.parametrize(("batch_size", "used"), [(5, 10), (4, 8), (16, 10)])
def test_an_epoch_holds_no_sample_twice_and_no_partial_batch(batch_size, used):
    """Unless there are fewer images than a batch has, which they then fill together with those of the next epochs."""
    batches = list(GlobalBatches(10, batch_size, 20, seed=0))
    pairs, epochs = flat(batches), 20 * batch_size // used
    assert {len(batch) for batch in batches} == {batch_size}
    drawn = [{index for index, _ in pairs[epoch * used :][:used]} for epoch in range(epochs)]
    assert {len(epoch) for epoch in drawn} == {used} and set().union(*drawn) == set(range(10))
    assert len({seed for _, seed in pairs}) == len(pairs)
    assert training_length(Train(epochs=3, iterations=None), 10) == 3 * 2   # 4 images a batch
