"""A loss or gradient that is not finite changes no parameter, and is written down."""

import json
from unittest.mock import Mock

import pytest
import torch

from engine.checkpoints import files
from engine.checkpoints.files import read_meta, read_tensors
from engine.config import load_config
from engine.training.nonfinite import NonFinite
from engine.training.optimizer import build_optimizer
from engine.training.step import Trainer
from tests import tiny
from tests.toy import method
from utils.errors import UserError
from utils.log import read_metrics


def gradient(self, batch, terms):
    return terms["area"] + (self.head.bias[0] * 0).abs().sqrt()   # 0, with a gradient of 0 / 0


def loss(self, batch, terms):
    return terms["area"] * float("inf")


def image(self, batch, terms):
    return self.losses_of_others(batch._replace(images=batch.images * float("nan")))["area"]


@pytest.fixture(params=[gradient, loss, image])
def fault(request, monkeypatch):
    """It is in the fourth step alone."""
    def losses(self, batch, iteration):
        terms = right(self, batch, iteration)
        return {**terms, "area": request.param(self, batch, terms)} if iteration == 3 else terms

    right = method.Toy.losses
    monkeypatch.setattr(method.Toy, "losses", losses)
    monkeypatch.setattr(method.Toy, "losses_of_others", lambda self, batch: right(self, batch, 0), raising=False)
    return request.param.__name__


def state_of(folder, name):
    path = folder / name
    weights = read_tensors(path.with_name(path.name.replace("state.pt", "weights.safetensors")))
    return weights, torch.load(path, weights_only=True)["optimizer"]["state"]


def test_it_ends_the_run(voc_root, tmp_path, fault):
    what = "gradient of head.bias" if fault == "gradient" else "loss term area"
    words = f"toy: the {what} is not finite at iteration 4, of the images tiny_0.*skip leaves such steps out"
    with pytest.raises(UserError, match=words):
        tiny.train_toy(voc_root, tmp_path, "train.checkpoint_every=3")
    run = tmp_path / "toy"
    assert sorted(path.name for path in run.glob("checkpoints/*.pt")) == ["iter_000003.state.pt"]
    line = json.loads((run / "nonfinite.jsonl").read_text())
    (only,) = line["processes"]
    assert line["iteration"] == 4 and len(only["images"]) == 4 and set(only["terms"]) == {"image", "area", "total"}
    assert "head.bias" in only["gradients_not_finite"]
    assert (only["terms"]["area"] in ("inf", "nan")) == (fault != "gradient")
    expected = state_of(run / "checkpoints", "iter_000003.state.pt")
    found = state_of(run / "nonfinite", "iter_000003.state.pt")
    exact = dict(rtol=0, atol=0)
    torch.testing.assert_close(found[1], expected[1], **exact)
    names = [name for name in expected[0] if "running" not in name and "batches" not in name]   # of the failed forward
    torch.testing.assert_close({n: found[0][n] for n in names}, {n: expected[0][n] for n in names}, **exact)
    with pytest.raises(UserError, match="at iteration 4"):   # nor does the run go past it by itself
        tiny.train_toy(voc_root, tmp_path, "train.checkpoint_every=3", "resume=auto")


