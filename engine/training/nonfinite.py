"""Steps whose loss or gradient is not finite: they are written down, then the run stops, or goes on without them."""

import json
import logging
import math
from collections import deque
from pathlib import Path

from torch import Tensor

from engine.checkpoints import files
from engine.distributed import gather, read_later
from engine.training.step import Trainer
from utils.batch import Batch
from utils.errors import UserError, name_some
from utils.files import naming
from utils.log import NAME


class NonFinite:
    """Sees every step of a run. folder: of the run; meta: of its weights.

    A GPU is asked one step later, so that it is never waited for: what is written of the network is after that step.
    """

    def __init__(self, folder: Path, trainer: Trainer, meta: dict) -> None:
        self.folder, self.trainer, self.meta = folder, trainer, meta
        self.late = trainer.ranks.device.type == "cuda"
        self.waiting: deque[tuple] = deque()
        self.count = 0

    def see(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        """To be called after every step, on all processes, with what went in and came out."""
        failed = read_later(self.trainer.failed, self.late)
        self.waiting.append((self.trainer.iteration, batch.names, terms, failed))
        self.judge(leave=1 if self.late else 0)

    def judge(self, leave: int = 0) -> None:
        """Looks at the steps seen so far, but for the last `leave`. Raises UserError as `train.on_nonfinite` has it."""
        while len(self.waiting) > leave:
            iteration, names, terms, failed = self.waiting.popleft()
            if failed():
                self._report(iteration, names, {name: value.item() for name, value in terms.items()})

    def _report(self, iteration: int, names: list[str], terms: dict[str, float]) -> None:
        parameters = [] if self.late else [   # of a GPU the next step has written over them
            name for name, value in self.trainer.method.named_parameters()
            if value.grad is not None and not value.grad.isfinite().all()
        ]
        shown = {name: value if math.isfinite(value) else str(value) for name, value in terms.items()}
        every = gather({"images": names, "terms": shown, "gradients_not_finite": parameters})
        bad = [name for name in terms if any(isinstance(one["terms"][name], str) for one in every)]
        what = f"loss term {bad[0]}" if bad else f"gradient of {parameters[0]}" if parameters else "gradient"
        images = name_some(name for one in every for name in one["images"])
        line = f"the {what} is not finite at iteration {iteration}, of the images {images}"
        train, record = self.trainer.config.train, self.folder / "nonfinite.jsonl"
        if self.trainer.ranks.rank == 0:
            with naming(record), open(record, "a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": iteration, "processes": every}) + "\n")
            kept = self.folder / "nonfinite"
            done = self.trainer.iteration - 1   # this step did nothing: such is the network before it
            files.save_state(kept, done, self.trainer.method, self.trainer.optimizer, self.meta)
            files.drop_older(kept, 1)
            logging.getLogger(NAME).warning("%s; more in %s, the network in %s", line, record, kept)
        self.count += 1
        if train.on_nonfinite == "stop":
            way = "train.on_nonfinite=skip leaves such steps out"
        elif self.count > train.max_nonfinite:
            way = f"it is step {self.count} of that kind, train.max_nonfinite is {train.max_nonfinite}"
        else:
            return
        raise UserError(f"{self.folder}: {line}; see {record.name}; the checkpoints stay; {way}")
