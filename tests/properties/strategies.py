"""What property tests draw: sizes, classes and the kind of labels, by hypothesis; the numbers come from a seed.

So failing examples become small, and examples are fast. The default suite checks a few, always the same ones;
PROPERTY_EXAMPLES=500 checks so many of each, and other ones in every run.
"""

import os
import tempfile
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from torch import Tensor

from utils.images import IGNORE

_home = tempfile.TemporaryDirectory(prefix="hypothesis")   # it keeps files, also without a database
set_hypothesis_home_dir(_home.name)
WANTED = os.environ.get("PROPERTY_EXAMPLES")
examples = settings(
    database=None, deadline=None, derandomize=not WANTED, max_examples=int(WANTED or 15),
    phases=[Phase.explicit, Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
)
KINDS = ("mixed", "known", "background", "ignored", "one class")   # of labels


@dataclass
class Case:
    """A batch of B images with K classes, a size (h, w) and a kind of labels; every tensor is drawn from the seed."""

    batch: int
    classes: int
    size: tuple[int, int]
    kind: str
    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From low to high - 1."""
        return torch.randint(low, high, shape, generator=self.generator)

    def any_of(self, values: Tensor, *shape: int) -> Tensor:
        return values[self.integers(0, len(values), *shape)]

    def valid(self) -> Tensor:
        """bool (B, h, w): a rectangle of each image, perhaps an empty one."""
        valid = torch.zeros(self.batch, *self.size, dtype=torch.bool)
        for own in valid:
            rows, columns = (sorted(self.integers(0, side + 1, 2).tolist()) for side in self.size)
            own[slice(*rows), slice(*columns)] = True
        return valid

    def ids(self) -> Tensor:
        """Label maps int64 (B, h, w): of background, two classes and 255, or as the kind says."""
        few = torch.cat([torch.tensor([0, IGNORE]), self.integers(1, self.classes + 1, 2)])
        of_kind = {"mixed": few, "known": torch.arange(self.classes + 1), "background": few[:1], "ignored": few[1:2],
                   "one class": few[2:3]}[self.kind]
        return self.any_of(of_kind, self.batch, *self.size)

    def multi_hot(self) -> Tensor:
        """Image labels float64 (B, K): about two classes, all, none, any, or one."""
        drawn = self.uniform(self.batch, self.classes)
        share = {"mixed": 2 / self.classes, "known": 1.0, "background": 0.0, "ignored": 0.5}
        if self.kind == "one class":
            return (drawn == drawn.amax(1, keepdim=True)).double()
        return (drawn < share[self.kind]).double()


def cases(side: int, batch: int = 3, least: int = 1) -> st.SearchStrategy[Case]:
    """Sides from `least` to `side`; 1 to 90 classes."""
    sides = st.integers(least, side)
    return st.builds(
        Case, st.integers(1, batch), st.integers(1, 90), st.tuples(sides, sides), st.sampled_from(KINDS),
        st.integers(0, 2**16),
    )
