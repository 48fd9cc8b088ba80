"""One step of training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.config import RunConfig
from engine.distributed import Ranks, all_reduce_sum, global_ratio
from engine.precision import autocast
from engine.training.optimizer import build_optimizer, set_lr
from model.method import Method
from utils.batch import Batch
from utils.errors import UserError


class Trainer:
    """A method, its optimizer and one step of training.

    method: on its device, with the weights it starts from. length: iterations of the whole training, None: that of the
    config. iteration: steps done so far. failed: 1 where the last step changed nothing, as its loss or a gradient was
    not finite on one of the processes, else 0; float32, on the device.
    """

    def __init__(self, method: Method, config: RunConfig, ranks: Ranks, length: int | None = None) -> None:
        self.method, self.config, self.ranks = method, config, ranks
        self.length = length or config.train.iterations
        self.optimizer = build_optimizer(method.param_groups(config.train), config.train)
        self.iteration, self.failed = 0, torch.zeros((), device=ranks.device)
        self.parallel: nn.Module = method
        changing = method.state_dict().keys() - dict(method.named_parameters()).keys()   # such as batch statistics
        self.statistics = [buffer for name, buffer in method.named_buffers() if name in changing]
        if config.train.compile:
            method.compile()
        if ranks.world > 1:
            method.ratio = global_ratio
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                method, device_ids=devices, broadcast_buffers=bool(changing), gradient_as_bucket_view=True
            )

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One iteration: losses, backward, optimizer. Returns the detached terms and their weighted sum `total`.

        Every term takes part, with weight 0 before its stage: its parameters then get zero gradients, not none.
        Random draws of the method follow from the seed, the iteration and the rank alone.
        """
        torch.manual_seed(((self.config.seed * 1_000_003 + self.iteration) * 1_009 + self.ranks.rank) % 2**63)
        set_lr(self.optimizer, self.iteration, self.config.train, self.length)
        self.optimizer.zero_grad(set_to_none=True)   # before the forward, which then has their memory
        with self._statistics_kept():
            with autocast(self.ranks.device, self.config.train.precision):
                terms = self.parallel(batch, self.iteration)
            weights = self.method.loss_weights(self.iteration)
            for name in terms.keys() - weights.keys():
                raise UserError(f"the loss term '{name}' has no weight: add it to loss.weights and loss.start_after")
            total = sum(weights[name] * term for name, term in terms.items())
            total.backward()
            self.failed = self._not_finite(total.detach())
        self._step()
        self.iteration += 1
        return {name: term.detach() for name, term in {**terms, "total": total}.items()}

    def _step(self) -> None:
        """Takes the optimizer's step unless it failed; a fused one decides that itself: no GPU is waited for."""
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        if fused:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, self.failed   # as torch's GradScaler sets them
        if fused or not self.failed:
            self.optimizer.step()

    def _not_finite(self, total: Tensor) -> Tensor:
        """1 where the loss or a gradient is not finite, else 0; the same on all processes."""
        found, one = torch.zeros((), device=total.device), torch.ones((), device=total.device)
        gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
        # what torch's GradScaler looks through gradients with, in one operator; it multiplies them by 1
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, one)
        return all_reduce_sum(found + (~total.isfinite()).float()).clamp(max=1)

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """Where steps that are not finite are skipped, they change no batch statistics either."""
        if self.config.train.on_nonfinite == "stop":
            yield
            return
        before = [buffer.clone() for buffer in self.statistics]
        yield
        for buffer, old in zip(self.statistics, before, strict=True):
            buffer.copy_(torch.where(self.failed > 0, old, buffer))
