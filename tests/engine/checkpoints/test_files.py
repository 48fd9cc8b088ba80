"""Weights files: what is written is read back; whatever is wrong is named; nothing half-written bears a final name."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints import files as checkpoint
from engine.config import load_config
from model import build_method
from utils.errors import UserError

SIZE = "model.backbone_args={embed_dim: 32, depth: 3, num_heads: 2, img_size: 32, patch_size: 8}"


def make(classes=5):
    return build_method(load_config(None, ["model.backbone=vit_tiny_patch16_224", SIZE]), classes)


def test_round_trip(tmp_path):
    first, second = make(), make()
    path = tmp_path / "checkpoints" / "w.weights.safetensors"
    checkpoint.save_weights(path, first, {"classes": list("abcde"), "iteration": 3})
    checkpoint.load_weights(path, second)
    read = second.state_dict()
    assert all(torch.equal(value, read[name]) for name, value in first.state_dict().items())
    assert checkpoint.read_meta(path) == {"classes": list("abcde"), "iteration": 3}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_faults_are_named(tmp_path):
    method, path = make(), tmp_path / "w.safetensors"
    checkpoint.save_weights(path, method, {})
    key = "network.decoder.conv8.weight"
    for change, words in [
        (lambda w: w.pop(key), f"{key}' is missing"),
        (lambda w: w.update(more=torch.zeros(1)), "'more' is not expected"),
        (lambda w: w.update({key: torch.zeros(2, 2)}), f"{key}' has shape"),
    ]:
        weights = load_file(path)
        change(weights)
        save_file(weights, tmp_path / "broken.safetensors")
        with pytest.raises(UserError, match=r"broken\.safetensors.*" + words):
            checkpoint.load_weights(tmp_path / "broken.safetensors", method)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_unreadable_files(tmp_path, name):
    with pytest.raises(UserError, match="no such"):
        checkpoint.load_weights(tmp_path / name, make())
    for content in (b"", b"no weights at all", bytes(200)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            checkpoint.load_weights(tmp_path / name, make())


def test_a_pickle_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "iter_000002.state.pt").touch()
    with pytest.raises(UserError, match=r"its weights are in iter_000002\.weights\.safetensors"):
        checkpoint.load_weights(tmp_path / "iter_000002.state.pt", make())
    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth"):
        checkpoint.load_weights(tmp_path / "evil.pth", make())
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    method, path = make(), tmp_path / "w.safetensors"
    checkpoint.save_weights(path, method, {"iteration": 1})

    def full(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_weights(path, method, {"iteration": 2})
    assert checkpoint.read_meta(path) == {"iteration": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_newest_state_is_taken(tmp_path):
    method = make()
    optimizer = torch.optim.AdamW(method.parameters())
    assert checkpoint.newest_state(tmp_path) is None
    for iteration in (2, 10):
        checkpoint.save_state(tmp_path, iteration, method, optimizer, meta={})
    assert checkpoint.newest_state(tmp_path)["iteration"] == 10
    assert [p.name for p in tmp_path.glob("*.state.pt")] == ["iter_000010.state.pt"]
    assert len(list(tmp_path.glob("*.weights.safetensors"))) == 2


def test_rates_of_a_resumed_run_are_those_it_is_given(tmp_path):
    method = make()
    before = torch.optim.AdamW(method.parameters(), lr=1.0, weight_decay=0.5)
    sum(p.sum() for p in method.parameters()).backward()
    before.step()
    checkpoint.save_state(tmp_path, 1, method, before, meta={})
    after = torch.optim.AdamW(method.parameters(), lr=2.0, weight_decay=0.25)
    checkpoint.load_optimizer(after, checkpoint.newest_state(tmp_path))
    assert [(g["lr"], g["weight_decay"]) for g in after.param_groups] == [(2.0, 0.25)]
    for p in method.parameters():
        assert torch.equal(after.state[p]["exp_avg"], before.state[p]["exp_avg"]) and after.state[p]["step"] == 1


def test_the_best_score_outlives_an_interruption(tmp_path):
    assert checkpoint.best_score(tmp_path, "seg") == float("-inf")
    checkpoint.save_weights(tmp_path / checkpoint.BEST, make(), {"val": {"seg": 0.25}})
    assert checkpoint.best_score(tmp_path, "seg") == 0.25
