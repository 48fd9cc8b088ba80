"""The dialect of the tools that take a checkpoint."""

import pytest

from utils.cli import CheckpointParser, Parser, count
from utils.errors import UserError


def parser(*shared, **more):
    result = CheckpointParser("what it does", "INPUT ", *shared, **more)
    result.add_argument("inputs", nargs="*")
    return result


def test_pairs_go_to_the_config_after_what_options_stand_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.jpg").touch()
    shared = "crf", "multi-scale", "batch", "device", "overwrite"
    argv = ["evaluate.crf=false", "w.pth", "a=b.jpg", "--batch", "2", "x=1", "--crf", "c.jpg", "--config=mine"]
    options = parser(*shared).read(argv)
    assert (options.checkpoint, options.inputs, options.config) == ("w.pth", ["a=b.jpg", "c.jpg"], "mine")
    assert options.settings == ["evaluate.images_at_once=2", "evaluate.crf=true", "evaluate.crf=false", "x=1"]
    assert options.device is None and not options.overwrite
    assert parser("multi-scale").read(["w.pth", "--multi-scale"]).settings == ["evaluate.multi_scale=true"]
    assert parser().read(["w.pth"]).settings == []
    assert CheckpointParser("", "", nargs="?").read(["x=1"]).checkpoint is None


@pytest.mark.parametrize(("argv", "message"), [
    ([], "the following arguments are required: CHECKPOINT; --help says more"),
    (["w.pth", "--crf"], "unrecognized arguments: --crf"),
    (["w.pth", "--device", "tpu"], "invalid choice: 'tpu'"),
])  # fmt: skip
def test_a_mistake_is_a_user_error(argv, message):
    with pytest.raises(UserError, match=message):
        CheckpointParser("", "", "device").read(argv)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_counts(text):
    result = Parser()
    result.add_argument("--most", type=count)
    assert result.parse_args(["--most", "3"]).most == 3
    with pytest.raises(UserError, match=f"--most: '{text}' is no number of 1 or more"):
        result.parse_args([f"--most={text}"])


@pytest.mark.parametrize(("item", "words"), [
    ("checkpoint=w.pth", "checkpoint=w.pth: write the path alone, first in its place"),
    ("output=masks", "output=masks: write --output VALUE in its place"),
])  # fmt: skip
def test_arguments_of_the_former_dialect_are_told_apart(item, words):
    with pytest.raises(UserError, match=words):
        CheckpointParser(None, "").read([item])


def test_a_long_pair_is_no_file():
    names = ",".join(f"class_number_{index}" for index in range(40))
    assert CheckpointParser(None, "").read(["w.pth", f"data.classes=[{names}]"]).settings == [f"data.classes=[{names}]"]
