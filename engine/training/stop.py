"""When a signal asks a run to end: after which step, so that all processes end after the same one."""

import torch
import torch.distributed as dist

from engine.distributed import WAIT, Ranks
from utils.processes import stop_asked


class Stop:
    """Agrees with the other processes; each of them calls `asked` after every step."""

    def __init__(self, ranks: Ranks) -> None:
        # of CPUs: no GPU is waited for
        self.group = dist.new_group(backend="gloo", timeout=WAIT) if ranks.world > 1 else None
        self.late, self.asking = ranks.device.type == "cuda", None

    def asked(self) -> int:
        """The number of a signal that one of the processes got, 0 for none; the same on all of them.

        GPUs are told one step later, so that no step waits for the slowest process's word.
        """
        number = torch.tensor(stop_asked())
        if self.group is None:
            return int(number)
        before = self.asking
        self.asking = number, dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group, async_op=True)
        number, word = before if self.late and before else self.asking
        word.wait()
        return int(number)
