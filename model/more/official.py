"""The weight files the MoRe authors released: an explicit key map onto our network, strict."""

from collections.abc import Mapping

from torch import Tensor, nn

from model.backbones.start_weights import check_keys
from model.method import Released

# official prefix -> ours; the encoder's tokens and positions are apart, below
PREFIXES = {
    "encoder.": "backbone.",
    "decoder.": "decoder.",
    "classifier.": "classifier.",
    "aux_classifier.": "aux_classifier.",
    "graph_layer.": "gcr.",
}


def unwrap(weights: dict) -> dict[str, Tensor]:
    """The flat state dict of a released file: VOC is flat, COCO keeps it under `model_state_dict`; no `module.`."""
    weights = weights.get("model_state_dict", weights)
    return {key.removeprefix("module."): value for key, value in weights.items()}


CONFIGS = {80: "more_coco"}   # by the number of classes; else more_voc


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Released | None:
    """A released MoRe file is known by its GCR and its classifier."""
    plain = {key.removeprefix("module."): shape for key, shape in shapes.items()}
    if not {"graph_layer._fc1.0.weight", "classifier.weight"} <= plain.keys():
        return None
    classes = plain["classifier.weight"][0]
    return Released(CONFIGS.get(classes, "more_voc"), classes)


def from_official(weights: dict, network: nn.Module) -> dict[str, Tensor]:
    """Our state dict from a released one.

    The released encoder's `head` and the GCR's `_fc1` are used by nothing: they must be there and are left out.
    Raises UserError naming the first missing, unexpected or misshaped key.
    """
    weights = unwrap(weights)
    own = network.state_dict()
    check_keys(weights, official_shapes(own), "official MoRe weights")
    tokens = own["backbone.tokens"].shape[1]
    result = {our_name(key): value.float() for key, value in weights.items() if our_name(key) in own}
    position = weights["encoder.pos_embed"].float()
    result["backbone.tokens"] = weights["encoder.cls_token"].float()
    result["backbone.token_pos"], result["backbone.patch_pos"] = position[:, :tokens], position[:, tokens:]
    return result


def official_shapes(own: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the released file for a network with the state dict `own`."""
    to_official = {ours: official for official, ours in PREFIXES.items()}
    shapes = {}
    for key, value in own.items():
        if key not in ("backbone.tokens", "backbone.token_pos", "backbone.patch_pos"):
            prefix = key.split(".")[0] + "."
            shapes[to_official[prefix] + key.removeprefix(prefix)] = tuple(value.shape)
    tokens, dim = own["backbone.tokens"].shape[1:]
    shapes["encoder.cls_token"] = (1, tokens, dim)
    shapes["encoder.pos_embed"] = (1, tokens + own["backbone.patch_pos"].shape[1], dim)
    shapes["encoder.head.weight"], shapes["encoder.head.bias"] = (tokens, dim), (tokens,)
    shapes["graph_layer._fc1.0.weight"], shapes["graph_layer._fc1.0.bias"] = (dim, dim), (dim,)
    return shapes


def our_name(key: str) -> str:
    """Our name of a released key that has one of its own."""
    prefix = key.split(".")[0] + "."
    return PREFIXES.get(prefix, prefix) + key.removeprefix(prefix)
