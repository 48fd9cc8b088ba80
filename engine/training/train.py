"""The training of a run, from its config to its end."""

import os
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from datasets import build_train_set, build_val_set, collate_train
from engine.alike import check_same
from engine.config import RunConfig, Train, portable
from engine.distributed import Ranks, loader_workers, started_again, use_tf32
from engine.evaluation.evaluate import validate
from engine.precision import settled
from engine.training.masks import check_masks, check_wanted
from engine.training.run import Run
from engine.training.sampler import GlobalBatches, used_images
from engine.training.step import Trainer
from engine.training.stop import Stop
from model import build_method
from utils.config import flatten
from utils.processes import end_with, ignore_stops, stops_put_off
from utils.progress import enter


def train(config: RunConfig, ranks: Ranks) -> Path:
    """Runs config to its end in the folder output/tag; returns that folder.

    config.resume=auto continues from the newest state there, and so does a run that torchrun has started again. Raises
    UserError for a user's mistake.
    """
    if started_again():
        config = config.model_copy(update={"resume": "auto"})
    config = settled(config, ranks.device)
    check_wanted(config)
    run = Run(config, ranks)
    use_tf32(config.train.tf32)
    train_set = build_train_set(config)
    val_set = build_val_set(config) if config.data.val_split else None
    check_alike(config, train_set, val_set)
    masks = None if train_set.masks is None else check_masks(train_set, ranks, run.logger)
    torch.manual_seed(config.seed % 2**63)
    method = build_method(config, len(train_set.classes)).to(ranks.device)
    state = run.begin(method, train_set, masks)
    trainer = Trainer(method, config, ranks, training_length(config.train, len(train_set)))
    run.attach(trainer, state)
    del state   # as large as two copies of the weights
    run.describe(train_set, val_set)
    if val_set is not None and run.lacks_validation():
        _validate(run, val_set)
    enter(f"the batch of iteration {trainer.iteration + 1}")
    stop = Stop(ranks)
    with stops_put_off(), run.progress(_loader(train_set, trainer)) as batches:
        for batch in batches:
            enter(f"the step of iteration {trainer.iteration + 1}")
            batch = batch.to(ranks.device)
            run.skipped.add(batch)
            run.count(batch, trainer.step(batch))
            validates = val_set is not None and run.is_due(config.train.validate_every)
            if run.is_due(config.train.log_every):
                run.log_terms(batches)
            if run.is_due(config.train.picture_every, at_the_end=False):
                run.draw(batch)
            if validates or run.is_due(config.train.checkpoint_every):
                enter(f"the checkpoint of iteration {trainer.iteration}")
                run.save()
            if validates:
                _validate(run, val_set)
            if number := stop.asked():
                run.stop(number)
            enter(f"the batch of iteration {trainer.iteration + 1}")
    return run.end()


def check_alike(config: RunConfig, train_set: Dataset, val_set: Dataset | None) -> None:
    """Raises UserError where the nodes have other settings, images, classes or image labels."""
    facts = flatten(portable(config))
    del facts["data.workers"]
    for split, dataset in (("training", train_set), ("validation", val_set)):
        facts |= {f"the {split} {name}": fact for name, fact in (dataset.facts() if dataset else {}).items()}
    check_same(facts)


def _validate(run: Run, val_set: Dataset) -> None:
    """The state of this iteration is written: a signal ends the run at once, and resume=auto validates again."""
    enter(f"the validation of iteration {run.trainer.iteration}")
    with run.paused(), stops_put_off(False):
        run.log_validation(*validate(run.trainer.method, val_set, run.config, run.ranks))


def training_length(train: Train, images: int) -> int:
    """Iterations of a training; an epoch has no partial batch."""
    return train.iterations or max(1, train.epochs * used_images(images, train.batch_size) // train.batch_size)


def _loader(train_set: Dataset, trainer: Trainer) -> DataLoader:
    config, ranks = trainer.config, trainer.ranks
    batches = GlobalBatches(
        len(train_set), config.train.batch_size, trainer.length, config.seed, ranks.rank, ranks.world, trainer.iteration
    )
    return DataLoader(
        train_set, batch_sampler=batches, collate_fn=collate_train, num_workers=loader_workers(config, ranks),
        pin_memory=ranks.device.type == "cuda", worker_init_fn=_tie,
    )


def _tie(worker: int) -> None:
    end_with(os.getppid())   # also where its process is killed
    ignore_stops()
