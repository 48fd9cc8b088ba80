"""The benchmarks of training: one step, its parts, and processes that share it. Started by benchmarks/benchmark.py."""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import plain_acr, plain_afa, plain_step
from benchmarks.measure import (
    CLASSES,
    Counter,
    batch_of,
    clock_of,
    host_waits,
    image_files,
    interleaved,
    kernels_of,
    load_images,
    load_plain_filter,
    median_ratio,
    seconds_of,
)
from datasets import collate_train
from datasets.samples import Sample
from datasets.sets import TrainSet
from datasets.transforms import build_augmentation, seeded
from engine.config import RunConfig, load_config
from engine.distributed import Ranks, barrier, cleanup, peak_memory, setup, use_tf32
from engine.evaluation.sweep import COUNT, THRESHOLDS, acr_iou, histogram, matrices_of
from engine.training.sampler import GlobalBatches
from engine.training.step import Trainer
from model import METHODS
from model.acr.getam import getam
from model.afa import method as afa_method
from model.afa.affinity import affinity_loss, random_walk
from model.afa.method import scores_with_background
from model.losses.consistency import mirror_consistency
from model.losses.ratio import local_ratio
from model.more.lir import certain_loss, hashed_order, sample_uncertain, uncertain_loss
from model.pseudo_labels import present_first, refined_labels
from utils.batch import Batch
from utils.errors import UserError
from utils.files import ROOT
from utils.images import read_rgb

ALLOWED_DIFFERENCE = {"fp32": 1e-3, "bf16": 5e-2}   # of a loss term, relative to the total: two formulations in float32
LATE = 12_000   # an iteration at which every term has a weight; MoRe's token labels come from the main CAM, AFA's walk
PLAIN = {"more": plain_step.PlainMoRe, "afa": plain_afa.PlainAFA, "acr": plain_acr.PlainACR}
# --backbone and --crop
DEFAULTS = {"more": ("vit_base_patch16_224", 448), "afa": ("mit_b1", 512), "acr": ("vit_base_r50_s16_384", 384)}
NO_DRAWS = {"afa": ["model.drop_path=0", "model.dropout=0"]}   # the two formulations draw in other orders


def step_config(options: argparse.Namespace) -> RunConfig:
    overrides = [f"model.backbone={options.backbone}", "model.weights=random", f"data.crop_size={options.crop}"]
    overrides.append("train.iterations=20000")   # the method's may be epochs, of images that are not here
    return load_config(f"{options.method}_voc", [*overrides, *NO_DRAWS.get(options.method, []), *options.settings])


def make_trainer(config: RunConfig, plain: bool, ranks: Ranks, classes: int = CLASSES) -> Trainer:
    """A trainer in the last stage. plain: with the plainly formulated losses and AdamW parameter by parameter."""
    torch.manual_seed(0)
    use_tf32(config.train.tf32)
    method = (PLAIN if plain else METHODS)[config.method](config, classes).to(ranks.device).train()
    trainer = Trainer(method, config, ranks)
    trainer.iteration = LATE
    if plain:
        method.host_filter = load_plain_filter()
        for group in trainer.optimizer.param_groups:
            group.update(fused=False, foreach=False)
    return trainer


@contextmanager
def phases_of(trainer: Trainer, mark: Callable) -> Iterator[list[tuple[str, object]]]:
    """Within it every border between phases of the steps is noted: the phase that begins or goes on there, and mark().
    Outside of all phases it is ''. Nothing is waited for: a GPU's marks are events."""
    borders: list[tuple[str, object]] = []
    inside = [""]

    def timed(function: Callable, phase: str) -> Callable:
        def call(*args, **kwargs):
            inside.append(phase)
            borders.append((phase, mark()))
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()
                borders.append((inside[-1], mark()))
        return call

    method, plain = trainer.method, isinstance(trainer.method, tuple(PLAIN.values()))
    calls = {"losses": (method, "losses"), "backward": (Tensor, "backward"), "optimizer": (trainer.optimizer, "step")}
    if trainer.config.method == "more":
        calls["CAM pass"] = method, "_all_cams" if plain else "_training_cams"
        calls["refine"] = method, "_pixel_labels"
        calls["forward"] = (plain_step, "plain_forward") if plain else (method.network, "forward")
    elif trainer.config.method == "acr":
        calls["forward"] = method.network, "forward"
    else:
        calls["CAM pass"] = (plain_afa, "plain_cams") if plain else (method, "_training_cams")
        calls["walk"] = (plain_afa, "plain_walk_labels") if plain else (method, "walked_labels")
        calls["refine"] = (plain_afa, "plain_cam_labels") if plain else (afa_method, "refined_labels")
    with ExitStack() as stack:
        for phase, (owner, name) in calls.items():
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), phase)))
        yield borders