@pytest.mark.parametrize("fused", [True, False])
def test_it_is_left_out(voc_root, tmp_path, monkeypatch, fault, fused):
    """As if the step had not been: parameters, what the optimizer keeps and batch statistics; the log counts it."""
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **how: sgd(*a, **{**how, "fused": fused}))   # or a user's own
    tiny.train_toy(voc_root, tmp_path, "train.on_nonfinite=skip", "train.log_every=6")
    step = Trainer.step

    def without_the_fourth(self, batch):
        if self.iteration != 3:
            return step(self, batch)
        self.iteration += 1
        return dict.fromkeys(("image", "area", "total"), torch.zeros(()))

    monkeypatch.setattr(Trainer, "step", without_the_fourth)
    tiny.train_toy(voc_root, tmp_path / "whole", "train.on_nonfinite=skip", "train.log_every=6")
    (_, found), (_, expected) = (
        state_of(folder / "toy" / "checkpoints", "iter_000006.state.pt") for folder in (tmp_path, tmp_path / "whole")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    tiny.assert_same_weights(*(tiny.last_weights(folder / "toy") for folder in (tmp_path, tmp_path / "whole")))
    with_it, without = (
        next(line for line in read_metrics(folder / "toy" / "metrics.jsonl") if "train/total" in line)
        for folder in (tmp_path, tmp_path / "whole")
    )
    assert with_it["train/skipped_steps"] == 1 and "train/skipped_steps" not in without
    assert with_it["train/total"] == pytest.approx(without["train/total"] * 6 / 5)
    assert "is not finite at iteration 4" in (tmp_path / "toy" / "train.log").read_text()
    assert read_meta(tiny.last_weights(tmp_path / "toy"))["iteration"] == 6


@pytest.mark.parametrize("every, seen_after", [(9, 5), (2, 4)])
def test_a_gpu_is_asked_one_step_later(voc_root, tmp_path, monkeypatch, fault, every, seen_after):
    """But before anything is saved."""
    init, empty, after = NonFinite.__init__, torch.empty, []

    def late(self, *arguments):
        init(self, *arguments)
        self.late = True

    monkeypatch.setattr(NonFinite, "__init__", late)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **how: empty(*a, **how))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Mock(spec=["record", "synchronize"]))
    monkeypatch.setattr(files, "save_state", lambda folder, done, *_: after.append((folder.name, done + 1)))
    with pytest.raises(UserError, match="is not finite at iteration 4, of the images tiny_"):
        settings = [f"train.checkpoint_every={every}", "train.log_every=9", "data.val_split=null"]
        tiny.train_toy(voc_root, tmp_path, *settings)
    assert after[-1] == ("nonfinite", seen_after) and after[:-1] == ([("checkpoints", 3)] if every == 2 else [])


def test_the_first_step_of_sgd_can_be_left_out(monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **how: empty_like(*a, **how).fill_(1e30))   # whatever was there
    weight, plain = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    train = load_config(None, ["train.optimizer=sgd"]).train
    ours, theirs = (build_optimizer([{"params": [one]}], train) for one in (weight, plain))
    for optimizer, failed in ((ours, 1.0), (ours, 0.0), (theirs, 0.0)):
        optimizer.found_inf = torch.tensor(failed)
        weight.grad, plain.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
    assert torch.equal(weight, plain)


def test_there_is_a_limit(voc_root, tmp_path, monkeypatch):
    monkeypatch.setattr(method.Toy, "losses", lambda self, *_: {"image": self.head.bias.sum() * float("nan")})
    with pytest.raises(UserError, match="at iteration 3, .*step 3 of that kind, train.max_nonfinite is 2"):
        tiny.train_toy(voc_root, tmp_path, "train.on_nonfinite=skip", "train.max_nonfinite=2")
    assert len((tmp_path / "toy" / "nonfinite.jsonl").read_text().splitlines()) == 3
    assert len(list((tmp_path / "toy" / "nonfinite").iterdir())) == 2   # of the last one


def test_what_became_not_finite_otherwise_is_not_saved(voc_root, tmp_path, monkeypatch):
    """Such as a parameter that a step of finite numbers has made too large."""
    step = Trainer.step

    def overflow(self, batch):
        with torch.no_grad():
            self.method.head.bias.mul_(1e39 if self.iteration == 3 else 1)
        return {name: torch.zeros(()) for name in step(self, batch)} if self.iteration < 3 else self.step_of_nothing()

    monkeypatch.setattr(Trainer, "step", overflow)
    monkeypatch.setattr(Trainer, "step_of_nothing", lambda self: setattr(self, "iteration", 4) or {}, raising=False)
    with pytest.raises(UserError, match="parameter head.bias is not finite at iteration 4; the checkpoints stay"):
        tiny.train_toy(voc_root, tmp_path, "train.log_every=6")
    assert sorted(path.name for path in (tmp_path / "toy").glob("checkpoints/*.pt")) == ["iter_000002.state.pt"]
