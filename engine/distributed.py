"""Processes of one run: who this one is, and sums over all of them."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.launch import ERROR_FILE
from engine.config import RunConfig
from utils.errors import UserError


class Ranks(NamedTuple):
    """rank of this process, number of processes, the device this one computes on."""

    rank: int
    world: int
    device: torch.device


def setup(device: str | None = None) -> Ranks:
    """Joins the process group torchrun describes (nccl on GPUs, gloo on CPU); alone where there is none.

    device: cpu or cuda; None: what the launcher was told, else a GPU where there is one.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    own = pick_device(device or os.environ.get("WSSS_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if world > 1 and not dist.is_initialized():
        wait, store, started = timedelta(hours=2), None, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if started != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # the launcher's store still holds the addresses of processes that have ended: they would be waited for
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False, wait)
            store = dist.PrefixStore(f"start_{started}", store)
        backend = "nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=world)
    return Ranks(rank, world, own)


def started_again() -> bool:
    """Whether torchrun has started a process of this run before; all processes call it, once."""
    before = False
    if path := os.environ.get(ERROR_FILE):   # in a folder of the launcher of this machine
        own = Path(path).with_name(f"started_{os.environ.get('LOCAL_RANK', 0)}")
        before = own.exists()
        own.touch()
    return any(gather(before))


def pick_device(name: str) -> torch.device:
    """The CPU, or this process's GPU for cuda. Raises UserError where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible; use --device cpu")
    if name == "cuda":   # threads are given a device by its index
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


def loader_workers(config: RunConfig, ranks: Ranks) -> int:
    """data.workers; null: this process's share of the machine's cores less one, at most 16; on a CPU, which trains
    with the same cores, at most 1."""
    if config.data.workers is not None:
        return config.data.workers
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(cores - 1, 16 if ranks.device.type == "cuda" else 1))


def use_tf32(on: bool) -> None:
    """Whether a GPU may multiply float32 matrices in TF32, faster and with 10 bits of mantissa; off is the parity mode.

    Convolutions are in TF32 either way: torch's default, which the released results were made with.
    """
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = on, True


def peak_memory(device: torch.device) -> float:
    """The most memory so far in GB, 1e9 bytes: of tensors on a GPU, else of this process; NaN where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # not ru_maxrss, which a process inherits from the one that started it
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((1024 * int(line.split()[1]) / 1e9 for line in lines if line.startswith("VmHWM")), math.nan)


def cleanup() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on the first process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The first process goes through the block before the others enter it, then the first of every other node, as what
    it leaves may be on a disk of its own; where one fails, the launcher ends them."""
    turn = 0 if is_main() else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(turn, 2):
        barrier()


def gather(value: Any) -> list:
    """The values of all processes in the order of their ranks, on every one; they must be picklable."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def read_later(value: Tensor, late: bool) -> Callable[[], float]:
    """Gives the number of a tensor of one element. late: it is copied from a GPU behind the work that is queued by now,
    and only a call waits for that."""
    if not late:
        return value.item
    copy, copied = torch.empty((), dtype=value.dtype, pin_memory=True), torch.cuda.Event()
    copy.copy_(value, non_blocking=True)
    copied.record()

    def read() -> float:
        copied.synchronize()
        return copy.item()

    return read


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; exact for integers."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def global_ratio(numerator: Tensor, count: Tensor, eps: float) -> Tensor:
    """`model.losses.ratio.local_ratio` over the samples of all processes.

    The mean of the returned values over processes, which is what DDP makes of their gradients, is the sum of all
    numerators over (the sum of all counts + eps).
    """
    total = all_reduce_sum(count.detach().to(numerator.dtype).clone())
    return numerator * world_size() / (total + eps)
