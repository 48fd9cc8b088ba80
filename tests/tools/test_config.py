"""tools/config.py: every key with its value and where that is from."""

import subprocess
import sys

import pytest

from engine.config import load_config
from tests import tiny
from tools.config import main
from utils.config import flatten
from utils.errors import UserError


def test_every_key_says_where_it_is_from(capsys, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("base: more_shapes\nmodel: {backbone_args: {depth: 3}}\n")
    main([str(own), "train.epochs=3", "data.classes=[a,b]"])
    lines = capsys.readouterr().out.splitlines()
    config = load_config(own, ["train.epochs=3", "data.classes=[a,b]"])
    assert [line.partition(": ")[0] for line in lines] == list(flatten(config.model_dump()))
    for line in (
        "data.crop_size: 80   # in configs/more_shapes.yaml", "data.classes: [a, b]   # on the command line",
        "train.iterations: null   # on the command line, with epochs", "evaluate.scales.cam: [1.0]   # default of more",
        f"model.backbone_args.depth: 3   # in {own}", "model.registers: 4   # default (code)",
        "model.backbone_args.patch_size: 8   # in configs/more_shapes.yaml",
        "evaluate.flip: true   # default (code of MoRe)",
    ):
        assert line in lines


@pytest.mark.parametrize(("arguments", "message"), [
    (["more_vox"], "no config named 'more_vox'; did you mean 'more_voc'"),
    (["more_voc", "train.batchsize=8"], "unknown key 'train.batchsize' on the command line"),
    (["more_voc", "train.batch_size=0"], "train.batch_size = 0 on the command line: expected an integer, at least 1"),
    ([], "the following arguments are required: NAME"),
])  # fmt: skip
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_a_mistake_is_one_line(tmp_path):
    command = [sys.executable, str(tiny.ROOT / "tools/config.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
