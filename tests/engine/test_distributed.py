"""What every process sets for itself."""

import pytest
import torch

from engine.distributed import use_tf32


@pytest.mark.parametrize("on", [False, True])
def test_tf32_is_of_convolutions_as_released_and_of_all_if_asked_for(on):
    matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matrices.allow_tf32, convolutions.allow_tf32
    convolutions.allow_tf32 = False
    use_tf32(on)
    now = matrices.allow_tf32, convolutions.allow_tf32
    matrices.allow_tf32, convolutions.allow_tf32 = before
    assert now == (on, True)
