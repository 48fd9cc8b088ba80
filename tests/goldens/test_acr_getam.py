"""GETAM: every function, start block, with and without affinity; the attention it is made of."""

import numpy as np
import pytest
import torch

from model.acr.getam import getam
from tests.goldens.acr import golden_acr


@pytest.fixture(scope="module")
def case(golden):
    arrays = golden("acr/getam.npz")
    return arrays, golden_acr(golden, arrays)[0].network, torch.from_numpy(arrays["input"])


def test_maps(case):
    arrays, network, images = case
    classes = torch.from_numpy(arrays["classes"])[None]
    for row, function in enumerate(arrays["func_names"]):
        for column, start in enumerate(arrays["start_layers"]):
            for affinity, name, atol in ((False, "maps", 2e-4), (True, "maps_aff", 1e-3)):
                made = getam(network, images, classes, str(function), int(start), affinity).maps.flatten(2)[0]
                theirs, what = arrays[name][:, row, column], f"{function} from {start}, {name}"
                np.testing.assert_allclose(made, theirs, rtol=1e-3, atol=atol, err_msg=what)


@torch.no_grad()
def test_logits_and_attention(case):
    arrays, network, images = case
    tokens, attention = network.backbone(images, lambda maps: maps)
    logits, maps = network.logits(tokens[:, :1])[:, 0], torch.cat(attention)
    torch.testing.assert_close(logits, torch.from_numpy(arrays["logits"]), rtol=1e-4, atol=5e-4)
    torch.testing.assert_close(maps, torch.from_numpy(arrays["attn"]), rtol=0, atol=2e-4)
    pairs = maps.mean(1).sum(0)[1:, 1:]
    torch.testing.assert_close(pairs, torch.from_numpy(arrays["patch_aff"]), rtol=0, atol=2e-4)
