"""The inference tools on one image against the released code."""

import numpy as np
import pytest
import torch

from engine.inference.batch import predict
from engine.inference.plan import evaluation_plan
from model.method import MapPlan
from tests.goldens.network import golden_method
from utils.images import to_uint8

WRONG = 1e-3   # share of the pixels of a label map that may differ


@pytest.fixture(scope="module")
def arrays(golden):
    return golden("more/inference.npz")


@pytest.fixture(scope="module")
def network(golden, arrays):
    return golden_method(golden, arrays)


@pytest.fixture(scope="module")
def predictions(golden, arrays):
    """{"ss", "ms"}: predictions with CRF, as the tools make them."""
    settings = [
        f"evaluate.base_size={int(arrays['base_size'])}", f"evaluate.bkg={float(arrays['bkg_thre'])}",
        f"evaluate.multi_scales={[float(s) for s in arrays['ms_scales']]}", "evaluate.crf=true",
        f"evaluate.scales.seg={[float(s) for s in arrays['seg_scales']]}",
    ]
    image, labels = torch.from_numpy(arrays["input"][0]), torch.from_numpy(arrays["cls_label"][0])
    made = {}
    for name, multi, kinds in (("ss", "false", "[cam, lam]"), ("ms", "true", "[cam, lam, seg]")):
        own = [*settings, f"evaluate.multi_scale={multi}", f"evaluate.maps={kinds}"]
        method, config = golden_method(golden, arrays, own)
        made[name] = predict(method, image, labels, evaluation_plan(config))
    return made


def assert_labels(ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    assert ours.shape == theirs.shape
    assert (ours != theirs).mean() <= WRONG, name


def test_the_input_is_the_image(arrays):
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(arrays["input"][0])), arrays["image_u8"])
    np.testing.assert_array_equal(arrays["label_size"], arrays["image_u8"].shape[:2])
    np.testing.assert_array_equal(np.flatnonzero(arrays["cls_label"][0]), arrays["keys"])


@pytest.mark.parametrize("kind", ["cam", "lam"])
@pytest.mark.parametrize("scale", ["ss", "ms"])
def test_localization(arrays, predictions, kind, scale):
    name, prediction = f"{kind}_{scale}", predictions[scale]
    maps = prediction.maps[kind].numpy()
    np.testing.assert_allclose(maps[:, ::8, ::8], arrays[f"{name}_s8"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(maps[arrays["keys"]], arrays[f"{name}_sel"], rtol=0, atol=1e-4)
    assert_labels(prediction.labels[kind, False], arrays[f"{name}_label"], name)
    assert_labels(prediction.labels[kind, True], arrays[f"{name}_crf_label"], f"{name} crf")


def test_segmentation(arrays, predictions):
    prediction = predictions["ms"]
    np.testing.assert_allclose(prediction.maps["seg"].numpy()[:, ::4, ::4], arrays["seg_logits_s4"], rtol=0, atol=2e-4)
    assert_labels(prediction.labels["seg", False], arrays["seg_label"], "seg")
    assert_labels(prediction.labels["seg", True], arrays["seg_crf_label"], "seg crf")


def test_predicted_image_labels(arrays, network):
    method, config = network
    plan = evaluation_plan(config).only("lam")._replace(predicted="classifier", crf=None)
    plan.maps["lam"] = MapPlan((1.0,), False)
    prediction = predict(method, torch.from_numpy(arrays["input"][0]), None, plan)
    np.testing.assert_array_equal(prediction.present.numpy(), arrays["predicted_cls_label"] > 0)
