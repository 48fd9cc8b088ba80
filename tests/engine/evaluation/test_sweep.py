"""The sweep over thresholds against a loop over them."""

import numpy as np
import pytest
import torch

from engine.distributed import Ranks
from engine.evaluation.evaluate import score
from engine.evaluation.sweep import COUNT, THRESHOLDS, count, histogram, matrices_of, winners
from engine.inference.batch import threshold
from engine.inference.plan import evaluation_plan
from tests.engine.fake_method import FakeMethod, FakeSet, K, config, fake_is_known  # noqa: F401
from utils.metrics import confusion_matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("present", [[True, False, True, True], [False, True, False, False], [False] * 4])
def test_every_pixel_at_every_threshold(dtype, present):
    """Values that are thresholds, 0, 1 and their neighbours; classes that are equal; pixels of 255; no class."""
    torch.manual_seed(0)
    at, up = torch.tensor([*THRESHOLDS, 1.0]), torch.tensor(2.0)
    values = torch.cat([at, at.nextafter(up), at.nextafter(-up), torch.rand(100)]).clamp(0, 1).to(dtype)
    present, maps = torch.tensor(present), values[torch.randint(len(values), (4, 40, 50))]
    maps[2, :8], maps[:, 30:32] = maps[0, :8], 0
    truth = torch.tensor([0, 1, 2, 3, 4, 255], dtype=torch.uint8)[torch.randint(6, (40, 50))]
    counts = np.zeros((5, 4, COUNT + 1), np.int64)
    counts[:, winners(present)] += histogram(maps, present, truth).numpy()
    for bkg, matrix in zip(THRESHOLDS, matrices_of(counts), strict=True):
        ids = threshold(maps, present, bkg).numpy()
        np.testing.assert_array_equal(matrix, confusion_matrix(truth.numpy(), ids, 5), err_msg=str(bkg))


def test_images_and_batches():
    """Images with and without classes as `score` counts them; batches do not change it."""
    method, dataset, plan = FakeMethod(), FakeSet(13), evaluation_plan(config("evaluate.maps=[lam,cam]"))
    alone = Ranks(0, 1, torch.device("cpu"))
    counts = count(method, dataset, K, plan, alone)
    assert [list(kinds) for _, kinds, _ in method.calls] == [["lam", "cam"]] * 13, "kinds share their passes"
    for index in (0, 31, 50, 99):
        made = {kind: how._replace(bkg=THRESHOLDS[index]) for kind, how in plan.maps.items()}
        for (kind, _), matrix in score(FakeMethod(), dataset, K, plan._replace(maps=made), alone).items():
            np.testing.assert_array_equal(counts[kind][index], matrix, err_msg=f"{kind} {index}")
    together = count(FakeMethod(), dataset, K, plan, alone, batch_size=5)
    assert all((together[kind] == counts[kind]).all() for kind in ("lam", "cam"))
