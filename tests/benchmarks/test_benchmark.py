"""benchmarks/benchmark.py on tiny sizes: its table, its JSON, and what it compares with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from benchmarks import benchmark, filter_and_crf
from benchmarks.measure import load_images, load_plain_filter
from bilateralfilter import bilateral_filter

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "benchmark.py"), *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stderr
    return done


def table(output: str, name: str) -> list[list[str]]:
    """The cells of one benchmark's lines, without its headings; a heading and its unit are apart by one space only."""
    _, _, after = output.partition(f"\n{name}: ")
    lines = after.partition("\n\n")[0].splitlines()
    headings, *cells = [line.strip().replace("   ", "  ").split("  ") for line in lines[1:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in cells]
    assert all(len(line) == len([heading for heading in headings if heading.strip()]) for line in cells)
    return cells


def test_table_and_json(tmp_path):
    path = tmp_path / "new" / "benchmark.json"
    sizes, batches, baselines = ("24x30x5", "17x13x3"), (1, 2), {"bilateral": "plain C++", "crf": "pydensecrf"}
    pytest.importorskip("pydensecrf")
    arguments = ["--sizes", ",".join(sizes), "--batch", "1,2", "--threads", "1,2", "--repeats", "3", "--json", path]
    output = run("bilateral", "crf", *arguments).stdout
    written = json.loads(path.read_text())
    assert written["machine"]["compiled"] is True
    rows = written["rows"]
    expected = [(name, size, batch) for name in baselines for size in sizes for batch in batches]
    assert [(row["benchmark"], row["size"], row["batch"]) for row in rows] == expected
    lines = table(output, "bilateral") + table(output, "crf")
    for row, cells in zip(rows, lines, strict=True):
        seconds, ratio, scaling = row["seconds"], row["ratio"], row["scaling"]
        assert (row["baseline"], row["device"], row["repeats"]) == (baselines[row["benchmark"]], "cpu", 3)
        assert row["images"] == "generated shapes"
        assert set(seconds) == {"baseline", "1", "2"} and set(ratio) == {"1", "2"} and set(scaling) == {"2"}
        assert all(value > 0 for part in (seconds, ratio, scaling) for value in part.values())
        assert row["agrees"] and row["difference"] <= {"bilateral": 1e-5, "crf": 1e-3}[row["benchmark"]]
        times = [f"{1000 * seconds[key]:.1f}" for key in ("baseline", "1", "2")]
        ratios = [f"{x:.2f}" for x in (ratio["1"], ratio["2"], scaling["2"])]
        assert cells == [row["size"], str(row["batch"]), "3", *times, *ratios, f"{row['difference']:.1e}"]


def test_what_cannot_be_measured_is_said(tmp_path):
    """pydensecrf that is not installed, in one table with our own times; a GPU that is not there."""
    (tmp_path / "pydensecrf.py").write_text("raise ImportError")
    tiny = ["--sizes", "24x30x5", "--batch", "1", "--repeats", "1"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    without = run("crf", *tiny, PYTHONPATH=paths)
    [cells] = table(without.stdout, "crf")
    absent = "not measured"
    assert cells[3] == cells[6] == cells[7] == cells[9] == absent
    assert absent not in (cells[4], cells[5], cells[8])
    arguments = [*tiny, "--device", "cuda", "--json", tmp_path / "gpu.json"]
    no_gpu = run("bilateral", "crf", *arguments, CUDA_VISIBLE_DEVICES="")
    assert [cells[3:] for cells in table(no_gpu.stdout, "bilateral")] == [[absent] * 4]
    assert all("seconds" not in row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"])


def test_mistakes(tmp_path, capsys):
    wrong = (("--sizes", "24x30", "sizes"), ("--repeats", "0", "number"), ("--batch", "1,x", "numbers"))
    for option, value, what in wrong:
        with pytest.raises(SystemExit, match="2"):
            benchmark.main(["crf", option, value])
        assert f"invalid {what} value: '{value}'" in capsys.readouterr().err
    empty = run("crf", "--images", tmp_path, "--sizes", "8x8x2", code=2).stderr
    assert f"{tmp_path}: no such folder, or no .jpg, .jpeg or .png in it" in empty and "Traceback" not in empty


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_other_results_are_an_error(monkeypatch, wrong):
    monkeypatch.setattr(filter_and_crf, "bilateral_filter", lambda *inputs: bilateral_filter(*inputs) * (1 + wrong))
    with pytest.raises(SystemExit, match="bilateral: ours and plain C.. differ by"):
        benchmark.main(["bilateral", "--sizes", "9x8x2", "--batch", "1", "--repeats", "1", "--threads", "1"])


def test_crf_leaves_out_the_largest_cases_by_default(monkeypatch, capsys):
    monkeypatch.setattr(filter_and_crf, "measure", lambda *given: {})
    monkeypatch.setattr(filter_and_crf, "crf_rivals", lambda images, channels, device: None)
    monkeypatch.setattr(filter_and_crf, "CRF_VALUES", 4 * 8 * 8 * 3)
    prepared = []
    monkeypatch.setattr(filter_and_crf, "load_images", lambda folder, batch, *size: prepared.append(batch))
    benchmark.main(["crf", "--sizes", "8x8x3"])
    assert prepared == [1, 4]
    benchmark.main(["crf", "--sizes", "8x8x3", "--batch", "8"])
    assert prepared == [1, 4, 8]


def test_images_of_a_folder(tmp_path):
    for name, value in (("b.JPG", 200), ("a.png", 100)):
        cv2.imwrite(str(tmp_path / name), np.full((20, 30, 3), value, np.uint8))
    (tmp_path / "c.txt").touch()
    images = load_images(tmp_path, 3, 7, 9)
    assert images.shape == (3, 3, 7, 9) and images.dtype == torch.uint8
    assert [int(image.min()) for image in images] == [int(image.max()) for image in images] == [100, 200, 100]


def test_crf_probabilities_leave_no_class_out(monkeypatch):
    given = []
    monkeypatch.setattr(filter_and_crf, "DenseCRF", lambda **parameters: lambda *inputs: given.append(inputs))
    filter_and_crf.crf_rivals(torch.zeros(1, 3, 40, 50, dtype=torch.uint8), 21, "cpu").ours()
    [(_, prob)] = given
    assert (prob.amax((0, 2, 3)) > 1e-5).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (24, 30)])
@pytest.mark.parametrize(("sigmas", "tolerance"), [((15.0, 50.0), 3e-6), ((3.0, 67.0), 3e-5)])
def test_plain_filter_equals_ours(size, sigmas, tolerance):
    """Two implementations of one formula: equal but for rounding in float32, of features up to 255 / sigma_rgb.

    Few pixels, as the filter jumps where rounding puts a pixel on the other side of a simplex's face; the first pixel
    lies on a face exactly.
    """
    torch.manual_seed(0)
    for _ in range(5):
        images = torch.rand(2, 3, *size) * 255
        maps = torch.randn(2, 5, *size)
        plain = load_plain_filter()(images, maps, *sigmas)
        ours = bilateral_filter(images, maps, *sigmas)
        assert (ours - plain).abs().max() <= tolerance * plain.abs().max()


def test_plain_filter_refuses_other_sizes():
    with pytest.raises(ValueError, match="the sizes differ"):
        load_plain_filter()(torch.rand(1, 3, 6, 4), torch.rand(1, 2, 6, 5), 15.0, 50.0)
