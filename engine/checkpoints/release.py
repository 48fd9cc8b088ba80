"""A run as one folder to share: weights, config, results, metrics, log, model card, hashes, registry row."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
import yaml
from torch import Tensor

from engine.checkpoints.files import BEST, last_weights, read_meta, save_weights
from engine.checkpoints.model_card import model_card
from engine.checkpoints.opening import SUMS, UNASKED, Opened, open_checkpoint
from engine.config import load_config, load_settings, portable
from engine.evaluation.results import title
from engine.inference.plan import evaluation_plan
from model.method import MapPlan, Method
from utils.config import read_yaml, save_yaml
from utils.errors import UserError
from utils.files import ROOT, fresh_name, hash_of, naming

ROW = "registry_row.yaml"
# /a/b, ~/a, ../a and C:\a, not a/b, 1/2 or https://host/a
FOLDERS = re.compile(
    r"(?<![\w/.~\\])(?:(?:~\w*)?/(?=[\w.~-])|(?<!:)//+(?=\w)|(?:\.\.[/\\])+|[A-Za-z]:\\)[^\s\"',;()\[\]{}]*"
)


def release(
    run: Path, out: Path, weights: str | None = None, name: str | None = None, unfinished: bool = False,
    url: str | None = None, page: str | None = None, licence: str | None = None,
) -> bool:
    """Writes the folder `out`; False where it was there already, the same. name: None for the name of `out`.

    weights: a file of the run's checkpoints; None for the best by validation, the last where there was no validation.
    url, page, licence: of the registry's row.

    Raises UserError for a run that is not finished (unless `unfinished`) or incomplete, for an `out` that holds other
    files, and where what was written does not open or gives other outputs than the run's weights.
    """
    name = name or out.resolve().name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name {name}: expected letters, digits, '.', '-' and '_'")
    _check_place(out)
    checkpoint = _checkpoint(run, weights, unfinished)
    opened = open_checkpoint(str(checkpoint), config=str(run / "config.yaml"))
    part = fresh_name(out.resolve())
    try:
        with naming(out):
            part.mkdir(parents=True)
            _write(part, run, checkpoint, name, opened)
            file = part / f"{name}.safetensors"
            row = registry_row(name, file, opened, read_meta(file), url, page, licence)
            (part / ROW).write_text(row, encoding="utf-8")
            sums = [f"{hash_of(path)}  {path.name}\n" for path in sorted(part.iterdir())]
            (part / SUMS).write_text("".join(sums), encoding="utf-8")
            _verify(file, opened)
            return _publish(part, out)
    except UserError as error:
        raise UserError(str(error).replace(str(part), str(out))) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def without_folders(text: str, known: list[str]) -> str:
    """The text with its absolute paths, and those from a home or from outside, cut down to their last part.

    known: folders that may have spaces in their names.
    """
    text = text.replace("file://", "")
    folders = sorted({one.rstrip("/\\") for one in known} - {""}, key=len, reverse=True)
    if folders:
        named = "|".join(map(re.escape, folders))
        whole = rf"(?<![\w/.~\\-])({named})(/|(?![\w/.-]))"
        text = re.sub(whole, lambda match: "" if match[2] else _last(match[1]), text)
    return FOLDERS.sub(lambda match: _last(match[0]), text)


def registry_row(
    name: str, file: Path, opened: Opened, meta: dict, url: str | None, page: str | None, licence: str | None
) -> str:
    """The row of weights/registry.yaml for a released weights file, as YAML."""
    config = opened.config
    what = f"{config.method} on {config.data.name} {config.data.train_split}, {config.model.backbone}"
    row = {
        "kind": "checkpoint", "url": f"{url.rstrip('/')}/{file.name}" if url else None, "page": page or url,
        "file": file.name, "size": file.stat().st_size, "sha256": hash_of(file), "licence": licence,
        "what": what + (f", iteration {meta['iteration']}" if "iteration" in meta else ""),
    }
    return yaml.safe_dump({name: row}, sort_keys=False, allow_unicode=True, width=1000)


def _checkpoint(run: Path, weights: str | None, unfinished: bool) -> Path:
    """The weights file of the run, see `release`. Raises UserError where the run is not finished, or lacks a file."""
    best, last = run / "checkpoints" / BEST, last_weights(run / "checkpoints")
    if weights is None:
        weights = BEST if best.is_file() or last is None else last.name
    for needed in ("config.yaml", "train.log", "metrics.jsonl", f"checkpoints/{weights}"):
        if not (run / needed).is_file():
            raise UserError(f"{run / needed}: no such file; a release is made of the folder of a run")
    meta = read_meta(last or run / "checkpoints" / weights)
    iterations = meta.get("iterations") or load_config(run / "config.yaml").train.iterations
    done = int(re.findall(r"\d+", last.name)[0]) if last else 0
    if not unfinished and done < iterations:
        raise UserError(
            f"{run}: {done} of {iterations} iterations are done; continue it with resume=auto, or release it with "
            "--unfinished"
        )
    return run / "checkpoints" / weights


def _write(part: Path, run: Path, checkpoint: Path, name: str, opened: Opened) -> None:
    """Weights, config, results, metrics, log and card."""
    settings = portable(opened.config)
    noted = {"method": opened.config.method, "classes": list(opened.classes), "settings": settings}
    known = _known_folders(run)
    meta = {**read_meta(checkpoint), **noted}
    save_weights(part / f"{name}.safetensors", opened.method, meta)
    save_yaml(settings, part / "config.yaml")
    results = _results(run, checkpoint.name, meta.get("iteration"))
    rows = [{**row, "checkpoint": f"{name}.safetensors"} for row in results]
    texts = {
        "results.json": json.dumps(rows, indent=1, allow_nan=False) + "\n",
        "metrics.jsonl": (run / "metrics.jsonl").read_text(encoding="utf-8"),
        "train.log": (run / "train.log").read_text(encoding="utf-8"),
        "README.md": model_card(name, opened, meta, rows, _starts(run)),
    }
    for file, text in texts.items():
        (part / file).write_text(without_folders(text, known), encoding="utf-8")


def _starts(run: Path) -> list[dict]:
    path = run / "provenance.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _results(run: Path, weights: str, iteration: int | None) -> list[dict]:
    """The rows of results.json that are of this weights file, and not of an earlier one of its name."""
    path = run / "results.json"
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        named = [row for row in rows if PureWindowsPath(row["checkpoint"]).name == weights]
        own = [row for row in named if row.get("iteration", iteration) == iteration]
        return list({title(row): row for row in own}.values())   # of the same thing evaluated again, the last
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: no list of results ({error})") from None


def _known_folders(run: Path) -> list[str]:
    """Folders that the run's files may name: of its config, its commands, and of this machine."""
    values = list(_texts(read_yaml(run / "config.yaml")))
    values += [item.partition("=")[2] for start in _starts(run) for item in start["command"]]
    named = [value for value in values if FOLDERS.match(value)]
    return [*named, str(run.resolve().parent), str(run.absolute().parent), str(ROOT), str(Path.home())]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
    elif isinstance(value, str):
        yield value


