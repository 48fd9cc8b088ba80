"""The whole network and its multi-scale maps against the released code."""

import numpy as np
import pytest
import torch

from model.method import MapPlan
from model.multi_scale import with_scale_1
from tests.goldens.network import golden_method

CASES = "__input"


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("more/network.npz")


@pytest.fixture(scope="module")
def network(golden, arrays):
    return golden_method(golden, arrays)[0].network


def attention_scores(network, images):
    """Last block, q.k before scaling, summed over heads: class-token rows, patch columns (B, K, h, w)."""
    block, kept = network.backbone.blocks[-1], {}
    hook = block.attn.qkv.register_forward_hook(lambda module, inputs, output: kept.update(qkv=output))
    patches = network.backbone(images).patches
    hook.remove()
    q, k, _ = kept["qkv"].unflatten(-1, (3, -1)).unbind(2)
    first, last = network.backbone.registers, network.backbone.registers + network.backbone.num_classes
    return (q[:, first:last] @ k[:, last:].transpose(1, 2)).unflatten(2, patches.shape[-2:])


@torch.no_grad()
def test_every_output(arrays, network):
    cases = [name.removesuffix(CASES) for name in arrays.files if name.endswith(CASES)]
    assert cases
    for case in cases:
        images = torch.from_numpy(arrays[case + CASES])
        features, out = network.backbone(images), network(images)
        maps = network.coarse_maps(images, ("cam", "cam_aux", "seg"))
        ours = {
            "cls": out.class_logits, "cls_aux": out.aux_logits, "seg": out.seg_logits, "x4": out.patches,
            "class_tokens_gcr": out.class_tokens, "class_tokens_raw": features.class_tokens, "cam": maps["cam"],
            "cam_aux": maps["cam_aux"], "x_aux": features.aux.flatten(2).transpose(1, 2),
            "score_maps": attention_scores(network, images),
        }
        stored = {n.removeprefix(case + "__") for n in arrays.files if n.startswith(case + "__")}
        assert stored - {"input", "images_u8", "image_names"} == set(ours)
        for name, value in ours.items():
            atol = 1e-3 if name == "score_maps" else 1e-4
            np.testing.assert_allclose(value.numpy(), arrays[f"{case}__{name}"], rtol=1e-4, atol=atol, err_msg=name)
        np.testing.assert_allclose(network.classify(images).numpy(), arrays[f"{case}__cls"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(maps["seg"].numpy(), arrays[f"{case}__seg"], rtol=1e-4, atol=1e-4)


def test_multi_scale_maps(golden):
    arrays = golden("more/multi_scale.npz")
    method, _ = golden_method(golden, arrays)
    images = torch.from_numpy(arrays["input"])
    runs = {
        "cam": ("cam", arrays["scales_cam"]), "cam_aux": ("cam_aux", arrays["scales_cam"]),
        "lam": ("lam", arrays["scales_lam"]), "cam1": ("cam", [1.0]), "cam_aux1": ("cam_aux", [1.0]),
        "lam1": ("lam", [1.0]),
    }
    for name, (kind, scales) in runs.items():
        plan = MapPlan(with_scale_1([float(s) for s in scales]), flip=True)
        maps = method.maps(images, {kind: plan})[kind].numpy()
        np.testing.assert_allclose(maps[..., ::4, ::4], arrays[f"{name}_s4"], rtol=0, atol=5e-5, err_msg=name)
        if f"{name}_sel" in arrays.files:
            chosen = maps[arrays["sel_image"], arrays["sel_class"]]
            np.testing.assert_allclose(chosen, arrays[f"{name}_sel"], rtol=0, atol=5e-5, err_msg=name)
            np.testing.assert_allclose(maps.mean((2, 3)), arrays[f"{name}_mean"], rtol=0, atol=5e-5, err_msg=name)
            np.testing.assert_allclose(maps.max((2, 3)), arrays[f"{name}_max"], rtol=0, atol=5e-5, err_msg=name)
