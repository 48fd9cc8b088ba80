"""Measures all that is to be known of the GPU path, on a machine with an NVIDIA card, and fills docs/performance.md.

    bash benchmarks/gpu.sh [--out FILE.json] [--minutes 10] [--device cpu] [--tiny] [--parts NAME ...]
    python benchmarks/gpu.py --fill FILE.json         # the tables alone, from a file that was made elsewhere

Every part is a process of its own whose limit is its share of what is left of --minutes. What fails or hangs is named
with its log, the others go on; FILE.json is written after every part. Exit code: 1 where one failed, 2 without a GPU.
--device cpu --tiny goes through all that needs no GPU. Then, and with --parts, only the document of --docs is filled.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from engine.launch import run_script
from benchmarks import filter_and_crf, training
from benchmarks.evaluation import rates
from benchmarks.measure import load_plain_filter, write_voc
from bilateralfilter import DenseCRF, Lattice, _cuda_toolkit, _extension, bilateral_filter
from datasets.texts import read_json
from engine.config import load_config
from engine.distributed import Ranks, loader_workers, pick_device
from model.par import par_affinity, par_refine
from utils.errors import UserError
from utils.files import ROOT, replacing
from utils.processes import end_with

OK, FAILED, NOT_MEASURED = "ok", "failed", "not measured"
BEGIN, END = "<!-- gpu.sh -->\n", "<!-- /gpu.sh -->\n"
TABLES = ROOT / "benchmarks" / "gpu_tables.md"   # a cell's {part[figure]:format} is of the figures of that part
ERROR = r"^(?:\S*(?:Error|Exception|Interrupt)\b.*|.*\berror: .*)$"   # CUDA's are followed by lines of advice
MAPS = {"bilateral": ["4x21x224x224", "4x81x224x224"], "crf": ["1x21x375x500", "1x81x375x500"]}
FULL = {
    "backbone": "vit_base_patch16_224", "model": [], "crop": 448, "steps": 20, "turns": 3, "images": 48, "maps": MAPS,
    "run": ["train.iterations=500"],
}
TINY = {
    "backbone": "vit_tiny_patch16_224", "crop": 64, "steps": 2, "turns": 1, "images": 3,
    "model": ["model.backbone_args={embed_dim: 32, depth: 3, num_heads: 2, img_size: 64, patch_size: 8}"],
    "maps": {"bilateral": ["1x3x30x20"], "crf": ["1x3x30x20"]},
    "run": ["train.iterations=4", "train.log_every=2", "data.shapes.train=8", "data.shapes.val=4", "data.root=shapes"],
}
STEPS = {   # settings of the step's formulations
    **{name: [f"train.precision={name}", "train.tf32=false"] for name in ("fp32", "bf16")},
    "tf32": ["train.precision=fp32", "train.tf32=true"], "compiled": ["train.precision=bf16", "train.compile=true"],
    "plain": ["train.precision=fp32", "train.tf32=false"],
}


# every part: what it is to measure (FULL or TINY; device, folder, end: when it is stopped) and note(figure=...), which
# keeps what was measured whatever comes; it returns why it measured nothing, if so

def machine(given: argparse.Namespace, note: Callable) -> None:
    query = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"
    note(gpus=_said("nvidia-smi", query, "--format=csv,noheader"), nvcc=_said(_nvcc(), "--version"))
    note(torch=torch.__version__, cuda=torch.version.cuda, cores=len(os.sched_getaffinity(0)))
    begin = time.monotonic()
    for device in {given.device, "cpu"}:   # compiles it, for all parts
        if not _extension.load(device):
            sys.exit(f"error: bilateralfilter has no compiled operators for {device}")
    load_plain_filter()
    note(compiling=time.monotonic() - begin)


def gpu_tests(given: argparse.Namespace, note: Callable) -> None:
    report = given.folder / "tests.xml"
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests"]
    code = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT).returncode
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        note(**counts, passed=2 * counts["tests"] - sum(counts.values()))
        if counts["tests"] == counts["skipped"]:
            sys.exit("error: every test was skipped")
    sys.exit(code)


def sanitizer(given: argparse.Namespace, note: Callable) -> str | None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=Path(_nvcc()).parent)
    if tool is None:
        return "no compute-sanitizer"
    script = [sys.executable, "-c", "from benchmarks.gpu import odd_sizes; odd_sizes('cuda')"]
    begin = time.monotonic()
    for name in ("memcheck", "racecheck"):
        if time.monotonic() + (time.monotonic() - begin) > given.end:
            note(**{name: f"{NOT_MEASURED}: no time"})
            continue
        options = ["--tool", name, "--error-exitcode", "9", "--target-processes", "application-only"]
        _call(tool, *options, *script, PYTORCH_NO_CUDA_MEMORY_CACHING="1")   # every tensor has borders of its own
        note(**{name: "clean"})
    return None


def odd_sizes(device: str) -> None:
    """The filter, the lattice, the CRF and PAR where indices could go astray."""
    for batch, channels, height, width in ((1, 1, 1, 1), (1, 3, 61, 53), (3, 81, 17, 40), (2, 21, 1, 31)):
        images = 255 * torch.rand(batch, 3, height, width, device=device)
        maps = torch.rand(batch, channels, height, width, device=device, requires_grad=True)
        bilateral_filter(images, maps, 15, 50).sum().backward()
        DenseCRF(iterations=2)(images, maps.detach().softmax(1))
        par_refine(maps.detach(), par_affinity(images / 255, (1, 4)), (1, 4), 2)
    for dimensions in range(1, 9):
        lattice = Lattice(3 * torch.randn(2, 257, dimensions, device=device))
        for transposed in (False, True):
            lattice.filter(torch.rand(2, 257, 33, device=device), transposed)


def filter_and_crf_part(given: argparse.Namespace, note: Callable) -> None:
    prepare = {"bilateral": filter_and_crf.bilateral_rivals, "crf": filter_and_crf.crf_rivals}
    for name, texts in given.maps.items():
        for text in texts:
            size = tuple(map(int, text.split("x")))
            note(**{f"{name} {text}": filter_and_crf.against_cpu(size, prepare[name], given.device)})


def steps(given: argparse.Namespace, note: Callable, names: tuple[str, ...], classes: int = 20) -> None:
    common = {"batch": 4, "crop": given.crop, "backbone": given.backbone, "classes": classes}
    common |= {"device": given.device, "images": ""}
    workers = {name: {**common, "settings": [*given.model, *STEPS[name]], "plain": name == "plain"} for name in names}
    for name, one in training.compare_steps(workers, given.steps, given.turns, given.end - 5).items():
        phases = {phase: 1000 * seconds for phase, seconds in one["phases"].items()}
        note(**{name: {**one, "images_a_second": 4 * one["rate"], "phases_ms": phases}})


def loader(given: argparse.Namespace, note: Callable) -> None:
    write_voc(given.folder / "voc", given.images)
    workers = loader_workers(load_config("more_voc"), Ranks(0, 1, pick_device(given.device)))
    folder = given.folder / "voc" / "JPEGImages"
    [row] = training.data(argparse.Namespace(images=folder, crop=given.crop, threads=[workers]))
    note(workers=workers, rate=row["images_a_second"][workers])


def evaluation(given: argparse.Namespace, note: Callable) -> None:
    write_voc(given.folder / "voc", given.images)
    settings = [*given.model, f"model.backbone={given.backbone}", f"evaluate.base_size={given.crop}"]
    note(**rates(given.folder / "voc", settings, Ranks(0, 1, pick_device(given.device))))


def cards(given: argparse.Namespace, note: Callable) -> str | None:
    if torch.cuda.device_count() < 2:
        return "one card"
    [row] = training.ddp(argparse.Namespace(**vars(given), batch=[4], repeats=given.steps))
    note(**{f"cards {count}": 4 * count / spent for count, spent in row["seconds"].items()}, ratio=row["ratio"])
    return None


def short_run(given: argparse.Namespace, note: Callable, precision: str) -> None:
    """The demo's training, shorter, through the launchers, and its scores."""
    device, begin = "0" if given.device == "cuda" else "cpu", time.monotonic()
    settings = [one.replace("data.root=", f"data.root={given.folder}/") for one in given.run]
    settings += ["config=more_shapes", f"output={given.folder}", f"train.precision={precision}"]
    _call("bash", "run_train.sh", "scripts/train_voc.py", device, "1", "auto", precision, *settings)
    note(seconds=time.monotonic() - begin)
    run = given.folder / precision
    _call("bash", "run_evaluate_voc.sh", device, "1", str(max(run.glob("checkpoints/iter_*.weights.safetensors"))))
    note(**{row["map"]: 100 * row["miou"] for row in read_json(run / "results.json")})


