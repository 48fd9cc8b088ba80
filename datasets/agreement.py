"""Whether masks and image labels speak of the same classes: ids that mean something else would give false scores."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError, name_some
from utils.images import IGNORE, read_ids

PREPARE = "tools/prepare_folder.py --ids ID=CLASS,... makes such masks of others"
COMPARED = 200   # masks at most: a second, where all of COCO's would be minutes


def step(count: int) -> int:
    """Every so many-th mask of so many is compared: evenly spread."""
    return -(-count // COMPARED)


def ids_in(mask: str | Path) -> set[int]:
    """All ids of a mask file. Raises UserError where it cannot be read."""
    return set(np.unique(read_ids(mask)).tolist())


def compare(
    images: Iterable[tuple[Path, set[int], set[int]]], classes: Sequence[str], advice: str = PREPARE
) -> str | None:
    """A line on the masks with other classes than their image's labels; None where there are none.

    images: of each the mask's file, the ids of its labels, all ids of the mask. classes: names, without background.
    advice: what to do where they do not fit.
    Raises UserError where most masks of images with labels, and more than one, hold none of their classes.
    """
    images = list(images)
    labelled = [image for image in images if image[1]]
    strange = [image for image in labelled if not image[1] & image[2]]
    if len(strange) > max(1, len(labelled) / 2):
        path, labels, ids = strange[0]
        raise UserError(
            f"{path}: ids {sorted(ids)}, labels {[classes[k - 1] for k in sorted(labels)]}; so {len(strange)} of "
            f"{len(labelled)} masks hold no class of the labels. Ids are 0 background, 1 {classes[0]} and so on in the "
            f"classes' order, {IGNORE} ignored: {advice}"
        )
    other = [path.stem for path, labels, ids in images if ids - {0, IGNORE} != labels]
    count = f"{len(other)} of {len(images)} masks"
    return f"note: {count} hold other classes than the labels: {name_some(other)}" if other else None
