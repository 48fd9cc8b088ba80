"""The key lists of the released AFA files load strictly."""

import pytest
import torch

from engine.config import load_config
from model import build_method
from model.afa.method import AFA
from utils.errors import UserError


def key_lists(text):
    """The lists of the file: {title: {key: tensor of zeros}}."""
    lists = {}
    for line in text.splitlines():
        if line.startswith("#"):
            lists[line] = own = {}
        elif line.strip():
            key, shape, dtype = line.split("\t")
            size = () if shape == "scalar" else tuple(int(side) for side in shape.split("x"))
            own[key] = torch.zeros((), dtype=getattr(torch, dtype)).expand(size)   # takes no memory
    return lists


def recognised(method_class, text):
    """(method, weights) for each list of the file: the method that the keys are recognised as."""
    found = []
    for weights in key_lists(text).values():
        released = method_class.recognise({key: tuple(value.shape) for key, value in weights.items()})
        with torch.device("meta"):
            method = build_method(load_config(released.config), released.classes)
        found.append((method, weights))
    return found


def assert_known_without_any_key(official):
    for method, weights in official:
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
        for key in shapes:
            released = type(method).recognise({other: shape for other, shape in shapes.items() if other != key})
            assert released is not None and released.classes == method.num_classes, key


@pytest.fixture(scope="module")
def official(golden):
    return recognised(AFA, golden("afa/official_state_dict_keys.txt"))


def test_lists_load(official):
    assert {(method.config.tag, method.num_classes, method.config.data.name) for method, _ in official} == {
        (None, 20, "voc"), (None, 80, "coco")
    }
    for method, weights in official:
        own = method.from_official({f"module.{key}": value for key, value in weights.items()})
        shapes = {name: value.shape for name, value in method.state_dict().items()}
        assert {name: value.shape for name, value in own.items()} == shapes
        assert sum(p.numel() for p in method.parameters()) == sum(
            value.numel() for key, value in weights.items() if "running" not in key and "tracked" not in key
        )


def test_every_tensor_gets_its_own(official):
    """No two keys are swapped: numbered tensors arrive under the name whose released name they had."""
    method, weights = official[0]
    numbered = {key: torch.full_like(value, index % 97, dtype=torch.float32) + index // 97 / 100
                for index, (key, value) in enumerate(weights.items())}
    own = method.from_official(numbered)
    assert sorted(float(value.flatten()[0]) for value in own.values()) == sorted(
        float(value.flatten()[0]) for value in numbered.values()
    )
    for ours, theirs in {
        "network.backbone.patch_embed.proj.weight": "encoder.patch_embed1.proj.weight",
        "network.backbone.stages.3.downsample.norm.bias": "encoder.patch_embed4.norm.bias",
        "network.backbone.stages.1.blocks.1.attn.kv.weight": "encoder.block2.1.attn.kv.weight",
        "network.backbone.stages.2.blocks.0.mlp.dwconv.weight": "encoder.block3.0.mlp.dwconv.dwconv.weight",
        "network.backbone.stages.0.norm.weight": "encoder.norm1.weight",
        "network.decoder.linears.0.weight": "decoder.linear_c1.proj.weight",
        "network.decoder.classifier.bias": "decoder.linear_pred.bias",
        "network.affinity_head.weight": "attn_proj.weight",
        "network.classifier.weight": "classifier.weight",
    }.items():
        assert torch.equal(own[ours], numbered[theirs]), ours


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_other_keys_are_named(official, change):
    for method, weights in official:
        key = list(weights)[len(weights) // 2]
        others = dict(weights)
        if change == "unexpected":
            key = "encoder.head.weight"
            others[key] = torch.zeros(2)
        elif change == "missing":
            del others[key]
        else:
            others[key] = torch.zeros(2, 3, 5)
        with pytest.raises(UserError, match=f"official AFA weights.*'{key}'"):
            method.from_official(others)


def test_a_file_is_known_whatever_key_it_lacks(official):
    assert_known_without_any_key(official)
