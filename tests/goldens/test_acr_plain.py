"""The plain formulation of ACR, which other tests and benchmarks compare with, against the released code."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.baselines import plain_acr


def golden_network(golden, arrays, backbone="hybrid"):
    sizes = {name.removeprefix("cfg_"): arrays[name].tolist() for name in arrays.files if name.startswith("cfg_")}
    if backbone == "plain":
        sizes["resnet_layers"] = ()
    network = plain_acr.PlainNetwork(**sizes).eval()
    network.load_released(golden(f"acr/{backbone}_state_dict.safetensors"))
    return network


def close(ours, theirs, rtol, atol, name=""):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=rtol, atol=atol, err_msg=name)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["hybrid", "plain"])
def test_network(golden, backbone):
    """Closer than the goldens ask: timm's way of standardising weights is 6e-4 away."""
    arrays = golden("acr/network.npz")
    network = golden_network(golden, arrays, backbone)
    for case in arrays["case_names"].tolist():
        out = network(torch.from_numpy(arrays[f"{case}__input"]))
        for name, value in zip(("x_cls", "x_patch_cls", "attn", "x_patch_cam", "tokens"), out, strict=True):
            close(value, arrays[f"{backbone}__{case}__{name}"], 0, 5e-5 if name == "attn" else 2e-4, f"{case} {name}")


def test_mirror_loss(golden):
    arrays = golden("acr/mirror_loss.npz")
    for case in arrays["case_names"].tolist():
        given = {name: torch.from_numpy(arrays[f"{case}__{name}"]) for name in ("attn1", "attn2", "x1", "x2", "label")}
        leaves = [given[name].requires_grad_() for name in ("attn1", "attn2", "x1", "x2")]
        margins = [F.multilabel_soft_margin_loss(x, given["label"]) for x in leaves[2:]]
        class_term, affinity_term, *undone = plain_acr.plain_mirror_terms(*leaves[:2])
        total = sum(margins) + int(arrays[f"{case}__alpha"]) * (class_term + affinity_term)
        total.backward()
        names = ("cls_loss_1", "cls_loss_2", "cls_align_loss", "aff_align_loss", "loss")
        for name, value in zip(names, (*margins, class_term, affinity_term, total), strict=True):
            close(value.detach(), arrays[f"{case}__{name}"], 1e-5, 0, name)
        for name, value in zip(("cls", "aff"), undone, strict=True):
            np.testing.assert_array_equal(value.detach(), arrays[f"{case}__attn2_{name}_undone"])
        for name, leaf in zip(("attn1", "attn2", "x1", "x2"), leaves, strict=True):
            close(leaf.grad, arrays[f"{case}__grad_{name}"], 1e-5, 1e-6, name)


def test_getam(golden):
    arrays = golden("acr/getam.npz")
    network, image = golden_network(golden, arrays), torch.from_numpy(arrays["input"])
    given = plain_acr.plain_gradients(network, image, arrays["classes"].tolist())
    maps, affinity, gradients = given
    ours = dict(attn=torch.stack(maps), grad=torch.stack(list(map(torch.stack, gradients))), patch_aff=affinity)
    for name, value in (ours | dict(logits=network(image).logits.detach())).items():
        close(value, arrays[name], 0, 2e-4, name)
    for i, function in enumerate(arrays["func_names"].tolist()):
        for j, start in enumerate(arrays["start_layers"].tolist()):
            for name, atol in (("maps", 2e-4), ("maps_aff", 1e-3)):
                ours = plain_acr.plain_getam(*given, function, start, name == "maps_aff")
                close(ours, arrays[name][:, i, j], 1e-3, atol, f"{function} {start}")


