"""The multi-class-token ViT: start weights, positions, odd sizes, what is refused."""

import json

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from engine.checkpoints.opening import checkpoint_config
from engine.config import load_config, load_settings, portable, split_config
from model.backbones.vit import MultiClassTokenViT
from utils.config import save_yaml
from utils.errors import UserError
from utils.images import MEAN, STD

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
    """The class token and its position are repeated; the positions of the registers, not their tokens, are redrawn."""
    weights = classifier().state_dict()
    vit.load_start_weights(weights)
    assert torch.equal(vit.tokens, weights["cls_token"].expand(1, R + K, -1))
    assert torch.equal(vit.token_pos[:, R:], weights["pos_embed"][:, :1].expand(1, K, -1))
    assert len(vit.token_pos[:, :R].unique()) == R * 32 and 0.5 < vit.token_pos[:, :R].std() < 1.5
    assert torch.equal(vit.patch_pos, weights["pos_embed"][:, 1:])


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
    """What does not fill a patch on the right and below is cut off."""
    images = torch.randn(2, 3, *size)
    features, whole = vit(images), vit(images[..., : 8 * grid[0], : 8 * grid[1]])
    torch.testing.assert_close(features.patches, whole.patches)
    assert features.patches.shape == features.aux.shape == (2, 32, *grid)
    assert features.class_tokens.shape == (2, K, 32)


def test_the_position_table_is_sampled_unless_the_input_is_square(vit):
    """64 pixels are the model's own size; 70 x 65 has as many patches."""
    plain = vit.positions(64, 64)[:, R + K :]
    assert torch.equal(plain, vit.patch_pos) and torch.equal(vit.positions(70, 70)[:, R + K :], plain)
    table = plain.transpose(1, 2).unflatten(2, (8, 8))
    sampled = F.interpolate(table, scale_factor=(8.1 / 8, 8.1 / 8), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit.positions(70, 65)[:, R + K :], sampled)
    assert (sampled - plain).abs().max() > 1e-3


def test_mean_and_std_of_the_weights():
    """CLIP's image tower gets images with CLIP's statistics, whatever the data set normalised them with."""
    name, args, k = "vit_base_patch16_clip_quickgelu_224.openai", {**TINY, "img_size": 64}, (1, 3, 1, 1)
    torch.manual_seed(0)
    imagenet, clip = (MultiClassTokenViT(name, args, 1, 0, -1, timm_statistics=own).eval() for own in (False, True))
    clip.load_state_dict(imagenet.state_dict())
    pixels = torch.rand(1, 3, 64, 64)
    cfg = timm.create_model(name, pretrained=False, **args).pretrained_cfg
    statistics = (MEAN, STD), (cfg["mean"], cfg["std"])
    given = [(pixels - torch.tensor(mean).view(k)) / torch.tensor(std).view(k) for mean, std in statistics]
    assert (given[0] - given[1]).abs().max() > 0.05
    with torch.no_grad():
        torch.testing.assert_close(clip(given[0]).patches, imagenet(given[1]).patches)


@pytest.mark.parametrize(
    ("overrides", "own"),
    [
        ([], False),
        (["config=more_voc_clip"], True),
        (["model.weights=timm"], True),
        (["model.backbone=vit_base_patch16_clip_224.openai", "model.weights=clip.safetensors"], True),
        (["config=more_voc_clip", "model.normalize=imagenet"], False),
    ],
)
def test_whose_statistics(overrides, own, tmp_path):
    name, overrides = split_config(overrides, "more_voc")
    config = load_config(name, overrides)
    assert config.model.timm_statistics == own
    before, path = portable(config), tmp_path / "config.yaml"
    del before["model"]["normalize"]   # as runs and checkpoints of earlier versions, all trained with ImageNet's
    save_yaml(before, path)
    file, meta = tmp_path / "w.safetensors", json.dumps({"settings": before})
    safetensors.torch.save_file({"x": torch.zeros(1)}, file, {"meta": meta})   # old versions read none without tensors
    opened, _ = checkpoint_config(str(file), overrides, name)
    assert not any(one.model.timm_statistics for one in (load_settings(before, "a file"), load_config(path), opened))


# a model of each family, with what makes it small, and the registers it brings
TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3}
FAMILIES = {
    "vit_base_patch14_dinov2": ({"img_size": 70}, 0),          # layer scale
    "vit_base_patch14_reg4_dinov2": ({"img_size": 70}, 4),     # no position for the tokens
    "deit3_base_patch16_224": ({"img_size": 64}, 0),           # layer scale, no position for the class token
    "vit_base_patch16_clip_224": ({"img_size": 64}, 0),        # a norm before the blocks, patches without bias
    "vit_base_patch16_clip_quickgelu_224": ({"img_size": 64}, 0),
    "vit_large_patch14_clip_224": ({"img_size": 56}, 0),
    "vit_base_patch16_224": ({"img_size": 64}, 0),             # AugReg, DINO, MAE
    "deit_base_patch16_224": ({"img_size": 64}, 0),
    "eva_large_patch14_196": ({"img_size": 56}, 0),            # normalises after pooling
    "beit3_base_patch16_224": ({"img_size": 64}, 0),           # norms within the blocks
    "flexivit_small": ({"img_size": 64}, 0),
    "vit_base_patch16_18x2_224": ({"img_size": 64}, 0),        # parallel blocks
    "vit_base_patch16_xp_224": ({"img_size": 64}, 0),
    "vit_base_patch16_radio_v3": ({"img_size": 64}, 7),        # no final norm
    "vit_tiny_patch16_224": ({"img_size": (32, 64), "patch_size": 8}, 0),
}


