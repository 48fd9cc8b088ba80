"""benchmarks/compare_methods.py on made-up runs: its table, JSON and plot, what it calls, and what it refuses."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from benchmarks import compare_methods as tool
from utils.errors import UserError

FACTS = {"dataset": "shapes v2", "split": "val", "images": 200, "flip": True, "crf": False, "input": 96,
         "predicted_from": None, "precision": "fp32", "iteration": 900}
TEXT = ("mIoU  {:.2f} over 7 classes present, pixel accuracy  90.00 | {}: shapes v2 train, 2000 images, single scale "
        "(1), flip, CRF, image labels given, input 96, high {}, low {}, 0.00 % of the pixels unsure")


def row(method: str, kind: str, miou: float, **other: object) -> dict:
    background, labels = (None, None) if kind == "seg" else (0.5, "given")
    made = {"scales": [1.0], "background": background, "image_labels": labels}
    scores = {"miou": miou, "pixel_accuracy": 0.9, "iou": {}, "checkpoint": "w", "seconds": 1.0, "evaluation": "e"}
    return {"map": kind, "method": method, **FACTS, **made, **scores, **other}


def make_run(folder: Path, method: str, seconds: float) -> None:
    """A run of 900 iterations that took `seconds`, 100 of them twice as long as the others."""
    folder.mkdir(parents=True)
    config = {"method": method, "model": {"weights": "start.safetensors"}, "train": {"iterations": 900},
              "loss": {"start_after": {"seg": 100} if method == "more" else {}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    each = seconds / 1000
    lines = [(99, 2 * each), (499, each), (899, each)]
    text = [json.dumps({"iteration": i, "train/total": 1.0, "train/seconds_per_iteration": s}) for i, s in lines]
    (folder / "metrics.jsonl").write_text("\n".join(text))


def make_pipeline(folder: Path, method: str, seconds: float, masks: float, second: float, *first: dict) -> None:
    make_run(folder / "first", method, seconds)
    make_run(folder / "second", "deeplab", 10)
    kind, best = ("GETAM", seconds / 1000) if method == "acr" else ("LAM", seconds / 1000)
    scores = {"first": first, "second": [row("deeplab", "seg", second)],
              "masks": {"miou": masks, "text": TEXT.format(100 * masks, kind, best, best)}}
    (folder / "pipeline.json").write_text(json.dumps({"steps": {}, "scores": scores}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three seeds of MoRe, one of ACR's two, one of the upper bound."""
    for seed, (cam, lam, seg, masks, second) in enumerate(
        [(0.50, 0.55, 0.60, 0.70, 0.61), (0.52, 0.58, 0.61, 0.72, 0.64), (0.54, 0.52, 0.65, 0.71, 0.70)]
    ):
        maps = row("more", "cam", cam), row("more", "lam", lam), row("more", "seg", seg)
        make_pipeline(tmp_path / f"more_shapes_s{seed}", "more", 200 + 10 * seed, masks, second, *maps)
    maps = row("acr", "cam", 0.2), row("acr", "getam", 0.4969, background=0.4)
    make_pipeline(tmp_path / "acr_shapes_s0", "acr", 100, 0.66, 0.5, *maps)
    make_run(tmp_path / "own_s0", "deeplab", 10)
    (tmp_path / "own_s0" / "results.json").write_text(json.dumps([row("deeplab", "seg", 0.8)]))
    return tmp_path


ASKED = ["--first", "more_shapes", "acr_shapes", "afa_shapes", "--second", "acr_shapes", "--seeds", "0", "1", "2"]


