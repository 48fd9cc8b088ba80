"""What a run's folder holds, read for a report: whatever is broken or missing becomes a note, never an error."""

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.config import DEFAULT_METHOD, RunConfig, load_config, up_to_date
from engine.evaluation.image_scores import EVALUATIONS
from engine.evaluation.results import title
from engine.inference.plan import kinds_of
from model import METHODS
from report.private import public
from utils.config import flatten, parse_yaml
from utils.errors import UserError
from utils.metrics import Scores

FILES = ("config.yaml", "metrics.jsonl", "results.json")
PLAIN = re.compile(r"[\w@%+=:,./\[\]-]+")   # words that a shell leaves as they are
NOT_TERMS = ("lr", "seconds_per_iteration", "memory_gb", "skipped", "skipped_steps")


@dataclass
class Series:
    """The values of a metric, None where one is not finite, and their iterations."""

    x: list[int] = field(default_factory=list)
    y: list[float | None] = field(default_factory=list)


@dataclass
class Evaluation:
    """Rows of results.json that one evaluation made, and what its folder holds.

    matrices: int64 (K+1, K+1) by the name of the row (`KIND`, `KIND_crf`); images: what images.json says.
    """

    rows: list[dict]
    folder: Path | None = None
    matrices: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        return method_of(self.rows[0])


@dataclass
class Run:
    """config: values by dotted key; metrics: by the name in metrics.jsonl; starts: lines of provenance.jsonl."""

    folder: Path
    name: str
    config: dict[str, Any]
    metrics: dict[str, Series]
    starts: list[dict]
    evaluations: list[Evaluation]
    notes: list[str]

    @property
    def terms(self) -> list[str]:
        """Loss terms, `total` first, then in the order of the config."""
        names = [name.removeprefix("train/") for name in self.metrics if name.startswith("train/")]
        weights = [key for key in self.config if key.startswith("loss.weights.")]
        known = [name for name in ("total", *(key.removeprefix("loss.weights.") for key in weights)) if name in names]
        return known + [name for name in names if name not in (*known, *NOT_TERMS)]

    @property
    def method(self) -> str:
        """As the config says, else the newest evaluation."""
        return method_of(next((row for row in (self.config, *self.rows[::-1]) if "method" in row), {}))

    @property
    def rows(self) -> list[dict]:
        """Those of all evaluations."""
        return [row for evaluation in self.evaluations for row in evaluation.rows]

    @property
    def validated(self) -> list[str]:
        """What validation scored: the method's kinds of map in their order, then others."""
        return [kind for kind in self.kinds if f"val/{kind}" in self.metrics]

    @property
    def kinds(self) -> list[str]:
        """Every kind of map that the run has: the method's in their order, then others."""
        found = [name.removeprefix("val/") for name in self.metrics if name.startswith("val/")]
        return list(dict.fromkeys([*kinds_of(self.method), *found, *(str(row["map"]) for row in self.rows)]))

    @property
    def length(self) -> int:
        """Iterations of the whole run: as the config says, or as far as the metrics go."""
        last = max((series.x[-1] + 1 for series in self.metrics.values() if series.x), default=0)
        planned = self.config.get("train.iterations")
        return max(last, planned) if isinstance(planned, int) else last


def read_run(folder: Path) -> Run:
    """Raises UserError where the folder is missing or holds none of a run's files."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run, such as runs/demo")
    if not any((folder / name).exists() for name in FILES):
        raise UserError(f"{folder} holds no run: none of {', '.join(FILES)} is there")
    notes: list[str] = []
    config = read_config(folder / "config.yaml", notes)
    name = str(config.get("tag") or folder.resolve().name)
    metrics = read_metrics(folder / "metrics.jsonl", notes)
    starts = [line for line in _json_lines(folder / "provenance.jsonl", notes) if isinstance(line, dict)]
    return Run(folder, name, config, metrics, starts, read_evaluations(folder, config, notes), notes)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """`read_run` of each folder; runs of one name are told apart by their folders."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name += f" ({public(str(run.folder))})"
    return runs


def read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    """Values by today's dotted keys, {} where the file cannot be read; those of a later version under their own."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: the settings and the stages of the losses are not known")
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} cannot be read: the settings and the stages of the losses are not known")
        return {}
    try:
        content = up_to_date(content, f"in {path.name}", method_of(content))
    except UserError as error:
        notes.append(str(error))
    return {key: value for key, value in flatten(content).items() if key != "schema"}


def default_config(method: str) -> dict[str, Any]:
    """The defaults of a method's runs by dotted key; of a method that this version does not know, those of any run."""
    config = load_config(None, [f"method={method}"]) if method in METHODS else RunConfig()
    return flatten(config.model_dump(mode="json"))


