"""When a signal asks a run to end: after which step, so that all processes end after the same one."""

import torch
import torch.distributed as dist

from engine.distributed import Ranks, read_later
from utils.processes import stop_asked


class Stop:
    """Agrees with the other processes; each of them calls `asked` after every step."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.late, self.asking = ranks, ranks.device.type == "cuda", None

    def asked(self) -> int:
        """The number of a signal that one of the processes got, 0 for none; the same on all of them.

        GPUs are told one step later, so that none is waited for.
        """
        if self.ranks.world == 1:
            return stop_asked()
        number = torch.full((), stop_asked(), dtype=torch.int32, device=self.ranks.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)   # by NCCL: gloo may not know a cluster's network
        if not self.late:
            return int(number)
        before, self.asking = self.asking, read_later(number, self.late)
        return before() if before else 0
