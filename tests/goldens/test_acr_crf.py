"""acr/inference.npz: the dense CRF of GETAM maps, from backgrounds of two powers, as evaluations start and run it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.config import load_config
from engine.inference.batch import predict, present_scores
from engine.inference.plan import evaluation_plan
from utils.crf import dense_crf
from utils.images import normalize

RELEASED = {"iterations": 10, "pos_xy_std": 3, "pos_w": 3, "bi_xy_std": 80, "bi_rgb_std": 13, "bi_w": 10}


@pytest.mark.parametrize(("backend", "marginals"), [("lattice", 2e-3), ("pydensecrf", 1e-4)])
def test_crf_of_both_alphas(golden, backend, marginals):
    data = golden("acr/inference.npz")
    if backend == "pydensecrf":
        pytest.importorskip("pydensecrf", reason="pydensecrf is not installed")
    given = ["evaluate.maps=[cam]", "evaluate.crf=true"]
    given += [f"crf.{name}={value}" for name, value in (RELEASED | {"backend": backend}).items()]
    for alpha in data["crf_alphas"].tolist():
        plan = evaluation_plan(load_config(None, [*given, f"crf.background_power={alpha}"]))
        for index in range(len(data["image_names"])):
            stored, image = torch.from_numpy(data[f"{index}__grad_s10_aff"]), data[f"{index}__image_u8"]
            present = torch.zeros(int(data["cfg_num_classes"]), dtype=torch.bool)
            present[data[f"{index}__classes"]] = True
            maps = torch.full((len(present), *stored.shape[1:]), 0.9)   # of absent classes, which do not count
            maps[present] = stored
            expected = data[f"{index}__crf_alpha{alpha}"]
            scores, ids = present_scores(maps, present, plan.background_power)
            q = dense_crf(image, scores, **plan.crf).numpy()
            np.testing.assert_allclose(q, expected, rtol=0, atol=marginals)
            method = SimpleNamespace(maps=lambda *_, maps=maps: {"cam": maps[None]})
            labels = predict(method, normalize(image), present.float(), plan).labels["cam", True]
            theirs = ids.numpy()[expected.argmax(0)]
            assert (labels != theirs).mean() <= 1e-4
