"""Which samples make up which batch: a function of the seed and the iteration alone."""

from collections.abc import Iterator

import torch


def used_images(length: int, batch_size: int) -> int:
    """How many of `length` images an epoch uses."""
    return length if length < batch_size else length - length % batch_size


class GlobalBatches:
    """Batches of (index, seed) pairs for one process, from iteration `start` on.

    Sample number n of a run is entry n of shuffled epochs, each without what does not fill a whole batch (as released),
    strung together, and its seed follows from n; a global batch takes the next `batch_size` samples and each process an
    equal, contiguous share. Fewer images than a batch fill it together with those of the next epochs. Neither the
    number of processes nor a restart changes what is drawn.
    """

    def __init__(
        self, length: int, batch_size: int, iterations: int, seed: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        self.length, self.batch_size, self.iterations, self.seed = length, batch_size, iterations, seed
        self.share, self.rank, self.start = batch_size // world, rank, start
        self.used = used_images(length, batch_size)   # of every epoch

    def __len__(self) -> int:
        return max(self.iterations - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order, seeds = -1, [], []
        for iteration in range(self.start, self.iterations):
            first = iteration * self.batch_size + self.rank * self.share
            batch = []
            for number in range(first, first + self.share):
                if number // self.used != epoch:
                    epoch = number // self.used
                    order, seeds = self._epoch(epoch)
                batch.append((order[number % self.used], seeds[number % self.used]))
            yield batch

    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.length, generator=generator).tolist()
        return order, torch.randint(2**31 - 1, (self.length,), generator=generator).tolist()
