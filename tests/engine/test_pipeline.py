"""engine/pipeline.py: a whole one, killed ones, changed ones. Commands are forks here, as their imports are done."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from engine.launch import DEVICE, run_script
from engine import pipeline
from engine.inference.pseudo_masks import MaskFormat
from engine.training.step import Trainer
from model import METHODS
from tests import tiny
from tests.engine.training.test_masks import Segmenter
from tests.test_user_errors import assert_one_line
from tools import pipeline as tool
from utils.errors import UserError
from utils.processes import end_with, lock

SECOND = [
    "second=more_voc", "second.method=toy", "second.model.weights=random", "second.data.crop_size=32",
    "second.data.workers=0", "second.train.checkpoint_every=3",
]
SETTINGS = [*(f"first.{item}" for item in tiny.SETTINGS), *SECOND, "crf.iterations=1"]
LAST = f"checkpoints/iter_{tiny.ITERATIONS:06d}.weights.safetensors"


def run(root: Path, output: Path, *more: str, kill: tuple[str, int] = ("", 0)) -> subprocess.CompletedProcess:
    """tools/pipeline.py in a process of its own. kill: of it, in the script of this name, after so many calls."""
    files = [output.with_suffix(f".{stream}") for stream in ("stdout", "stderr")]
    arguments = ["cpu", "1", "tag", f"data.root={root}", f"output={output}", *SETTINGS, *more]
    process = tiny._forks.Process(target=_main, args=(arguments, files, kill))
    process.start()
    process.join(120)
    return subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text() for file in files))


def _main(arguments: list[str], files: list[Path], kill: tuple[str, int]) -> None:
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    METHODS["toy"] = Segmenter
    pipeline.run_command = partial(_command, kill, files[0])
    sys.argv = ["tools/pipeline.py", *arguments]
    run_script(tool.main)


def _command(kill: tuple[str, int], out: Path, command: list[str]) -> tuple[int, list[str]]:
    """In place of `run_command`: what the launchers would start, on one process."""
    scripts = [Path(part) for part in command if part.startswith((f"{tiny.ROOT}/scripts/", f"{tiny.ROOT}/tools/"))]
    script = [*scripts, Path("tools/infer_voc.py")][0]
    arguments = command[command.index("1") + 1 if "1" in command else 2 :]   # behind COUNT
    if script.parent.name == "scripts":
        arguments = [f"tag={arguments[1]}", *arguments[2:]]
    parent, start = os.getpid(), out.stat().st_size
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), out.read_text()[start:].splitlines()
    end_with(parent)
    os.environ[DEVICE] = "cpu"
    if kill[0] == script.stem:
        owner, name = (MaskFormat, "write") if kill[0] == "export_masks" else (Trainer, "step")
        setattr(owner, name, _killing(getattr(owner, name), parent, kill[1]))
    sys.argv = [str(script), *(argument for argument in arguments if argument != "auto")]
    code = 0
    try:
        run_script(importlib.import_module(f"{script.parent.name}.{script.stem}").main)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    os._exit(code)


def _killing(method, parent: int, after: int):
    calls = []

    def killing(self, *arguments):
        calls.append(1)
        if len(calls) > after:
            os.kill(parent, signal.SIGKILL)
            time.sleep(60)   # it ends with its parent
        return method(self, *arguments)

    return killing


def noted(output: Path) -> dict:
    return json.loads((output / "tag/pipeline.json").read_text())


def scores(output: Path) -> dict:
    """Those of pipeline.json, without what every call has anew."""
    found, anew = noted(output)["scores"], ("checkpoint", "seconds", "evaluation")
    rows = {stage: [{name: row[name] for name in row if name not in anew} for row in found[stage]]
            for stage in ("first", "second")}
    return {**found, **rows}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", Segmenter)


@pytest.fixture(scope="module")
def whole(voc_root, tmp_path_factory):
    """(root, output, what was said): one that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    done = run(voc_root, output)
    assert done.returncode == 0, done.stderr
    return voc_root, output, done.stdout


