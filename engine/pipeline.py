"""From image-level labels to a network of a second stage: commands in a row, each skipped where it is done already.

OUTPUT/TAG holds first/ and second/ (runs), masks/ (pseudo masks), report.html and pipeline.json, which notes with what
each step was done, and the scores. A step is done again where its arguments, the files it reads, or its images and
their labels are not those of then; DEVICES and COUNT may change, as no score depends on them.
"""

import contextlib
import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import count as numbers
from pathlib import Path
from typing import Literal, NamedTuple

from engine.launch import USER_ERROR_CODE
from datasets import ROOT_VARIABLES, build_image_set
from datasets.config import Data
from engine.checkpoints.files import last_weights, read_meta
from engine.config import RunConfig, load_config, portable
from engine.evaluation.results import title
from engine.inference.plan import seed_kind
from engine.inference.prediction_folder import SETTINGS
from engine.training.masks import check_wanted
from model import METHODS
from utils.config import Layers, shown
from utils.errors import UserError
from utils.files import ROOT, hash_of, replacing
from utils.processes import end_with, lock, stops_given_to
from utils.schema import Count, Flag, Section, Text, key

STEPS = ("train_first", "evaluate_first", "sweep", "export", "train_second", "evaluate_second", "report")
SCORES = {"evaluate_first": "first", "sweep": "sweep", "export": "masks", "evaluate_second": "second"}
NOT_FOR_TOOLS = ("seed=", "train.", "loss.", "model.", "evaluate.crf=")   # the weights hold them; steps set it
SET_HERE = ("config", "tag", "resume", "data.masks")


class Keys(Section):
    """Those of the pipeline itself."""

    first: Text = key("more_voc", "ours: config of the first stage")
    second: Text = key("deeplab_voc", "ours: config of the second stage")
    map: Text | None = key(None, "ours: kind of map of the pseudo masks; null: as tools/export_masks.py")
    crf: Flag = key(True, "ours: pseudo masks with the dense CRF")
    sweep: Flag = key(True, "ours: their threshold is the best on data.train_split; false: the method's own thresholds")
    images: Count | None = key(None, "ours: the sweep takes so many of the first images; null: all")
    only: Literal[STEPS] | None = key(None, "ours: one step alone")


class Step(NamedTuple):
    """launcher and arguments: the command. reads: hashes of what it reads, by name."""

    launcher: list[str]
    arguments: list[str]
    reads: dict[str, str | None]


