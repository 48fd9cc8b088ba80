"""Weights files: what is written is read back; whatever is wrong is named; nothing half-written bears a final name."""

import io

import numpy
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from engine.checkpoints import files as checkpoint
from engine.checkpoints.opening import open_checkpoint
from engine.config import load_config
from model import build_method
from utils.errors import UserError

SIZE = "model.backbone_args={embed_dim: 32, depth: 3, num_heads: 2, img_size: 32, patch_size: 8}"
SMALL = ["model.backbone=vit_tiny_patch16_224", SIZE]


def make(classes=5):
    return build_method(load_config(None, SMALL), classes)


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


def of(save, *things):
    """The bytes of a file that save(thing, file) writes."""
    file = io.BytesIO()
    save(*things, file)
    return file.getvalue()


STATE = {"iteration": 6, "optimizer": {}, "kind": "AdamW"}


@pytest.mark.parametrize("content, words", [
    (b"", "an empty file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "Git LFS pointer.*git lfs pull"),
    (b"\n<!DOCTYPE html><html>", "a web page.*download it again"),
    (b'{"a": 1}', "JSON, no weights"),
    ("method: mäßig\n".encode(), "a text, no weights; .*--config"),
    (bytes(200), "not a readable weights file"),
    (b"\x1f\x8b\x08", "an archive: unpack it"),
    (of(lambda file: numpy.save(file, numpy.zeros(3))), "a NumPy array"),
    (of(lambda file: numpy.savez(file, a=numpy.zeros(3))), "a zip archive, or arrays of NumPy"),
    (of(torch.save, torch.nn.Linear(2, 2)), r"other Python objects than tensors.* save state_dict\(\) alone"),
    (of(torch.save, [1]), "holds a list, no weights by name"),
    (of(torch.save, STATE), r"state of an interrupted run; its weights are in iter_000006\.weights\.safetensors"),
    (of(torch.save, STATE)[:300], "a torch file or zip archive that is cut short"),
    (of(torch.jit.save, torch.jit.trace(torch.nn.ReLU(), torch.zeros(1))), r"a TorchScript file: save the state_dict"),
    (save({"a": torch.zeros(9)})[:-1], "a safetensors file that is cut short or damaged"),
    (save({"head.weight": torch.zeros(9)}), "no checkpoint of this method: start weights .* go to model.weights"),
], ids=lambda value: "bytes" if isinstance(value, bytes) else None)  # fmt: skip
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_of_something_else_is_named(tmp_path, name, content, words):
    with pytest.raises(UserError, match="no such"):
        checkpoint.load_weights(tmp_path / name, make())
    (tmp_path / name).write_bytes(content)
    for load in (lambda path: open_checkpoint(str(path), SMALL), lambda path: checkpoint.load_weights(path, make())):
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            load(tmp_path / name)


def test_a_pickle_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth"):
        checkpoint.load_weights(tmp_path / "evil.pth", make())
    assert not (tmp_path / "ran").exists()


def test_the_newest_state_is_taken(tmp_path):
    method = make()
    optimizer = torch.optim.AdamW(method.parameters())
    assert checkpoint.newest_state(tmp_path) is None
    for iteration in (1, 2, 10):
        checkpoint.save_state(tmp_path, iteration, method, optimizer, meta={})
    assert checkpoint.newest_state(tmp_path)["iteration"] == 10
    (tmp_path / "iter_000001.state.pt").unlink()   # as of a run of an earlier version, which kept all its weights
    checkpoint.drop_older(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 5
    checkpoint.drop_older(tmp_path, 1)
    pair = ["iter_000010.state.pt", "iter_000010.weights.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_000001.weights.safetensors", *pair]


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