def test_what_is_done_and_said(whole):
    _, output, said = whole
    folder, (steps, found) = output / "tag", (noted(output)[name] for name in ("steps", "scores"))
    assert list(steps) == list(pipeline.STEPS) and all(step["done"] for step in steps.values())
    best, exported = found["sweep"]["lam"]["best"], json.loads((folder / "masks/settings.json").read_text())
    assert (exported["high"], exported["low"], exported["kind"]) == (best, best, "lam") and exported["crf"]
    assert len(list((folder / "masks").glob("*.png"))) == 8 and f" data.masks={folder / 'masks'} " in said
    for stage in ("first", "second"):
        rows = json.loads((folder / stage / "results.json").read_text())
        assert found[stage] and found[stage] == rows[: len(found[stage])]
        assert {row["checkpoint"] for row in rows} == {str(folder / stage / LAST)}
        assert all(f"\n{stage:<6}  mIoU {100 * row['miou']:6.2f} | " in said for row in found[stage])
    assert f"\nmasks   {found['masks']['text']}\n" in said and "LAM: voc train_aug, 8 images" in said
    assert f"mIoU {100 * found['masks']['miou']:6.2f} over " in found["masks"]["text"]
    assert said.endswith(f"report  {folder / 'report.html'}\n") and (folder / "report.html").is_file()


def test_a_second_call_changes_nothing(whole):
    root, output, _ = whole
    times = {path: path.stat().st_mtime_ns for path in (output / "tag").rglob("*") if path.name != ".lock"}
    done = run(root, output)
    assert done.returncode == 0 and done.stdout.count(": done already\n") == 7
    assert {path: path.stat().st_mtime_ns for path in (output / "tag").rglob("*") if path.name != ".lock"} == times


def test_killed_three_times(whole, tmp_path):
    root, output, _ = whole
    for kill in (("train_voc", 4), ("export_masks", 3), ("train_seg", 5)):
        assert run(root, tmp_path, kill=kill).returncode == -signal.SIGKILL
    assert len(noted(tmp_path)["steps"]) == 5 and "second" not in noted(tmp_path)["scores"]
    done = run(root, tmp_path)
    assert done.returncode == 0 and done.stdout.count(": done already\n") == 4, done.stderr
    assert "resumed after iteration 3" in done.stdout
    for stage in ("first", "second"):
        tiny.assert_same_weights(tmp_path / "tag" / stage / LAST, output / "tag" / stage / LAST)
    assert scores(tmp_path) == scores(output)


def test_another_threshold_runs_again_what_is_behind(whole, tmp_path):
    root, output, _ = whole
    shutil.copytree(output / "tag", tmp_path / "tag")
    begun = run(root, tmp_path, "sweep=false", kill=("export_masks", 3))   # in the midst of replacing the masks
    assert begun.returncode == -signal.SIGKILL and list(noted(tmp_path)["scores"]) == ["first"]
    done = run(root, tmp_path, "sweep=false")
    assert done.returncode == 0, done.stderr
    assert "sweep: left out: sweep=false" in done.stdout and "learned from other masks: kept as second_1" in done.stdout
    skipped = [step for step in pipeline.STEPS if f"{step}: done already" in done.stdout]
    assert skipped == ["train_first", "evaluate_first"] and "sweep" not in scores(tmp_path)
    assert "high 0.7, low 0.25" in scores(tmp_path)["masks"]["text"]
    assert scores(tmp_path)["first"] == scores(output)["first"]
    tiny.assert_same_weights(tmp_path / "tag/second_1" / LAST, output / "tag/second" / LAST)


def test_only(whole, tmp_path):
    root, output, _ = whole
    for step, missing in (("export", "train_first"), ("train_second", "export"), ("report", "train_first")):
        assert_one_line(run(root, tmp_path, f"only={step}"), f"the step {missing} makes ")
    shutil.copytree(output / "tag/first", tmp_path / "tag/first")   # a training that pipeline.json does not know
    done = run(root, tmp_path, "only=sweep", "images=3")
    assert done.returncode == 0 and list(noted(tmp_path)["steps"]) == ["sweep"], done.stderr
    assert "LAM: voc train_aug, 3 images" in done.stdout
    assert_one_line(run(root, tmp_path, "only=export"), "no threshold for these weights and settings: the step sweep")


def test_a_second_stage_alone_takes_no_masks_of_other_settings(whole):
    root, output, _ = whole
    assert "train_second: done already\n" in run(root, output, "only=train_second").stdout
    for setting, step in (("map=cam", "sweep"), ("first.evaluate.flip=false", "sweep"), ("crf=false", "export")):
        assert_one_line(run(root, output, "only=train_second", setting), f": the step {step} ")


