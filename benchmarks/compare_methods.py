"""Compares methods under equal conditions: trains each with several seeds and a second stage, and writes one table.

    python benchmarks/compare_methods.py FOLDER --first more_shapes afa_shapes --second deeplab_shapes --seeds 0 1 2
    python benchmarks/compare_methods.py FOLDER --only-table

Each config and seed is a pipeline (run_pipeline.sh) in FOLDER/CONFIG_sSEED, the upper bound a second stage on the data
set's own masks in FOLDER/own_sSEED; key=value goes to all of them, first.KEY= and second.KEY= to one stage. All have
their turn with one seed before the next seed begins. Ended at any place, the same call goes on, and --only-table shows
what is done by then: comparison.md, comparison.json with every row used, comparison.svg.

The budget of a first stage is its config's own schedule, --iterations N, or --seconds S of training: S over the seconds
of an iteration with all terms on, from a run of 20 in FOLDER/probe_CONFIG. Iterations at which something begins
(loss.start_after, *_after) are not scaled.
"""

import argparse
import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from engine.launch import run_script
from benchmarks.comparison import OWN, chart, is_stage, markdown, read_json, rows_of_run, table, tag_of
from engine.checkpoints.files import last_weights
from engine.config import find_config, load_config
from engine.pipeline import NOT_FOR_TOOLS, evaluator
from report.private import public
from report.run import read_run
from utils.cli import Parser, count
from utils.config import flatten
from utils.errors import UserError
from utils.files import ROOT, replacing
from utils.processes import end_with, lock

PROBE = 20   # iterations, of which the second half is measured
STEPS = ("train_first", "evaluate_first", "sweep", "export")   # of a pipeline without a second stage
SET_HERE = ("first", "second", "seed", "output", "tag", "config", "resume", "only", "images", "data.masks")
LENGTHS = ("train.iterations", "train.epochs", "first.train.iterations", "first.train.epochs")


def main(argv: list[str]) -> None:
    options = parse(argv)
    state, failed = begin(options), []
    if not options.only_table:
        for name in (*options.first, options.second):
            find_config(name)
        state["command"] = public(f"python benchmarks/compare_methods.py {shlex.join(argv)}")
        with lock(options.folder):
            failed = run(state, options)
    rows = table(state, options.folder)
    save({**state, "rows": rows}, options)
    write(options.table or options.folder / "comparison.md", markdown(state, rows))
    write(options.folder / "comparison.svg", chart(rows))
    print(f"\n{options.table or options.folder / 'comparison.md'}", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the same call tries again")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s FOLDER --first CONFIG ... --second CONFIG [options] [key=value ...]")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--first", nargs="+", default=[], metavar="CONFIG", help="configs of the methods")
    parser.add_argument("--second", metavar="CONFIG", help="config of the second stage")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="default: 0")
    parser.add_argument("--devices", default="cpu", help="cpu, or GPU ids such as 0,1")
    parser.add_argument("--count", default="1", help="of processes")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--iterations", type=count, metavar="N", help="of every first stage")
    budget.add_argument("--seconds", type=count, metavar="S", help="of training of every first stage")
    parser.add_argument("--images", type=count, metavar="N", help="the sweep of thresholds takes the first N images")
    parser.add_argument("--no-second", action="store_true", help="no second stage")
    parser.add_argument("--upper-bound", action="store_true", help="also a second stage on the data set's own masks")
    parser.add_argument("--only-table", action="store_true", help="runs nothing")
    parser.add_argument("--table", type=Path, metavar="FILE", help="default: FOLDER/comparison.md")
    settings = [item for item in argv if "=" in item and not item.startswith("-")]
    options = parser.parse_args([item for item in argv if item not in settings])
    taken = SET_HERE + (LENGTHS if options.iterations or options.seconds else ())
    if wrong := [item for item in settings if item.partition("=")[0] in taken]:
        raise UserError(f"{wrong[0]}: the comparison sets it; --help shows its options")
    options.settings = settings + ([f"images={options.images}"] if options.images else [])
    options.settings += [f"first.train.iterations={options.iterations}"] if options.iterations else []
    return options


def begin(options: argparse.Namespace) -> dict:
    """What comparison.json keeps, and what is asked for now. Raises UserError where it was begun in another way."""
    path = options.folder / "comparison.json"
    asked = {name: getattr(options, name) for name in ("second", "seconds", "settings")}
    state = read_json(path) or {**asked, "first": [], "seeds": [], "upper_bound": False, "iterations": {}, "cells": {}}
    for name, value in {} if options.only_table else asked.items():
        if value != state[name]:
            raise UserError(f"{path}: begun with {name} {state[name]}, not {value}: give the same, or another folder")
    options.seeds = options.seeds or state["seeds"] or [0]
    state["first"] = list(dict.fromkeys([*state["first"], *options.first]))
    state["seeds"] = sorted({*state["seeds"], *options.seeds})
    state["upper_bound"] |= options.upper_bound
    if not state["first"] or not (options.only_table or (options.first and options.second)):
        raise UserError("give --first CONFIG ... and --second CONFIG")
    if len({tag_of(name, 0) for name in state["first"]}) < len(state["first"]):
        raise UserError(f"--first: two of {', '.join(state['first'])} have one name: rename a file")
    return state


