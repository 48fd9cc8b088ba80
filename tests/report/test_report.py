"""The report of real and of broken runs: read by an HTML parser, looked at by Chromium where that is installed."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engine.config import DEFAULT_METHOD, load_config, save_config
from engine.distributed import Ranks
from engine.evaluation.evaluate import evaluate
from engine.evaluation.image_scores import ImageScores, new_evaluation, write_evaluation
from engine.evaluation.results import append_results, score_entries, title
from engine.inference.plan import evaluation_plan
from report.charts import LEFT, RIGHT, WIDTH, Curve, nice_ticks, running_mean, smoothed
from report.private import public
from report.run import evaluate_command, read_run, read_runs
from tests.engine.fake_method import FakeMethod, FakeSet, config, fake_is_known  # noqa: F401
from tests.report.chromium import PROGRAM, Chromium
from tools.make_report import main
from utils.errors import UserError
from utils.metrics import Scores

ROOT = Path(__file__).resolve().parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))
EVIL = ("<b>a & b</b>", "quote \"'", "</script><script>alert(1)</script>")
VOID = {"meta", "link", "br", "img", "input", "hr"}


class EvilSet(FakeSet):
    """Classes whose names are markup."""

    classes = EVIL

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item._replace(name=f"<i>{item.name}</i>&")


class Page(HTMLParser):
    """tables: rows of cell texts by caption; data: of the script; links, ids, images, pieces of SVG paths by chart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.links, self.ids, self.images, self.tags, self.text = [], [], [], [], [], ""
        self.tables, self.table, self.paths, self.chart = [], None, {}, None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.DOTALL)
        self.data = json.loads(found[1])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [attributes[name] for name in ("src", "href", "xlink:href", "action") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "img":
            self.images.append(attributes)
        if tag == "table":
            self.table = []
            self.tables.append(self.table)
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")
        if tag == "svg":
            self.chart = attributes.get("data-chart")
        if tag == "path" and self.chart:
            self.paths.setdefault(self.chart, []).append(attributes["d"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
        if {"td", "th"} & set(self.open):
            self.table[-1][-1] += data

    def table_of(self, first: str) -> list[list[str]]:
        """The rows, stripped, of the first table whose first cell is `first`."""
        return next([[" ".join(cell.split()) for cell in row] for row in table]
                    for table in self.tables if table[0][0].strip() == first)


def write_metrics(folder: Path, lines: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics(length: int, step: int = 20) -> list[dict]:
    rng = np.random.default_rng(0)
    lines = [
        {"iteration": i - 1, "time": float(i), "train/cls": 1 / i + 0.01 * rng.random(), "train/seg": rng.random(),
         "train/total": 2 / i, "train/lr": 1e-5, "train/seconds_per_iteration": 0.2, "train/memory_gb": 1.5}
        for i in range(step, length + 1, step)
    ]
    validation = {"iteration": length - 1, "time": 1.0, "val/cam": 0.5, "val/lam": 0.25, "val/seg": 0.375}
    return [*lines, validation]


def make_run(folder: Path, *overrides: str, dataset: FakeSet | None = None, length: int = 400) -> Path:
    """A run as training and one evaluation leave it."""
    folder.mkdir(parents=True)
    settings = config(f"tag={folder.name}", f"train.iterations={length}", "loss.start_after.seg=100",
                      "pseudo_labels.main_cam_after=200", "evaluate.report_images=2", *overrides)
    save_config(settings, folder / "config.yaml")
    write_metrics(folder, metrics(length))
    command = ["/home/someone/bin/python", "train.py", "hub_token=hf_abcdefghij"]
    start = {"time": "2024-01-01 00:00:00", "command": command, "commit": "0123456789abcdef", "changed": False,
             "versions": {"python": "3.11", "torch": "2.11"}}
    (folder / "provenance.jsonl").write_text(json.dumps(start) + "\n")
    weights = str(folder / "checkpoints" / "iter_000400.weights.safetensors")
    evaluate(FakeMethod(), dataset or FakeSet(6), settings, ALONE, weights, folder / "results.json")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run with a plain evaluation and one with CRF, of classes and images whose names are markup."""
    run = make_run(tmp_path_factory.mktemp("runs") / "a&b", dataset=EvilSet(6))
    settings = config("evaluate.crf=true", "crf.iterations=1", "evaluate.report_images=1")
    evaluate(FakeMethod(), EvilSet(5), settings, ALONE, "official.pth", run / "results.json")
    main([str(run)])
    return run


@pytest.fixture(scope="module")
def page(made) -> Page:
    return Page(made / "report.html")


def results(run: Path) -> list[dict]:
    return json.loads((run / "results.json").read_text())


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def test_one_file_that_needs_no_other(page):
    assert all(link.startswith(("data:image/jpeg;base64,", "data:,", "#")) for link in page.links)
    assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org)", page.source)
    assert len(page.ids) == len(set(page.ids))
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert page.tags.count("h1") == 1 and '<html lang="en">' in page.source
    assert all(image["alt"] for image in page.images)


def test_every_evaluation_is_shown_with_its_label(made, page):
    cells = [row[-4:] for row in page.table_of("evaluation")[1:]]
    rows = results(made)
    assert len(rows) == 9
    assert cells == [
        [percent(row["miou"]), percent(row["pixel_accuracy"]), title(row),
         "official.pth" if row["checkpoint"] == "official.pth" else public(row["checkpoint"])] for row in rows
    ]


def test_classes_are_those_of_the_results(made, page):
    rows = results(made)
    tables = [table for table in page.tables if [c.strip() for c in table[0][:2]] == ["class", "CAM"]]
    for table, own in zip(tables, (rows[3:], rows[:3]), strict=True):   # the newest first
        for line, name in zip(table[1:], ["background", *EVIL], strict=False):
            assert line[: len(own) + 1] == [name, *(percent(row["iou"][name]) for row in own)]
        assert table[-1][: len(own) + 1] == ["mIoU", *(percent(row["miou"]) for row in own)]


def test_names_are_escaped(page):
    for name in (*EVIL, "<i>image_3</i>&"):
        assert name in page.text and name not in page.source
    assert "alert(1)</script>" not in page.source.partition("</head>")[2]


def test_confusion_matrices(made, page):
    row = results(made)[0]
    matrix = np.load(made / "evaluation" / row["evaluation"] / "confusion.npz")["cam"]
    drawn = page.data["matrices"]["r0e1-cam"]
    assert drawn["names"] == list(row["iou"])
    for true, shares in enumerate(drawn["rows"]):
        if not matrix[true].any():
            assert shares is None
        else:
            assert shares == pytest.approx(matrix[true] / matrix[true].sum(), abs=5e-5)
    assert len(page.data["matrices"]) == 9


def test_pictures_are_those_that_the_evaluation_kept(made, page):
    count = sum(len(shown["panels"]) for folder in (made / "evaluation").iterdir()
                for content in [json.loads((folder / "images.json").read_text())]
                for shown in (*content["best"], *content["worst"]))
    assert len(page.images) == count == 4 * 5 + 2 * 8
    assert page.images[0]["alt"].startswith("input of <i>image_")


def test_curves_are_those_of_the_metrics(made, page):
    assert "loss term memory_gb" not in page.source
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    for term in ("cls", "seg", "total", "lr", "seconds_per_iteration", "memory_gb"):
        (line,) = page.data["charts"][f"r0-{term}"]["lines"]
        own = [entry for entry in lines if f"train/{term}" in entry]
        assert line["x"] == [entry["iteration"] for entry in own]
        assert line["y"] == pytest.approx([entry[f"train/{term}"] for entry in own], rel=1e-6)
        drawn = [tuple(map(float, point.split())) for point in re.split("[ML]", page.paths[f"r0-{term}"][0])[1:]]
        expected = [LEFT + (WIDTH - LEFT - RIGHT) * entry["iteration"] / 400 for entry in own]
        assert [x for x, _ in drawn] == pytest.approx(expected, abs=0.06)
        heights, values = np.array([y for _, y in drawn]), np.array(line["y"])
        if np.ptp(values):   # a straight line, downwards
            slope, offset = np.polyfit(values, heights, 1)
            assert slope < 0
            np.testing.assert_allclose(heights, slope * values + offset, atol=0.06)
    assert page.data["charts"]["r0-validation"]["lines"][1] == {"name": "LAM", "x": [399], "y": [0.25]}
    assert "after iteration 100: seg starts to count" in page.text
    assert "after iteration 200: pseudo_labels.main_cam_after is passed" in page.text


def test_a_resumed_run_has_no_point_twice(run):
    lines = metrics(400)
    write_metrics(run, [*lines[:10], *({**line, "train/cls": 7.0} for line in lines[5:-1]), lines[-1], lines[-1]])
    series = read_run(run).metrics["train/cls"]
    assert series.x == [line["iteration"] for line in lines[:-1]]
    assert series.y == [line["train/cls"] for line in lines[:5]] + [7.0] * 15
    assert read_run(run).metrics["val/cam"].x == [399]


def test_nothing_private(tmp_path, made, page):
    assert "hf_abcdefghij" not in page.source and "someone" not in page.source and "~/bin/python" in page.source
    for text, expected in {
        "loss.weights.token=1.0 loss.start_after.token=-1": "loss.weights.token=1.0 loss.start_after.token=-1",
        "api_key=abc HF_TOKEN=x --password: y": "api_key=*** HF_TOKEN=*** --password: ***",
        "https://me:word@host/x /home/me/a /Users/you/b /data/home/c": "https://***@host/x ~/a ~/b /data/home/c",
        f"root={Path.home()}/data": "root=~/data",
    }.items():
        assert public(text) == expected


def damaged(file: str, mode: str, text: str, note: str):
    """A damage like those below: opens a file of the run to write the text; without a mode there is no such file."""
    def damage(run):
        (path,) = run.glob(file)
        if not mode:
            path.unlink()
        else:
            with path.open(mode) as stream:
                stream.write(text)
        return note

    return damage


def nan_in_a_row(run):
    rows = results(run)
    rows[1]["miou"] = float("nan")
    (run / "results.json").write_text(json.dumps([*rows, "text", {"miou": 1.0}, {"map": "cam", "iou": [1]}]))
    return "the mIoU of entry 2 (lam) is not a finite number"


def evaluation_folder(run):
    return run / "evaluation" / results(run)[0]["evaluation"]


def early_rows(run):
    rows = [{k: v for k, v in row.items() if k not in ("evaluation", "background", "input", "predicted_from")}
            for row in results(run)]
    rows[2]["flip"] = rows[1]["flip"] = rows[0]["flip"] = False
    (run / "results.json").write_text(json.dumps(rows))
    return (f"made before confusion matrices and pictures were kept; bash run_evaluate_voc.sh cpu 1 "
            f"{rows[0]['checkpoint']} evaluate.images=6 evaluate.flip=false makes them")


def no_folder(run):
    shutil.rmtree(evaluation_folder(run))
    return "is missing; bash run_evaluate_voc.sh"


def foreign_matrices(run):
    np.savez(evaluation_folder(run) / "confusion.npz", cam=np.eye(4), lam=np.eye(4), seg=np.eye(5))
    return "the confusion matrix of seg is not that of its row"


def a_path_for_an_id(run):
    (run / "results.json").write_text(json.dumps([{**row, "evaluation": "../../x"} for row in results(run)]))
    return "made before confusion matrices"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("sound") / "run")


@pytest.fixture
def run(sound, tmp_path) -> Path:
    """A copy of the sound run."""
    return shutil.copytree(sound, tmp_path / "run")


def page_of(run: Path) -> Page:
    main([str(run)])
    return Page(run / "report.html")


NO_NUMBERS = '{"iteration": 419, "train/cls": NaN, "train/seg": null}\n"text"\n{"iteration": true}\n'


@pytest.mark.parametrize("damage", [
    damaged("config.yaml", "w", "a: [", "config.yaml cannot be read"),
    damaged("metrics.jsonl", "", "", "metrics.jsonl is missing"),
    damaged("metrics.jsonl", "a", '{"iteration": 419, "train/cl', "metrics.jsonl: 1 line(s) cannot be read"),
    damaged("metrics.jsonl", "a", NO_NUMBERS, "not finite in train/cls, train/seg"),
    damaged("results.json", "w", '[{"map": "cam", "io', "results.json cannot be read as a list"),
    damaged("results.json", "", "", "run_evaluate_voc.sh cpu 1"),
    damaged("evaluation/*/confusion.npz", "w", "PK\3\4", "confusion.npz cannot be read"),
    damaged("evaluation/*/images.json", "w", '{"ranked_by": "seg", "images": [], "best": [{}]}', "images.json cannot"),
    damaged("evaluation/*/best_1_0.jpg", "", "", "the file is missing"),
    damaged("provenance.jsonl", "w", '{"time"\n{"command": "text", "versions": 3}\n[]\n', "jsonl: 1 line(s) cannot be"),
    nan_in_a_row, early_rows, no_folder, foreign_matrices, a_path_for_an_id,
])
def test_a_broken_run_has_a_report_that_says_so(run, damage):
    note, page = damage(run), page_of(run)
    assert note in " ".join(page.text.split())
    assert "Training" in page.text and "NaN" not in json.dumps(page.data)


def edit_config(run: Path, change) -> None:
    """Writes config.yaml anew after change(its content)."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    change(content)
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def test_a_run_of_an_earlier_version(run):
    """Keys under earlier names, rows and a config without a method: today's names, and the default method."""

    def earlier(content):
        del content["schema"], content["method"], content["evaluate"]["scales"]
        content["evaluate"] |= {"cam_scales": [1.0, 0.5], "lam_scales": [1.0], "seg_scales": [1.0, 1.25, 1.5]}
        content["data"]["augmentation"] = "voc"

    edit_config(run, earlier)
    rows = [{key: value for key, value in row.items() if key != "method"} for row in results(run)]
    for row in rows:
        row["image_labels"] = row["image_labels"] and "predicted"
        row["predicted_from"] = row["image_labels"] and "segmentation"
    rows[0]["scales"] = [1.0, 0.5]
    (run / "results.json").write_text(json.dumps(rows))
    shutil.rmtree(evaluation_folder(run))
    page, read = page_of(run), read_run(run)
    assert read.method == DEFAULT_METHOD and "method" not in read.config and "schema" not in read.config
    assert [row[-2] for row in page.table_of("evaluation")[1:]] == [title(row) for row in rows]
    changed = {row[0]: row[1:] for row in page.table_of("key")[1:]}
    assert changed["evaluate.scales.cam"] == ["[1.0, 0.5]", "[1.0]"]
    assert not any(key.startswith("evaluate.cam") or key == "data.augmentation" for key in changed)
    command = evaluate_command(run, rows, read.config)
    assert command.split()[4].endswith(".safetensors") and command.split()[5:] == [
        "evaluate.images=6", "evaluate.image_labels=predicted", "evaluate.predict_from=seg"
    ]
    load_config(None, command.split()[5:])


def test_a_run_of_another_method(run):
    """Of one that this version does not know: kinds by their names, in the order they are found."""

    def change(content):
        content["method"] = "other"
        content["other"] = {"map_after": 150, "flag_after": True}

    edit_config(run, change)
    names = {"cam": "getam", "lam": "<affinity>", "seg": "seg"}
    rows = [{**row, "method": "other", "map": names[row["map"]]} for row in results(run)]
    (run / "results.json").write_text(json.dumps(rows))
    write_metrics(run, [{"iteration": 9, "train/total": 1.0, "val/mine": 0.5, "val/<affinity>": 0.25}])
    page, read = page_of(run), read_run(run)
    assert read.validated == ["mine", "<affinity>"] and read.kinds == ["mine", "<affinity>", "getam", "seg"]
    assert [line["name"] for line in page.data["charts"]["r0-validation"]["lines"]] == ["mine", "<affinity>"]
    assert [c.strip() for c in page.table_of("class")[0]] == ["class", "getam", "<affinity>", "seg"]
    assert "<affinity>: voc val, 6 images" in page.text
    assert "after iteration 150: other.map_after is passed" in page.text and "flag_after is" not in page.text
    changed = {row[0]: row[2] for row in page.table_of("key")[1:]}
    assert changed["other.map_after"] == "not known" and "train.lr" not in changed


def test_a_config_of_a_later_version(run):
    edit_config(run, lambda content: content.update(schema=99, later={"key": 1}))
    page = page_of(run)
    assert "config.yaml is of schema 99, this version knows" in page.text
    assert ["later.key", "1", "no such key today"] in page.table_of("key")


def test_validation_in_the_order_of_the_method(run):
    write_metrics(run, [{"iteration": 9, "train/total": 1.0, "val/later": 0.1, "val/seg": 0.2, "val/fused": 0.3}])
    lines = page_of(run).data["charts"]["r0-validation"]["lines"]
    assert [line["name"] for line in lines] == ["CAM x LAM", "segmentation", "later"]


def test_the_command_makes_the_rows_again(tmp_path):
    scales = ["evaluate.multi_scale=true", "evaluate.multi_scales=[1.0,2.0]", "evaluate.scales.seg=[1.5]"]
    run = make_run(tmp_path / "run", "evaluate.maps=[seg,cam]", *scales, "evaluate.flip=false", "evaluate.bkg=0.25")
    rows, own = results(run), read_run(run).config
    assert evaluate_command(run, rows, own).split()[5:] == ["evaluate.images=6"]
    in_bf16 = [{**row, "precision": "bf16"} for row in rows]
    again = evaluate_command(run, in_bf16, {**own, "train.precision": "fp32"})
    assert again.split()[5:] == ["evaluate.images=6", "evaluate.precision=bf16"]
    words = evaluate_command(run, rows, {}).split()[5:]
    assert config(*words).evaluate.maps == ("seg", "cam") and config(*words).evaluate.multi_scale
    assert config(*words).evaluate.multi_scales == (1.0, 2.0) and config(*words).evaluate.scales["seg"] == (1.5,)
    other = tmp_path / "results.json"
    assert [row["miou"] for row in evaluate(FakeMethod(), FakeSet(6), config(*words), ALONE, "w", other)] == [
        row["miou"] for row in rows
    ]


def many_classes(folder: Path) -> Path:
    """81 classes, scored with CRF, confused at random."""
    run = make_run(folder)
    names, rng = ["background", *(f"class of things number {i}" for i in range(80))], np.random.default_rng(0)
    rows, matrices = [], {}
    for row in [("cam", False), ("lam", True), ("seg", False)]:
        matrix = rng.integers(0, 50, (81, 81)) ** 4 // 10**4 + np.diag(rng.integers(0, 9000, 81))
        matrix[5] = 0
        matrices[row] = matrix
    name, plan = new_evaluation(run), evaluation_plan(config())
    write_evaluation(run, name, matrices, names[1:], ImageScores(plan, "seg", 0))
    for (kind, crf), matrix in matrices.items():
        rows.append({
            "map": kind, "dataset": "coco", "split": "val", "images": 5000, "scales": [1.0], "flip": True, "crf": crf,
            "image_labels": "given", **score_entries(Scores(matrix), names), "checkpoint": "x", "seconds": 1.0,
            "evaluation": name,
        })
    append_results(run / "results.json", rows)
    return run


def test_runs_are_compared(sound, tmp_path, capsys):
    other = make_run(tmp_path / "other", "train.lr=1e-3", "evaluate.bkg=0.6", dataset=FakeSet(6))
    halved = [{**row, "iou": {k: value and value / 2 for k, value in row["iou"].items()}} for row in results(other)]
    (other / "results.json").write_text(json.dumps(halved))
    output = tmp_path / "both.html"
    main([str(sound), str(other), "--output", str(output), "--images", "1"])
    assert f"report: {output} (" in capsys.readouterr().out and not (other / "report.html").exists()
    page, (ours, theirs) = Page(output), (results(sound), results(other))
    scores = {row[0]: row[1:] for row in page.table_of("run")[1:]}
    file = "iter_000400.weights.safetensors"
    assert scores[title(ours[2])] == [percent(rows[2]["miou"]) + file for rows in (ours, theirs)]
    assert scores["backbone"] == ["vit_base_patch16_224"] * 2
    assert scores[title(ours[0])][1] == scores[title(theirs[0])][0] == "not evaluated so"   # another threshold
    settings = {row[0]: row[1:] for row in page.table_of("key")[1:]}
    assert settings == {"train.lr": ["6e-05", "0.001"], "evaluate.bkg": ["0.5", "0.6"]}
    assert [line["name"] for line in page.data["charts"]["all-train/cls"]["lines"]] == ["run", "other"]
    assert page.data["charts"]["all-val/seg"]["lines"][0]["y"] == [0.375]
    classes = next(table for table in page.tables if "other less run" in [cell.strip() for cell in table[0]])
    for row in classes[1:]:
        ours_, theirs_ = (rows[2]["iou"][row[0]] for rows in (ours, theirs))
        assert row[1:3] == [percent(ours_), percent(theirs_)]
        assert row[3] == ("–" if ours_ is None else f"{100 * (theirs_ - ours_):+.2f}")
    assert len(page.images) == 2 * 2 * 5
    assert [run.name for run in read_runs([sound, other, sound])] == [f"run ({sound})", "other", f"run ({sound})"]


def test_mean_over_neighbours():
    values = [3.0, None, 5.0, 1.0, 4.0, 8.0, 2.0]
    for reach in (0, 1, 2, 9):
        for i, mean in enumerate(running_mean(values, reach)):
            side = min(reach, i, len(values) - 1 - i)
            near = [v for v in values[i - side : i + side + 1] if v is not None]
            assert mean is None if values[i] is None else mean == pytest.approx(sum(near) / len(near))
    stepped = Curve("x", [9, 19, 29, 39], [0.0, 0.0, 8.0, 8.0], "term")
    assert smoothed(stepped, 1) == pytest.approx([0, 8 / 3, 16 / 3, 8])
    assert smoothed(stepped._replace(boundaries=[20]), 1) == [0, 0, 8, 8]


def test_ticks_are_round_and_span_the_values():
    for low, high in ((0, 1), (0, 0.73), (-3e-4, 2e-5), (3, 3), (0, 0), (0, 80000), (0.4971, 0.5103), (-7, -7)):
        ticks = nice_ticks(low, high)
        steps = np.diff(ticks)
        assert ticks[0] <= low <= high <= ticks[-1] + 1e-12 and 2 <= len(ticks) <= 7
        assert steps == pytest.approx([steps[0]] * len(steps))
    assert nice_ticks(2.99573, 2.99574) == [0, 1, 2, 3]


def test_long_curves_keep_their_extremes(run):
    lines = [{"iteration": i, "train/cls": float(np.sin(i))} for i in range(10_000)]
    lines[5_003]["train/cls"] = 99.0
    write_metrics(run, lines)
    page = page_of(run)
    points = [point.split() for point in re.split("[ML]", page.paths["r0-cls"][0])[1:]]
    assert len(points) <= 1500 and (run / "report.html").stat().st_size < 1_500_000
    assert min(points, key=lambda point: float(point[1]))[0] == f"{LEFT + (WIDTH - LEFT - RIGHT) * 0.5003:.1f}"


def test_the_tool_from_another_folder(tmp_path, sound):
    command = [sys.executable, str(ROOT / "tools" / "make_report.py")]
    done = subprocess.run([*command, "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr == (
        "error: nowhere: no such folder; give the folder of a run, such as runs/demo\n")
    with pytest.raises(UserError, match="holds no run: none of config.yaml"):
        main([str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: File exists"):
        main([str(sound), "--output", str(tmp_path / "file" / "report.html")])


LOOK = """(() => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const page = document.scrollingElement, image = [...document.images];
  const wide = [...document.querySelectorAll("body *")].filter((one) => {
    const box = one.getBoundingClientRect();
    return box.width && box.right > innerWidth + 1 && !one.closest(".scroll, .unseen, pre");
  });
  return {page: page.scrollWidth, window: innerWidth, height: page.scrollHeight,
          wide: wide.slice(0, 3).map((one) => one.outerHTML.slice(0, 90)),
          lost: image.filter((one) => !one.naturalWidth).length};
})()"""


@pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
def test_in_a_browser(made, tmp_path):
    """Nothing on the console, nothing beyond the window, pictures there; the page's script does what it should."""
    several = tmp_path / "several.html"
    main([str(made), str(many_classes(tmp_path / "many")), "--output", str(several)])
    with Chromium() as browser:
        for path in (made / "report.html", several):
            for width, scheme in ((400, "light"), (1280, "dark"), (1600, "light")):
                browser.open(path, width, scheme=scheme)
                found = browser.run(LOOK)
                assert found["page"] <= found["window"] == width and not found["wide"], found
                assert not found["lost"] and found["height"] > 1000 and not browser.messages, browser.messages
        paper = "getComputedStyle(document.body).backgroundColor"
        light = browser.run(paper)
        browser.open(made / "report.html", 800, scheme="dark")
        assert browser.run(paper) != light
        assert browser.run("""(() => {
          document.querySelector("[data-sorts] [data-by='0']").click();
          return [...document.querySelector("ol.classes").children].map((one) => JSON.parse(one.dataset.values)[0]);
        })()""") == sorted((row["iou"][name] for row in results(made)[3:4] for name in row["iou"]),
                           key=lambda value: -1 if value is None else value, reverse=True)
        last = [line for line in metrics(400) if "train/cls" in line][-1]["train/cls"]
        iteration, value = browser.run("""(() => {
          const svg = document.querySelector("svg[data-chart=r0-cls]"), box = svg.getBoundingClientRect();
          svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right, clientY: box.top + 50}));
          return document.getElementById("tooltip").textContent;
        })()""").splitlines()
        assert iteration == "iteration 399" and float(value.removeprefix("cls ")) == pytest.approx(last, rel=1e-3)
        names, cell = results(made)[3]["iou"], "{clientX: box.left + 1.5 * 27, clientY: box.bottom - 0.5 * 27}"
        assert browser.run(f"""(() => {{
          const svg = document.querySelector("svg[data-matrix]"), box = svg.getBoundingClientRect();
          svg.dispatchEvent(new PointerEvent("pointermove", {cell}));
          return document.getElementById("tooltip").textContent;
        }})()""").startswith(f"{list(names)[3]} taken for {list(names)[1]}\n")
        tab = "getComputedStyle(document.querySelectorAll('.tabs')[0].querySelectorAll('.tab')[{}]).display"
        assert [browser.run(tab.format(i)) for i in (0, 1)] == ["block", "none"]
        browser.run("document.querySelectorAll('.tabs')[0].querySelectorAll('input')[1].click()")
        assert [browser.run(tab.format(i)) for i in (0, 1)] == ["none", "block"]
