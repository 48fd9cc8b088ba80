"""The training images that could not be read, and in whose place others were taken (data.on_error=skip)."""

from logging import Logger

from datasets.config import Data
from datasets.sets import refuse_many
from engine.distributed import gather
from utils.batch import Batch


class Skipped:
    def __init__(self, data: Data, logger: Logger) -> None:
        self.data, self.logger = data, logger
        self.known, self.new = {}, []   # name -> why, of all processes since they started; this one's since `report`

    def add(self, batch: Batch) -> None:
        self.new += batch.skipped

    def report(self) -> dict[str, int]:
        """{"skipped": how often since the last call an image's place was taken}, {} where that raises.

        All processes call it. The log names each image once. Raises UserError for more than data.max_errors images.
        """
        if self.data.on_error == "raise":
            return {}
        limit, found = self.data.max_errors, [pair for part in gather(self.new) for pair in part]
        self.new = []
        for name, reason in found:
            if name not in self.known:
                self.known[name] = reason
                self.logger.warning("skipped, image %d of at most %d: %s", len(self.known), limit, reason)
        refuse_many(self.known, limit)
        return {"skipped": len(found)}
