"""The key lists of the released ACR files load strictly."""

import pytest
import torch

from model.acr.method import ACR
from model.acr.official import UNUSED
from tests.goldens.test_afa_official_keys import assert_known_without_any_key, recognised
from utils.errors import UserError


@pytest.fixture(scope="module")
def official(golden):
    return recognised(ACR, golden("acr/official_state_dict_keys.txt"))


def test_lists_load(official):
    known = {(m.num_classes, m.config.data.name, m.network.backbone.hybrid) for m, _ in official}
    assert known == {(20, "voc", True), (80, "coco", True), (20, "voc", False)}
    for method, weights in official:
        own = method.from_official({f"module.{key}": value for key, value in weights.items()})
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in method.state_dict().items()}
        kept = sum(value.numel() for key, value in weights.items() if key not in UNUSED)
        assert sum(p.numel() for p in method.parameters()) == kept


def test_every_tensor_gets_its_own(official):
    """No two keys are swapped: numbered tensors arrive under the name whose released name they had."""
    method, weights = official[0]
    numbered = {key: torch.full_like(value, index) for index, (key, value) in enumerate(weights.items())}
    own = method.from_official(numbered)
    split = {"network.backbone.tokens": "cls_token", "network.backbone.token_pos": "pos_embed",
             "network.backbone.patch_pos": "pos_embed"}
    for ours, value in own.items():
        theirs = "pretrained.model." + split.get(ours, ours.removeprefix("network.backbone."))
        theirs = ours.replace("network.classifier.", "cls_head.") if "network.classifier." in ours else theirs
        assert (value == numbered[theirs].flatten()[0]).all(), ours


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "unused missing"])
def test_other_keys_are_named(official, change):
    for method, weights in official:
        key = list(weights)[len(weights) // 2]
        others = dict(weights)
        if change == "unexpected":
            key = "pretrained.model.dist_token"
            others[key] = torch.zeros(2)
        elif change == "shape":
            others[key] = torch.zeros(2, 3, 5)
        else:
            key = key if change == "missing" else sorted(UNUSED)[-1]
            del others[key]
        with pytest.raises(UserError, match=f"official ACR weights.*'{key}'"):
            method.from_official(others)


def test_a_file_is_known_whatever_key_it_lacks(official):
    assert_known_without_any_key(official)
