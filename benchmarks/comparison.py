"""The table of compare_methods.py, from what its runs have written; a score that is not there is 'not measured'."""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from engine.evaluation.results import title
from engine.inference.plan import kinds_of
from report.charts import dot_chart
from report.page import STARTS, stages_of
from report.run import read_run
from utils.errors import UserError

OWN, ABSENT = "own", "not measured"   # of the upper bound: the data set's own masks
MAPS, DECODER, MASKS, SECOND = COLUMNS = ("localisation map", "decoder", "pseudo masks", "second stage")
RESULTS = {"miou", "pixel_accuracy", "iou", "checkpoint", "seconds", "evaluation", "text"}   # others are facts
SHOWN = ("map", "method", "iteration")   # facts that the table itself tells
SAME = ("dataset", "split", "images", "crf", "image_labels", "precision")   # facts that the methods share in a column
TUNED = {   # as docs/schedules.md says
    "more_shapes": "start weights, iterations and pseudo_labels.high by trial, four runs scored on the images of val",
    "afa_shapes": "radius out of two values, and the background of the affinity CAM, by scores on val",
    "acr_shapes": "nothing: the first schedule that was tried",
    "more_acr_shapes": "nothing beyond more_shapes; the weight of its two terms was chosen before any run",
    "more_voc_animals": "rates and stages by trial, by losses; the rate of the tokens is the first that was tried",
    "afa_voc_animals": "nothing: the first schedule that was tried",
    "acr_voc_animals": "optimizer and rates by trial, three of them",
    "deeplab_shapes": "rate and iterations by trial, on the pseudo masks of more_shapes with seed 0, scored on val",
    "deeplab_voc_animals": "nothing: the first schedule that was tried",
}
LEGEND = """mIoU in per cent: mean ± sample standard deviation (n - 1) over the seeds, whose number is in brackets; one
seed has no spread. Scores are of the last weights of a run. Localisation map: of the kinds of map that image labels
restrict, the one whose mean is best on these images. Pseudo masks: on the images that are trained on; where the sweep
chose their threshold, it did so by the true masks of these. Iterations and seconds are of the first stage's training,
validation not counted; in the row of the upper bound of the second stage's."""


def table(state: dict, folder: Path) -> list[dict]:
    """A row for every config, last the upper bound. Raises UserError where scores were not measured alike."""
    rows: list[dict] = []
    for config in [*state["first"], *[OWN] * state["upper_bound"]]:
        tags, scores = [tag_of(config, seed) for seed in state["seeds"]], {}
        runs = {tag: scores_of(folder, tag) for tag in tags}
        for column in COLUMNS:
            if found := [run[column] for run in runs.values() if run[column]]:
                best = best_kind(column, found)
                others = [row["scores"][column]["runs"][0] for row in rows if column in row["scores"]]
                agree(column, [*others[:1], best[0]], None if column == SECOND else SAME)
                values = [score["miou"] for score in best]
                sd = stdev(values) if len(values) > 1 else None
                scores[column] = {"mean": mean(values), "sd": sd, "title": best[0]["title"], "runs": best}
        runs_of, inside = (SECOND, "") if config == OWN else (MAPS, "first")
        training = [training_of(folder / tag / inside) for tag in tags if runs[tag][runs_of]]
        second = [training_of(folder / tag / "second") for tag in tags if runs[tag][SECOND] and inside]
        rows.append({"config": config, "training": training, "second_training": second, "scores": scores})
    return rows


def tag_of(config: str, seed: int) -> str:
    return f"{Path(config).stem}_s{seed}"


def is_stage(key: str, value: object) -> bool:
    """Whether a key of the config is an iteration at which something begins."""
    return type(value) is int and (key.startswith(STARTS) or key.endswith("_after"))


