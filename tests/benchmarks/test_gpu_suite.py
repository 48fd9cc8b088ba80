"""benchmarks/gpu.sh where there is no GPU: parts on the CPU, parts that fail, tables, fakes for what CUDA gives."""

import argparse
import json
import re
import shutil
import sys
import time
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, measure
from tests.tiny import ROOT, bash
from utils.errors import UserError

DOCS = ROOT / "docs" / "performance.md"
RUN = ("machine", "tests", "filter", "step_voc", "run_bf16")


def test_all_that_needs_no_gpu(tmp_path):
    docs, out = shutil.copy(DOCS, tmp_path / "docs.md"), tmp_path / "gpu.json"
    given = ["--device", "cpu", "--tiny", "--out", out, "--docs", docs, "--parts", *RUN]
    done = bash("benchmarks/gpu.sh", *given, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert [parts[name]["status"] for name in RUN] == ["ok", "not measured", "ok", "ok", "ok"]
    step = parts["step_voc"]["figures"]
    assert step["fp32"]["difference"] < 1e-4 and step["plain"]["phases"].keys() == step["bf16"]["phases"].keys()
    cells = re.search(r"\| CAM pass, ms \|(.*)\|", docs.read_text())[1].split("|")
    assert [cell.strip() for cell in cells[:4]] == [f"{one['phases_ms']['CAM pass']:.1f}" for one in step.values()]
    assert cells[4] == " not measured " and "- `tests` not measured: no GPU\n" in docs.read_text()
    assert set(parts["run_bf16"]["figures"]) == {"seconds", "cam", "lam", "seg"}
    assert re.search(r"\| what the step in bf16 consumes \| \d+ \|\n", docs.read_text())
    assert set(parts["filter"]["figures"]["crf 1x3x30x20"]) == {"ms", "difference"}


@pytest.mark.slow
def test_images_a_second(tmp_path):
    noted = {}
    for part in (gpu.loader, gpu.evaluation):
        folder = tmp_path / part.__name__
        folder.mkdir()
        assert part(argparse.Namespace(**gpu.TINY, device="cpu", folder=folder), noted.update) is None
    assert noted["workers"] == 1 and noted["rate"] > 1 and noted.keys() >= {"seg", "lam", "lam_crf"}
    assert noted["lam"]["evaluation"] > 0 and len(list(folder.rglob("lam_crf1/labels/lam_crf/*.png"))) == 3


def test_parts_that_fail_hang_or_come_too_late(tmp_path, capsys):
    """The others go on, figures that were noted stay, and nothing that a part started outlives it."""
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.1)"
    codes = {
        "fails": "print('RuntimeError: CUDA error: x\\nCompile with DSA'); raise SystemExit(1)",
        "dies": "import os; os.kill(os.getpid(), 11)",
        "hangs": f"""import subprocess, sys, pathlib
pathlib.Path({str(tmp_path / "out" / "hangs.json")!r}).write_text('{{"first": 1}}')
subprocess.run([sys.executable, "-c", {child!r}])""",
        "works": "pass",
    }
    commands = {name: (1, [sys.executable, "-c", code]) for name, code in codes.items()}
    parts = gpu.measure({**commands, "absent": (1, "no GPU")}, tmp_path / "out.json", minutes=0.2)["parts"]
    assert parts == json.loads((tmp_path / "out.json").read_text())["parts"]
    assert [part["status"] for part in parts.values()] == ["failed"] * 3 + ["ok", "not measured"]
    reasons = [parts[name]["reason"] for name in ("fails", "dies", "absent")]
    assert reasons == ["RuntimeError: CUDA error: x", "SIGSEGV: it said nothing", "no GPU"]
    assert parts["hangs"]["figures"] == {"first": 1} and "stopped at its limit" in parts["hangs"]["reason"]
    assert f"see {tmp_path / 'out' / 'fails.log'}" in capsys.readouterr().out
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()
    late = gpu.measure(commands, tmp_path / "out.json", minutes=0)["parts"]
    assert all(part["status"] == "not measured" and "--minutes" in part["reason"] for part in late.values())


