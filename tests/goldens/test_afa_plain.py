"""The plain formulation of AFA, which other tests and benchmarks compare with, against the released code."""

import numpy as np
import pytest
import torch

from benchmarks.baselines import plain_afa
from utils.images import MEAN, STD


def golden_network(golden, arrays):
    sizes = {name.removeprefix("cfg_"): arrays[name].tolist() for name in arrays.files if name.startswith("cfg_")}
    network = plain_afa.PlainNetwork(**sizes)
    network.load_state_dict(golden("afa/network_state_dict.safetensors"))
    return network.eval()


def golden_settings(arrays, **more):
    names = {"high": "high_thre", "low": "low_thre", "par_iterations": "par_num_iter", "dilations": "par_dilations"}
    return plain_afa.Settings(**{name: arrays[theirs].tolist() for name, theirs in names.items()}, **more)


def cases(arrays, *names):
    for case in arrays["case_names"]:
        yield str(case), *(torch.from_numpy(arrays[f"{case}__{name}"]) for name in names)


def close(ours, theirs, rtol, atol, name=""):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=rtol, atol=atol, err_msg=name)


@torch.no_grad()
def test_network(golden):
    arrays = golden("afa/network.npz")
    network = golden_network(golden, arrays)
    for case, images in cases(arrays, "input"):
        cls, seg, maps, affinity = network(images)
        ours = dict(cls=cls, seg=seg, attn_pred=affinity, cam=network(images, cam_only=True)[0])
        ours |= {f"x{i}": x for i, x in enumerate(network.encode(images)[0], 1)}
        ours |= {f"attn_{i}": x for i, x in enumerate(maps)}
        given = {name.removeprefix(f"{case}__") for name in arrays.files if name.startswith(f"{case}__")}
        for name in given - {"image_names", "images_u8", "input"}:
            close(ours[name], arrays[f"{case}__{name}"], 1e-4, 1e-3 if name[5:].isdigit() else 1e-4, name)


def test_multi_scale(golden):
    arrays = golden("afa/multi_scale.npz")
    network = golden_network(golden, arrays)
    for case, images, scales in cases(arrays, "input", "scales"):
        cam, affinity = plain_afa.plain_cams(network, images, scales.tolist())
        close(cam, arrays[f"{case}__cam"], 0, 5e-4, case)
        close(affinity, arrays[f"{case}__aff_mat"], 0, 1e-4, case)


def test_walk(golden):
    arrays = golden("afa/propagation.npz")
    for h, w, radius in arrays["mask_sizes"].tolist():
        np.testing.assert_array_equal(plain_afa.plain_mask(h, w, radius), arrays[f"mask_{h}x{w}_r{radius}"])
    for case, cams, affinity, labels, radius in cases(arrays, "cams", "aff", "cls_label", "radius"):
        mask = plain_afa.plain_mask(*cams.shape[-2:], int(radius) or max(cams.shape))   # 0: no mask
        for name, score in zip(("low", "high"), arrays[f"{case}__bkg_scores"].tolist(), strict=True):
            ours = plain_afa.plain_walk(cams, affinity, mask, labels, score)
            close(ours, arrays[f"{case}__with_bkg_{name}"], 1e-5, 1e-6, case)


