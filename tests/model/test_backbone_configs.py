"""The configs of other backbones: they load, start from timm's weights and train, also at crops of no whole patches."""

import pytest
import timm
import torch
import torch.nn.functional as F

from engine.config import load_config
from engine.distributed import Ranks
from engine.training.step import Trainer
from model import build_method
from model.method import MapPlan
from utils.batch import Batch

CONFIGS = {"more_voc_dinov2": 14, "more_voc_deit3": 16, "more_voc_clip": 16}
SMALL = ["model.decoder_channels=16", "pseudo_labels.par_dilations=[1,2]", "pseudo_labels.par_iterations=2"]


def tiny(name, patch):
    """The config with a backbone of 3 small blocks, and MoRe started from a timm network of that form."""
    args = f"{{embed_dim: 48, depth: 3, num_heads: 3, img_size: {4 * patch}}}"
    config = load_config(name, [*SMALL, f"model.backbone_args={args}"])
    torch.manual_seed(0)
    method = build_method(config, 4)
    theirs = timm.create_model(config.model.backbone, pretrained=False, **config.model.backbone_args)
    method.load_start_weights(theirs.state_dict())
    return method, config


def batch(size):
    images = F.interpolate(torch.randn(2, 3, 6, 6), size, mode="bicubic")
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    return Batch(["a", "b"], images, labels, torch.ones(2, size, size, dtype=torch.bool), torch.arange(2), 2)


@pytest.mark.parametrize("name, patch", CONFIGS.items())
def test_crops_are_of_whole_patches(name, patch):
    config = load_config(name)
    scales = (*config.evaluate.scales["seg"], *config.evaluate.multi_scales)
    sizes = [config.data.crop_size * scale for scale in config.pseudo_labels.cam_scales]
    sizes += [config.evaluate.base_size * scale for scale in scales]
    assert all(size % patch == 0 for size in sizes) and config.model.weights == "timm"
    assert timm.models.get_pretrained_cfg(config.model.backbone).hf_hub_id, "timm has weights for it"


@pytest.mark.parametrize(
    "name, size", [("more_voc_dinov2", 98), ("more_voc_deit3", 112), ("more_voc_clip", 112), ("more_voc_dinov2", 160)]
)
def test_a_step_of_training(name, size):
    """All terms are finite and reach the backbone; what does not fill a patch has no token: 160 / 14 is 11."""
    patch = CONFIGS[name]
    side = size // patch
    method, config = tiny(name, patch)
    assert method.network.backbone.patch_size == (patch, patch)
    training, data = Trainer(method.train(), config, Ranks(0, 1, torch.device("cpu"))), batch(size)
    training.iteration = 3000   # all terms have their weights
    terms = training.step(data)
    assert all(term.isfinite() for term in terms.values()) and terms["ptc"] > 0
    backbone = method.network.backbone
    for parameter in (backbone.tokens, backbone.patch_pos, backbone.patch_embed.proj.weight):
        assert parameter.grad.abs().max() > 0
    with torch.no_grad():
        out = method.eval().network(data.images)
        whole = method.network(data.images[..., : side * patch, : side * patch])
    assert out.patches.shape[-2:] == (side, side)
    torch.testing.assert_close(out.patches, whole.patches)
    maps = method.maps(data.images, {"cam": MapPlan((1.0, 0.5), flip=True), "seg": MapPlan(flip=True)})
    assert {kind: values.shape[1] for kind, values in maps.items()} == {"cam": 4, "seg": 5}
    assert all(values.shape[-2:] == data.images.shape[-2:] for values in maps.values())
