"""Files are whole or not there, whoever else writes them and whatever stops the writing."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.evaluation.results import append_results
from engine.inference.pictures import save_picture
from tests import tiny
from utils.config import save_yaml
from utils.errors import UserError
from utils.files import fresh_name, replacing
from utils.log import MetricsWriter, setup_logger

NOISE = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)


def replaced(path, write):
    with replacing(path) as part:
        write({"a": torch.zeros(9999)}, part)


@pytest.mark.parametrize("name, write", [
    ("x.pt", lambda path: replaced(path, torch.save)),
    ("x.safetensors", lambda path: replaced(path, save_file)),
    ("x.png", lambda path: save_picture(path, NOISE)),
    ("x.jpg", lambda path: save_picture(path, NOISE)),
    ("x.yaml", lambda path: save_yaml({"a": "x" * 9999}, path)),
    ("results.json", lambda path: append_results(path, [{"a": "x" * 9999}])),
    ("metrics.jsonl", lambda path: MetricsWriter(path.parent).scalars(0, {"x" * 9999: 0})),
    ("train.log", lambda path: setup_logger(path).info("x" * 9999)),
])
def test_a_full_disk_is_one_line_with_the_file(tmp_path, name, write, monkeypatch):
    monkeypatch.setattr("utils.log._ConsoleHandler.emit", lambda *_: None)
    with tiny.full_disk(9000), pytest.raises(UserError) as caught:
        write(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: File too large"
    if name not in ("metrics.jsonl", "train.log"):   # these grow line by line
        assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """What a killed one left goes after a day; a link is replaced, not what it points to; other faults stay."""
    path, target = tmp_path / "a" / "x", tmp_path / "target"
    target.write_text("kept")
    path.parent.mkdir()
    path.symlink_to(target)
    left = fresh_name(path)
    left.touch()
    os.utime(left, (0, 0))
    monkeypatch.setattr("utils.files._swept", set())
    with replacing(path) as one, replacing(path) as other:
        one.write_text("1")
        other.write_text("2")
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_text(str(1 / 0))
    with pytest.raises(UserError, match="a: is no file that can be replaced"), replacing(path.parent):
        pass
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("x", "1")]
    assert target.read_text() == "kept"
