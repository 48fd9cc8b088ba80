"""Network, decoder and multi-scale CAM of AFA against the released code."""

import numpy as np
import pytest
import torch

from model.afa.method import FUSIONS
from model.decoders.segformer import SegFormerHead
from model.method import MapPlan
from model.multi_scale import fused_maps, with_scale_1
from tests.goldens.afa import cases, golden_afa


def close(ours, theirs, what, rtol=1e-4, atol=1e-4):
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=rtol, atol=atol, err_msg=what)


@torch.no_grad()
def test_network(golden):
    arrays = golden("afa/network.npz")
    network = golden_afa(golden, arrays)[0].network
    for case in cases(arrays):
        images, of = torch.from_numpy(arrays[f"{case}__input"]), {n for n in arrays.files if n.startswith(f"{case}__")}
        out = network(images)
        close(out.class_logits, arrays[f"{case}__cls"], case)
        close(out.seg_logits, arrays[f"{case}__seg"], case)
        close(out.affinity.full(), arrays[f"{case}__attn_pred"], case)
        close(network.cam(out.stages[-1]), arrays[f"{case}__cam"], case)
        for stage, ours in enumerate(out.stages, 1):
            if f"{case}__x{stage}" in of:
                close(ours, arrays[f"{case}__x{stage}"], f"{case} stage {stage}")
        blocks = [block for block in range(sum(network.backbone.depths)) if f"{case}__attn_{block}" in of]
        assert blocks
        for block, raw in zip(blocks, network.backbone(images, blocks).attention, strict=True):
            close(raw.maps(), arrays[f"{case}__attn_{block}"], f"{case} block {block}", atol=1e-3)


def test_fused_attention_is_that_of_the_maps(golden):
    """A block that hands out its attention makes of the tokens what it makes without."""
    arrays = golden("afa/network.npz")
    backbone = golden_afa(golden, arrays)[0].network.backbone
    images = torch.from_numpy(arrays[f"{cases(arrays)[0]}__input"])
    with torch.no_grad():
        asked, fused = backbone(images, range(sum(backbone.depths))), backbone(images)
    assert len(asked.attention) == sum(backbone.depths) and fused.attention == ()
    for one, other in zip(asked.stages, fused.stages, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def golden_head(arrays):
    weights = {n.removeprefix("param__"): torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith("param__")}
    channels = [weights[f"linear_c{stage}.proj.weight"].shape[1] for stage in (1, 2, 3, 4)]
    classes, width = weights["linear_pred.weight"].shape[:2]
    head = SegFormerHead(channels, width, classes, dropout=0)
    head.load_state_dict({ours(name): value for name, value in weights.items()})
    return head


def ours(name):
    """Our name of a tensor of the released head."""
    for theirs, mine in {"linear_fuse.conv": "fuse", "linear_fuse.bn": "norm", "linear_pred": "classifier"}.items():
        if name.startswith(theirs):
            return mine + name.removeprefix(theirs)
    return f"linears.{int(name[len('linear_c')]) - 1}.{name.rsplit('.', 1)[1]}"


def test_head(golden):
    arrays = golden("afa/head.npz")
    head = golden_head(arrays)
    stages = [torch.from_numpy(arrays[f"c{stage}"]).requires_grad_() for stage in (1, 2, 3, 4)]
    close(head.eval()(stages), arrays["out_eval"], "eval", atol=1e-5)
    out = head.train()(stages)
    close(out, arrays["out_train"], "train", atol=1e-5)
    close(head.norm.running_mean, arrays["running_mean"], "running mean", atol=1e-5)
    close(head.norm.running_var, arrays["running_var"], "running variance", atol=1e-5)
    (out * torch.from_numpy(arrays["upstream"])).sum().backward()
    for stage, tensor in enumerate(stages, 1):
        close(tensor.grad, arrays[f"grad_c{stage}"], f"stage {stage}")
    mine = dict(head.named_parameters())
    names = [name.removeprefix("grad__") for name in arrays.files if name.startswith("grad__")]
    assert {ours(name) for name in names} == set(mine)
    for name in names:
        close(mine[ours(name)].grad, arrays[f"grad__{name}"], name)


def test_counting_alone_updates_as_a_forward_does(golden):
    head, other = (golden_head(golden("afa/head.npz")).train() for _ in range(2))
    stages = [torch.from_numpy(golden("afa/head.npz")[f"c{stage}"]) for stage in (1, 2, 3, 4)]
    head(stages)
    other.count(stages)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(head.norm, name), getattr(other.norm, name)), name


@torch.no_grad()
def test_multi_scale_cam(golden):
    arrays = golden("afa/multi_scale.npz")
    network = golden_afa(golden, arrays)[0].network
    for case in cases(arrays):
        images, scales = torch.from_numpy(arrays[f"{case}__input"]), arrays[f"{case}__scales"].tolist()

        def coarse(views, kinds, network=network):
            return {"cam": network.cam(network.features(views).stages[-1])}

        plan = MapPlan(with_scale_1(scales), flip=True)
        cam = fused_maps(images, {"cam": (plan, FUSIONS["cam"])}, coarse)["cam"]
        close(cam, arrays[f"{case}__cam"], case, rtol=0, atol=5e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
@torch.no_grad()
def test_cams_and_affinity_of_training(golden, mode):
    """What the pseudo labels are made of. The released affinity is entry argmax(scales) of the scales with 1 first."""
    arrays = golden("afa/multi_scale.npz")
    for case in cases(arrays):
        scales, images = arrays[f"{case}__scales"].tolist(), torch.from_numpy(arrays[f"{case}__input"])
        labels = torch.from_numpy(arrays[f"{case}__cls_label"])
        settings = [f"pseudo_labels.cam_scales={scales}", f"pseudo_labels.cam_pass={mode}"]
        method = golden_afa(golden, arrays, settings)[0].train()
        out, everyone = method.network(images), all_present(labels)
        cam, affinity = method._training_cams(images, out, everyone)
        close(cam, arrays[f"{case}__cam"], case, rtol=0, atol=5e-4)
        assert int(method.network.decoder.norm.num_batches_tracked) == start(golden) + (
            1 + len(with_scale_1(scales)) if mode == "train" else 1
        )
        if with_scale_1(scales)[scales.index(max(scales))] == max(scales):
            theirs = arrays[f"{case}__aff_mat"]
            close(affinity.full(), theirs[: len(theirs) // 2], case, rtol=0)


def start(golden):
    return int(golden("afa/network_state_dict.safetensors")["decoder.linear_fuse.bn.num_batches_tracked"])


def all_present(labels):
    from model.pseudo_labels import Present

    return Present(torch.arange(labels.shape[1]).expand_as(labels), torch.ones_like(labels, dtype=torch.bool))