class Part(NamedTuple):
    """seconds: of ten minutes, on an H100. gpu: not to be measured without one."""

    measure: Callable
    seconds: int
    gpu: bool = False


PARTS = {
    "machine": Part(machine, 120),
    "tests": Part(gpu_tests, 40, gpu=True),
    "sanitizer": Part(sanitizer, 60, gpu=True),
    "filter": Part(filter_and_crf_part, 15),
    "step_voc": Part(partial(steps, names=("plain", "fp32", "tf32", "bf16")), 90),
    "step_coco": Part(partial(steps, names=("plain", "fp32", "tf32", "bf16"), classes=80), 90),
    "loader": Part(loader, 15),
    "evaluation": Part(evaluation, 50),
    "cards": Part(cards, 30, gpu=True),
    "run_fp32": Part(partial(short_run, precision="fp32"), 80),   # of it 40 to draw the images
    "run_bf16": Part(partial(short_run, precision="bf16"), 40),
    "step_compiled": Part(partial(steps, names=("bf16", "compiled")), 90, gpu=True),   # last: it compiles longest
}


def _nvcc() -> str:
    """That which compiles the filter; just its name where none fits."""
    with suppress(LookupError):
        return str(_cuda_toolkit.find(_cuda_toolkit.cards()).home / "bin" / "nvcc")
    return "nvcc"


