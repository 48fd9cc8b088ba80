"""One self-contained HTML page about one or several runs."""

import base64
import json
import re
import shlex
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from engine.config import schema_of
from engine.inference.plan import title_of
from model import METHODS
from report.charts import (
    LEVELS,
    Curve,
    Stage,
    chart_data,
    class_bars,
    confusion_chart,
    confusion_data,
    curve_chart,
    reach_of,
    shares_of,
)
from report.private import public
from report.run import Evaluation, Run, default_config, label, number, row_key
from utils.files import replacing
from utils.images import voc_palette
from utils.metrics import Scores
from utils.schema import keys

TEMPLATES = Path(__file__).parent / "templates"
COLOURS = 8          # of runs in style.css
MAP_COLOURS = 6      # of kinds of map
MISTAKES = 3         # shown for each class
STARTS = "loss.start_after."   # and a term
NOT_SETTINGS = ("tag", "output", "resume")   # differ between any two runs


class Page:
    """What the template shows. images: how many of the best and worst images of each evaluation, None for all."""

    def __init__(self, runs: Sequence[Run], images: int | None = None) -> None:
        self.runs, self.images = runs, images
        self.charts: dict[str, dict] = {}
        self.matrices: dict[str, dict] = {}

    def render(self) -> str:
        """The HTML."""
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(percent=percent, plain=plain, thousands=thousands)
        runs = [self.run(index, run) for index, run in enumerate(self.runs)]
        compared = self.compared(runs) if len(runs) > 1 else None
        return environment.get_template("page.html").render(
            heading=" and ".join(run["name"] for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
            runs=runs, compared=compared, tabs=most_tabs(runs, compared),
            levels=[f"{100 * level:g}" for level in LEVELS],
            style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
            script=Markup((TEMPLATES / "script.js").read_text(encoding="utf-8")),
            data={"charts": self.charts, "matrices": self.matrices}, made=time.strftime("%Y-%m-%d %H:%M"),
        )

    def run(self, index: int, run: Run) -> dict:
        """All about one run."""
        stages, late = stages_of(run)
        evaluations = [
            self.evaluation(f"r{index}e{i}", run, evaluation) | {"number": i}
            for i, evaluation in enumerate(run.evaluations, 1)
        ]
        reached = max((series.x[-1] + 1 for series in run.metrics.values() if series.x), default=0)
        return {
            "key": f"r{index}", "name": run.name, "colour": f"run-{index % COLOURS}",
            "notes": list(map(code, run.notes)),
            "facts": facts_of(run, reached), "newest": evaluations[-1] if evaluations else None,
            "evaluations": evaluations, "stages": stages, "late": late,
            "charts": self.run_charts(f"r{index}", run, stages), "tenths": tenths(run),
            "smoothing": 2 * reach_of(max((len(s.x) for s in run.metrics.values()), default=0)) + 1,
            "validations": validations(run),
            "changed": changed(run.config, run.method), "config": [(k, show(v)) for k, v in run.config.items()],
            "starts": [start_of(start) for start in run.starts],
        }

    def evaluation(self, key: str, run: Run, evaluation: Evaluation) -> dict:
        """The scores, classes, confusion and images of one evaluation."""
        rows = [
            {
                "key": row_key(row), "name": name_of(row_key(row), evaluation.method), "label": label(row),
                "colour": colour_of(run, row["map"]), "crf": bool(row.get("crf")), "iou": ious(row),
                "miou": number(row.get("miou")), "accuracy": number(row.get("pixel_accuracy")),
            }
            for row in evaluation.rows
        ]
        first = evaluation.rows[0]
        return {
            "key": key, "rows": rows, "checkpoint": checkpoint_of(first, run.folder), "id": first.get("evaluation"),
            "of": f"{first.get('dataset', '?')} {first.get('split', '?')}, {first.get('images', '?')} images",
            "notes": list(map(code, evaluation.notes)), "classes": class_rows(rows, evaluation),
            "confusion": [self.confusion(f"{key}-{row['key']}", row, evaluation) for row in rows
                          if row["key"] in evaluation.matrices],
            "images": self.shown_images(run, evaluation),
        }

    def confusion(self, key: str, row: dict, evaluation: Evaluation) -> dict:
        """The matrix of a row as a chart, and for each class what it is taken for."""
        matrix, names = evaluation.matrices[row["key"]], list(row["iou"])
        self.matrices[key] = {"names": names, "rows": confusion_data(matrix)}
        return {"key": key, "name": row["name"], "chart": confusion_chart(key, row["name"], matrix, names),
                "mistakes": mistakes(matrix, names)}

    def shown_images(self, run: Run, evaluation: Evaluation) -> dict | None:
        """The best and worst images with their panels as data URIs; None where no image has scores, as of a sweep."""
        if not evaluation.images.get("images"):
            return None
        content = evaluation.images
        groups = [
            {"place": place, "images": [self.image(shown, run, evaluation) for shown in content[place][: self.images]]}
            for place in ("best", "worst")
        ]
        return {
            "by": name_of(content["ranked_by"], evaluation.method), "groups": groups, "count": len(content["images"]),
            "kept": bool(content["best"] or content["worst"]),
        }

    def image(self, shown: dict, run: Run, evaluation: Evaluation) -> dict:
        scores = evaluation.images["scores"].get(shown["name"], {})
        return {
            "name": shown["name"],
            "scores": [
                (name_of(key, evaluation.method), number(value), colour_of(run, key.removesuffix("_crf")))
                for key, value in scores.items()
            ],
            "classes": [(name, "#{:02x}{:02x}{:02x}".format(*voc_palette()[int(i) % 256]))
                        for name, i in shown["classes"].items() if i],
            "panels": [(panel["caption"], data_uri(evaluation.folder, panel["file"])) for panel in shown["panels"]],
        }

    def chart(self, key: str, name: str, heading: str, note: str, curves: list[Curve], length: int, **more) -> dict:
        self.charts[key] = chart_data(curves, more.get("percent", False))
        return {"name": name, "note": note, "svg": curve_chart(key, heading, curves, length, **more), "curves": curves}

    def run_charts(self, key: str, run: Run, stages: list[Stage]) -> dict[str, list[dict]]:
        """The charts of a run: its terms; the validation; rate and seconds."""
        terms = []
        for term in run.terms:
            series, starts = run.metrics[f"train/{term}"], run.config.get(f"{STARTS}{term}")
            curve = Curve(term, series.x, series.y, "term", True, [stage.after for stage in stages])
            note = term_note(run, term)
            starts = starts if isinstance(starts, int) else None
            terms.append(self.chart(f"{key}-{term}", term, f"loss term {term}", note, [curve], run.length,
                                    stages=stages, starts=starts))
        found = [(kind, run.metrics[f"val/{kind}"]) for kind in run.validated]
        curves = [Curve(name_of(kind, run.method), series.x, series.y, colour_of(run, kind)) for kind, series in found]
        validation = [
            self.chart(f"{key}-validation", "validation", "mIoU of the validation in training", "mIoU, per cent",
                       curves, run.length, stages=stages, percent=True)
        ] if curves else []
        pace = []
        for name, shown, note in (("lr", "learning rate", "of the backbone"),
                                  ("seconds_per_iteration", "seconds per iteration", "validation not counted"),
                                  ("memory_gb", "memory, GB", "the most so far, of the first process")):
            if series := run.metrics.get(f"train/{name}"):
                curve = Curve(shown, series.x, series.y, "pace", name != "lr", [stage.after for stage in stages])
                pace.append(self.chart(f"{key}-{name}", shown, shown, note, [curve], run.length))
        return {"terms": terms, "validation": validation, "pace": pace}

    def compared(self, shown: list[dict]) -> dict:
        """What stands side by side where there are several runs."""
        length = max(run.length for run in self.runs)
        methods = {f"val/{kind}": run.method for run in self.runs for kind in run.validated}
        names = dict.fromkeys(
            name for run in self.runs
            for name in [*(f"val/{kind}" for kind in run.validated), *(f"train/{term}" for term in run.terms)]
        )
        charts = []
        for name in names:
            kind, _, metric = name.partition("/")
            curves = [
                Curve(run.name, run.metrics[name].x, run.metrics[name].y, seen["colour"], kind == "train",
                      [stage.after for stage in seen["stages"]])
                for run, seen in zip(self.runs, shown, strict=True) if name in run.metrics
            ]
            title = metric if kind == "train" else f"{name_of(metric, methods[name])}, validation"
            note = "loss" if kind == "train" else "mIoU, per cent"
            charts.append(self.chart(f"all-{name}", title, title, note, curves, length, percent=kind == "val"))
        keys = dict.fromkeys(key for run in self.runs for key in run.config if key not in NOT_SETTINGS)
        settings = [
            (key, [show(run.config[key]) if key in run.config else "not set" for run in self.runs]) for key in keys
        ]
        return {
            "scores": compared_scores(shown), "charts": charts,
            "settings": [(key, values) for key, values in settings if len(set(values)) > 1],
            "without_config": [run.name for run in self.runs if not run.config], "classes": compared_classes(shown),
        }


def write_page(runs: Sequence[Run], path: Path, images: int | None = None) -> int:
    """Writes the page of the runs; its size in bytes. Raises UserError where it cannot be written."""
    content = Page(runs, images).render().encode("utf-8", "replace")
    with replacing(path) as part:
        part.write_bytes(content)
    return len(content)


def most_tabs(runs: Sequence[dict], compared: dict | None) -> int:
    """The largest number of tabs that stand in one place."""
    counts = [len(evaluation["confusion"]) for run in runs for evaluation in run["evaluations"]]
    return max([*counts, len(compared["classes"]) if compared else 0], default=0)


def percent(value: float | None, digits: int = 2) -> str:
    """A share in 0..1 in per cent."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def plain(value: float | None) -> str:
    """A number to four digits."""
    return "–" if value is None else f"{value:.4g}"


def thousands(value: int) -> str:
    return f"{value:,}"


def show(value: object) -> str:
    """A value of a config as YAML writes it, in one line, without what is private."""
    return public(json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value)


def code(note: str) -> Markup:
    """A note with `...` as code."""
    parts = re.split(r"`([^`]*)`", public(note))
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def name_of(key: str, method: str) -> str:
    """The title of a row, named `KIND` or `KIND_crf`: that of the kind, with `, CRF` behind it."""
    kind = key.removesuffix("_crf")
    return title_of(method, kind) + (", CRF" if key != kind else "")


def colour_of(run: Run, kind: str) -> str:
    """The class of the style sheet for a kind of map, the same all over the run."""
    return f"map-{run.kinds.index(kind) % MAP_COLOURS}" if kind in run.kinds else "map-0"


def ious(row: dict) -> dict[str, float | None]:
    values = row.get("iou")
    return {str(name): number(value) for name, value in values.items()} if isinstance(values, dict) else {}


def checkpoint_of(row: dict, folder: Path) -> str:
    """The checkpoint's path, from the run's folder on where it lies there."""
    text = str(row.get("checkpoint", "unknown checkpoint"))
    path = Path(text)
    if path.parent.name == "checkpoints" and (folder / "checkpoints" / path.name).is_file():
        return f"checkpoints/{path.name}"
    return public(text)


def data_uri(folder: Path, name: str) -> str | None:
    """A JPEG of the evaluation's folder, None where it is missing."""
    try:
        content = (folder / Path(name).name).read_bytes()
    except OSError:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def facts_of(run: Run, reached: int) -> list[tuple[str, str]]:
    """What a run is, in a line."""
    config = run.config
    keys = {"method": "method", "backbone": "model.backbone", "data": "data.name", "batch": "train.batch_size"}
    keys["trained on"] = "data.train_split"
    facts = [(name, show(config[key])) for name, key in keys.items() if key in config]
    planned = config.get("train.iterations")
    of = f" of {planned:,}" if isinstance(planned, int) and planned != reached else ""
    facts.append(("iterations", f"{reached:,}{of}" if reached or of else "unknown"))
    return facts


def stages_of(run: Run) -> tuple[list[Stage], list[str]]:
    """The boundaries within the run, lettered, and in words those that it does not reach."""
    changes: dict[int, list[str]] = {}
    for key, after in run.config.items():
        is_boundary = key.startswith(STARTS) or key.endswith("_after")
        if is_boundary and isinstance(after, int) and not isinstance(after, bool) and after >= 0:
            changes.setdefault(after, []).append(key)
    stages, late = [], []
    for after in sorted(changes):
        terms = [key.removeprefix(STARTS) for key in changes[after] if key.startswith(STARTS)]
        texts = [f"{', '.join(terms)} start{'s' if len(terms) == 1 else ''} to count"] if terms else []
        texts += [f"{key} is passed" for key in changes[after] if not key.startswith(STARTS)]
        if after < run.length:
            stages.append(Stage(after, chr(ord("A") + len(stages) % 26), "; ".join(texts)))
        else:
            late.append(f"after {after:,}: {'; '.join(texts)}")
    return stages, late


def term_note(run: Run, term: str) -> str:
    """Weight and start of a term."""
    weight, after = run.config.get(f"loss.weights.{term}"), run.config.get(f"{STARTS}{term}")
    if term == "total":
        return "the weighted sum"
    parts = [f"weight {weight:g}"] if number(weight) is not None else []
    return ", ".join(parts + ([f"after iteration {after:,}"] if isinstance(after, int) and after >= 0 else []))


def tenths(run: Run) -> list[tuple[str, list[float | None]]]:
    """The mean of every term over each tenth of the run."""
    size, rows = max(run.length / 10, 1), []
    for part in range(10):
        low, high = part * size, (part + 1) * size
        means = []
        for term in run.terms:
            series = run.metrics[f"train/{term}"]
            values = [y for x, y in zip(series.x, series.y, strict=True) if low <= x < high and y is not None]
            means.append(float(np.mean(values)) if values else None)
        if any(mean is not None for mean in means):
            rows.append((f"{int(np.ceil(low)):,} to {int(np.ceil(high)) - 1:,}", means))
    return rows


def validations(run: Run) -> dict:
    """The validations of training as a table."""
    names = run.validated
    at = sorted({x for name in names for x in run.metrics[f"val/{name}"].x})
    by_iteration = [dict(zip(run.metrics[f"val/{n}"].x, run.metrics[f"val/{n}"].y, strict=True)) for n in names]
    titled = [name_of(name, run.method) for name in names]
    return {"names": titled, "rows": [(x, [values.get(x) for values in by_iteration]) for x in at]}


def changed(config: dict, method: str) -> list[tuple[str, str, str]]:
    """(key, value, default) of the keys that differ from the defaults of the method."""
    default, is_known = default_config(method), method in METHODS
    free = tuple(f"{name}." for name in keys(schema_of(method))) if is_known else ()   # inside of a key's value

    def usual(key: str) -> str:
        other = "–" if key.startswith(free) else "no such key today" if is_known else "not known"
        return show(default[key]) if key in default else other

    found = {key: value for key, value in config.items() if key not in default or default[key] != value}
    return [(key, show(value), usual(key)) for key, value in found.items()]


def start_of(start: dict) -> dict:
    """A start of the run: when, the command line, the commit, versions."""
    command = start.get("command")
    words = [str(word) for word in command] if isinstance(command, list) else [str(command)]
    versions = start.get("versions") if isinstance(start.get("versions"), dict) else {}
    commit = str(start["commit"])[:12] if start.get("commit") else "no commit known"
    return {
        "time": str(start.get("time", "unknown time")),
        "command": public(" ".join(shlex.quote(public(word)) for word in words)),
        "commit": commit + (", with changes" if start.get("changed") else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }


def class_rows(rows: list[dict], evaluation: Evaluation) -> list[dict]:
    """One entry for each class: its IoU in each row, drawn and in numbers, and its share of the true pixels."""
    names = list(dict.fromkeys(name for row in rows for name in row["iou"]))
    truth = next((matrix.sum(1) / max(matrix.sum(), 1) for matrix in evaluation.matrices.values()), None)
    shares = dict(zip_longest(names, [] if truth is None else truth.tolist()))
    found = []
    for index, name in enumerate(names):
        values = [row["iou"].get(name) for row in rows]
        drawn = [(row["name"], f"{row['colour']}{' crf' if row['crf'] else ''}", value)
                 for row, value in zip(rows, values, strict=True)]
        found.append({
            "index": index, "name": name, "values": values, "share": shares[name], "bars": class_bars(drawn),
            "absent": all(value is None for value in values),
        })
    return found


def mistakes(matrix: np.ndarray, names: Sequence[str]) -> list[dict]:
    """For each class in the ground truth, the share that is right and what most of the rest is taken for."""
    found = []
    scores = Scores(matrix)
    for index, row in enumerate(shares_of(matrix)):
        if np.isfinite(row[0]):
            others = [i for i in np.argsort(-row, kind="stable") if i != index and row[i] > 0][:MISTAKES]
            found.append({
                "name": names[index], "right": float(row[index]), "precision": number(float(scores.precision[index])),
                "others": [(names[i], float(row[i])) for i in others],
            })
    return found


def compared_scores(shown: list[dict]) -> list[tuple[str, list[tuple[float | None, str] | None]]]:
    """For each label of a number, (mIoU, checkpoint) of the newest row of each run that bears it, else None."""
    newest = [
        {row["label"]: (row["miou"], evaluation["checkpoint"]) for evaluation in run["evaluations"]
         for row in evaluation["rows"]}
        for run in shown
    ]
    labels = dict.fromkeys(text for rows in newest for text in rows)
    return [(text, [rows.get(text) for rows in newest]) for text in labels]


def compared_classes(shown: list[dict]) -> list[dict]:
    """For each label that several runs share: IoU of each class in each run and the difference to the first of them."""
    tables = []
    newest = [{row["label"]: row for e in run["evaluations"] for row in e["rows"]} for run in shown]
    for text in dict.fromkeys(text for rows in newest for text in rows):
        having = [(run, rows[text]["iou"]) for run, rows in zip(shown, newest, strict=True) if text in rows]
        if len(having) > 1:
            names = list(dict.fromkeys(name for _, iou in having for name in iou))
            rows = []
            for name in names:
                first, *rest = values = [iou.get(name) for _, iou in having]
                differences = [None if None in (first, value) else value - first for value in rest]
                rows.append({"name": name, "values": values, "differences": differences})
            largest = max((abs(value) for row in rows for value in row["differences"] if value), default=1.0)
            tables.append({
                "label": text, "key": f"classes-{len(tables)}", "runs": [run for run, _ in having], "rows": rows,
                "largest": largest,
            })
    return tables
