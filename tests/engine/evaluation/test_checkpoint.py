"""Where the scores of a checkpoint go."""

from pathlib import Path

from engine.evaluation.checkpoint import results_folder


def test_results_go_to_the_run_or_here(tmp_path):
    path = tmp_path / "checkpoints" / "w.safetensors"
    path.parent.mkdir()
    path.touch()
    assert results_folder(str(path), str(path)) == tmp_path
    assert results_folder(str(path.parent), str(path)) == tmp_path
    assert results_folder("more_voc_official", str(path)) == Path()
    (tmp_path / "SHA256SUMS").touch()
    assert results_folder(str(path.parent), str(path)) == Path(), "a release stays as it is"
