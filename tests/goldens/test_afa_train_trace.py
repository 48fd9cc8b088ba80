"""AFA's released training loops, VOC's and COCO's, followed term by term by the real trainer's step.

The biases of the decoder's linear layers lie before batch norm: their true gradient is 0, and AdamW turns the rounding
noise into steps of the full rate, so they are not compared.
"""

import numpy as np
import pytest
import torch

from engine.distributed import Ranks
from engine.training.step import Trainer
from model.afa.official import official_name
from model.pseudo_labels import par_images
from tests.goldens.afa import affinity_target, golden_afa, normalized
from utils.batch import Batch
from utils.images import IGNORE

TERMS = {"cls_loss": "cls", "seg_loss": "seg", "aff_loss": "affinity", "loss": "total"}
GROUPS = ("encoder", "norms", "heads", "decoder")
FILES = ["afa/train_trace.npz", "afa/train_trace_coco.npz"]   # every one that there is: see the guard in conftest.py


def no_gradient(name):
    return name.startswith("decoder.linear_c") and name.endswith("bias")


def settings(arrays):
    start = int(arrays["cam_iters"])
    return [
        f"loss.start_after.seg={start}", f"loss.start_after.affinity={start}",
        f"loss.weights.seg={float(arrays['w_seg'])}", f"loss.weights.affinity={float(arrays['w_aff'])}",
        f"pseudo_labels.walk_after={int(arrays['switch_iter'])}",
        f"pseudo_labels.walk_for_affinity={bool(arrays['coco_loop'])}".lower(),
        f"pseudo_labels.radius={int(arrays['radius'])}", f"pseudo_labels.cam_scales={arrays['cam_scales'].tolist()}",
        f"pseudo_labels.high={float(arrays['high_thre'])}", f"pseudo_labels.low={float(arrays['low_thre'])}",
        f"pseudo_labels.par_iterations={int(arrays['par_num_iter'])}",
        f"pseudo_labels.par_dilations={arrays['par_dilations'].tolist()}",
        f"train.warmup_iterations={int(arrays['warmup_iter'])}", f"train.iterations={int(arrays['max_iters'])}",
        f"train.lr={float(arrays['base_lr'])}", f"train.weight_decay={float(arrays['weight_decay'])}",
        f"train.warmup_ratio={float(arrays['warmup_ratio'])}", f"train.power={float(arrays['power'])}",
        "train.betas=[0.9,0.999]", "train.precision=fp32", f"evaluate.bkg={float(arrays['bkg_score'])}",
    ]


def batches(arrays):
    for images_u8, labels, boxes in zip(arrays["images_u8"], arrays["cls_label"], arrays["img_box"], strict=True):
        images = normalized(images_u8)
        valid = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
        for mask, (top, bottom, left, right) in zip(valid, boxes.tolist(), strict=True):
            mask[top:bottom, left:right] = True
        yield Batch([""] * len(images), images, torch.from_numpy(labels), valid, torch.zeros(len(images)).long())


@pytest.fixture(scope="module", params=FILES)
def trace(golden, request):
    """Arrays of the reference, and the same things of ours, made by Trainer.step."""
    arrays = golden(request.param)
    method, config = golden_afa(golden, arrays, settings(arrays))
    trainer = Trainer(method.train(), config, Ranks(0, 1, torch.device("cpu")))
    start = {official_name(name): value.clone() for name, value in method.network.named_parameters()}
    ours = {name: [] for name in ("terms", "lr", "cls", "grad_norm", "pixel", "affinity", "cam", "walked")}

    def keep(module, inputs, outputs):
        if module.training and torch.is_grad_enabled():
            ours["cls"].append(outputs.class_logits.detach())

    method.network.register_forward_hook(keep)
    make_cams, make_pseudo_labels = method._training_cams, method.pseudo_labels

    def training_cams(images, out, present):
        """Notes both kinds of labels, whichever of them this iteration learns from."""
        cam, affinity = make_cams(images, out, present)
        ours["walked"].append(method.walked_labels(cam, affinity, present, par_images(images), batch))
        return cam, affinity

    def pseudo_labels(*args):
        made = make_pseudo_labels(*args)
        for name, label in made.items():
            ours[name].append(label)
        return made

    method._training_cams, method.pseudo_labels = training_cams, pseudo_labels
    names = [str(name) for name in arrays["param_names"]]
    for batch in batches(arrays):
        terms = trainer.step(batch)
        ours["terms"].append({name: float(value) for name, value in terms.items()})
        rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
        ours["lr"].append([rates[name] for name in GROUPS])
        grads = {official_name(name): p.grad for name, p in method.network.named_parameters()}
        ours["grad_norm"].append([float("nan") if grads[n] is None else float(grads[n].norm()) for n in names])
    return arrays, ours, start, method


