"""Batch norm over two processes against torch's of the whole batch; as a program, one of the two processes.

    python -m tests.model.test_batch_norm RANK STORE RESULT
"""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.batch_norm import SyncBatchNorm
from tests.tiny import ROOT

SHARES = slice(0, 2), slice(2, 5)   # of the images of a batch


def trained(norm: type[nn.Module], share: slice = slice(None), world: int = 1) -> dict[str, torch.Tensor]:
    """Outputs, gradients and running statistics of two steps, the second after a pass without gradients."""
    torch.manual_seed(0)
    batches, targets = torch.randn(2, 5, 3, 6, 7).double() + 3, torch.randn(5, 2, 4, 5).double()
    layers = [nn.Conv2d(3, 4, 3), norm(4, momentum=None), nn.Tanh(), nn.Conv2d(4, 2, 1), norm(2, affine=False)]
    network, made = nn.Sequential(*layers).double(), {}
    nn.init.normal_(network[1].weight), nn.init.normal_(network[1].bias)
    parallel = DistributedDataParallel(network) if world > 1 else network
    for step, batch in enumerate(batches):
        images = batch[share].requires_grad_()
        output = parallel(images)
        loss = world * (output - targets[share]).square().sum() / targets.numel()   # whose mean is the batch's
        loss.backward()
        made |= {f"output {step}": output.detach(), f"images {step}": images.grad / world}
        with torch.no_grad():
            network(2 * images)
    made |= {f"gradient of {name}": parameter.grad for name, parameter in network.named_parameters()}
    return {**made, **dict(network.named_buffers()), "evaluated": network.eval()(batches[0][share]).detach()}


def test_two_processes_are_one_batch(tmp_path):
    """Whatever share of it each has; what DDP averages is the gradient of the mean loss."""
    command = [sys.executable, "-m", "tests.model.test_batch_norm"]
    both = [subprocess.Popen([*command, r, tmp_path / "store", tmp_path / f"{r}.pt"], cwd=ROOT) for r in "01"]
    assert [process.wait(timeout=100) for process in both] == [0, 0]
    ours, theirs = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)], trained(nn.BatchNorm2d)
    assert len(theirs) == 4 + 6 + 6 + 1
    for name, expected in theirs.items():
        of_images = name.split()[0] in ("output", "images", "evaluated")
        for made, share in zip(ours, SHARES, strict=True):
            torch.testing.assert_close(made[name], expected[share] if of_images else expected, rtol=0, atol=1e-10)


if __name__ == "__main__":
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    torch.save(trained(SyncBatchNorm, SHARES[rank], 2), sys.argv[3])
    with pytest.raises(ValueError, match="has no variance"):
        SyncBatchNorm(2)(torch.ones(rank, 2, 1, 1).bfloat16())   # one of the processes has no sample
    dist.destroy_process_group()
