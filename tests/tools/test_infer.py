"""The evaluation tools' arguments; whole runs are in tests/test_end_to_end*.py."""

import pytest

from tools import infer_seg_coco, infer_voc
from utils.errors import UserError

TOOLS = [infer_voc, infer_seg_coco]


@pytest.fixture
def calls(monkeypatch):
    """What `evaluate_checkpoint` is called with, in place of a call: checkpoint, settings, config, fallback."""
    calls = []
    monkeypatch.setattr(infer_voc, "evaluate_checkpoint", lambda ranks, *given: calls.append(given[:4]))
    return calls


def test_checkpoint_is_taken_out(calls, tmp_path):
    path = tmp_path / "a=b.safetensors"
    path.touch()
    infer_voc.main(["tag=x", str(path), "--config", "mine", "seed=1", "--crf", "--device", "cpu"])
    infer_seg_coco.main([str(path), "evaluate.base_size=64", "--batch", "2"])
    assert calls == [
        (str(path), ["evaluate.crf=true", "tag=x", "seed=1"], "mine", "more_voc"),
        (str(path), ["evaluate.base_size=null", "evaluate.images_at_once=2", "evaluate.base_size=64"], None,
         "more_coco"),
    ]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("argv", [[], ["seed=1"]])
def test_no_checkpoint(argv, tool):
    with pytest.raises(UserError, match="required: CHECKPOINT"):
        tool.main(argv)


@pytest.mark.parametrize("tool", TOOLS)
def test_missing_checkpoint_is_named(tmp_path, tool):
    with pytest.raises(UserError, match="nowhere.pth: no such checkpoint"):
        tool.main([str(tmp_path / "nowhere.pth"), "--device", "cpu"])