def read_json(path: Path) -> dict | list | None:
    """None where there is no such file. Raises UserError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError:
        raise UserError(f"{path}: cannot be read; move it away, and run again what wrote it") from None


def rows_of_run(run: Path) -> list[dict]:
    """Those of its last evaluation."""
    rows = read_json(run / "results.json") or []
    return [row for row in rows if row["evaluation"] == rows[-1]["evaluation"]]


def scores_of(folder: Path, tag: str) -> dict[str, list[dict]]:
    """By column the scores of a run, one for each kind of map: {run, map, miou, title, row}."""
    found = (read_json(folder / tag / "pipeline.json") or {}).get("scores", {})
    first, second, masks = (found.get(part) or [] for part in ("first", "second", "masks"))
    labelled = {row["map"] for row in first if kinds_of(row["method"])[row["map"]].uses_labels}
    made = []
    if masks and masks["miou"] is not None:
        heading = masks["text"].partition(" | ")[2].partition(", high ")[0]   # each run has thresholds of its own
        kind, rest = heading.split(": ", 1)
        facts = dict(zip(("split", "images", "protocol"), rest.split(", ", 2), strict=True))
        made = [{"run": tag, "map": kind, "miou": masks["miou"], "title": heading, "row": {**masks, **facts}}]
    return {MAPS: scored(tag, [row for row in first if row["map"] in labelled]), MASKS: made,
            DECODER: scored(tag, [row for row in first if row["map"] not in labelled]),
            SECOND: scored(tag, second or rows_of_run(folder / tag))}


def scored(tag: str, rows: Sequence[dict]) -> list[dict]:
    """With CRF where the evaluation has made it."""
    used = [row for row in rows if row["crf"] == any(row["crf"] for row in rows)]
    return [{"run": tag, "map": row["map"], "miou": row["miou"], "title": title(row), "row": row} for row in used]


def best_kind(column: str, runs: Sequence[Sequence[dict]]) -> list[dict]:
    """The scores of the kind of map with the best mean, one a run."""
    kinds: dict[str, list[dict]] = {}
    for score in (score for scores in runs for score in scores):
        kinds.setdefault(score["map"], []).append(score)
    for kind, scores in kinds.items():
        agree(column, scores)
        if len(scores) < len(runs):
            names = " and ".join(dict.fromkeys(scores[0]["run"] for scores in runs))
            raise UserError(f"{names}: {column} {kind} is not in all of them: give all the same evaluate.maps and map")
    return max(kinds.values(), key=lambda scores: mean(score["miou"] for score in scores))


def agree(column: str, scores: Sequence[dict], keys: Iterable[str] | None = None) -> None:
    """Raises UserError where two were not measured alike. keys: of their rows; None: all facts."""
    for a, b in itertools.pairwise(scores):
        for key in differing([a, b], keys):
            what = f"{a['row'].get(key)} in one and {b['row'].get(key)} in the other"
            raise UserError(f"{a['run']} and {b['run']}: {column} with {key} {what}: evaluate both alike")


def differing(scores: Sequence[dict], keys: Iterable[str] | None = None) -> list[str]:
    """The facts in which the scores are not alike."""
    rows = [score["row"] for score in scores]
    keys = keys or dict.fromkeys(key for row in rows for key in row if key not in RESULTS)
    return [key for key in keys if any(row.get(key) != rows[0].get(key) for row in rows)]


def training_of(folder: Path) -> dict:
    """What a run was trained with, and the seconds that its iterations took."""
    run, seconds, before = read_run(folder), 0.0, -1
    series = run.metrics.get("train/seconds_per_iteration")
    for iteration, each in zip(series.x, series.y, strict=True) if series else ():
        seconds, before = seconds + each * (iteration - before), iteration
    stages, late = stages_of(run)
    texts = [f"after {stage.after}: {stage.text}" for stage in stages] + [f"never reached: {text}" for text in late]
    start = {key: run.starts[-1][key] for key in ("command", "commit", "versions")} if run.starts else {}
    return {"run": str(folder), "start_weights": run.config.get("model.weights"), "iterations": before + 1,
            "seconds": round(seconds, 1), "stages": texts, **start}


def markdown(state: dict, rows: Sequence[dict]) -> str:
    """The table, and below it what each number is."""
    heads = ("config", "start weights", "iterations", "seconds a run", *COLUMNS)
    lines = [heads, ["---"] * len(heads), *([*training_cells(row), *score_cells(row)] for row in rows)]
    lines = [f"| {' | '.join(line)} |" for line in lines]
    command = f"    {state.get('command', '')}"
    return "\n".join([*lines, "", LEGEND, "", budget(state), "", command, "", *notes(state, rows)])


def training_cells(row: dict) -> list[str]:
    runs = row["training"]
    keys = "start_weights", "iterations"
    weights, iterations = (", ".join(dict.fromkeys(str(run[key]) for run in runs)) for key in keys)
    seconds = spread([run["seconds"] for run in runs], 0)
    return [marked(row["config"]), *(text or ABSENT for text in (weights, iterations, seconds))]


def marked(config: str) -> str:
    """The name of a row in Markdown."""
    return "true masks (upper bound)" if config == OWN else f"`{config}`"


def score_cells(row: dict) -> list[str]:
    scores, cells = row["scores"], []
    kinds = kinds_of(scores[MAPS]["runs"][0]["row"]["method"]) if MAPS in scores else {}
    for column in COLUMNS:
        if column in scores:
            name = f"{scores[column]['title'].partition(':')[0]} " if column in (MAPS, MASKS) else ""
            values = [100 * score["miou"] for score in scores[column]["runs"]]
            cells.append(f"{name}{spread(values, 2)} ({len(values)})")
        else:
            lacks = column == DECODER and kinds and all(kind.uses_labels for kind in kinds.values())
            cells.append("none" if lacks or (row["config"] == OWN and column != SECOND) else ABSENT)
    return cells


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation; '' of nothing."""
    after = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{after}" if values else ""


