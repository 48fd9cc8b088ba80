"""The authors' localisation tool: GETAM and patch CAM of whole images, two views, to [0, 1]."""

import numpy as np
import torch

from engine.config import load_config
from model.acr.getam import getam
from model.method import MapPlan
from model.multi_scale import resize
from tests.goldens.acr import golden_acr, normalized


def setting(name: str) -> list[str]:
    """`grad_s_s10_aff`: function, start block, affinity."""
    function, start = str(name).rsplit("_s", 1)
    start, affinity = start.split("_")
    return [f"getam.function={function}", f"getam.start_block={start}", f"getam.affinity={affinity == 'aff'}".lower()]


def images_of(arrays):
    for index in range(len(arrays["image_names"])):
        labels = torch.zeros(1, int(arrays["cfg_num_classes"]))
        labels[0, arrays[f"{index}__classes"]] = 1
        yield index, normalized(arrays[f"{index}__image_u8"]), labels


def test_inputs(golden):
    arrays = golden("acr/inference.npz")
    for index, image, _ in images_of(arrays):
        ours = resize(image, [int(arrays["crop_size"])] * 2)
        np.testing.assert_allclose(ours, arrays[f"{index}__input"], rtol=0, atol=1e-4)


def test_maps(golden):
    arrays = golden("acr/inference.npz")
    plan = MapPlan(flip=True, side=int(arrays["crop_size"]))
    method, _ = golden_acr(golden, arrays)
    for name in arrays["setting_names"]:
        method.config = load_config("acr_voc", setting(name))
        for index, image, labels in images_of(arrays):
            made, classes = method.maps(image, {"getam": plan, "cam": plan}, labels), arrays[f"{index}__classes"]
            for kind, theirs in (("getam", f"{index}__{name}"), ("cam", f"{index}__patch_cam")):
                np.testing.assert_allclose(made[kind][0, classes], arrays[theirs], rtol=0, atol=1e-3, err_msg=theirs)
                assert not made[kind][labels == 0].any()


def test_unnormalised_views(golden):
    arrays = golden("acr/inference.npz")
    method, config = golden_acr(golden, arrays, overrides=setting("grad_s10_aff"))
    for index, image, _ in images_of(arrays):
        inputs = torch.from_numpy(arrays[f"{index}__input"])
        classes = torch.from_numpy(arrays[f"{index}__classes"])[None].expand(2, -1)
        c = config.getam
        views = torch.cat([inputs, inputs.flip(-1)])
        maps = getam(method.network, views, classes, c.function, c.start_block, c.affinity).maps
        plain, mirrored = resize(maps, image.shape[-2:], align_corners=True).unbind(0)
        for name, ours in (("plain", plain), ("flip", mirrored.flip(-1))):
            theirs = arrays[f"{index}__unnormalised_{name}"]
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3, err_msg=name)
