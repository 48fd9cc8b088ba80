"""The folder of a run: its log, metrics, pictures, checkpoints and the best weights so far."""

import hashlib
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets import TrainSet
from engine.checkpoints import files
from engine.checkpoints.start_weights import load_start_weights
from engine.config import RunConfig, portable
from engine.distributed import Ranks, all_reduce_sum, barrier, gather, peak_memory
from engine.inference.pictures import training_picture
from engine.provenance import save_provenance
from engine.training.nonfinite import NonFinite
from engine.training.resume import check_same_run
from engine.training.skipped import Skipped
from engine.training.step import Trainer
from model.batch_norm import FrozenBatchNorm, SyncBatchNorm
from model.method import Method
from utils.batch import Batch
from utils.errors import UserError
from utils.files import retried
from utils.log import MetricsWriter, read_metrics, setup_logger
from utils.processes import Stopped, lock
from utils.progress import progress_bar


class Run:
    """What happens around the steps of a training; only the first process writes.

    Raises UserError for settings that do not go together, and for a folder that holds a run already.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        if not config.tag:
            raise UserError("tag is not set: give tag=NAME, the name of the run's folder")
        if config.train.batch_size % ranks.world:
            raise UserError(f"train.batch_size={config.train.batch_size} is no multiple of the {ranks.world} processes")
        self.config, self.ranks, self.main = config, ranks, ranks.rank == 0
        self.folder = Path(config.output) / config.tag
        self.checkpoints = self.folder / "checkpoints"
        self.logger = setup_logger(self.folder / "train.log", main=self.main)
        self.lock = lock(self.folder) if self.main else None
        kept = [*self.checkpoints.glob("*.state.pt"), *self.checkpoints.glob("*.weights.safetensors")]
        if config.resume is None and kept:
            raise UserError(f"{self.folder} holds a run already: continue it with resume=auto, or give another tag")
        self.period, self.metrics = _Period(), self.folder / "metrics.jsonl"
        self.skipped = Skipped(config.data, self.logger)

    def begin(self, method: Method, train_set: TrainSet, masks: str | None = None) -> dict | None:
        """Loads the weights the run goes on with, or starts from; returns the state of the run it goes on with.

        masks: what `check_masks` gave.
        """
        self.classes, self.changed, state = list(train_set.classes), "", None
        digest = hashlib.sha256("\n".join(train_set.names).encode()).hexdigest()
        self.images, self.masks = {"count": len(train_set), "sha256": digest}, masks
        if self.config.resume == "auto":
            state = None if self._had_no_state_yet() else files.newest_state(self.checkpoints)
            if len(set(gather(state and state["iteration"]))) > 1:
                raise UserError(f"{self.checkpoints}: the processes see different files there: start again")
        if state is None:
            if self.metrics.is_file() or self.config.resume == "auto":
                self.logger.info("no checkpoint in %s: the run begins anew, and its metrics", self.folder)
            load_start_weights(method, self.config.model)
        else:
            weights = self.checkpoints / files.WEIGHTS.format(state["iteration"])
            files.check_classes(weights, self.classes)
            self.changed = check_same_run(weights, self.config, self.images, masks)
            files.load_weights(weights, method)
            if self.main:
                files.drop_newer(self.checkpoints, state["iteration"])
        return state

    def _had_no_state_yet(self) -> bool:
        """Whether the run ended before its first state was whole, whatever weights it had written by then."""
        if any(self.checkpoints.glob("*.state.pt")) or not self.metrics.is_file():
            return False
        return all(line["iteration"] < self.config.train.checkpoint_every for line in read_metrics(self.metrics))

    def attach(self, trainer: Trainer, state: dict | None) -> None:
        """Takes the trainer, which goes on from `state`, and opens the files of the run."""
        self.trainer, self.best, self.saved = trainer, -math.inf, 0
        if state is not None:
            if (done := state["iteration"]) > trainer.length:
                raise UserError(f"{self.folder}: {done} iterations are done: give train.iterations={done} or more")
            files.load_optimizer(trainer.optimizer, state)
            trainer.iteration = self.saved = state["iteration"]
            self._take_up(state.get("rest") or {})   # earlier states have none
            self.best = files.best_score(self.checkpoints, trainer.method.best_by)
        self.meta = {"method": self.config.method, "classes": self.classes, "config": self.config.tag}
        self.meta |= {"settings": portable(self.config), "iterations": trainer.length, "train_images": self.images}
        self.meta |= {} if self.masks is None else {"train_masks": self.masks}
        self.non_finite = NonFinite(self.folder, trainer, self.meta)
        if self.main:
            save_provenance(self.config, self.folder, trainer.iteration, self.changed)
            self.writer = MetricsWriter(self.folder, start=trainer.iteration)

    def _take_up(self, rest: dict) -> None:
        """Goes on with what was counted since the last log line; says what another number of processes changes."""
        sums, (rank, world, device) = rest.get("sums", []), self.ranks
        if sums and len(sums) != world:
            parts = self.trainer.method.modules()
            drops = any(getattr(part, "p", 0) or getattr(part, "drop_prob", 0) for part in parts)
            more = ", and dropout draws otherwise" if drops else ""
            words = "%d process(es) in place of %d: the same batches, but sums differ by rounding%s"
            self.logger.warning(words, world, len(sums), more)
            names = sums[0].keys()
            all_of_them = {name: sum(one[name] for one in sums) * world / len(sums) for name in names}
            sums = [all_of_them, *[dict.fromkeys(names, 0.0)] * (world - 1)]
        if sums and rest["steps"]:
            self.period.take_up(sums[rank], rest, device)

    def describe(self, train_set: Dataset, val_set: Dataset | None) -> None:
        """Says in the log what is trained on what."""
        config, world = self.config, self.ranks.world
        parameters = sum(p.numel() for p in self.trainer.method.parameters()) / 1e6
        model, data, batch = config.model, config.data, config.train.batch_size
        self.logger.info("%s, %s, %.2f M parameters, from %s", config.method, model.backbone, parameters, model.weights)
        validation = f"{len(val_set)} validation images ({data.val_split})" if val_set else "no validation"
        facts = len(train_set), data.train_split, validation, len(self.classes)
        self.logger.info("%d training images (%s), %s, %d classes", *facts)
        facts = batch, world, batch // world, self.ranks.device, config.train.lr, config.train.precision
        self.logger.info("global batch %d = %d process(es) x %d on %s, lr %.3g, %s", *facts)
        norms = [part for part in self.trainer.method.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)
                 and not isinstance(part, FrozenBatchNorm)]
        own = any(not isinstance(norm, SyncBatchNorm | nn.SyncBatchNorm) for norm in norms)
        if world > 1 and own:
            self.logger.warning("batch norm: each process's own statistics: the number of processes changes the run")
        elif world > 1 and norms:
            self.logger.info("batch norm: statistics over all processes")
        if self.trainer.iteration:
            changed = self.changed and f"; changed: {self.changed}"
            self.logger.info("resumed after iteration %d%s", self.trainer.iteration, changed)

    def lacks_validation(self) -> bool:
        """Whether the run goes on from an iteration that was to be validated, and ended before that was done."""
        lines = read_metrics(self.metrics) if self.main and self.trainer.iteration else []
        name = f"val/{self.trainer.method.best_by}"
        done = any(line["iteration"] == self.trainer.iteration - 1 and name in line for line in lines)
        return gather(self.trainer.iteration > 0 and not done and self.is_due(self.config.train.validate_every))[0]

    def progress(self, loader: DataLoader) -> tqdm:
        """The batches with a bar; to be closed, so that a message of an error starts on a line of its own."""
        start, length = self.trainer.iteration, self.trainer.length
        return progress_bar(loader, "train", disable=not self.main, initial=start, total=length)

    def is_due(self, every: int, at_the_end: bool = True) -> bool:
        """Whether what happens every so many iterations happens after this one, and after the last."""
        done = self.trainer.iteration
        return done % every == 0 or (at_the_end and done == self.trainer.length)

    def count(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        """Takes the terms of a step into the means of `log_terms`. Raises UserError where they end the run."""
        self.period.add(terms, self.trainer.failed)
        self.non_finite.see(batch, terms)

    def log_terms(self, bar: tqdm) -> None:
        """Writes the means since the last call, and what was skipped.

        Raises UserError where a step that was not finite, or too many images that cannot be read, end the run.
        """
        self.non_finite.judge()
        skipped = self.skipped.report()
        done, length, means = self.trainer.iteration, self.trainer.length, self.period.means(self.ranks)
        if self.main:
            bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
            seconds, memory = self.period.seconds, peak_memory(self.ranks.device)
            rate = {"lr": self.trainer.optimizer.param_groups[0]["lr"], "seconds_per_iteration": seconds}
            rate |= {"memory_gb": memory, **skipped}
            rate |= {"skipped_steps": self.period.failed} if self.period.failed else {}
            self.writer.scalars(done - 1, {**means, **rate}, prefix="train/")
            self.logger.info(_line(done, length, means, seconds, memory))
        self.period = _Period()

    def draw(self, batch: Batch) -> None:
        """A picture of the maps for TensorBoard."""
        if self.main:
            picture = training_picture(self.trainer.method, batch, self.classes, self.config)
            self.writer.image(self.trainer.iteration - 1, "maps", picture)

    def check_finite(self) -> None:
        """Raises UserError where a parameter, a batch statistic or what the optimizer keeps is not finite: no such
        thing is saved, and no later step mends it."""
        self.non_finite.judge()
        method, state = self.trainer.method, self.trainer.optimizer.state
        kept = ((name, value) for name, one in method.named_parameters() for value in state.get(one, {}).values())
        for name, value in (*method.state_dict().items(), *kept):
            if isinstance(value, Tensor) and not value.isfinite().all():
                where = f"is not finite at iteration {self.trainer.iteration}; the checkpoints stay"
                raise UserError(f"{self.folder}: parameter {name} {where}")

    def save(self) -> None:
        """Weights and state of this iteration, if it has none yet.

        Raises UserError where they are not finite or, after some tries, cannot be written: the last ones stay.
        """
        if self.saved == self.trainer.iteration:
            return
        self.check_finite()
        rest = {"sums": gather(self.period.numbers()), "steps": self.period.steps, "failed": float(self.period.failed)}
        if self.main:
            done, trainer = self.trainer.iteration, self.trainer
            retried(
                lambda: files.save_state(self.checkpoints, done, trainer.method, trainer.optimizer, self.meta, rest)
            )
            files.drop_older(self.checkpoints, self.config.train.keep_checkpoints)
        self.saved = self.trainer.iteration
        barrier()

    def stop(self, number: int) -> None:
        """Ends the run where a signal asks for it: with a state of this iteration. Raises Stopped."""
        self.skipped.report()
        self.save()
        name, done = signal.Signals(number).name, self.trainer.iteration
        self.logger.info("%s: stopped after iteration %d, whose state is written; resume=auto goes on", name, done)
        if self.main:
            self.writer.close()
        raise Stopped(number)

    def log_validation(self, scores: dict[str, float], present: int) -> None:
        """scores: mIoU (0..1) of each kind over the classes present; the best weights by `best_by` are kept."""
        done, method = self.trainer.iteration, self.trainer.method
        if self.main:
            shown = "  ".join(f"{name} {100 * value:.2f}" for name, value in scores.items())
            self.logger.info("validation at %d (%d classes present): %s", done, present, shown)
            if scores[method.best_by] > self.best:
                self.best = scores[method.best_by]
                meta = {**self.meta, "iteration": done, "val": scores}
                retried(lambda: files.save_weights(self.checkpoints / files.BEST, method, meta))
            named = {f"val/{name}": value for name, value in scores.items()}   # last: the validation is done
            self.writer.scalars(done - 1, {**named, "classes_present": present})
        barrier()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within it is no time of training."""
        started = time.perf_counter()
        yield
        self.period.paused += time.perf_counter() - started

    def end(self) -> Path:
        """Closes the files; the run's folder."""
        if self.main:
            self.writer.close()
            self.logger.info("done: %s", self.folder)
        return self.folder