def method_of(settings: Mapping) -> str:
    """The method of a config or of a row of results.json; early ones do not name theirs."""
    return str(settings.get("method") or DEFAULT_METHOD)


def read_metrics(path: Path, notes: list[str]) -> dict[str, Series]:
    """The curves of a metrics.jsonl. A line that goes back to an earlier iteration replaces all from that one on."""
    kept: dict[str, list[dict]] = {}
    replaced, whole = 0, list(_json_lines(path, notes))
    counted = (line for line in whole if isinstance(line, dict) and type(line.get("iteration")) is int)
    lines = [line for line in counted if line["iteration"] >= 0]
    for line in lines:
        names = [name for name in line if name not in ("iteration", "time")]
        same = kept.setdefault(names[0].partition("/")[0] if names else "", [])
        while same and same[-1]["iteration"] >= line["iteration"]:
            same.pop()
            replaced += 1
        same.append(line)
    if len(lines) < len(whole):
        notes.append(f"{path.name}: {len(whole) - len(lines)} line(s) without an iteration are left out")
    if replaced:
        notes.append(f"{path.name}: {replaced} line(s) were written again by a resumed run; the later ones count")
    curves: dict[str, Series] = {}
    for line in (line for group in kept.values() for line in group):
        for name in line.keys() - {"iteration", "time"}:
            series = curves.setdefault(name, Series())
            series.x.append(line["iteration"])
            series.y.append(number(line[name]))
    broken = sorted(name for name, series in curves.items() if None in series.y)
    if broken:
        notes.append(f"{path.name}: values that are not finite in {', '.join(broken)}; the curves have gaps there")
    order = {name: index for index, name in enumerate(name for line in lines for name in line)}
    return dict(sorted(curves.items(), key=lambda item: order[item[0]]))


def read_evaluations(folder: Path, config: dict[str, Any], notes: list[str]) -> list[Evaluation]:
    """The rows of results.json in groups that one evaluation made, in their order."""
    path = folder / "results.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        command = evaluate_command(folder, [], config)
        notes.append(f"{path.name} is missing: no evaluation was made; `{command}` makes one")
        return []
    except (OSError, ValueError):
        rows = None
    if not isinstance(rows, list):
        notes.append(f"{path.name} cannot be read as a list of results")
        return []
    groups: list[list[dict]] = []
    for index, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "map" not in row:
            notes.append(f"{path.name}: entry {index} is no result and is left out")
            continue
        if number(row.get("miou")) is None:
            notes.append(f"{path.name}: the mIoU of entry {index} ({row['map']}) is not a finite number")
        if not groups or not _same_evaluation(groups[-1], row):
            groups.append([])
        groups[-1].append(row)
    return [_read_evaluation(folder, group, evaluate_command(folder, group, config)) for group in groups]


def row_key(row: Mapping) -> str:
    """`KIND`, or with CRF `KIND_crf`: as the files of an evaluation name a row."""
    return f"{row['map']}{'_crf' if row.get('crf') else ''}"


def label(row: Mapping) -> str:
    """What a row's numbers are of, in the words of the evaluation; of an incomplete row, what there is."""
    try:
        return title(row)
    except (KeyError, TypeError, ValueError):
        known = (f"{name} {row[name]}" for name in ("map", "dataset", "split", "images", "crf") if name in row)
        return f"incomplete entry: {', '.join(known)}"


def number(value: Any) -> float | None:
    """The value where it is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def evaluate_command(folder: Path, rows: list[dict], config: dict[str, Any]) -> str:
    """The command that makes the rows again, with what differs from the run's config as key=value."""
    known = rows[0].get("checkpoint") if rows else None
    own = folder / "checkpoints" / Path(str(known or "best.weights.safetensors")).name
    checkpoint = known if known and not own.is_file() else own
    settings, tool = _settings(rows), "bash run_evaluate_voc.sh cpu 1"
    config = {"crf.background_power": 1.0, **config}   # early configs lack it
    if rows and rows[0].get("best_of"):
        del settings["evaluate.bkg"]
        tool = "python tools/sweep.py --write"
    precision = config.get("evaluate.precision") or config.get("train.precision")
    if precision in ("auto", settings.get("evaluate.precision")):
        settings.pop("evaluate.precision", None)
    changed = {key: value for key, value in settings.items() if config.get(key) != value}
    texts = [f"{key}={json.dumps(value, separators=(',', ':'))}".replace('"', "") for key, value in changed.items()]
    words = (word if PLAIN.fullmatch(word) else shlex.quote(word) for word in (str(checkpoint), *texts))
    return public(" ".join([tool, *words]))