DINOV2 = "vit_base_patch14_reg4_dinov2", {**TINY, "img_size": 70}


def drawn(name, args):
    """timm's model with every weight drawn at random: none stays at its 0 or 1."""
    model = timm.create_model(name, pretrained=False, num_classes=10, **args)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.1)
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_timms_network_with_its_tokens(name):
    args, registers = FAMILIES[name]
    args = {**TINY, **args}
    model = drawn(name, args)
    ours = MultiClassTokenViT(name, args, 1, registers, -1).eval()
    ours.load_start_weights(model.state_dict())
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        theirs, features = model.fc_norm(model.forward_features(images)), ours(images)
    patches = features.patches.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features.class_tokens, theirs[:, :1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patches, theirs[:, 1 + registers :], rtol=1e-5, atol=1e-5)
    assert patches.std() > 0.1


def test_registers_that_the_weights_have_are_the_first():
    weights = drawn(*DINOV2).state_dict()
    ours = MultiClassTokenViT(*DINOV2, K, 6)
    ours.load_start_weights(weights)
    assert torch.equal(ours.tokens[:, :4], weights["reg_token"])
    assert torch.equal(ours.tokens[:, 6:], weights["cls_token"].expand(1, K, -1))
    assert 0.5 < ours.token_pos[:, 4:6].std() < 1.5 and ours.token_pos.any(2).sum() == 2
    with pytest.raises(UserError, match=r"'reg_token' holds 4 registers: give model\.registers=4 or more"):
        MultiClassTokenViT(*DINOV2, K, 2)


def test_names_of_the_authors_files():
    """DINOv2's own file: another name for the registers, a mask token, a position for the class token alone."""
    weights = drawn(*DINOV2).state_dict()
    ours, same = MultiClassTokenViT(*DINOV2, K), MultiClassTokenViT(*DINOV2, K)
    ours.load_start_weights(weights)
    file = {**weights, "register_tokens": weights["reg_token"], "mask_token": torch.zeros(1, 48)}
    file["pos_embed"] = torch.cat([torch.full((1, 1, 48), 0.5), weights["pos_embed"]], dim=1)
    del file["reg_token"]
    same.load_start_weights(file)
    assert (same.token_pos[:, 4:] == 0.5).all() and not same.token_pos[:, :4].any()
    assert torch.equal(same.patch_pos, ours.patch_pos) and torch.equal(same.tokens, ours.tokens)


def test_a_norm_after_pooling_becomes_the_final_norm(vit):
    weights = classifier(global_pool="avg").state_dict()
    vit.load_start_weights(weights)
    assert "norm.weight" not in weights and torch.equal(vit.norm.bias, weights["fc_norm.bias"])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.pop("blocks.2.mlp.fc1.bias"), "'blocks.2.mlp.fc1.bias' is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "'extra' is not expected"),
        (lambda w: w.update({"norm.weight": torch.zeros(7)}), r"'norm.weight' has shape \(7,\), expected \(32,\)"),
        (lambda w: w.update(dist_token=w["cls_token"]), "'dist_token': the distillation token has no counterpart"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 68, 32)), "'pos_embed' has 68 entries: no square"),
        (lambda w: w.update(pos_embed=torch.zeros(64, 32)), r"'pos_embed' has shape \(64, 32\), expected \(1, n, 32\)"),
        (lambda w: w.update(reg_token=torch.zeros(1, 2, 31)), r"'reg_token' has shape \(1, 2, 31\)"),
        (lambda w: w.update({"blocks.0.ls1.gamma": torch.zeros(32)}), "'blocks.0.ls1.gamma' is not expected"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.zeros(32, 3, 14, 14)}), "'patch_embed.proj.weight' has"),
        (lambda w: w.pop("pos_embed"), "'pos_embed' is missing"),
    ],
)
def test_weights_of_another_form_are_refused(vit, change, words):
    weights = classifier().state_dict()
    change(weights)
    with pytest.raises(UserError, match="start weights: .*" + words):
        vit.load_start_weights(weights)


@pytest.mark.parametrize(
    "name, args, reason",
    [
        (NAME, {"num_heads": 5}, "backbone_args={'num_heads': 5}: "),
        ("resnet18", {}, "timm makes it as a ResNet"),
        ("no_such_model", {}, "Unknown model"),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (2, 2)}, "timm makes it as a SwinTransformer"),
        ("vit_small_patch16_dinov3", {"depth": 1}, "timm makes it as a Eva"),
        ("test_vit2", {}, "it has no class token"),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, "it has a distillation token"),
        ("vit_tiny_r_s16_p8_224", {"depth": 1}, "its patches come from a HybridEmbed"),
        ("vit_tiny_patch16_224", {"depth": 1, "pos_embed": "none"}, "it has no position table"),
    ],
)
def test_other_networks_are_refused(name, args, reason):
    with pytest.raises(UserError, match=f"{name}.*{reason}"):
        MultiClassTokenViT(name, args, K)


def test_a_block_that_does_not_exist():
    with pytest.raises(UserError, match="aux_block=-9"):
        MultiClassTokenViT(NAME, SMALL, K, aux_block=-9)
