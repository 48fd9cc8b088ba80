"""The evaluation tools' arguments; whole runs are in tests/test_end_to_end*.py."""

from pathlib import Path

import pytest

from engine.evaluation.results import append_results
from tools.infer_voc import results_folder, split_checkpoint
from utils.errors import UserError


def test_checkpoint_is_taken_out(tmp_path):
    path = tmp_path / "a=b.safetensors"
    path.touch()
    assert split_checkpoint(["tag=x", f"checkpoint={path}", "seed=1"]) == (str(path), ["tag=x", "seed=1"])


@pytest.mark.parametrize("argv", [[], ["seed=1"], ["checkpoint="]])
def test_no_checkpoint(argv):
    with pytest.raises(UserError, match="checkpoint=PATH"):
        split_checkpoint(argv)


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.pth: no such checkpoint"):
        split_checkpoint([f"checkpoint={tmp_path / 'nowhere.pth'}"])


def test_results_go_to_the_run_or_here(tmp_path):
    path = tmp_path / "checkpoints" / "w.safetensors"
    path.parent.mkdir()
    path.touch()
    assert results_folder([f"checkpoint={path}"], str(path)) == tmp_path
    assert results_folder([f"checkpoint={path.parent}"], str(path)) == tmp_path
    assert results_folder(["checkpoint=more_voc_official"], str(path)) == Path()
    (tmp_path / "SHA256SUMS").touch()
    assert results_folder([f"checkpoint={path.parent}"], str(path)) == Path(), "a release stays as it is"


def test_results_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="results.json: the results cannot be written"):
        append_results(tmp_path / "file" / "results.json", [])
