"""The multi-class-token ViT: start weights, positions, odd sizes, what is refused."""

import pytest
import timm
import torch

from model.backbones.vit import MultiClassTokenViT
from utils.errors import UserError

SMALL = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64, "patch_size": 8}
NAME, K, R = "vit_tiny_patch16_224", 5, 4


@pytest.fixture
def vit():
    return MultiClassTokenViT(NAME, SMALL, K, R)


def classifier(**args):
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=10, **{**SMALL, **args})
    torch.nn.init.normal_(model.pos_embed)
    torch.nn.init.normal_(model.cls_token)
    return model


def test_start_weights(vit):
    """One token: the network is timm's own, with the class token and its position repeated."""
    weights = classifier().state_dict()
    vit.load_start_weights(weights)
    assert torch.equal(vit.tokens[:, R:], weights["cls_token"].expand(1, K, -1))
    assert not torch.equal(vit.tokens[:, :R], weights["cls_token"].expand(1, R, -1))
    assert torch.equal(vit.token_pos, weights["pos_embed"][:, :1].expand(1, R + K, -1))
    assert torch.equal(vit.patch_pos, weights["pos_embed"][:, 1:])


def test_is_timms_network_with_one_token():
    model = classifier().eval()
    ours = MultiClassTokenViT(NAME, SMALL, 1, 0, -1).eval()
    ours.load_start_weights(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs, features = model.forward_features(images), ours(images)
    torch.testing.assert_close(features.class_tokens, theirs[:, :1])
    torch.testing.assert_close(features.patches.flatten(2).transpose(1, 2), theirs[:, 1:])


def test_auxiliary_map_is_a_block_output_before_the_norm(vit):
    kept = {}
    vit.blocks[1].register_forward_hook(lambda module, inputs, output: kept.update(x=output))   # depth 4, block -3
    with torch.no_grad():
        aux = vit(torch.randn(1, 3, 64, 64)).aux
    assert torch.equal(aux.flatten(2).transpose(1, 2), kept["x"][:, R + K :])


def test_positions_of_another_grid_are_resized(vit):
    vit.load_start_weights(classifier(img_size=32).state_dict())
    assert vit.patch_pos.shape == (1, 64, 32)


@pytest.mark.parametrize(
    "size, grid", [((64, 64), (8, 8)), ((40, 96), (5, 12)), ((47, 103), (5, 12)), ((8, 9), (1, 1))]
)
def test_any_size(vit, size, grid):
    features = vit(torch.randn(2, 3, *size))
    assert features.patches.shape == features.aux.shape == (2, 32, *grid)
    assert features.class_tokens.shape == (2, K, 32)


def test_the_rest_of_an_image_is_cut_off(vit):
    images = torch.randn(1, 3, 47, 103)
    torch.testing.assert_close(vit(images).patches, vit(images[..., :40, :96]).patches)


def test_faults_of_start_weights_are_named(vit):
    weights = classifier().state_dict()
    for change, words in [
        (lambda w: w.pop("blocks.2.mlp.fc1.bias"), "'blocks.2.mlp.fc1.bias' is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "'extra' is not expected"),
        (lambda w: w.update({"norm.weight": torch.zeros(7)}), r"'norm.weight' has shape \(7,\), expected \(32,\)"),
    ]:
        broken = dict(weights)
        change(broken)
        with pytest.raises(UserError, match=words):
            vit.load_start_weights(broken)


@pytest.mark.parametrize("name", ["resnet18", "no_such_model", "swin_tiny_patch4_window7_224", "flexivit_small"])
def test_other_networks_are_refused(name):
    with pytest.raises(UserError, match=name):
        MultiClassTokenViT(name, {}, K)


def test_a_block_that_does_not_exist():
    with pytest.raises(UserError, match="aux_block=-9"):
        MultiClassTokenViT(NAME, SMALL, K, aux_block=-9)