def step(options: argparse.Namespace) -> list[dict]:
    """One training step of ours against the same step formulated plainly; prints a table, returns its rows."""
    rows = []
    for batch in options.batch or (4,):
        for precision in options.precision:
            row = {"benchmark": "step", "batch": batch, "crop": options.crop, "precision": precision}
            row |= {"method": options.method, "device": options.device, "backbone": options.backbone}
            if options.device == "cuda" and not torch.cuda.is_available():
                row["measured"] = False
            else:
                row |= measure_step(options, batch, precision)
            rows.append(row)
            print_step(row)
            if row.get("difference", 0) > ALLOWED_DIFFERENCE[precision]:
                sys.exit(f"step: the loss terms of ours and the plain step differ by {row['difference']:.1e}")
    return rows


def measure_step(options: argparse.Namespace, batch: int, precision: str) -> dict:
    """The measured part of a row."""
    given = {"batch": batch, "crop": options.crop, "backbone": options.backbone, "device": options.device}
    given |= {"method": options.method, "images": str(options.images or "")}
    workers = {"ours": {**given, "settings": [f"train.precision={precision}"]}}
    if options.baseline:
        workers["plain"] = {**given, "settings": ["train.precision=fp32"], "plain": True}
    repeats = options.repeats or 3
    found = compare_steps(workers, 1, repeats)
    row = {key: found["ours"][key] for key in ("operators", "host_reads", "flops", "phases")} | {"repeats": repeats}
    row |= {key: {name: one[key] for name, one in found.items()} for key in ("seconds", "peak_gb")}
    if "plain" in workers:
        row |= {key: found["ours"][key] for key in ("ratio", "difference")}
    row["matmul_flops"] = matmul_rate(options.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    row["utilisation"] = row["flops"] / row["seconds"]["ours"] / row["matmul_flops"]
    return row


def compare_steps(given: dict[str, dict], steps: int, repeats: int, end: float = float("inf")) -> dict[str, dict]:
    """What is measured of the steps of every `StepWorker(given[name])`; with `plain` among them, also against it.

    seconds and phases of a step: medians of `repeats` turns of so many steps, of fewer where time.monotonic() would
    pass `end`. Each formulation runs in a process of its own; they take turns, so that each has all cores and a peak of
    its own. On a GPU idle is the share of the step in which it computes nothing.
    """
    workers = {name: StepWorker(one) for name, one in given.items()}
    found = {name: worker.steps(1) for name, worker in workers.items()}   # warms up and counts
    turns: list[dict] = []
    begin = time.monotonic()
    while len(turns) < repeats and (not turns or time.monotonic() + (time.monotonic() - begin) / len(turns) < end):
        turns.append({name: worker.steps(steps) for name, worker in workers.items()})
    times = {name: [turn[name]["seconds"] for turn in turns] for name in workers}
    for name, one in found.items():
        phases = {phase: statistics.median(turn[name]["phases"][phase] for turn in turns) for phase in one["phases"]}
        one |= {"seconds": statistics.median(times[name]), "phases": phases, "repeats": len(turns)}
        one |= {"rate": 1 / one["seconds"], "peak_gb": workers[name].close()}
        if "busy" in one:
            one["idle"] = max(0, 1 - one["busy"] / one["seconds"])
        if "plain" in found:
            one["ratio"] = median_ratio(times["plain"], times[name])
            terms, plain = one["terms"], found["plain"]["terms"]
            one["difference"] = max(abs(terms[term] - plain[term]) for term in plain) / abs(plain["total"])
    return found


class StepWorker:
    """A process that trains: so many steps for every number it gets, one line of JSON for them, the peak at the end."""

    def __init__(self, given: dict) -> None:
        command = [sys.executable, "-c", "import benchmarks.training as s; s.work()", json.dumps(given)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes)

    def steps(self, count: int) -> dict:
        """What `work` says of so many steps."""
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> float:
        """Ends it; its peak in GB: of its memory, or of what it has allocated on the GPU."""
        self.process.stdin.close()
        peak = self._answer()["peak"]
        self.process.wait()
        return peak

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit("step: a process that was to be measured ended; its error stands above")
        return json.loads(line)


def work() -> None:
    """The process of a `StepWorker`. Its first answer holds what `counted` counts, too."""
    options = argparse.Namespace(**{"plain": False, "classes": CLASSES, "method": "more"} | json.loads(sys.argv[1]))
    folder = Path(options.images) if options.images else None
    images = load_images(folder, options.batch, options.crop, options.crop)
    given = batch_of(images, options.device, options.classes)
    ranks = Ranks(0, 1, torch.device(options.device))
    trainer = make_trainer(step_config(options), options.plain, ranks, options.classes)
    answer = counted(trainer, given)
    for line in sys.stdin:
        print(json.dumps(answer | timed_steps(trainer, given, int(line))), flush=True)
        answer = {}
    print(json.dumps({"peak": peak_memory(ranks.device)}), flush=True)


def counted(trainer: Trainer, given: Batch) -> dict:
    """The first step's terms and counts. On a GPU of two more how often the host waits, and what the GPU runs."""
    flops, counter = FlopCounterMode(display=False), Counter()
    with ExitStack() as stack:
        for mode in () if trainer.config.train.compile else (flops, counter):   # compiled code would be left aside
            stack.enter_context(mode)
        terms = trainer.step(given)
    found = {"terms": {name: float(x) for name, x in terms.items()}, "flops": flops.get_total_flops()}
    found |= {"operators": counter.operators, "host_reads": counter.host_reads}
    if trainer.ranks.device.type == "cuda":
        found["host_reads"] = host_waits(partial(trainer.step, given))
        found |= kernels_of(partial(trainer.step, given))
    return found


def timed_steps(trainer: Trainer, given: Batch, count: int) -> dict:
    """Seconds of a step and of its phases, on the mean of `count` steps one after the other."""
    mark, seconds_between, wait = clock_of(trainer.ranks.device.type)
    wait()
    with phases_of(trainer, mark) as borders:
        begin = mark()
        for _ in range(count):
            trainer.step(given)
        end = mark()
    wait()
    phases: dict[str, float] = defaultdict(float)
    for (phase, since), (_, until) in pairwise(borders):
        phases[phase] += seconds_between(since, until) / count
    phases.pop("", None)
    return {"seconds": seconds_between(begin, end) / count, "phases": phases}


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product, which utilisation is a share of."""
    side = 8192 if device == "cuda" else 3072
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    spent = []
    for _ in range(5):
        begin = time.perf_counter()
        (a @ b).sum().item()
        spent.append(time.perf_counter() - begin)
    return 2 * side**3 / statistics.median(spent)


def print_step(row: dict) -> None:
    network, crop = f"{row['method']}, {row['backbone']}", f"{row['crop']}x{row['crop']}"
    print(f"\nstep: {network}, batch {row['batch']}, {crop}, {row['precision']}, {row['device']}")
    if not row.get("measured", True):
        print("  not measured: no GPU")
        return
    seconds = row["seconds"]
    print(f"  ours {seconds['ours']:.3f} s, median of {row['repeats']}")
    if "plain" in seconds:
        print(f"  plain step, fp32: {seconds['plain']:.3f} s, {row['ratio']:.2f} times as long; "
              f"largest difference of a loss term {row['difference']:.1e} of the total")
    print("  " + ", ".join(f"{phase} {spent:.3f} s" for phase, spent in row["phases"].items()))
    print(f"  {row['operators']} operators, {row['host_reads']} host reads, {row['flops'] / 1e9:.0f} GFLOP: "
          f"{100 * row['utilisation']:.0f} % of the {row['matmul_flops'] / 1e9:.0f} GFLOP/s of a matrix product")
    print("  peak memory " + ", ".join(f"{name} {peak:.2f} GB" for name, peak in row["peak_gb"].items()), flush=True)


def parts(options: argparse.Namespace) -> list[dict]:
    """Parts of a step against their plain formulations, interleaved, with their gradients: PAR refinement and the two
    losses of LIR, or AFA's random walk and affinity loss, or ACR's localisation, consistency and sweep."""
    rows, side = [], options.crop // 16
    rivals_of = {"more": part_rivals, "afa": afa_rivals, "acr": acr_rivals}[options.method]
    for batch in options.batch or (4,):
        for name, rivals in rivals_of(options, batch, side).items():
            with Counter() as counter:
                result = rivals[0]()
            apart = (result - rivals[1]()).detach()   # of labels: the share that differs
            difference = float((apart.abs() if apart.is_floating_point() else apart != 0).double().mean())
            ours, plain = (_with_gradient(call) for call in rivals)
            timers = {
                run: partial(seconds_of, call, options.device) for run, call in (("plain", plain), ("ours", ours))
            }
            times = interleaved(timers, options.repeats or 9)
            ratio = median_ratio(times["plain"], times["ours"])
            row = {"benchmark": "parts", "method": options.method, "part": name, "batch": batch, "crop": options.crop}
            row |= {"ratio": ratio, "seconds": {run: statistics.median(spent) for run, spent in times.items()}}
            row |= {"operators": counter.operators, "host_reads": counter.host_reads, "difference": difference}
            rows.append(row)
            print(f"{name:>10}, batch {batch}: plain {1000 * row['seconds']['plain']:.2f} ms, ours "
                  f"{1000 * row['seconds']['ours']:.2f} ms, {ratio:.1f} times; forward: {counter.operators} operators, "
                  f"{counter.host_reads} host reads; mean difference {difference:.1e}", flush=True)
    return rows


def part_rivals(options: argparse.Namespace, batch: int, side: int) -> dict[str, tuple[Callable, Callable]]:
    """name -> (ours, plain), each a call that returns what is compared."""
    given = batch_of(load_images(options.images, batch, options.crop, options.crop), options.device)
    c, device = load_config("more_voc").pseudo_labels, options.device
    torch.manual_seed(0)
    cam = F.interpolate(torch.rand(batch, CLASSES, side, side), options.crop, mode="bilinear").to(device)
    image = ((given.images - given.images.min()) / (given.images.max() - given.images.min()) * 255).floor() / 255
    settings = c.high, c.low, list(c.par_dilations), c.par_iterations
    tokens = torch.randn(batch, CLASSES, 768, device=device, requires_grad=True)
    leaf = torch.randn(batch, side * side, 768, device=device, requires_grad=True)
    patches = leaf.transpose(1, 2).unflatten(2, (side, side))   # as the network lays them out
    first = given.labels.argmax(1)[:, None, None] + 1
    blobs = F.avg_pool2d(torch.rand(batch, 1, side, side, device=device), 5, 1, 2)[:, 0]
    labels = torch.where(blobs > 0.52, 255, torch.where(blobs > 0.45, first, 0))
    outputs = plain_step.Outputs(*(None,) * 3, tokens, patches, None)

    def refine() -> Tensor:
        present = present_first(given.labels, given.most_classes)
        return refined_labels(present.of(cam), present, image, *settings)

    def refine_plainly() -> Tensor:
        triples = zip(cam, given.labels, image, strict=True)
        return torch.stack([plain_step.plain_pixel_labels(*one, *settings) for one in triples])

    def sampled() -> Tensor:
        samples = sample_uncertain(labels, hashed_order, given.seeds, 8)
        return uncertain_loss(tokens, patches, samples, given.labels, local_ratio)

    def sampled_plainly() -> Tensor:
        orders = hashed_order(given.seeds, (side - 6) ** 2)
        places = [plain_step.plain_samples(*one, 8) for one in zip(labels, orders, strict=True)]
        return plain_step.plain_uncertain_loss(outputs, places, given.labels)

    def certain() -> Tensor:
        return certain_loss(tokens, patches, labels, present_first(given.labels, given.most_classes), 0.5)

    def certain_plainly() -> Tensor:
        return plain_step.plain_certain_loss(outputs, labels, given.labels, 0.5)

    return {
        "refine": (refine, refine_plainly),
        "uncertain": (sampled, sampled_plainly),
        "certain": (certain, certain_plainly),
    }


def afa_rivals(options: argparse.Namespace, batch: int, side: int) -> dict[str, tuple[Callable, Callable]]:
    """The same of AFA: the walk at the largest scale, for both backgrounds and from the same affinities; the loss from
    labels on. Its gradient is added to the value, so that it is compared too."""
    given = batch_of(load_images(options.images, batch, options.crop, options.crop), options.device)
    c, device = load_config("afa_voc").pseudo_labels, options.device
    large, backgrounds = int(max(c.cam_scales) * side), (c.high, c.low)
    torch.manual_seed(0)
    cam = torch.rand(batch, CLASSES, large, large, device=device)
    walked_by = torch.rand(batch, large**2, large**2, device=device)
    learned = torch.rand(batch, side**2, side**2, device=device)
    classes = given.labels.argmax(1)[:, None, None] + 1
    blobs = F.avg_pool2d(torch.rand(batch, 1, side, side, device=device), 5, 1, 2)[:, 0]
    labels = torch.where(blobs > 0.52, 255, torch.where(blobs > 0.49, classes, 0))
    pixels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)

    def walk() -> Tensor:
        present = present_first(given.labels, given.most_classes)
        own = present.of(cam)
        scores = [scores_with_background(own, present, (large, large), background) for background in backgrounds]
        walked = random_walk(torch.cat(scores, 1), lambda rows, columns: walked_by[:, rows, columns], c.radius)
        spread = walked.new_zeros(batch, 2, CLASSES + 1, large, large)
        for image in range(batch):
            ids = present.classes[image][present.there[image]] + 1
            of_both = walked[image].unflatten(0, (2, -1))
            spread[image, :, 0], spread[image][:, ids] = of_both[:, 0], of_both[:, 1 : 1 + len(ids)]
        return spread.transpose(0, 1)

    def walk_plainly() -> Tensor:
        mask, own = plain_afa.plain_mask(large, large, c.radius, cam.device), cam * given.labels[:, :, None, None]
        return torch.stack([plain_afa.plain_walk(own, walked_by, mask, given.labels, score) for score in backgrounds])

    def loss() -> Tensor:
        return affinity_loss(learned.detach().requires_grad_(), labels, CLASSES, c.radius)

    def loss_plainly() -> Tensor:
        mask = plain_afa.plain_mask(side, side, c.radius, cam.device)
        targets = plain_afa.plain_affinity_labels(pixels, mask)
        return plain_afa.plain_affinity_loss(learned.detach().requires_grad_(), targets)[0]

    return {"random walk": (walk, walk_plainly), "affinity": (loss, loss_plainly)}


def acr_rivals(options: argparse.Namespace, batch: int, side: int) -> dict[str, tuple[Callable, Callable]]:
    """The same of ACR: GETAM of three classes an image as released, its largest value made 1; the sum of both terms of
    consistency over 12 blocks of two heads; the IoU at 100 thresholds of maps of three classes an image."""
    config, device, chosen = step_config(argparse.Namespace(**vars(options), settings=[])), options.device, (0, 7, 14)
    ranks = Ranks(0, 1, torch.device(device))
    ours, plain = (make_trainer(config, plain, ranks).method.eval().network for plain in (False, True))
    images = batch_of(load_images(options.images, batch, options.crop, options.crop), device).images
    classes = torch.tensor(chosen, device=device).expand(batch, -1)
    size = 2 * batch, 2, side**2 + 1, side**2 + 1
    bias = 3 * torch.randn(size[2:], device=device)   # of both views: mirrored back they differ
    maps = [(torch.randn(size, device=device) + bias).softmax(-1).requires_grad_() for _ in range(12)]
    cams = F.interpolate(torch.rand(batch, CLASSES, side, side), options.crop, mode="bilinear")
    truth = torch.randint(CLASSES + 1, (batch, options.crop, options.crop), dtype=torch.uint8)
    present = torch.zeros(CLASSES, dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)

    def localised() -> Tensor:
        found = getam(ours, images, classes, "grad", -2, True).maps.flatten(2)
        return found / found.amax(2, keepdim=True)

    def localised_plainly() -> Tensor:
        found = [plain_acr.plain_getam(*plain_acr.plain_gradients(plain, image[None], chosen)) for image in images]
        return torch.stack([one / one.amax(1, keepdim=True) for one in found])

    def consistency() -> Tensor:
        of_blocks = [mirror_consistency(of_block, (side, side), slice(0, 1)) for of_block in maps]
        return torch.stack(of_blocks).mean(0).sum()

    def consistency_plainly() -> Tensor:
        views = (torch.stack([x.mean(1) for x in view], 1) for view in zip(*(x.chunk(2) for x in maps), strict=True))
        return sum(plain_acr.plain_mirror_terms(*views)[:2])

    def swept() -> Tensor:
        counts = np.zeros((CLASSES + 1, CLASSES, COUNT + 1), np.int64)
        for cam, label in zip(cams, truth, strict=True):
            counts[:, present.numpy()] += histogram(cam, present, label).numpy()
        return torch.from_numpy(acr_iou(matrices_of(counts)))

    def swept_plainly() -> Tensor:
        stored = [{number: cam[number] for number in chosen} for cam in cams]
        return plain_acr.plain_sweep(stored, truth, THRESHOLDS)

    return {
        "getam": (localised, localised_plainly),
        "consistency": (consistency, consistency_plainly),
        "sweep": (swept, swept_plainly),
    }


def _with_gradient(call: Callable[[], Tensor]) -> Callable[[], None]:
    def both() -> None:
        result = call()
        if result.requires_grad:
            result.backward()

    return both


def data(options: argparse.Namespace) -> list[dict]:
    """Images a second that the training data set makes: decoding and augmentation alone, then through its loader."""
    if options.images is None:
        raise UserError("data needs --images FOLDER, real images: what they cost to decode is the question")
    config = load_config("more_voc", [f"data.crop_size={options.crop}"])
    paths = image_files(options.images)
    augment = build_augmentation(config.data)
    samples = [Sample(path.stem, path, None) for path in paths]
    train_set = TrainSet(samples, lambda sample: torch.zeros(CLASSES), tuple(map(str, range(CLASSES))), augment)
    count = min(len(paths), 128)
    begin = time.perf_counter()
    pictures = [read_rgb(path) for path in paths[:count]]
    decoding = (time.perf_counter() - begin) / count
    begin = time.perf_counter()
    for seed, picture in enumerate(pictures):
        with seeded(seed):
            augment(picture)
    augmenting = (time.perf_counter() - begin) / count
    sides = statistics.mean(max(picture.shape) for picture in pictures)
    print(f"\ndata: {count} images, long side {sides:.0f} on the mean, crops of {options.crop}: decode "
          f"{1000 * decoding:.2f} ms, augment and normalise {1000 * augmenting:.2f} ms an image")
    row = {"benchmark": "data", "crop": options.crop, "decode": decoding, "augment": augmenting, "images_a_second": {}}
    for workers in options.threads:
        length = max(count, 256, 160 * workers) // 4   # a worker has made 8 of them before the clock starts
        batches = GlobalBatches(len(paths), 4, length, seed=0)
        loader = DataLoader(train_set, batch_sampler=batches, collate_fn=collate_train, num_workers=workers)
        turns = iter(loader)
        for _ in range(4):
            next(turns)   # the workers have started
        begin = time.perf_counter()
        for _ in turns:
            pass
        rate = 4 * (length - 4) / (time.perf_counter() - begin)
        row["images_a_second"][workers] = rate
        print(f"  {workers} worker(s): {rate:.1f} images/s", flush=True)
    return [row]


def ddp(options: argparse.Namespace) -> list[dict]:
    """Steps of two processes, or one on every GPU, against one process, each with one CPU thread and --batch images."""
    count = 2 if options.device == "cpu" else torch.cuda.device_count()
    if count < 2:
        raise UserError("ddp --device cuda needs two GPUs or more")
    rows = []
    for batch in options.batch or (1,):
        spent = {world: processes_step(options, batch, world) for world in (1, count)}
        ratio = count * spent[1] / spent[count]
        rows.append({"benchmark": "ddp", "batch": batch, "crop": options.crop, "seconds": spent, "ratio": ratio})
        print(f"\nddp: {options.backbone}, {batch} image(s) of {options.crop} a process, one thread each: one process "
              f"{spent[1]:.2f} s a step, {count} {spent[count]:.2f}: {ratio:.2f} times the images a second", flush=True)
    return rows


def processes_step(options: argparse.Namespace, batch: int, world: int) -> float:
    """Seconds of a step, the median of --repeats (3), of `world` processes that train together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    given = {"batch": batch, "crop": options.crop, "backbone": options.backbone, "method": options.method}
    given["repeats"] = options.repeats or 3
    given["settings"] = ["train.precision=fp32"]
    command = [sys.executable, "-c", "import benchmarks.training as s; s.report_step()", json.dumps(given)]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WSSS_DEVICE": options.device}
    runs = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]
    outputs = [run.communicate()[0] for run in runs]
    if any(run.returncode for run in runs):
        sys.exit("ddp: a process failed")
    return float(outputs[0].split()[-1])


def report_step() -> None:
    """Prints the seconds of a step; in the processes that `processes_step` starts."""
    options = argparse.Namespace(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    ranks = setup()
    trainer = make_trainer(step_config(options), False, ranks)
    given = batch_of(load_images(None, options.batch, options.crop, options.crop), ranks.device)
    trainer.step(given)
    spent = []
    for _ in range(options.repeats):
        barrier()
        spent.append(seconds_of(partial(trainer.step, given), ranks.device.type))
    if ranks.rank == 0:
        print(statistics.median(spent))
    cleanup()
