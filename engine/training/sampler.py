"""Which samples make up which batch: a function of the seed and the iteration alone."""

from collections.abc import Iterator

import torch


class GlobalBatches:
    """Batches of (index, seed) pairs for one process, from iteration `start` on.

    Sample number n of a run is entry n of shuffled epochs strung together, and its seed follows from n; a global batch
    takes the next `batch_size` samples and each process an equal, contiguous share. Neither the number of processes
    nor a restart changes what is drawn.
    """

    def __init__(
        self, length: int, batch_size: int, iterations: int, seed: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        self.length, self.batch_size, self.iterations, self.seed = length, batch_size, iterations, seed
        self.share, self.rank, self.start = batch_size // world, rank, start

    def __len__(self) -> int:
        return max(self.iterations - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order, seeds = -1, [], []
        for iteration in range(self.start, self.iterations):
            first = iteration * self.batch_size + self.rank * self.share
            batch = []
            for number in range(first, first + self.share):
                if number // self.length != epoch:
                    epoch = number // self.length
                    order, seeds = self._epoch(epoch)
                batch.append((order[number % self.length], seeds[number % self.length]))
            yield batch

    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.length, generator=generator).tolist()
        return order, torch.randint(2**31 - 1, (self.length,), generator=generator).tolist()
