"""GETAM of several images and classes at once against a backward pass through the whole network for each."""

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.acr.getam import FUNCTIONS, getam
from model.acr.network import ACRNetwork
from model.backbones.class_token_vit import ClassTokenViT
from tests.model.test_acr import full_backward
from tests.properties.strategies import cases, examples

DEPTH, PATCH = 3, 4


@examples
@given(cases(4, batch=2), st.sampled_from(sorted(FUNCTIONS)), st.integers(-DEPTH, DEPTH - 1), st.booleans(),
       st.integers(0, 2))
def test_getam_is_that_of_full_backwards(case, function, start, affinity, registers):
    torch.manual_seed(case.seed)
    args = {"embed_dim": 8, "depth": DEPTH, "num_heads": 2, "img_size": 8, "patch_size": PATCH, "reg_tokens": registers}
    network = ACRNetwork(ClassTokenViT("vit_tiny_patch16_224", args), case.classes).double().eval()
    for parameter in network.parameters():
        parameter.data = 0.5 * case.normal(*parameter.shape)
    images = case.normal(case.batch, 3, *(PATCH * side + 1 for side in case.size))
    classes = case.integers(0, case.classes, case.batch, 2)
    made = getam(network, images, classes, function, start, affinity)
    assert made.grid == case.size
    for image, column in product(range(case.batch), range(2)):
        own = images[image : image + 1], classes[image, column]
        theirs = full_backward(network, *own, function, start, affinity)
        torch.testing.assert_close(made.maps[image, column].flatten(), theirs, rtol=1e-7, atol=1e-12)