def test_loss_terms(trace):
    arrays, ours, *_ = trace
    columns = {str(name): arrays["loss_terms"][:, column] for column, name in enumerate(arrays["term_names"])}
    for theirs, name in TERMS.items():
        np.testing.assert_allclose([t[name] for t in ours["terms"]], columns[theirs], rtol=1e-3, err_msg=theirs)
    for i, labels in enumerate(ours["affinity"]):
        target = affinity_target(labels, int(arrays["radius"]))
        for theirs, value in (("pos_count", 1), ("neg_count", 0)):
            assert abs(int((target == value).sum()) + 1 - columns[theirs][i]) <= 2, theirs
        assert (target.numpy() != arrays["aff_label"][i]).mean() <= 2e-3


def test_learning_rates(trace):
    arrays, ours, *_ = trace
    np.testing.assert_allclose(ours["lr"], arrays["lr"], rtol=1e-6)


def test_class_logits(trace):
    arrays, ours, *_ = trace
    np.testing.assert_allclose(torch.stack(ours["cls"]), arrays["cls"], rtol=0, atol=2e-3)


def test_labels(trace):
    arrays, ours, *_ = trace
    switch = int(arrays["switch_iter"])
    pixel, walked = torch.stack(ours["pixel"]).numpy(), torch.stack(ours["walked"]).numpy()
    assert (pixel != arrays["refined_aff_label"]).mean() <= 2e-3
    assert (pixel[: switch + 1] != arrays["refined_pseudo_label"][: switch + 1]).mean() <= 2e-3
    strict, loose = arrays["refined_aff_label_h"], arrays["refined_aff_label_l"]
    valid = np.stack([batch.valid for batch in batches(arrays)])   # outside theirs are 0 at this point
    theirs = np.where((strict == 0) & (loose != 0) | ~valid, IGNORE, strict)
    assert (walked != theirs).mean() <= 2e-3


def test_denormalised_images(golden):
    for name in FILES:
        arrays = golden(name)
        for batch, theirs in zip(batches(arrays), arrays["denorm_u8"], strict=True):
            np.testing.assert_array_equal((par_images(batch.images) * 255).round(), theirs)
            np.testing.assert_array_equal(par_images(batch.images), theirs / np.float32(255))


def test_gradient_norms(trace):
    arrays, ours, *_ = trace
    mine, theirs = np.array(ours["grad_norm"]), arrays["grad_norm"]
    assert np.array_equal(np.isnan(mine), np.isnan(theirs))
    for row, name in enumerate(str(n) for n in arrays["param_names"]):
        if not no_gradient(name):
            np.testing.assert_allclose(mine[:, row], theirs[:, row], rtol=1e-2, atol=1e-3, err_msg=name)


def test_final_parameters(trace):
    arrays, _, start, method = trace
    final = {official_name(name): p.detach() for name, p in method.network.named_parameters()}
    for row, name in enumerate(str(n) for n in arrays["param_names"]):
        if no_gradient(name):
            continue
        mine, update = final[name].flatten(), float((final[name] - start[name]).norm().detach())
        np.testing.assert_allclose(float(mine.norm()), arrays["final_norm"][row], rtol=1e-4, atol=3e-3, err_msg=name)
        np.testing.assert_allclose(update, arrays["update_norm"][row], rtol=3e-2, atol=8e-3, err_msg=name)
        theirs = arrays["final_slice"][row][: len(mine)]
        np.testing.assert_allclose(mine[: len(theirs)], theirs, rtol=0, atol=4e-3, err_msg=name)


def test_batch_statistics(trace):
    arrays, *_, method = trace
    norm = method.network.decoder.norm
    assert int(norm.num_batches_tracked) == int(arrays["bn_num_batches"])
    np.testing.assert_allclose(norm.running_mean, arrays["bn_running_mean"], rtol=0, atol=2e-2)
    np.testing.assert_allclose(norm.running_var, arrays["bn_running_var"], rtol=1e-3, atol=2e-3)


@torch.no_grad()
def test_trained_network(trace):
    arrays, *_, method = trace
    images = next(batches(arrays)).images
    out = method.network.eval()(images)
    for ours, name, atol in (
        (out.class_logits, "final_cls", 2e-3), (out.seg_logits, "final_seg", 1e-2),
        (out.affinity.full(), "final_attn_pred", 1e-3),
    ):
        np.testing.assert_allclose(ours, arrays[name], rtol=0, atol=atol, err_msg=name)
