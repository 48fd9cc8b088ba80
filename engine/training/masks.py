"""What is checked of the masks that a training learns from, before it starts."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from logging import Logger

import numpy as np

from datasets import TrainSet, agreement
from datasets.samples import Sample
from datasets.sets import refuse_many
from engine.config import RunConfig
from engine.distributed import Ranks, gather
from model import METHODS
from utils.errors import UserError
from utils.images import IGNORE
from utils.progress import progress_bar

ADVICE = "were these made with other classes, or of other images?"


def check_wanted(config: RunConfig) -> None:
    """Raises UserError unless data.masks is given to a method that learns from masks, and to no other."""
    learns, given = METHODS[config.method].learns_from_masks, config.data.masks is not None
    if learns and not given:
        raise UserError(
            f"{config.method} learns from masks: give data.masks=FOLDER, such as one of tools/export_masks.py, or "
            "data.masks=own, the data set's own"
        )
    if given and not learns:
        able = ", ".join(name for name, method in METHODS.items() if method.learns_from_masks) or "none"
        raise UserError(
            f"data.masks={config.data.masks}, but {config.method} learns from image labels alone: leave data.masks "
            f"out, or give a method that learns from masks ({able})"
        )


def check_masks(train_set: TrainSet, ranks: Ranks, logger: Logger) -> str:
    """The sha256 of all masks; a line of the log says what they hold. All processes call it, each reads its share.

    Raises UserError for a mask that cannot be read or does not fit its image (with data.on_error=skip: for too many),
    where no mask shows a class, and where most do not show what the image labels say (`agreement.compare`).
    """
    masks, samples, own = train_set.masks, train_set.samples, []

    def facts(sample: Sample) -> tuple[np.ndarray, bytes, str]:
        try:
            return *masks.facts(sample), ""
        except UserError as error:
            if train_set.max_errors is None:
                raise
            return np.zeros(IGNORE + 1, np.int64), b"cannot be read", str(error)

    share, total = samples[ranks.rank :: ranks.world], np.zeros(IGNORE + 1, np.int64)
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ThreadPoolExecutor(min(threads, 16)) as pool:
        read = pool.map(facts, share)
        for pixels, *rest in progress_bar(read, "masks", total=len(share), disable=ranks.rank != 0, delay=2):
            own.append((set(pixels.nonzero()[0].tolist()), *rest))
            total += pixels
    totals, parts = zip(*gather((total, own)), strict=True)
    ids, digests, bad = zip(*(parts[i % ranks.world][i // ranks.world] for i in range(len(samples))), strict=True)
    skipped = {sample.name: reason for sample, reason in zip(samples, bad, strict=True) if reason}
    for reason in skipped.values():
        logger.warning("will be skipped: %s", reason)
    refuse_many(skipped, train_set.max_errors or 0)
    some = [one - {0, IGNORE} != set() for one in ids]   # the others show nothing of their ids' meaning
    if not any(some):
        raise UserError(f"data.masks={masks.source}: none of the {len(ids)} masks shows a class, all is 0 or {IGNORE}")
    compared = [index for index in range(0, len(ids), agreement.step(len(ids))) if some[index]]
    labels = [{k + 1 for k in train_set.labels_of(samples[i]).nonzero().flatten().tolist()} for i in compared]
    images = ((masks.paths[samples[i].name], given, ids[i]) for i, given in zip(compared, labels, strict=True))
    note = agreement.compare(images, train_set.classes, ADVICE)
    shares = [100 * sum(totals)[part].sum() / sum(totals).sum() for part in (0, slice(1, IGNORE), IGNORE)]
    empty = f"; {len(some) - sum(some)} show no class" if not all(some) else ""
    words = "learns from %d masks (data.masks=%s): %.1f %% background, %.1f %% classes, %.1f %% ignored%s"
    logger.info(words, len(ids), masks.source, *shares, empty)
    if note:
        logger.warning("%s (data.masks=%s)", note, masks.source)
    return hashlib.sha256(b"".join(digests)).hexdigest()
