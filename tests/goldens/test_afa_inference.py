"""AFA's test tool and the validation of its training script, through the plans that users run."""

import numpy as np
import pytest
import torch

from engine.evaluation.results import scores_of
from engine.inference.batch import predict
from engine.inference.plan import evaluation_plan, validation_plan
from tests.goldens.afa import golden_afa, normalized
from utils.metrics import confusion_matrix


def images_of(arrays):
    """(normalised image, RGB, labels, ground truth) of each image; validation's are those of inference."""
    for index in range(len(arrays["image_names"])):
        u8 = arrays[f"{index}__image_u8"]
        yield normalized(u8), torch.from_numpy(arrays["cls_label"][index]), arrays[f"{index}__label"]


def check_scores(matrix, theirs, iou=None, atol=1e-4):
    """theirs: pixel accuracy, mean accuracy, mean IoU over the classes that are there; iou: of each class."""
    ours = scores_of(matrix, "val")
    np.testing.assert_allclose([ours.pixel_accuracy, ours.miou], [theirs[0], theirs[2]], rtol=0, atol=atol)
    if iou is not None:
        known = np.isfinite(iou)
        np.testing.assert_allclose(np.asarray(ours.iou)[known], iou[known], rtol=0, atol=atol)


@pytest.fixture(scope="module")
def inference(golden):
    """Arrays, and what the evaluation makes of each image: at one scale, and at all with CRF."""
    arrays = golden("afa/inference.npz")
    crf = {key: arrays[f"crf_{key}"].item() for key in ("pos_xy_std", "pos_w", "bi_xy_std", "bi_rgb_std", "bi_w")}
    shared = [f"evaluate.long_side={int(arrays['resize_long'])}", "evaluate.maps=[seg]"]
    made = []
    for scales, flip, more in (
        ([1.0], "false", []),
        (arrays["scales"].tolist(), "true", ["evaluate.crf=true", f"crf.iterations={arrays['crf_iter_max'].item()}",
                                             *(f"crf.{key}={value}" for key, value in crf.items())]),
    ):
        own = [*shared, f"evaluate.scales.seg={scales}", f"evaluate.flip={flip}", *more]
        method, config = golden_afa(golden, arrays, own)
        plan = evaluation_plan(config)
        made.append([predict(method, image, labels, plan) for image, labels, _ in images_of(arrays)])
    return arrays, *made, method, plan


@torch.no_grad()
def test_logits(inference):
    arrays, _, _, method, plan = inference
    for index, (image, *_) in enumerate(images_of(arrays)):
        size = plan.maps["seg"].input_size(*image.shape[-2:])
        resized = torch.nn.functional.interpolate(image[None], size, mode="bilinear", align_corners=False)
        ours = method.coarse_scores(resized, "seg")[0]
        np.testing.assert_allclose(ours, arrays[f"{index}__segs"], rtol=0, atol=2e-4)
        made = method.maps(image[None], plan.maps, None)["seg"]
        theirs = torch.from_numpy(arrays[f"{index}__msc_segs"])[None]
        theirs = torch.nn.functional.interpolate(theirs, image.shape[-2:], mode="bilinear", align_corners=False)
        np.testing.assert_allclose(made, theirs, rtol=0, atol=2e-4)


def test_predictions(inference):
    arrays, single, multi, *_ = inference
    rows = {"pred": (single, False, "single"), "msc_pred": (multi, False, "msc"), "crf_pred": (multi, True, "crf")}
    for name, (predictions, crf, score) in rows.items():
        total = 0
        for index, (prediction, (_, _, truth)) in enumerate(zip(predictions, images_of(arrays), strict=True)):
            labels = prediction.labels["seg", crf]
            assert (labels != arrays[f"{index}__{name}"]).mean() <= 1e-3, name
            total = total + confusion_matrix(truth, labels, int(arrays["cfg_num_classes"]))
        check_scores(total, arrays[f"score_{score}"], arrays[f"iou_{score}"], atol=1e-3)


def test_crf(inference):
    """The dense CRF from the released logits, with AFA's settings."""
    from utils.crf import dense_crf
    from utils.images import to_uint8

    arrays, *_, plan = inference
    for index, (image, *_) in enumerate(images_of(arrays)):
        logits = torch.from_numpy(arrays[f"{index}__msc_segs"])[None]
        logits = torch.nn.functional.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)
        ours = dense_crf(to_uint8(image), logits[0].softmax(0), **plan.crf)[:, ::8, ::8]
        np.testing.assert_allclose(ours, arrays[f"{index}__crf_Q_step8"], rtol=0, atol=1e-3)


def test_validation(golden):
    arrays, images = golden("afa/validation.npz"), golden("afa/inference.npz")
    if arrays["image_names"].tolist() != images["image_names"].tolist():
        pytest.fail("the images of validation.npz are those of inference.npz")
    settings = [
        f"pseudo_labels.cam_scales={arrays['cam_scales'].tolist()}", f"evaluate.bkg={float(arrays['bkg_score'])}",
        f"pseudo_labels.low={float(arrays['aff_bkg_score'])}", f"pseudo_labels.radius={int(arrays['radius'])}",
    ]
    method, config = golden_afa(golden, arrays, settings)
    plan = validation_plan(config)
    totals = dict.fromkeys(("seg", "cam", "aff"), 0)
    for index, (image, labels, truth) in enumerate(images_of(images)):
        made = predict(method, image, labels, plan).labels
        for name, kind in (("seg", "seg"), ("cam", "cam"), ("aff", "affinity_cam")):
            ours = made[kind, False]
            assert (ours != arrays[f"{index}__{name}_label"]).mean() <= 1e-3, name
            totals[name] = totals[name] + confusion_matrix(truth, ours, int(arrays["cfg_num_classes"]))
    for name, matrix in totals.items():
        check_scores(matrix, arrays[f"score_{name}"], atol=2e-3)
    logits = [method.classify(image[None])[0] > 0 for image, *_ in images_of(images)]
    given = torch.from_numpy(images["cls_label"]) > 0
    both, either = (given & torch.stack(logits)).sum(1), given.sum(1) + torch.stack(logits).sum(1)
    np.testing.assert_allclose((2 * both / either).mean(), arrays["cls_f1"], atol=2e-3)