def _verify(file: Path, opened: Opened) -> None:
    """Raises UserError unless the released file opens, by its folder and by its header, and gives the same outputs."""
    released = open_checkpoint(str(file))
    meta = read_meta(file)
    settings = load_settings(meta["settings"], str(file), UNASKED)
    side, kinds = opened.config.data.crop_size, evaluation_plan(opened.config).kinds
    images, labels = torch.randn(1, 3, side, side), torch.ones(1, len(opened.classes))

    def outputs(method: Method) -> list[Tensor]:
        maps = method.maps(images, dict.fromkeys(kinds, MapPlan(flip=True)), labels)
        return [method.classify(images), *(maps[kind] for kind in kinds)]

    pairs = zip(outputs(opened.method), outputs(released.method), strict=True)
    same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
    if not same or released.classes != opened.classes or settings != released.config:
        raise UserError(f"{file.name}: it does not give what the run's weights give, so nothing is released")


def _check_place(out: Path) -> None:
    """Raises UserError where `out` is anything but nothing, or an earlier release."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, expected a folder")
    others = {path.name for path in out.iterdir()} - {SUMS, *_sums(out)} if out.exists() else None
    if others:
        raise UserError(f"{out}: holds {sorted(others)[0]}, which is no part of a release; give another folder")


def _publish(part: Path, out: Path) -> bool:
    """Gives the folder its name, in place of an earlier release; False where that is the same."""
    if out.exists():
        if _intact(out) and (out / SUMS).read_bytes() == (part / SUMS).read_bytes():
            return False
        old = fresh_name(part)
        os.replace(out, old)
        os.replace(part, out)
        shutil.rmtree(old)
    else:
        os.replace(part, out)
    return True


def _sums(out: Path) -> dict[str, str]:
    """The hashes of a release by file, {} where there is none."""
    if not (out / SUMS).is_file():
        return {}
    return {name: digest for digest, name in map(str.split, (out / SUMS).read_text(encoding="utf-8").splitlines())}


def _intact(out: Path) -> bool:
    """Whether a folder is a release and its files have their hashes."""
    sums = _sums(out)
    return bool(sums) and all((out / name).is_file() and hash_of(out / name) == sums[name] for name in sums)


def _last(path: str) -> str:
    return PureWindowsPath(path.rstrip("/\\")).name or "."