def test_tables_of_all_some_and_no_figures(tmp_path):
    docs = tmp_path / "docs.md"
    docs.write_text(f"before\n{gpu.BEGIN}former\n{gpu.END}after\n")
    parts = {}
    for part, *keys in (re.findall(r"\w[^\[\]{}:]*", one) for one in re.findall(r"\{([^:}]*)", gpu.TABLES.read_text())):
        figures = parts.setdefault(part, {"status": "ok", "figures": {}})["figures"]
        for key in keys[:-1]:
            figures = figures.setdefault(key, {})
        figures[keys[-1]] = 0.5
    assert set(parts) == set(gpu.PARTS)
    gpu.fill({"parts": parts}, docs)
    full = docs.read_text()
    assert "{" not in full and "not measured" not in full and "former" not in full
    assert full.startswith("before\n<!--") and full.endswith("-->\nafter\n")
    parts["loader"] = {"status": "failed", "reason": "OutOfMemoryError: x", "figures": {}}
    gpu.fill({"parts": parts}, docs)
    changed = set(docs.read_text().splitlines()) - set(full.splitlines())
    assert changed == {"- `loader` failed: OutOfMemoryError: x", "| loader | not measured |"}
    gpu.fill({"parts": {}}, docs)
    assert not re.search(r"\d\.\d", docs.read_text()) and docs.read_text().count("not measured") > 50
    docs.write_text("no marks")
    with pytest.raises(UserError, match="has no lines <!-- gpu.sh -->"):
        gpu.fill({"parts": {}}, docs)


def test_no_gpu_and_no_file_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "other.json").write_text("[]")
    for given, said in (([], "no GPU is visible"), (["--fill", tmp_path / "other.json"], "other.json: is no file of")):
        done = bash("benchmarks/gpu.sh", *given)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_no_sanitizer_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu.sanitizer(argparse.Namespace(), print) == "no compute-sanitizer"


def test_a_run_of_skipped_tests_is_a_failure(tmp_path, monkeypatch):
    def pytest_run(command, **_):
        counts = 'tests="2" failures="0" errors="0" skipped="2"'
        (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite {counts}/></testsuites>")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu.subprocess, "run", pytest_run)
    noted = {}
    with pytest.raises(SystemExit, match="every test was skipped"):
        gpu.gpu_tests(argparse.Namespace(folder=tmp_path), noted.update)
    assert (noted["passed"], noted["skipped"]) == (0, 2)


def test_what_cuda_says_is_read(monkeypatch):
    """Its events in milliseconds, its warnings of waits, the profiler's kernels."""
    times = iter((100, 350))
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: end.at - event.at, at=next(times))
    events = iter((event, SimpleNamespace(record=lambda: None, at=next(times))))
    waited = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: next(events))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("device"))
    assert measure.seconds_of(lambda: None, "cuda") == 0.25 and waited == ["device", "device"]

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", waited.append)
    warn = "called a synchronizing CUDA operation"
    assert measure.host_waits(lambda: [warnings.warn(text, stacklevel=1) for text in (warn, "other", warn)]) == 2
    assert waited[2:] == ["warn", "default"]

    class Profile:
        def __init__(self, activities): ...
        def __enter__(self): return self
        def __exit__(self, *_): ...
        def events(self):
            kinds = (("CUDA", False), ("CUDA", True), ("CPU", False), ("CUDA", False))
            span = SimpleNamespace(elapsed_us=lambda: 3)
            of = partial(SimpleNamespace, time_range=span)
            return [of(device_type=getattr(measure.DeviceType, kind), is_user_annotation=note) for kind, note in kinds]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert measure.kernels_of(lambda: None) == {"kernels": 2, "busy": 6e-6}


def test_odd_sizes_run():
    gpu.odd_sizes("cpu")