def test_affinity(golden):
    arrays = golden("afa/affinity.npz")
    for case, label, radius, affinity in cases(arrays, "cam_label", "radius", "attn_pred"):
        grid = (side // plain_afa.STRIDE for side in label.shape[-2:])
        mask = plain_afa.plain_mask(*grid, int(radius) or max(label.shape))
        targets = plain_afa.plain_affinity_labels(label, mask)
        loss, *counts = plain_afa.plain_affinity_loss(affinity.requires_grad_(), targets)
        loss.backward()
        np.testing.assert_array_equal(targets, arrays[f"{case}__aff_label"], err_msg=case)
        close(loss.detach(), arrays[f"{case}__loss"], 1e-6, 0, case)
        close(affinity.grad, arrays[f"{case}__grad"], 0, 1e-8, case)
        assert counts == [arrays[f"{case}__pos_count"], arrays[f"{case}__neg_count"]], case


def test_refined_labels(golden):
    arrays = golden("afa/pseudo_labels.npz")
    images = torch.from_numpy(arrays["images_u8"]).permute(0, 3, 1, 2).float() / 255
    given = torch.from_numpy(arrays["cls_label"]), images, arrays["img_box"].tolist(), golden_settings(arrays)
    ours = plain_afa.plain_cam_labels(torch.from_numpy(arrays["cams_u8"]) / 256, *given)
    assert (ours.numpy() != arrays["refined_label"]).mean() <= 1e-4
    ours = plain_afa.plain_refined(torch.from_numpy(arrays["aff_cams"]), *given)
    close(ours, arrays["refined_cams"], 0, 5e-6)
    assert (plain_afa.only_inside(ours.argmax(1), given[2]).numpy() != arrays["refined_cams_label"]).mean() <= 1e-4


@pytest.mark.parametrize("trace", ["train_trace", "train_trace_coco"])
def test_train_trace(golden, trace):
    """Not compared: biases before the batch norm, whose gradient is rounding that AdamW makes steps of."""
    arrays = golden(f"afa/{trace}.npz")
    names = ("cam_scales", "radius", "switch_iter", "coco_loop", "weight_decay", "cam_iters", "w_seg", "w_aff")
    scales, radius, switch, coco, decay, cam_iters, seg, aff = (arrays[name].tolist() for name in names)
    settings = golden_settings(arrays, scales=scales, radius=radius, walk_after=switch, affinity_follows=bool(coco))
    network = golden_network(golden, arrays).train()
    parameters = dict(network.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items()}
    groups = [{"params": [], "weight_decay": decay * (index != 1)} for index in range(4)]
    for name, value in parameters.items():
        group = "norm" in name if name.startswith("encoder.") else 2 + name.startswith("decoder.")
        groups[group]["params"].append(value)
    optimizer = torch.optim.AdamW(groups)
    free = [f"decoder.linear_c{i}.proj.bias" for i in range(1, 5)]
    rows = [(i, name) for i, name in enumerate(arrays["param_names"].tolist()) if name not in free]
    mean, std = (torch.tensor([255 * value for value in values]).view(3, 1, 1) for values in (MEAN, STD))
    batches = (torch.from_numpy(arrays["images_u8"]).movedim(-1, 2).float() - mean) / std
    for iteration, images in enumerate(batches):
        seen, theirs = {}, {name: arrays[name][iteration] for name in ("lr", "cls", "loss_terms", "grad_norm")}
        given = torch.from_numpy(arrays["cls_label"][iteration]), arrays["img_box"][iteration].tolist()
        terms = list(plain_afa.plain_losses(network, images, *given, iteration, settings, seen).values())
        terms.append(terms[0] + (iteration > cam_iters) * (seg * terms[1] + aff * terms[2]))
        for group, rate in zip(groups, theirs["lr"].tolist(), strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        terms[-1].backward()
        optimizer.step()
        close([float(term.detach()) for term in terms], theirs["loss_terms"][:4], 1e-3, 0)
        close(seen.pop("counts"), theirs["loss_terms"][4:], 0, 2)
        close(seen.pop("cls"), theirs["cls"], 0, 2e-3)
        for name, label in seen.items():
            assert (label.numpy() != arrays[name][iteration]).mean() <= 2e-3, name
        for i, name in rows:
            close(parameters[name].grad.norm(), theirs["grad_norm"][i], 1e-2, 1e-3, name)
    for i, name in rows:
        value = parameters[name].detach()
        close(value.norm(), arrays["final_norm"][i], 1e-4, 3e-4, name)
        close((value - start[name]).norm(), arrays["update_norm"][i], 3e-2, 8e-4, name)
        close(value.flatten()[:64], arrays["final_slice"][i][: value.numel()], 0, 4e-4, name)
    mean, var, count = network.decoder["linear_fuse"]["bn"].buffers()
    assert count == arrays["bn_num_batches"]
    close(mean, arrays["bn_running_mean"], 0, 2e-2)
    close(var, arrays["bn_running_var"], 1e-3, 2e-3)
    with torch.no_grad():
        cls, seg, _, affinity = network.eval()(batches[0])
    close(cls, arrays["final_cls"], 0, 2e-3)
    close(seg, arrays["final_seg"], 0, 1e-2)
    close(affinity, arrays["final_attn_pred"], 0, 1e-3)
