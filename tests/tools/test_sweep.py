"""tools/sweep.py: what it prints and writes, on one process and on two, and the report of it."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from engine.evaluation.results import title
from report.page import write_page
from report.run import evaluate_command, read_run
from tests import tiny
from tools import infer_voc
from tools import sweep as tool
from utils.errors import UserError


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return str(tiny.save_checkpoint(tmp_path / "run" / "checkpoints" / "tiny.safetensors"))


def test_two_processes_write_what_one_prints(checkpoint, tiny_voc, tmp_path, capsys):
    settings = [f"data.root={tiny_voc}", "data.workers=0", "evaluate.images=7"]
    run, before = tmp_path / "run", sorted(tmp_path.rglob("*"))
    tool.main([checkpoint, "--split", "train", *settings, "evaluate.bkg=0.9"])
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written unasked"
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    command = [sys.executable, "engine/launch.py", "tools/sweep.py", "cpu", "2", "auto", checkpoint, "--write"]
    command += [*settings, "--split", "train"]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[-1 - len(printed) : -1] == printed and lines[-1].startswith(f"results: {run / 'results.json'}")

    rows, [folder] = json.loads((run / "results.json").read_text()), (run / "evaluation").iterdir()
    written = json.loads((folder / "sweep.json").read_text())
    drawn = "".join(ElementTree.parse(folder / "sweep.svg").getroot().itertext())
    for row, name in zip(rows, ("CAM", "LAM"), strict=True):   # those of evaluate.maps with a threshold
        own, heading = written["maps"][row["map"]], title(row)
        best, miou = int(np.argmax(own["miou"])), f"{100 * row['miou']:.2f}"
        assert (own["best"], row["background"], row["miou"]) == (best / 100, best / 100, own["miou"][best])
        np.testing.assert_allclose(own["miou_all"], np.array(own["miou"]) * 5 / 21, rtol=1e-6)   # 5 ids are there
        chosen = f", background {best / 100:g}, best of 100 backgrounds on this split, "
        curve = printed[printed.index(heading.replace(chosen, ", ")) :]
        marked = next(line for line in curve if line.endswith(" best"))
        assert marked.split()[:2] == [f"{best / 100:.2f}", miou] and f"{name} {miou} at {best / 100:g}" in drawn
        assert any(line.startswith(f"mIoU {miou:>6} over 5 ") and line.endswith(heading) for line in curve)
        by_acr = f"mIoU {100 * own['miou_all'][best]:6.2f} over all 21 with background, 0 for absent ones (ACR's way)"
        assert f"{by_acr} | {heading}" in curve

    # an evaluation at the best threshold has its scores, and a report shows both
    at_best = [f"evaluate.bkg={rows[1]['background']}", "evaluate.maps=[lam]", "data.val_split=train"]
    infer_voc.main([checkpoint, *settings, *at_best])
    again = json.loads((run / "results.json").read_text())[2]
    assert {**rows[1], **{name: again[name] for name in ("seconds", "evaluation")}} == {**again, "best_of": 100}
    read = read_run(run)
    assert not any(evaluation.notes for evaluation in read.evaluations)
    assert [list(evaluation.matrices) for evaluation in read.evaluations] == [["cam", "lam"], ["lam"]]
    write_page([read], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert title(rows[1]) in page and page.count("Best and worst images") == 1   # a sweep keeps none
    words = evaluate_command(run, rows, read.config)
    assert words.startswith(f"python tools/sweep.py --write {checkpoint} ") and "evaluate.bkg" not in words


@pytest.mark.parametrize(("arguments", "message"), [
    (["--map", "cam", "seg"], "map seg has a background .*; kinds of more with a threshold: cam, lam, fused"),
    (["evaluate.maps=[seg]"], "map seg has a background of its own"),
    (["evaluate.crf=true"], r"evaluate\.crf: .*; give evaluate\.crf=false"),
])
def test_mistakes(checkpoint, tiny_voc, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        tool.main([checkpoint, "--write", f"data.root={tiny_voc}", *arguments])
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "evaluation").exists()
