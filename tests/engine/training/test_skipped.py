"""A run with images among its own that cannot be read: skipped, said, counted, up to a limit."""

from functools import partial
from types import SimpleNamespace

import pytest

from datasets.config import Data
from engine.training import skipped
from engine.training.sampler import GlobalBatches
from model import METHODS
from tests import tiny
from tests.toy import method
from utils.errors import UserError
from utils.log import read_metrics


def test_a_corrupt_image_among_good_ones(tiny_voc, tmp_path, monkeypatch):
    """The run that raised goes on with skip, and ends as one that skipped all along, in other processes."""
    monkeypatch.setitem(METHODS, "toy", method.Toy)
    name = f"tiny_{next(iter(GlobalBatches(8, 4, 2, seed=0, start=1)))[0][0]:03d}"   # of the second iteration
    image = tiny_voc / "JPEGImages" / f"{name}.jpg"
    image.write_bytes(image.read_bytes()[:500])
    train, skip = partial(tiny.train_toy, tiny_voc, tmp_path, "train.checkpoint_every=1"), "data.on_error=skip"
    with pytest.raises(UserError, match=rf"{name}\.jpg: image file cannot be read"):
        train()
    with pytest.raises(UserError, match=rf"1 training images cannot be read, .*: {name}; the first: .*{name}\.jpg"):
        train("resume=auto", skip, "data.max_errors=0")
    train("resume=auto", skip, "data.max_errors=1")
    log = (tmp_path / "toy/train.log").read_text()
    assert log.count(f"skipped, image 1 of at most 1: {image}: ") == 1 and "changed: data.on_error = skip, was" in log
    lines = [line for line in read_metrics(tmp_path / "toy/metrics.jsonl") if "train/total" in line]
    assert sum(line["train/skipped"] for line in lines[1:]) == 3 and "train/skipped" not in lines[0]   # once an epoch
    train(skip, "data.workers=2", "tag=through")
    tiny.assert_same_weights(*(tiny.last_weights(tmp_path / tag) for tag in ("toy", "through")))


def test_all_processes_count_together(monkeypatch):
    monkeypatch.setattr(skipped, "gather", lambda new: [new, [("b", "b.jpg: broken"), ("a", "a.jpg: broken")]])
    said = []
    logger = SimpleNamespace(warning=lambda words, *facts: said.append(words % facts))
    ours = skipped.Skipped(Data(on_error="skip", max_errors=2), logger)
    ours.new = [("a", "a.jpg: broken")]
    assert ours.report() == {"skipped": 3} and ours.report() == {"skipped": 2}
    assert said == [f"skipped, image {n} of at most 2: {name}.jpg: broken" for n, name in ((1, "a"), (2, "b"))]
    ours.new = [("c", "c.jpg: broken")]
    with pytest.raises(UserError, match="3 training images cannot be read, .*: a, b, c; the first: a.jpg"):
        ours.report()