def _settings(rows: list[dict]) -> dict[str, Any]:
    """The keys of a config that rows tell of, those of one evaluation."""
    if not rows:
        return {}
    first = {name: row[name] for row in reversed(rows) for name in row if row[name] is not None or name == "input"}
    told = {
        "data.val_split": "split", "evaluate.images": "images", "evaluate.flip": "flip", "evaluate.base_size": "input",
        "evaluate.bkg": "background", "evaluate.image_labels": "image_labels",
        "evaluate.predict_from": "predicted_from", "evaluate.precision": "precision",
    }
    settings = {key: first[name] for key, name in told.items() if name in first}
    if "input" in first:
        settings["evaluate.long_side"] = first.get("long_side")
    method, scales = method_of(rows[0]), {str(row["map"]): row.get("scales") or [1.0] for row in rows}
    settings |= {"evaluate.maps": list(scales), "evaluate.crf": any(row.get("crf") for row in rows)}
    multi = [kind for kind, declared in kinds_of(method).items() if kind in scales and not declared.background]
    if any(row.get("crf") and row["map"] in multi for row in rows):
        settings["crf.background_power"] = first.get("background_power", 1.0)
    settings |= {key: value for row in rows for key, value in row.get("settings", {}).items()}
    if not all(len(scales[kind]) > 1 for kind in multi):
        multi = []
    settings["evaluate.multi_scale"] = bool(multi)
    settings |= {"evaluate.multi_scales" if k in multi else f"evaluate.scales.{k}": scales[k] for k in scales}
    return up_to_date(settings, "in results.json", method)


def _same_evaluation(group: list[dict], row: dict) -> bool:
    """Rows of early evaluations bear no id: then all that they share must agree, and no map may come twice."""
    keys = ("evaluation", "checkpoint", "dataset", "split", "images", "seconds")
    return all(group[0].get(key) == row.get(key) for key in keys) and row_key(row) not in map(row_key, group)


def _read_evaluation(run: Path, rows: list[dict], again: str) -> Evaluation:
    """again: the command that makes the rows again."""
    name = rows[0].get("evaluation")
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        note = f"made before confusion matrices and pictures were kept; `{again}` makes them"
        return Evaluation(rows, notes=[note])
    folder = run / EVALUATIONS / name
    found = Evaluation(rows, folder)
    if not folder.is_dir():
        found.notes.append(f"the folder {EVALUATIONS}/{name} is missing; `{again}` makes another")
        return found
    try:
        _read_matrices(found)
    except Exception as error:   # a broken file makes numpy and zipfile raise nearly anything
        found.notes.append(f"{EVALUATIONS}/{name}/confusion.npz cannot be read ({_reason(error)}); `{again}`")
    try:
        found.images = _checked_images(json.loads((folder / "images.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found.notes.append(f"{EVALUATIONS}/{name}/images.json cannot be read ({_reason(error)}); `{again}`")
    return found


def _read_matrices(evaluation: Evaluation) -> None:
    """Those of the rows; one that is not the row's own, by its mIoU, is left out."""
    with np.load(evaluation.folder / "confusion.npz", allow_pickle=False) as file:
        for row in evaluation.rows:
            matrix, miou = file[row_key(row)], number(row.get("miou"))
            fits = matrix.shape == (len(row.get("iou") or ()),) * 2
            if fits and miou is not None and math.isclose(Scores(matrix).miou, miou, abs_tol=1e-9):
                evaluation.matrices[row_key(row)] = matrix
            else:
                evaluation.notes.append(f"the confusion matrix of {row_key(row)} is not that of its row: left out")


def _checked_images(content: dict) -> dict:
    """images.json with what a report takes of it. Raises what the lookup of something missing raises."""
    for shown in (*content["best"], *content["worst"]):
        shown["name"], shown["classes"].items(), [(panel["caption"], Path(panel["file"])) for panel in shown["panels"]]
    scores = {entry["name"]: dict(entry["score"]) for entry in content["images"]}
    return {**content, "scores": scores, "ranked_by": str(content["ranked_by"])}


def _json_lines(path: Path, notes: list[str]) -> Iterator[Any]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        notes.append(f"{path.name} is missing")
        return
    broken = 0
    for line in filter(str.strip, lines):
        try:
            yield json.loads(line)
        except ValueError:
            broken += 1
    if broken:
        notes.append(f"{path.name}: {broken} line(s) cannot be read (cut by a kill?) and are left out")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    return re.sub(r"\s+", " ", str(error)) or type(error).__name__
