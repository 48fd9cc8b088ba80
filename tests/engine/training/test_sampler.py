"""Batches are a function of the seed and the iteration alone."""

from engine.training.sampler import GlobalBatches


def flat(batches):
    return [pair for batch in batches for pair in batch]


def test_processes_share_the_global_batch():
    alone = list(GlobalBatches(10, 4, 12, seed=3))
    first, second = (list(GlobalBatches(10, 4, 12, seed=3, rank=r, world=2)) for r in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone


def test_a_restart_goes_on():
    assert list(GlobalBatches(10, 4, 12, seed=3, start=5)) == list(GlobalBatches(10, 4, 12, seed=3))[5:]
    assert len(GlobalBatches(10, 4, 12, seed=3, start=5)) == 7


def test_every_epoch_holds_every_sample_once():
    pairs = flat(GlobalBatches(10, 4, 15, seed=0))
    for epoch in range(6):
        assert sorted(index for index, _ in pairs[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert len({seed for _, seed in pairs}) == len(pairs)


def test_more_images_a_batch_than_there_are():
    assert [len(batch) for batch in GlobalBatches(3, 8, 2, seed=0)] == [8, 8]