def test_one_at_a_time(whole):
    root, output, _ = whole
    with lock(output / "tag"):
        assert_one_line(run(root, output), f"{output / 'tag'}: process {os.getpid()} of ")


def test_what_is_not_swept(tiny_voc):
    (tiny_voc / "SegmentationClassAug/tiny_003.png").unlink()
    for kind, reason in (("lam", "1 of the 8 images of train_aug have no mask; "), ("seg", "map seg has a")):
        asked = [*SECOND, f"data.root={tiny_voc}", f"map={kind}"]
        assert pipeline.Pipeline("cpu", "1", "tag", asked).sweep().startswith(reason)


@pytest.mark.parametrize(("edit", "steps"), [
    (lambda root, run: edit_labels(root, "tiny_000"), {"train_first", "sweep"}),
    (lambda root, run: edit_labels(root, "tiny_011"), {"evaluate_first", "evaluate_second"}),
    (lambda root, run: (root / "ImageSets/Segmentation/val.txt").write_text("tiny_009\n"),
     {"evaluate_first", "evaluate_second"}),
    (lambda root, run: (run / "second/weights").write_text("others"), {"evaluate_second", "report"}),
])
def test_what_is_done_again(tiny_voc, tmp_path, monkeypatch, edit, steps):
    """The images of a split, their labels, the weights; a record of before these were noted stays."""
    monkeypatch.setattr(pipeline.Pipeline, "_last", lambda self, stage: self.folder / stage / "weights")
    asked = [*SECOND, f"data.root={tiny_voc}", f"output={tmp_path}"]

    def inputs() -> dict[str, dict]:
        one = pipeline.Pipeline("cpu", "1", "tag", asked)
        one.steps = {}
        names = "train_first", "evaluate_first", "sweep", "evaluate_second", "report"
        return {name: one._inputs(getattr(one, name)()) for name in names}

    for stage in ("first", "second"):
        (tmp_path / "tag" / stage).mkdir(parents=True)
        (tmp_path / "tag" / stage / "weights").write_text(stage)
    before = inputs()
    edit(tiny_voc, tmp_path / "tag")
    after = inputs()
    assert {name for name in after if after[name] != before[name]} == steps
    one = pipeline.Pipeline("cpu", "1", "tag", asked)
    for noted, ended in ((before, {*before} - steps), ({name: {} for name in before}, {*before})):
        one.steps = {name: {"done": True, "inputs": noted[name]} for name in before}
        one.made = {}
        assert {name for name in before if one._has_ended(name, after[name])} == ended


def edit_labels(root: Path, name: str) -> None:
    labels = json.loads((root / "labels.json").read_text())
    (root / "labels.json").write_text(json.dumps(labels | {name: ["person"]}))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_command_ends_with_the_pipeline(tmp_path, number, code):
    child = tmp_path / "child"
    process = tiny._forks.Process(target=_wait, args=(child,))
    process.start()
    while not child.exists() or not child.read_text():
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == code
    time.sleep(0.1)
    left = Path(f"/proc/{child.read_text().strip()}/cmdline")
    assert not left.exists() or not left.read_bytes()   # nobody may have waited for it yet


def _wait(file: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)   # also where the tests run in the background of a shell
    sys.exit(pipeline.run_command(["sh", "-c", f"echo $$ > {file}; exec sleep 60"])[0])


@pytest.mark.parametrize(("setting", "words"), [
    ("first=moer_voc", "first=moer_voc: no config named 'moer_voc'; did you mean 'more_voc'?"),
    ("second.train.iteration=5", "second=.*: unknown key 'train.iteration' .* did you mean 'train.iterations'"),
    ("second.method=more", "second=more_voc: data.masks=masks, but more learns from image labels alone"),
    ("map=lamm", "map=lamm: expected a kind of map of more: cam, lam, fused, seg"),
    ("first=afa_coco", "first=afa_coco, second=.*: data.name is coco and voc"),
    ("only=all", "only = all on the command line: expected train_first or "),
    ("resume=auto", "resume=auto: the pipeline sets it; its own keys are first, second"),
    ("first.output=x", "first.output=x: the pipeline sets it"),
])
def test_mistakes(setting, words):
    with pytest.raises(UserError, match=words) as error:
        pipeline.Pipeline("cpu", "1", "tag", [*SECOND, setting])
    assert "\n" not in str(error.value)