def _said(*command: str) -> str | None:
    """The last line of a program; of several GPUs all. None where it is not there or fails."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(said.strip().splitlines()[0 if "smi" in command[0] else -1:])


def _call(*command: str, **environment: str) -> None:
    """Ends this process where the command fails: what it printed last is the part's error."""
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)


def measure_part(name: str, folder: Path, given: argparse.Namespace) -> None:
    """The process of a part."""
    end_with(os.getppid())
    found = {}

    def note(**figures: object) -> None:
        found.update(figures)
        with replacing(folder / f"{name}.json") as part:
            part.write_text(json.dumps(found), encoding="utf-8")

    with tempfile.TemporaryDirectory(dir=folder) as own:
        given.folder = Path(own)
        if reason := PARTS[name].measure(given, note):
            note(not_measured=reason)


def measure(commands: Mapping[str, tuple[int, list[str] | str]], out: Path, minutes: float) -> dict:
    """Runs every part and returns {"minutes", "parts": {name: entry}}, which `out` holds after every part.

    commands: name -> (seconds of the ten minutes, the command or why there is none). The command gets the part's limit
    as its last argument; its figures are those of OUT/NAME.json, beside its log.
    """
    folder, end = out.with_suffix(""), time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    results = {"date": time.strftime("%Y-%m-%d"), "minutes": minutes, "parts": {}}
    wanted = {name: seconds for name, (seconds, command) in commands.items() if not isinstance(command, str)}
    for name, (_, command) in commands.items():
        left, reason = end - time.monotonic(), command if isinstance(command, str) else None
        entry = {"status": NOT_MEASURED, "reason": reason or f"the {minutes:g} minutes are over; see --minutes"}
        if reason is None and left > 1:
            entry = run_part(command, left * wanted[name] / sum(wanted.values()), folder / name)
        wanted.pop(name, None)
        results["parts"][name] = entry
        with replacing(out) as part:
            part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        said = [entry["status"], entry.get("reason"), entry["status"] == FAILED and f"see {entry['log']}"]
        print(f"{name}, {entry.get('seconds', 0):.0f} s:", "; ".join(filter(None, said)), flush=True)
    return results