class _Period:
    """Sums of the terms since the last log line, kept on the device; `paused`: seconds of it that were no training."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.before, self.failed = 0, 0, 0   # before: steps of an earlier start; failed: as of `Trainer`
        self.paused, self.started = 0.0, time.perf_counter()

    def add(self, terms: dict[str, Tensor], failed: Tensor) -> None:
        self.sums = {name: self.sums.get(name, 0) + term.where(failed == 0, 0) for name, term in terms.items()}
        self.steps, self.failed = self.steps + 1, self.failed + failed

    def numbers(self) -> dict[str, float]:
        """The sums, to be kept in a state."""
        return {name: float(value) for name, value in self.sums.items()}

    def take_up(self, sums: dict[str, float], counts: dict, device: torch.device) -> None:
        """Goes on from what `numbers` gave, and counts of steps."""
        self.sums = {name: torch.tensor(value, device=device) for name, value in sums.items()}
        self.steps = self.before = counts["steps"]
        self.failed = counts["failed"]

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Mean of every term over the period's steps and over all processes."""
        total = all_reduce_sum(torch.stack(list(self.sums.values())).double())
        self.seconds = (time.perf_counter() - self.started - self.paused) / (self.steps - self.before)
        self.failed = int(self.failed)
        good = max(self.steps - self.failed, 1)
        return dict(zip(self.sums, (total / (good * ranks.world)).tolist(), strict=True))


def _line(done: int, iterations: int, means: dict[str, float], seconds: float, memory: float) -> str:
    left = int(seconds * (iterations - done))
    eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    terms = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    return f"{done}/{iterations}  {terms}  {seconds:.3f} s/it  {memory:.2f} GB  eta {eta}"
