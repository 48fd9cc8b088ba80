"""A method in closed form and a data set for it; as a program, one of two processes that evaluate it.

    python -m tests.engine.fake_method RANK WORLD STORE RESULTS
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from datasets import EvalItem
from engine.distributed import Ranks, cleanup
from engine.evaluation.evaluate import evaluate
from model.multi_scale import resize
from utils.config import load_config
from utils.images import normalize

K = 3


class FakeMethod(nn.Module):
    """Maps that are functions of a pixel's colour (c0, c1, c2) alone, in units of the normalised image.

    CAM of class k: sigmoid(c_k), 0.9 times that at each scale other than 1; LAM: sigmoid(-c_k).
    Logits: 0.1 of background, c_k of class k, twice that with flip. Class logits: the mean of c_k.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def localize(self, images, kind, scales, flip):
        self.calls.append((kind, tuple(images.shape[-2:]), tuple(scales), flip, self.training))
        return {"cam": images, "lam": -images}[kind].sigmoid() * 0.9 ** (len(scales) - 1)

    def segment(self, images, scales, flip, out_size=None):
        self.calls.append(("seg", tuple(images.shape[-2:]), tuple(scales), flip, self.training))
        logits = torch.cat([torch.full_like(images[:, :1], 0.1), images], 1) * (1 + flip)
        return resize(logits, out_size or images.shape[-2:])

    def classify(self, images):
        return images.mean((2, 3))


class FakeSet:
    """Images of random colours and sizes, with labels and masks that have nothing to do with them."""

    classes = ("first", "second", "third")

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> EvalItem:
        rng = np.random.default_rng(index)
        size = tuple(rng.integers(6, 12, 2))
        image = normalize(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        truth = rng.choice([0, 1, 3, 255], size).astype(np.uint8)   # class 2 is never there
        labels = torch.zeros(K)
        labels[[[0], [0, 2], [1], []][index % 4]] = 1
        return EvalItem(f"image_{index}", image, labels, truth)


def config(*overrides: str):
    """The default config without workers, at native size."""
    return load_config(None, ["data.workers=0", "evaluate.base_size=null", *overrides])


if __name__ == "__main__":
    rank, world, store, results = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    ranks = Ranks(rank, world, torch.device("cpu"))
    rows = evaluate(FakeMethod(), FakeSet(5), config(), ranks, "weights", results.with_name(f"{results.name}.{rank}"))
    print(repr([row["miou"] for row in rows]))
    cleanup()