def test_localization(golden):
    arrays = golden("acr/inference.npz")
    network = golden_network(golden, arrays)
    for image in range(len(arrays["image_names"])):
        given, classes = torch.from_numpy(arrays[f"{image}__input"]), arrays[f"{image}__classes"].tolist()
        where = [side // plain_acr.STRIDE for side in given.shape[-2:]], arrays[f"{image}__image_u8"].shape[:2]
        views = given.flip(-1), given
        gradients = [plain_acr.plain_gradients(network, view, classes) for view in views]
        for name in arrays["setting_names"].tolist():
            function, start, affinity = name.rsplit("_", 2)
            tokens = [plain_acr.plain_getam(*x, function, int(start[1:]), affinity == "aff") for x in gradients]
            ours, parts = plain_acr.plain_localization(tokens, *where)
            close(ours, arrays[f"{image}__{name}"], 0, 1e-3, name)
            if name == "grad_s10_aff":
                for part, value in zip(("flip", "plain"), parts, strict=True):
                    close(value, arrays[f"{image}__unnormalised_{part}"], 1e-3, 0, part)
        tokens = [network(view).cam[0].T[classes].detach() for view in views]
        ours, _ = plain_acr.plain_localization(tokens, *where, getam=False)
        close(ours, arrays[f"{image}__patch_cam"], 0, 1e-3, "patch CAM")


def test_sweep(golden):
    arrays = golden("acr/evaluation.npz")
    stored, labels = [], []
    for image in range(int(arrays["num_images"])):
        maps = torch.from_numpy(arrays[f"{image}__cams_u8"]) / 256
        stored.append(dict(zip(arrays[f"{image}__classes"].tolist(), maps, strict=True)))
        labels.append(torch.from_numpy(arrays[f"{image}__label"]))
    thresholds = [index / 100 for index in range(100)]
    iou = 100 * plain_acr.plain_sweep(stored, labels, thresholds, int(arrays["num_classes"]))
    close(iou, arrays["iou"], 1e-6, 1e-12)
    close(iou.mean(1), arrays["curve"], 1e-6, 0)
    assert iou.mean(1).argmax() == arrays["best_index"]


def test_optimizer(golden):
    arrays = golden("acr/optimizer.npz")
    lr, decay = float(arrays["lr0"]), float(arrays["weight_decay_argument"])
    parameters = [torch.nn.Parameter(torch.from_numpy(arrays[f"param{i}_init"])) for i in (1, 2)]
    optimizer = plain_acr.plain_optimizer(parameters, lr, decay)
    for step, theirs in enumerate(arrays["lr"]):
        rate = plain_acr.plain_rate(lr, step, int(arrays["max_step"]))
        close(rate, theirs, 1e-6, 0)
        optimizer.param_groups[0]["lr"] = rate
        for i, value in enumerate(parameters, 1):
            value.grad = torch.from_numpy(arrays[f"grad{i}"][step])
        optimizer.step()
        for i, value in enumerate(parameters, 1):
            close(value.detach(), arrays[f"param{i}"][step], 0, 1e-6)


def test_train_trace(golden):
    arrays = golden("acr/train_trace.npz")
    network = golden_network(golden, arrays).train()
    parameters = dict(network.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items()}
    alive = [(i, name) for i, name in enumerate(arrays["param_names"].tolist()) if not name.startswith(plain_acr.DEAD)]
    assert np.isnan(arrays["grad_norm"]).any(0).sum() == len(arrays["param_names"]) - len(alive)
    lr, alpha = float(arrays["lr0"]), int(arrays["alpha"])
    optimizer = plain_acr.plain_optimizer(list(parameters.values()), lr, float(arrays["weight_decay_argument"]))
    for step, images in enumerate(torch.from_numpy(arrays["input"]).float()):
        rate = plain_acr.plain_rate(lr, step, int(arrays["max_step"]))
        terms, outputs = plain_acr.plain_losses(network, images, torch.from_numpy(arrays["cls_label"][step]))
        values = list(terms.values())
        values.append(values[0] + values[1] + alpha * values[2] + alpha * values[3])
        close(rate, arrays["lr"][step], 1e-6, 0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
        found = [float(value.detach()) for value in values]
        close(found, arrays["loss_terms"][step], *((1e-3, 1e-3) if step else (1e-5, 0)))
        close(torch.stack([out.logits.detach() for out in outputs]), arrays["cls"][step], 0, 3e-2)
        for i, name in alive:
            norm, theirs = parameters[name].grad.norm(), arrays["grad_norm"][step, i]
            close(norm, theirs, *((5e-2, 0.5) if step else (1e-4, 0)), f"{step} {name}")
    for i, name in alive:
        value = parameters[name].detach()
        close(value.norm(), arrays["final_norm"][i], 1e-5, 0, name)
        close((value - start[name]).norm(), arrays["update_norm"][i], 1e-2, 2e-5, name)
        close(value.flatten()[:64], arrays["final_slice"][i][: value.numel()], 0, 2e-5, name)
