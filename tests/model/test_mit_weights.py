"""Every naming brought back to SegFormer's, from a list of the same layers under all three."""

import pytest
import torch

from model.backbones.mit_weights import segformer_names
from utils.errors import UserError

KINDS = ("weight", "bias")


def namings(dims=(4, 8, 12, 16), depths=(2, 1, 11, 1), ratios=(8, 4, 2, 1)):
    """Random weights of SegFormer's, Hugging Face's and MMSegmentation's names."""
    torch.manual_seed(0)
    ours, hugging_face, mmseg = {}, {}, {}

    def layer(name, theirs, others, *shape, mmseg_shape=()):
        for kind, size in zip(KINDS, (shape, shape[:1]), strict=True):
            tensor = ours[f"{name}.{kind}"] = hugging_face[f"{theirs}.{kind}"] = torch.randn(size)
            mmseg[f"{others}.{kind}"] = tensor.reshape(mmseg_shape) if mmseg_shape and kind == "weight" else tensor

    for s, (dim, before) in enumerate(zip(dims, (3, *dims), strict=False)):
        layer(f"patch_embed{s + 1}.proj", f"patch_embeddings.{s}.proj", f"layers.{s}.0.projection", dim, before, 3, 3)
        layer(f"patch_embed{s + 1}.norm", f"patch_embeddings.{s}.layer_norm", f"layers.{s}.0.norm", dim)
        for b in range(depths[s]):
            a, h, m, wide = f"block{s + 1}.{b}", f"block.{s}.{b}", f"layers.{s}.1.{b}", 4 * dim
            layer(f"{a}.norm1", f"{h}.layer_norm_1", f"{m}.norm1", dim)
            for kind, size in zip(KINDS, ((dim, dim), (dim,)), strict=True):
                q, k, v = torch.randn(3, *size)
                ours |= {f"{a}.attn.q.{kind}": q, f"{a}.attn.kv.{kind}": torch.cat([k, v])}
                hugging_face |= {f"{h}.attention.self.value.{kind}": v, f"{h}.attention.self.key.{kind}": k}
                hugging_face[f"{h}.attention.self.query.{kind}"] = q
                mmseg[f"{m}.attn.attn.in_proj_{kind}"] = torch.cat([q, k, v])
            layer(f"{a}.attn.proj", f"{h}.attention.output.dense", f"{m}.attn.attn.out_proj", dim, dim)
            if ratios[s] > 1:
                layer(f"{a}.attn.sr", f"{h}.attention.self.sr", f"{m}.attn.sr", dim, dim, ratios[s], ratios[s])
                layer(f"{a}.attn.norm", f"{h}.attention.self.layer_norm", f"{m}.attn.norm", dim)
            layer(f"{a}.norm2", f"{h}.layer_norm_2", f"{m}.norm2", dim)
            layer(f"{a}.mlp.fc1", f"{h}.mlp.dense1", f"{m}.ffn.layers.0", wide, dim, mmseg_shape=(wide, dim, 1, 1))
            layer(f"{a}.mlp.dwconv.dwconv", f"{h}.mlp.dwconv.dwconv", f"{m}.ffn.layers.1", wide, 1, 3, 3)
            layer(f"{a}.mlp.fc2", f"{h}.mlp.dense2", f"{m}.ffn.layers.4", dim, wide, mmseg_shape=(dim, wide, 1, 1))
        layer(f"norm{s + 1}", f"layer_norm.{s}", f"layers.{s}.2", dim)
    return ours, hugging_face, mmseg


@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone.", "segformer.encoder."])
@pytest.mark.parametrize("naming", range(3))
def test_every_naming_comes_back_and_unknown_keys_stay(naming, prefix):
    theirs = {prefix + key: tensor for key, tensor in namings()[naming].items()}
    heads = dict.fromkeys(("head.weight", "classifier.bias"), torch.ones(5))
    unknown = ("block1.0.attn.k.bias", "layers.4.0.norm.bias", "norm0.weight", "layer_norm.4.bias", "norm1.bias.x", "x")
    unknown = {key: torch.ones(2) for key in ("decode_head.bias", *(prefix + key for key in unknown))}
    ours, expected = segformer_names({**theirs, **heads, **unknown}), {**namings()[0], **unknown}
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)


@pytest.mark.parametrize("half, other", [("key", "value"), ("value", "key")])
@pytest.mark.parametrize("kind", KINDS)
def test_half_a_pair_is_refused(half, other, kind):
    theirs, place = namings()[1], "block.2.10.attention.self."
    shorter = {**theirs, f"{place}{other}.{kind}": torch.ones(3)}
    del theirs[f"{place}{other}.{kind}"]
    for wrong in (theirs, shorter):
        with pytest.raises(UserError, match=rf"'block3.10.attn.kv.{kind}' is given by .*{place}{half}.{kind}"):
            segformer_names(wrong)


def test_a_layer_given_twice_is_refused():
    with pytest.raises(UserError, match="'norm1.bias' is given by encoder.norm1.bias and layer_norm.0.bias; expected"):
        segformer_names({"layer_norm.0.bias": torch.ones(4), "encoder.norm1.bias": torch.ones(4)})