def run_part(command: list[str], limit: float, stem: Path) -> dict:
    log, file, begin = stem.with_suffix(".log"), stem.with_suffix(".json"), time.monotonic()
    file.unlink(missing_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, f"{limit:.1f}"], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
        )
        try:
            code, reason = process.wait(limit), None
        except subprocess.TimeoutExpired:
            code, reason = 1, f"stopped at its limit of {limit:.0f} s; --minutes gives more"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)   # what it started, too
            process.wait()
    found = json.loads(file.read_text()) if file.exists() else {}
    entry = {"status": FAILED if code else OK, "seconds": time.monotonic() - begin, "limit": limit, "log": str(log)}
    if code:
        said = log.read_text(errors="replace").strip()
        errors = re.findall(ERROR, said, re.MULTILINE) or said.splitlines() or ["it said nothing"]
        signalled = f"{signal.Signals(-code).name}: " if code < 0 else ""
        entry["reason"] = reason or signalled + errors[-1].strip()
    elif "not_measured" in found:
        entry |= {"status": NOT_MEASURED, "reason": found.pop("not_measured")}
    return {**entry, "figures": found}


def fill(results: Mapping, docs: Path) -> None:
    """Writes the tables of the results between the marks of the document. Raises UserError where it has none."""
    text = docs.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{docs}: has no lines {BEGIN.strip()} and {END.strip()}, between which the tables go")
    figures = {name: part.get("figures", {}) for name, part in results["parts"].items()}

    def cell(found: re.Match) -> str:
        try:
            return found[0].format_map(figures)
        except (KeyError, TypeError, ValueError):
            return f" {NOT_MEASURED} "

    tables = re.sub(r"[^|\n]*\{[^|\n]*", cell, TABLES.read_text(encoding="utf-8"))
    lacking = [f"- `{n}` {p['status']}: {p['reason']}\n" for n, p in results["parts"].items() if p["status"] != OK]
    with replacing(docs) as part:
        part.write_text("".join([before, begin, tables, *(["\n"] if lacking else []), *lacking, end, after]), "utf-8")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu.json", metavar="FILE.json")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: whether everything runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--fill", type=Path, metavar="FILE.json", help="measure nothing, fill the tables from it")
    parser.add_argument("--docs", type=Path, help="the document with the tables; default: docs/performance.md")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)   # a part's own process: its name, its limit
    options = parser.parse_args(argv)
    docs = options.docs or ROOT / "docs" / "performance.md"
    if options.fill:
        results = read_json(options.fill)
        if not isinstance(results, dict) or "parts" not in results:
            raise UserError(f"{options.fill}: is no file of benchmarks/gpu.sh")
        return fill(results, docs)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is visible to torch; --device cpu --tiny tries all that needs none")
    out = options.out.resolve()
    if options.one:
        name, limit = options.one
        sizes = TINY if options.tiny else FULL
        given = argparse.Namespace(**sizes, device=options.device, end=time.monotonic() + float(limit))
        return measure_part(name, out.with_suffix(""), given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # as Ctrl-C: the part that runs is ended, too
    again = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), "--device", options.device]
    again += ["--tiny", "--one"] if options.tiny else ["--one"]
    absent = "no GPU" if options.device == "cpu" else None
    commands = {
        name: (part.seconds, (part.gpu and absent) or [*again, name])
        for name, part in PARTS.items() if name in options.parts
    }
    results = measure(commands, out, options.minutes)
    if options.docs or (options.device == "cuda" and not options.tiny and options.parts == list(PARTS)):
        fill(results, docs)
    print(f"all figures: {out}")
    failed = [name for name, entry in results["parts"].items() if entry["status"] == FAILED]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
