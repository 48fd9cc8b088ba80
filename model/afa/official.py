"""The weight files of AFA's released code: an explicit key map onto our network, strict."""

from collections.abc import Mapping

from torch import Tensor, nn

from model.backbones import mit
from model.backbones.start_weights import check_keys
from model.method import Released

CONFIGS = {80: "afa_coco"}   # by the number of classes; else afa_voc
HEADS = {   # official prefix -> ours, but for the encoder
    "classifier.": "classifier.",
    "attn_proj.": "affinity_head.",
    "decoder.linear_c1.proj.": "decoder.linears.0.",
    "decoder.linear_c2.proj.": "decoder.linears.1.",
    "decoder.linear_c3.proj.": "decoder.linears.2.",
    "decoder.linear_c4.proj.": "decoder.linears.3.",
    "decoder.linear_fuse.conv.": "decoder.fuse.",
    "decoder.linear_fuse.bn.": "decoder.norm.",
    "decoder.linear_pred.": "decoder.classifier.",
}


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Released | None:
    """A released AFA file is known by its affinity head or the fusion of its decoder, so that it is even where a key is
    missing; the classes are counted by the classifier, else by the decoder."""
    plain = {key.removeprefix("module."): shape for key, shape in shapes.items()}
    if not any(key.startswith(("attn_proj.", "decoder.linear_fuse.")) for key in plain):
        return None
    sizes = (("classifier.weight", 0), ("decoder.linear_pred.weight", 1), ("decoder.linear_pred.bias", 1))
    classes = next((plain[key][0] - background for key, background in sizes if plain.get(key)), 20)
    return Released(CONFIGS.get(classes, "afa_voc"), classes)


def from_official(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Our state dict from a released one. Raises UserError naming the first missing, unexpected or misshaped key."""
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    names = {official_name(name): name for name in network.state_dict()}
    shapes = {official: tuple(network.state_dict()[own].shape) for official, own in names.items()}
    check_keys(weights, shapes, "official AFA weights")
    return {names[key]: value.float() if value.is_floating_point() else value for key, value in weights.items()}


def official_name(own: str) -> str:
    """The released name of a tensor of our network."""
    if own.startswith("backbone."):
        return "encoder." + mit.official_name(own.removeprefix("backbone."))
    official, ours = next((official, ours) for official, ours in HEADS.items() if own.startswith(ours))
    return official + own.removeprefix(ours)