def test_table_json_and_plot(folder):
    """LAM: mean 55, deviations 0, 3, -3: 3.00. CAM's is 52. Decoder: 62, deviations -2, -1, 3: sqrt(14 / 2) = 2.65.
    Masks: 71 and 1. Second: 65, deviations -4, -1, 5: sqrt(42 / 2) = 4.58."""
    tool.main([str(folder), *ASKED, "--upper-bound", "--only-table", "--table", str(folder / "table.md")])
    text = (folder / "table.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    absent = "not measured"
    assert lines[2:] == [
        ["`more_shapes`", "start.safetensors", "900", "210 ± 10",
         "LAM 55.00 ± 3.00 (3)", "62.00 ± 2.65 (3)", "LAM 71.00 ± 1.00 (3)", "65.00 ± 4.58 (3)"],
        ["`acr_shapes`", "start.safetensors", "900", "100",
         "GETAM 49.69 (1)", "none", "GETAM 66.00 (1)", "50.00 (1)"],
        ["`afa_shapes`", *[absent] * 7],
        ["true masks (upper bound)", "start.safetensors", "900", "10", *["none"] * 3, "80.00 (1)"],
    ]
    for words in (
        "- localisation map, `more_shapes`: LAM: shapes v2 val, 200 images, single scale (1), flip, no CRF, "
        "image labels given, background 0.5, input 96x96",
        "- pseudo masks, `acr_shapes`: GETAM: shapes v2 train, 2000 images",
        "- second stage, `more_shapes`, `acr_shapes`, true masks (upper bound): ",
        "- `more_shapes`: after 100: seg starts to count",
        "- `acr_shapes`: nothing: the first schedule that was tried", "Budget: each config's own schedule.",
        "- localisation map: not the same in all rows: background\n",
    ):
        assert words in text
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    second = rows[0]["scores"]["second stage"]
    assert [round(second[name], 6) for name in ("mean", "sd")] == [0.65, round(0.0021**0.5, 6)]
    assert [run["row"]["miou"] for run in second["runs"]] == [0.61, 0.64, 0.7]
    assert rows[1]["scores"]["second stage"]["sd"] is None and rows[2]["scores"] == {}
    assert [run["seconds"] for run in rows[0]["training"]] == [200, 210, 220]
    root = ElementTree.parse(folder / "comparison.svg").getroot()
    assert len(root.findall(".//{*}circle")) == 4 * 3 + 3 + 1
    assert {"more_shapes", "afa_shapes", "true masks (upper bound)", "second stage"} <= set(root.itertext())


@pytest.mark.parametrize(
    ("tag", "part", "change", "message"),
    [
        ("more_shapes_s1", "first", {"images": 50}, "s0 and more_shapes_s1: localisation map with images 200 in one"),
        ("more_shapes_s2", "second", {"iteration": 80}, "s1 and more_shapes_s2: second stage with iteration 900 in"),
        ("acr_shapes_s0", "first", {"split": "train"}, "more_shapes_s0 and acr_shapes_s0: localisation map with split"),
        ("acr_shapes_s0", "second", {"scales": [0.5, 1.0]}, "acr_shapes_s0: second stage with scales"),
        ("more_shapes_s1", "first", {"map": "seg"}, "localisation map cam is not in all of them"),
    ],
)
def test_other_protocols_are_refused(folder, tag, part, change, message):
    path = folder / tag / "pipeline.json"
    content = json.loads(path.read_text())
    for row in content["scores"][part][: 1 if "map" in change else None]:
        row |= change
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        tool.main([str(folder), *ASKED, "--only-table"])


@pytest.mark.parametrize(("second", "split"), [("acr_shapes", []), ("deeplab_coco", ["val_part"])])
def test_upper_bound(tmp_path, monkeypatch, second, split):
    """Settings of the second stage alone; evaluated on the last weights, once."""
    calls = []

    def call(command):
        calls.append([str(word) for word in command])
        made = tmp_path / "own_s3" / "checkpoints" / "iter_000020.weights.safetensors"
        made.parent.mkdir(parents=True, exist_ok=True)
        made.touch()
        if "run_evaluate" in calls[-1][1]:
            rows = [row("more", "seg", 0.5, checkpoint=str(made))]
            (tmp_path / "own_s3" / "results.json").write_text(json.dumps(rows))
        return 0

    monkeypatch.setattr(tool, "call", call)
    argv = [str(tmp_path), "--first", "more_shapes", "--second", second, "--seeds", "3", "--upper-bound"]
    settings = ["crf=false", "first.train.lr=1", "second.train.lr=2", "second.evaluate.flip=false", "data.root=x"]
    tool.main([*argv, *settings])
    pipeline, train, evaluate = calls
    assert pipeline[4:] == ["more_shapes_s3", "first=more_shapes", f"second={second}", "seed=3", f"output={tmp_path}",
                            *settings]
    assert train[6:] == ["own_s3", f"config={second}", "train.lr=2", "evaluate.flip=false", "data.root=x", "seed=3",
                         "data.masks=own", f"output={tmp_path}", "resume=auto"]
    assert evaluate[-3].endswith("iter_000020.weights.safetensors")
    assert evaluate[-5 - len(split) : -3] == ["cpu", "1", *split]
    assert evaluate[-2:] == ["evaluate.flip=false", "data.root=x"] and ("coco.sh" in evaluate[1]) == ("coco" in second)
    tool.main([*argv, "--no-second", *settings])
    assert [words[-1] for words in calls[3:]] == [f"only={step}" for step in tool.STEPS] + ["resume=auto"]


def test_calls_budget_and_failures(tmp_path, monkeypatch):
    """Seeds are the outer loop; a failed cell ends nothing; seconds are measured once; other settings are refused."""
    calls, seconds = [], {"more_shapes": 0.5, "acr_shapes": 0.25}

    def call(command):
        words = [str(word) for word in command]
        tag = words[4 if words[1].endswith("run_pipeline.sh") else 6]
        calls.append((tag, [word for word in words if "iterations=" in word or "_after" in word]))
        if tag.startswith("probe_"):
            name = tag.removeprefix("probe_")
            make_run(tmp_path / tag, "more", 1000 * seconds[name])
        return int(tag == "acr_shapes_s0")

    monkeypatch.setattr(tool, "call", call)
    argv = [str(tmp_path), "--first", "more_shapes", "acr_shapes", "--second", "acr_shapes", "--seconds", "100"]
    again = [*argv, "--seeds", "0", "1", "data.root=x"]
    with pytest.raises(SystemExit, match="^failed: acr_shapes_s0; the same call tries again"):   # its code is 1
        tool.main(again)
    first = ["probe_more_shapes", "more_shapes_s0", "probe_acr_shapes", "acr_shapes_s0"]
    assert [tag for tag, _ in calls] == [*first, "more_shapes_s1", "acr_shapes_s1"]
    assert "loss.start_after.seg=-1" in calls[0][1] and "pseudo_labels.main_cam_after=-1" in calls[0][1]
    assert [words for tag, words in calls if tag == "more_shapes_s1"] == [["first.train.iterations=200"]]
    calls.clear()
    seconds["acr_shapes"] = 99
    with pytest.raises(SystemExit, match="failed: acr_shapes_s0"):
        tool.main(again)
    assert [words for _, words in calls] == [["first.train.iterations=200"], ["first.train.iterations=400"]] * 2
    with pytest.raises(UserError, match=r"begun with settings \['data.root=x'\], not \['data.root=y'\]: give the same"):
        tool.main([*argv, "data.root=y"])
    with pytest.raises(UserError, match="train.iterations=7: the comparison sets it"):
        tool.main([*again, "first.train.iterations=7"])
