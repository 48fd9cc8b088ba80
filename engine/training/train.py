"""The training loop; it knows a method by its contract alone (`model/__init__.py`)."""

import math
import time
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import build_train_set, build_val_set, collate_train
from engine.checkpoints import files as checkpoint
from engine.checkpoints.start_weights import RANDOM, TIMM, start_weights
from engine.distributed import Ranks, all_reduce_sum, barrier, global_ratio, loader_workers, use_tf32
from engine.evaluation.evaluate import check_classes, validate
from engine.inference.pictures import training_picture
from engine.training.optimizer import build_optimizer, set_lr
from engine.training.sampler import GlobalBatches
from model import build_method
from utils.batch import Batch
from utils.config import portable, save_provenance
from utils.errors import UserError
from utils.log import MetricsWriter, setup_logger


class Trainer:
    """A method, its optimizer and one step of training.

    method: on its device. config: the whole config. iteration: steps done so far.
    """

    def __init__(self, method: nn.Module, config: DictConfig, ranks: Ranks) -> None:
        self.method, self.config, self.ranks = method, config, ranks
        self.optimizer = build_optimizer(method.param_groups(config.train.lr), config.train)
        self.iteration = 0
        self.parallel: nn.Module = method
        if config.train.compile:
            method.compile()
        if ranks.world > 1:
            method.ratio = global_ratio
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(method, device_ids=devices)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One iteration: losses, backward, AdamW. Returns the detached terms and their weighted sum `total`.

        Every term takes part, with weight 0 before its stage: its parameters then get zero gradients, not none.
        """
        set_lr(self.optimizer, self.iteration, self.config.train)
        self.optimizer.zero_grad(set_to_none=True)   # before the forward, which then has their memory
        bf16 = self.config.train.precision == "bf16"
        with torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=bf16):
            terms = self.parallel(batch, self.iteration)
        weights = self.method.loss_weights(self.iteration)
        for name in terms.keys() - weights.keys():
            raise UserError(f"the loss term '{name}' has no weight: add it to loss.weights and loss.start_after")
        total = sum(weights[name] * term for name, term in terms.items())
        total.backward()
        self.optimizer.step()
        self.iteration += 1
        return {name: term.detach() for name, term in {**terms, "total": total}.items()}


def train(config: DictConfig, ranks: Ranks) -> Path:
    """Runs config to its end in the folder output/tag; returns that folder.

    config.resume=auto continues from the newest state there. Raises UserError for a user's mistake.
    """
    if not config.tag:
        raise UserError("tag is not set: give tag=NAME, the name of the run's folder")
    if config.train.batch_size % ranks.world:
        raise UserError(f"train.batch_size={config.train.batch_size} is no multiple of the {ranks.world} processes")
    main = ranks.rank == 0
    folder = Path(config.output) / config.tag
    checkpoints = folder / "checkpoints"
    if config.resume is None and any(checkpoints.glob("iter_*.state.pt")):
        raise UserError(f"{folder} holds a run already: continue it with resume=auto, or give another tag")
    log = setup_logger(folder / "train.log", main=main)

    use_tf32(config.train.tf32)
    train_set = build_train_set(config)
    val_set = build_val_set(config) if config.data.val_split else None
    torch.manual_seed(config.seed)
    method = build_method(config, len(train_set.classes))
    meta = {"method": config.method, "classes": list(train_set.classes), "config": config.tag}
    meta["settings"] = portable(config)
    trainer = Trainer(method.to(ranks.device), config, ranks)
    resumed = checkpoint.load_state(checkpoints, method, trainer.optimizer) if config.resume == "auto" else None
    if resumed is None:
        best = -math.inf
        _start(method, config.model)
    else:
        check_classes(checkpoints / checkpoint.WEIGHTS.format(resumed), train_set.classes)
        trainer.iteration, best = resumed, checkpoint.best_score(checkpoints)
    if main:
        save_provenance(config, folder)
        writer = MetricsWriter(folder, start=trainer.iteration)
    _describe(log, config, ranks, method, train_set, val_set, trainer.iteration)

    loader = _loader(train_set, config, ranks, trainer.iteration)
    period = _Period()
    length = config.train.iterations
    # closed on the way out, so that a message of an error starts on a line of its own
    bar = tqdm(loader, disable=not main, initial=trainer.iteration, total=length, desc="train", dynamic_ncols=True)
    with bar as progress:
        for batch in progress:
            batch = batch.to(ranks.device)
            period.add(trainer.step(batch))
            done, last = trainer.iteration, trainer.iteration == length
            if done % config.train.log_every == 0 or last:
                means = period.means(ranks)
                _stop_unless_finite(means, done, folder)
                if main:
                    progress.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
                    rate = {"lr": trainer.optimizer.param_groups[0]["lr"], "seconds_per_iteration": period.seconds}
                    writer.scalars(done - 1, {**means, **rate}, prefix="train/")
                    log.info(_line(done, length, means, period.seconds))
                period = _Period()
            if main and done % config.train.picture_every == 0:
                writer.image(done - 1, "maps", training_picture(method, batch, train_set.classes))
            if done % config.train.checkpoint_every == 0 or last:
                if main:
                    checkpoint.save_state(checkpoints, done, method, trainer.optimizer, meta)
                barrier()
            if val_set is not None and (done % config.train.validate_every == 0 or last):
                paused = time.perf_counter()
                scores = validate(method, val_set, config, ranks)
                if main:
                    writer.scalars(done - 1, scores, prefix="val/")
                    shown = "  ".join(f"{name} {100 * value:.2f}" for name, value in scores.items())
                    log.info("validation at %d: %s", done, shown)
                    if scores["seg"] > best:
                        best = scores["seg"]
                        best_meta = {**meta, "iteration": done, "val": scores}
                        checkpoint.save_weights(checkpoints / checkpoint.BEST, method, best_meta)
                barrier()
                period.paused += time.perf_counter() - paused
    if main:
        writer.close()
        log.info("done: %s", folder)
    return folder


def _start(method: nn.Module, model: DictConfig) -> None:
    weights = start_weights(model.weights, model)
    if weights is not None:
        try:
            method.load_start_weights(weights)
        except UserError as error:
            raise UserError(
                f"model.weights={model.weights} do not fit model.backbone={model.backbone}: {error}; give others, or "
                f"model.weights={TIMM} or {RANDOM}"
            ) from None


def _loader(train_set, config: DictConfig, ranks: Ranks, start: int) -> DataLoader:
    batches = GlobalBatches(
        len(train_set), config.train.batch_size, config.train.iterations, config.seed, ranks.rank, ranks.world, start
    )
    return DataLoader(
        train_set, batch_sampler=batches, collate_fn=collate_train, num_workers=loader_workers(config, ranks),
        pin_memory=ranks.device.type == "cuda",
    )


class _Period:
    """Sums of the terms since the last log line, kept on the device; `paused`: seconds of it that were no training."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.paused, self.started = 0, 0.0, time.perf_counter()

    def add(self, terms: dict[str, Tensor]) -> None:
        self.sums = {name: self.sums.get(name, 0) + term for name, term in terms.items()}
        self.steps += 1

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Mean of every term over the period's steps and over all processes."""
        total = all_reduce_sum(torch.stack(list(self.sums.values())).double())
        self.seconds = (time.perf_counter() - self.started - self.paused) / self.steps
        return dict(zip(self.sums, (total / (self.steps * ranks.world)).tolist(), strict=True))


def _stop_unless_finite(means: dict[str, float], done: int, folder: Path) -> None:
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"{folder}: the loss term {bad[0]} is not finite at iteration {done}; the checkpoints stay")


def _line(done: int, iterations: int, means: dict[str, float], seconds: float) -> str:
    left = int(seconds * (iterations - done))
    eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    terms = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    return f"{done}/{iterations}  {terms}  {seconds:.3f} s/it  eta {eta}"


def _describe(log, config: DictConfig, ranks: Ranks, method: nn.Module, train_set, val_set, start: int) -> None:
    parameters = sum(p.numel() for p in method.parameters()) / 1e6
    model = config.model
    log.info("%s, %s, %.2f M parameters, from %s", config.method, model.backbone, parameters, model.weights)
    validation = f"{len(val_set)} validation images ({config.data.val_split})" if val_set else "no validation"
    log.info("%d training images (%s), %s, %d classes", len(train_set), config.data.train_split, validation,
             len(train_set.classes))
    log.info("global batch %d = %d process(es) x %d on %s, lr %.3g, %s", config.train.batch_size, ranks.world,
             config.train.batch_size // ranks.world, ranks.device, config.train.lr, config.train.precision)
    if start:
        log.info("resumed after iteration %d", start)