def budget(state: dict) -> str:
    fixed = [item.rpartition("=")[2] for item in state["settings"] if item.startswith("first.train.iterations=")]
    if not state["seconds"] and not fixed:
        return "Budget: each config's own schedule."
    words = f"{state['seconds']} seconds" if state["seconds"] else f"{fixed[-1]} iterations"
    return f"Budget: {words} of training for every first stage; where its stages begin is as in its config, not scaled."


def notes(state: dict, rows: Sequence[dict]) -> list[str]:
    """What each score is of, in what the rows of a column differ, the stages, and what was tuned."""
    lines = ["What each number is of:", ""]
    for column in COLUMNS:
        shown = {row["config"]: row["scores"][column] for row in rows if column in row["scores"]}
        for heading in dict.fromkeys(of["title"] for of in shown.values()):
            whose = ", ".join(marked(name) for name, of in shown.items() if of["title"] == heading)
            lines.append(f"- {column}, {whose}: {heading}")
        others = [key for key in differing([of["runs"][0] for of in shown.values()]) if key not in SHOWN]
        lines += [f"- {column}: not the same in all rows: {', '.join(others)}"] if others else []
    lines += ["", "Stages of the training:", ""]
    begun = {row["config"]: row["training"][0]["stages"] for row in rows if row["training"]}
    lines += [f"- {marked(name)}: {'; '.join(stages) or 'one'}" for name, stages in begun.items()]
    names, lines = filter(None, (*state["first"], state["second"])), [*lines, "", "What was tuned:", ""]
    return lines + [f"- `{name}`: {TUNED.get(name, 'not stated')}" for name in names]


def chart(rows: Sequence[dict]) -> str:
    """Every run of every row."""
    series = {}
    for column in COLUMNS:
        runs = [row["scores"].get(column, {"runs": ()})["runs"] for row in rows]
        series |= {column: [[score["miou"] for score in one] for one in runs]} if any(runs) else {}
    return str(dot_chart([marked(row["config"]).strip("`") for row in rows], series))