class Pipeline:
    """A method for each of STEPS says what is to be done for it, or in words why it is left out.

    steps, scores: those of pipeline.json. What waits for an earlier step is not `done`, its scores are `kept`.
    """

    def __init__(self, devices: str, count: str, tag: str, settings: Sequence[str]) -> None:
        """settings: key=value pairs, of `Keys`, of a stage (first.KEY, second.KEY) or of both. Raises UserError."""
        if "=" in tag:
            raise UserError(f"TAG is '{tag}': expected a name; was it left out before the key=value arguments?")
        self.keys, self.settings = split_settings(settings)
        self.names = {"first": self.keys.first, "second": self.keys.second}
        self.configs = {stage: _config(stage, self.names[stage], items) for stage, items in self.settings.items()}
        first, layouts = self.configs["first"], [config.data.name for config in self.configs.values()]
        if len(set(layouts)) > 1:
            raise UserError(f"first={self.keys.first}, second={self.keys.second}: data.name is {' and '.join(layouts)}")
        self.split, self.kinds = first.data.train_split, METHODS[first.method].kinds
        self.kind = self.keys.map or seed_kind(first)
        if self.kind not in self.kinds:
            raise UserError(f"map={self.kind}: expected a kind of map of {first.method}: {', '.join(self.kinds)}")
        self.where, self.folder = [devices, count], Path(first.output) / tag
        for items in self.settings.values():
            items[:] = [item for item in items if not item.startswith("output=")]
        self.masks, self.path = self.folder / "masks", self.folder / "pipeline.json"
        results = {stage: self.folder / stage / "results.json" for stage in self.names}
        self.made = {"evaluate_first": results["first"], "sweep": results["first"], "export": self.masks / SETTINGS,
                     "evaluate_second": results["second"], "report": self.folder / "report.html"}
        self.root = first.data.root or os.environ.get(ROOT_VARIABLES.get(first.data.name, ""))

    def run(self) -> int:
        """The exit code: 0, or that of the first step that failed. Raises UserError."""
        with lock(self.folder):
            self._read()
            for name in [self.keys.only] if self.keys.only else STEPS:
                step = getattr(self, name)()
                if isinstance(step, str):
                    self._leave_out(name, step)
                elif self._has_ended(name, inputs := self._inputs(step)):
                    print(f"{name}: done already", flush=True)
                    self._finish(name, self.steps[name].pop("kept", None))
                elif code := self._do(name, step, inputs):
                    return code
            print(f"\n{self._summary()}")
        return 0

    def train_first(self) -> Step:
        script = "scripts/train_coco.py" if self.configs["first"].data.name == "coco" else "scripts/train_voc.py"
        return self._training("first", script)

    def train_second(self) -> Step:
        if not self._has_ended("export"):
            raise UserError(f"{self.masks}: no whole pseudo masks: the step export makes them")
        if not self._has_ended("export", self._inputs(self.export())):
            raise UserError(f"{self.masks}: of other weights or settings: the step export makes new ones")
        return self._training("second", "scripts/train_seg.py", f"data.masks={self.masks}", masks=self.made["export"])

    def _training(self, stage: str, script: str, *more: str, **reads: Path) -> Step:
        launcher = ["bash", f"{ROOT}/run_train.sh", f"{ROOT}/{script}", *self.where, "auto"]
        arguments = [stage, f"config={self.names[stage]}", *self.settings[stage], *more]
        arguments += [f"output={self.folder}", "resume=auto"]
        config = hashlib.sha256(json.dumps(portable(self.configs[stage])).encode()).hexdigest()   # its file may change
        return Step(launcher, arguments, {"config": config, **self._images(stage), **_hashes(reads)})

    @functools.cache   # noqa: B019
    def _images(self, stage: str, split: str | None = None) -> dict[str, str]:
        """split: None for data.train_split."""
        config = self.configs[stage]
        return {"images": build_image_set(config, split or config.data.train_split).identity()}

    def _evaluation(self, stage: str) -> Step | str:
        config = self.configs[stage]
        if config.data.val_split is None:
            return "data.val_split is null"
        launcher, split = evaluator(config.data, self.where)
        weights, crf = self._weights(stage), f"evaluate.crf={shown(config.evaluate.crf)}"
        reads = _hashes({"weights": weights}) | self._images(stage, config.data.val_split)
        return Step(launcher, [*split, str(weights), *self._for_tools(stage), crf], reads)

    evaluate_first = functools.partialmethod(_evaluation, "first")
    evaluate_second = functools.partialmethod(_evaluation, "second")

    def sweep(self) -> Step | str:
        if self._no_sweep:
            return f"{self._no_sweep}; the pseudo masks take the method's own rule"
        images = [f"evaluate.images={self.keys.images}"] if self.keys.images else []
        return self._tool("tools/sweep.py", "--write", *self._for_tools("first"), *images, "evaluate.crf=false")

    @functools.cached_property
    def _no_sweep(self) -> str | None:
        if not self.keys.sweep:
            return "sweep=false"
        if self.kinds[self.kind].background:
            return f"map {self.kind} has a background of its own"
        samples = build_image_set(self.configs["first"], self.split).samples
        lacking = sum(sample.mask is None for sample in samples)
        return f"{lacking} of the {len(samples)} images of {self.split} have no mask" if lacking else None

    def export(self) -> Step:
        threshold, sweep = [], self.sweep()
        if isinstance(sweep, Step):
            if not self._has_ended("sweep", self._inputs(sweep)):
                raise UserError(f"{self.folder}: no threshold for these weights and settings: the step sweep finds it")
            best = (self.steps["sweep"].get("kept") or self.scores["sweep"])[self.kind]["best"]
            threshold = ["--high", f"{best:g}", "--low", f"{best:g}"]
        settings = [*self._for_tools("first"), f"evaluate.crf={shown(self.keys.crf)}"]
        return self._tool("tools/export_masks.py", "--output", str(self.masks), *threshold, *settings)

    def report(self) -> Step:
        weights = {f"{stage}_weights": self._weights(stage) for stage in self.names}
        arguments = [*(str(self.folder / stage) for stage in self.names), "--output", str(self.made["report"])]
        results = {stage: self.made[f"evaluate_{stage}"] for stage in self.names}
        return Step([sys.executable, f"{ROOT}/tools/make_report.py"], arguments, _hashes(results | weights))

    def _tool(self, tool: str, *arguments: str) -> Step:
        """One that makes the map of the pseudo masks on the images that are trained on."""
        weights, launcher = self._weights("first"), [sys.executable, f"{ROOT}/engine/launch.py", f"{ROOT}/{tool}"]
        given = [str(weights), "--map", self.kind, "--split", self.split, *arguments]
        return Step([*launcher, *self.where, "auto"], given, _hashes({"weights": weights}) | self._images("first"))

    def _for_tools(self, stage: str) -> list[str]:
        return [item for item in self.settings[stage] if not item.startswith(NOT_FOR_TOOLS)]

    def _weights(self, stage: str) -> Path:
        """The last weights of a run: its best were chosen on masks of val. Raises UserError where it has no end."""
        step, weights = f"train_{stage}", self._last(stage)
        if weights is None or (step in self.steps and not self._has_ended(step)):
            raise UserError(f"{self.folder / stage}: no finished training: the step {step} makes it")
        return weights

    def _last(self, stage: str) -> Path | None:
        last = last_weights(self.folder / stage / "checkpoints")
        meta = read_meta(last) if last else {}
        return last if last and meta["iteration"] == meta["iterations"] else None

    def _inputs(self, step: Step) -> dict:
        """What a step is done with; the folder's own name has no part in it."""
        arguments = [item.replace(str(self.folder), ".") for item in step.arguments]
        return {"arguments": arguments, "root": self.root, **step.reads}

    def _has_ended(self, name: str, inputs: dict | None = None) -> bool:
        """Whether a step ended, with these inputs where they are given, and what it made is there.

        A record without one of them was written before that was noted.
        """
        record = self.steps.get(name)
        if record is None or not (record["done"] or "kept" in record):
            return False
        if inputs is not None and inputs | record["inputs"] != inputs:
            return False
        return self.made[name].is_file() if name in self.made else self._last(name.removeprefix("train_")) is not None

    def _leave_out(self, name: str, reason: str) -> None:
        print(f"{name}: left out: {reason}", flush=True)
        if self.steps.pop(name, None):
            self.scores.pop(SCORES[name], None)
            self._write()

    def _do(self, name: str, step: Step, inputs: dict) -> int:
        """Runs a step and notes it; the exit code."""
        before = self.steps.get(name)
        same = before is not None and before["inputs"] == inputs
        if name == "export" and before and not (same and self.made[name].is_file()):   # others: they go
            self.made[name].unlink(missing_ok=True)
            shutil.rmtree(self.masks, ignore_errors=True)
        if name == "train_second":
            self._set_aside()
        record = {"inputs": inputs, "seconds": before["seconds"] if same and not before["done"] else 0.0, "done": False}
        self.steps[name] = record
        for later in STEPS[STEPS.index(name) :]:
            scores = self.scores.pop(SCORES.get(later), None)
            if self.steps.get(later, {}).get("done"):
                self.steps[later] |= {"done": False, "kept": scores}
        self._write()
        print(f"\n{name}: {shlex.join([*step.launcher, *step.arguments])}", flush=True)
        started = time.perf_counter()
        code, lines = run_command([*step.launcher, *step.arguments])
        record["seconds"] = round(record["seconds"] + time.perf_counter() - started, 1)
        if code == 0:
            self._finish(name, self._scores_of(name, lines))
            return 0
        self._write()
        if code != USER_ERROR_CODE:   # a mistake was named, and what to do
            print(f"{name} ended with code {code}; the same command goes on from there", file=sys.stderr)
        return code

    def _set_aside(self) -> None:
        """Renames a second/ that began before the masks were made: from which it learned is not in its settings."""
        second, since = self.folder / "second", self.made["export"].stat().st_mtime_ns
        if any(path.stat().st_mtime_ns < since for path in second.glob("checkpoints/iter_*.weights.safetensors")):
            free = next(path for i in numbers(1) if not (path := self.folder / f"second_{i}").exists())
            print(f"{second} learned from other masks: kept as {free.name}")
            second.rename(free)

    def _finish(self, name: str, scores: object) -> None:
        if not self.steps[name]["done"]:
            self.steps[name]["done"] = True
            self.scores |= {SCORES[name]: scores} if name in SCORES else {}
            self._write()

    def _scores_of(self, name: str, lines: list[str]) -> object:
        """What a step that ended found out. lines: what it printed."""
        if name == "export":
            text = next((line for line in lines if line.startswith("mIoU ")), None)
            return {"miou": float(text.split()[1]) / 100 if text else None, "text": text or lines[-1]}
        if name not in SCORES:
            return None
        rows = json.loads(self.made[name].read_text(encoding="utf-8"))
        rows = [row for row in rows if row.get("evaluation") == rows[-1]["evaluation"]]
        if name == "sweep":
            return {row["map"]: {"best": row["background"], "miou": row["miou"]} for row in rows}
        return rows

    def _summary(self) -> str:
        """A line for every score, which says what it is of, and where the report is."""
        first, second = (
            [f"{stage:<6}  mIoU {100 * row['miou']:6.2f} | {title(row)}" for row in self.scores.get(stage, ())]
            for stage in self.names
        )
        masks = [f"masks   {self.scores['masks']['text']}"] if "masks" in self.scores else []
        return "\n".join([*first, *masks, *second, f"report  {self.made['report']}"])

    def _read(self) -> None:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        except ValueError:
            raise UserError(f"{self.path}: cannot be read; move it away, finished trainings are kept") from None
        self.steps, self.scores = known.get("steps", {}), known.get("scores", {})

    def _write(self) -> None:
        content = {**self.names, "steps": self.steps, "scores": self.scores}
        with replacing(self.path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def split_settings(settings: Sequence[str]) -> tuple[Keys, dict[str, list[str]]]:
    """The pipeline's own keys, and the key=value pairs of each stage: those of both, then its own. Raises UserError."""
    own, shared, stages = [], [], {"first": [], "second": []}
    for item in settings:
        name = item.partition("=")[0]
        stage, dot, rest = name.partition(".")
        of_one = bool(dot) and stage in stages
        if (rest if of_one else name) in SET_HERE or (of_one and rest == "output"):
            raise UserError(f"{item}: the pipeline sets it; its own keys are {', '.join(Keys.model_fields)}")
        if of_one:
            stages[stage].append(item.removeprefix(f"{stage}."))
        else:
            (own if name in Keys.model_fields else shared).append(item)
    layers = Layers(Keys)
    layers.add_overrides(own)
    return layers.resolve(), {stage: [*shared, *items] for stage, items in stages.items()}


def evaluator(data: Data, where: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher that scores weights on data.val_split, its arguments before them. where: DEVICES and COUNT."""
    if data.name == "coco":
        script = f"{ROOT}/tools/infer_seg_coco.py"
        return ["bash", f"{ROOT}/run_evaluate_seg_coco.sh", script, *where], [data.val_split]
    return ["bash", f"{ROOT}/run_evaluate_voc.sh", *where], []


def run_command(command: Sequence[str]) -> tuple[int, list[str]]:
    """Runs a command, which does not outlive this process; its exit code as a shell has it, and its lines on stdout.

    Signals that ask to end are passed on.
    """
    parent, received, lines = os.getpid(), [], []
    how = {"env": {**os.environ, "PYTHONUNBUFFERED": "1"}, "start_new_session": True, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=lambda: end_with(parent), **how)

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):   # it ended just now
            os.killpg(process.pid, number)

    with stops_given_to(pass_on), process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return code or (128 + received[0] if received else 0), lines


def _config(stage: str, name: str, settings: Sequence[str]) -> RunConfig:
    try:
        config = load_config(name, [*settings, "data.masks=masks"] if stage == "second" else settings)
        check_wanted(config)
    except UserError as error:
        raise UserError(f"{stage}={name}: {error}") from None
    return config


def _hashes(files: dict[str, Path]) -> dict[str, str | None]:
    return {name: hash_of(path) if path.is_file() else None for name, path in files.items()}
