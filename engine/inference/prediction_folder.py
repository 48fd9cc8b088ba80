"""One way from a checkpoint to a folder of predictions: find, open, plan, claim the folder, write every image.

Beside the files stands settings.json, what they were made with: a second call with the same goes on where the first
one stopped, every other is refused.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from datasets import EvalItem, ImageSet, Unreadable, build_image_set
from engine.alike import check_all_there, check_same, check_same_file
from engine.checkpoints.files import check_classes
from engine.checkpoints.opening import checkpoint_config, find_checkpoint, open_checkpoint
from engine.config import RunConfig
from engine.distributed import Ranks, barrier, gather, loader_workers, main_first, use_tf32
from engine.inference.many import Take, as_is, labels_alone, over_images
from engine.inference.plan import evaluation_plan, maps_setting
from utils.errors import UserError, one_line
from utils.files import hash_of_names, replacing
from utils.progress import progress_bar

SETTINGS = "settings.json"


class Written(NamedTuple):
    """What `Predictor.write` did in all processes: images written, found done already, not readable; its seconds."""

    written: int
    skipped: int
    failed: int
    seconds: float


class Predictor:
    """An opened checkpoint with its plan.

    file: the weights file. method, on the device of `ranks`; classes, K names; config; plan.
    """

    def __init__(
        self, ranks: Ranks, checkpoint: str, settings: Sequence[str] = (), config: str | None = None,
        kinds: Sequence[str] | None = None, default: Callable[[RunConfig], str] | None = None,
    ) -> None:
        """checkpoint, settings, config: as `open_checkpoint` takes them. kinds: of the maps to make; None: those that
        the settings name in evaluate.maps, else that which `default` gives for the checkpoint's config.
        """
        with main_first():
            self.file = find_checkpoint(checkpoint)
        check_same_file(self.file)
        if kinds:
            settings = [*settings, maps_setting(kinds)]
        elif default is not None:
            settings = [maps_setting([default(checkpoint_config(self.file, settings, config)[0])]), *settings]
        method, self.classes, self.config, _ = open_checkpoint(self.file, settings, config)
        self.ranks, self.method = ranks, method.to(ranks.device)
        self.plan = evaluation_plan(self.config).on(ranks.device)

    def images_of(self, split: str) -> ImageSet:
        """The images of a split of the config's data. Raises UserError for other classes than the checkpoint's."""
        dataset = build_image_set(self.config, split)
        check_classes(self.file, dataset.classes)
        return dataset

    def claim(self, folder: Path, overwrite: bool, depends_on: Mapping[str, Any]) -> Callable[[Path], bool]:
        """Claims the folder; returns whether a file in it is there and of its settings.

        depends_on: what the files are made with beside checkpoint, plan and model.
        Raises UserError where the folder holds files of something else, and `overwrite` is not asked for.
        """
        self.folder = folder
        return claim_folder(folder, {**self._made_with(), **depends_on}, overwrite, self.ranks)

    def write(
        self, dataset: Dataset, write: Callable[[EvalItem, Any], None], finished: Callable[[str], bool], title: str,
        take: Take = labels_alone,
    ) -> Written:
        """Calls write(item, what `take` takes) for every image of `dataset` that is not finished(name), with a bar.

        dataset: with `names`; an item is an EvalItem or `Unreadable`, which is reported and counted. Rank r takes the
        images r, r + world, ... One image alone is computed with all threads of the CPU.
        """
        started, ranks = time.perf_counter(), self.ranks
        check_same({"images": hash_of_names(dataset.names)})
        share = range(ranks.rank, len(dataset), ranks.world)
        todo = [index for index in share if not finished(dataset.names[index])]
        use_tf32(self.config.train.tf32)
        workers = loader_workers(self.config, ranks) if len(todo) > 1 else 0
        loader = DataLoader(Subset(dataset, todo), batch_size=None, collate_fn=as_is, num_workers=workers)
        failed = []

        def readable() -> Iterator[EvalItem]:
            for item in loader:
                if isinstance(item, Unreadable):
                    failed.append(item)
                    tqdm.write(one_line(item.reason), file=sys.stderr)
                    bar.update()
                else:
                    yield item

        bar = progress_bar(desc=title, total=len(todo), unit="image", disable=ranks.rank != 0)
        at_once, batch_size = 1 if len(todo) == 1 else None, self.config.evaluate.images_at_once
        given = self.method, readable(), self.plan, ranks.device, write, batch_size, at_once, take
        with bar, over_images(*given) as done:
            for _ in done:
                bar.update()
        own = len(todo) - len(failed), len(share) - len(todo), len(failed)
        done = Written(*map(sum, zip(*gather(own), strict=True)), time.perf_counter() - started)
        missing = [name for name in dataset.names if not finished(name)]
        check_all_there(missing if len(missing) > done.failed else [], len(dataset), self.folder)
        return done

    def _made_with(self) -> dict:
        """What predictions depend on beside the images: the weights file (name, size, time), the plan, the model."""
        about, model = Path(self.file).stat(), self.config.model.model_dump()
        del model["weights"]   # those it once started from
        checkpoint = [Path(self.file).name, about.st_size, about.st_mtime_ns]
        plan = {**self.plan._asdict(), "kinds": list(self.plan.kinds)}
        return {"checkpoint": checkpoint, **plan, "model": model}


def claim_folder(folder: Path, settings: dict, overwrite: bool, ranks: Ranks) -> Callable[[Path], bool]:
    """Notes in FOLDER/settings.json what its files are made with, so that a second run may go on with them.

    Returns whether a file is there and not older than that note, which an overwriting run writes anew.
    Raises UserError, unless `overwrite` is asked for, where they were made with other settings, naming what differs,
    and where the folder holds files and no such note.
    """
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if ranks.rank == 0:
        earlier = None if overwrite else _read_settings(path, settings)
        if earlier is None and not overwrite and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: holds files that are not of this tool; give another folder, or --overwrite")
        for key in {**settings, **earlier} if earlier is not None else ():
            if earlier.get(key) != settings.get(key):
                raise UserError(
                    f"{folder}: its files were made with {key} = {earlier.get(key)}, not {settings.get(key)};"
                    " give another folder, or --overwrite"
                )
        if earlier is None:
            with replacing(path) as part:
                part.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    barrier()
    check_all_there([] if path.is_file() else [SETTINGS], 1, folder)
    since = path.stat().st_mtime_ns
    return lambda file: file.is_file() and file.stat().st_mtime_ns >= since


def _read_settings(path: Path, settings: dict) -> dict | None:
    try:
        before = {"precision": "fp32", "background_power": 1.0, "settings": settings.get("settings")}   # those keys
        return before | json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: cannot be read; give another folder, or --overwrite") from None