def save(state: dict, options: argparse.Namespace) -> None:
    write(options.folder / "comparison.json", json.dumps(state, indent=1))


def write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(f"{text.rstrip()}\n", encoding="utf-8")


def run(state: dict, options: argparse.Namespace) -> list[str]:
    """Asks for everything, seed by seed; a pipeline skips what it has done. The names of what failed."""
    cells = [(config, seed) for seed in options.seeds for config in (*options.first, *[OWN] * options.upper_bound)]
    failed = []
    for config, seed in cells:
        of_one = upper_bound if config == OWN else pipeline
        code, tag = of_one(state, config, seed, options), tag_of(config, seed)
        failed += [tag] if code else []
        state["cells"][tag] = {"exit_code": code, "cores": len(os.sched_getaffinity(0))}
        save(state, options)
    return failed


def pipeline(state: dict, config: str, seed: int, options: argparse.Namespace) -> int:
    """Both stages of a config; the exit code."""
    if options.seconds and config not in state["iterations"] and (code := probe(state, config, options)):
        return code
    length = [f"first.train.iterations={state['iterations'][config]}"] if options.seconds else []
    command = ["bash", ROOT / "run_pipeline.sh", options.devices, options.count, tag_of(config, seed)]
    command += [f"first={config}", f"second={options.second}", f"seed={seed}", f"output={options.folder}"]
    command += [*options.settings, *length]
    commands = [[*command, f"only={step}"] for step in STEPS] if options.no_second else [command]
    return next((code for one in commands if (code := call(one))), 0)


def probe(state: dict, config: str, options: argparse.Namespace) -> int:
    """Measures how many iterations the seconds are, once: later calls keep that; the exit code."""
    settings, tag = settings_of(options, "first"), f"probe_{Path(config).stem}"
    keys = flatten(load_config(config, settings).model_dump())
    settings += [f"{key}=-1" for key, value in keys.items() if is_stage(key, value)]   # all terms are on
    settings += ["data.val_split=null", f"train.iterations={PROBE}", f"train.log_every={PROBE // 2}"]
    if code := train("scripts/train_voc.py", tag, config, settings, options):
        return code
    seconds = read_run(options.folder / tag).metrics["train/seconds_per_iteration"].y[-1]
    state["iterations"][config] = max(1, int(options.seconds / seconds))
    save(state, options)
    return 0


def upper_bound(state: dict, config: str, seed: int, options: argparse.Namespace) -> int:
    """The second stage on the data set's own masks, and its evaluation where that is not done; the exit code."""
    tag, settings = tag_of(config, seed), settings_of(options, "second")
    own = [*settings, f"seed={seed}", "data.masks=own"]
    if code := train("scripts/train_seg.py", tag, options.second, own, options):
        return code
    weights = last_weights(options.folder / tag / "checkpoints")
    if any(Path(row["checkpoint"]).name == weights.name for row in rows_of_run(options.folder / tag)):
        return 0
    launcher, split = evaluator(load_config(options.second, own).data, (options.devices, options.count))
    return call([*launcher, *split, weights, *(item for item in settings if not item.startswith(NOT_FOR_TOOLS))])


def settings_of(options: argparse.Namespace, stage: str) -> list[str]:
    """Those of one stage's run; names without a dot are the pipeline's own."""
    other = "second." if stage == "first" else "first."
    dotted = [item for item in options.settings if "." in item.partition("=")[0] and not item.startswith(other)]
    return [item.removeprefix(f"{stage}.") for item in dotted]


def train(script: str, tag: str, config: str, settings: Sequence[str], options: argparse.Namespace) -> int:
    command = ["bash", ROOT / "run_train.sh", ROOT / script, options.devices, options.count, "auto", tag]
    return call([*command, f"config={config}", *settings, f"output={options.folder}", "resume=auto"])


def call(command: Sequence[object]) -> int:
    """Runs a command, which does not outlive this process; its exit code."""
    parent, words = os.getpid(), [str(word) for word in command]
    print(f"\n{shlex.join(words)}", flush=True)
    return subprocess.run(words, preexec_fn=lambda: end_with(parent), check=False).returncode


if __name__ == "__main__":
    run_script(main)
