"""The weight files of ACR's released code: an explicit key map onto our network, strict."""

from collections.abc import Mapping

from torch import Tensor

from model.acr.network import ACRNetwork
from model.backbones.start_weights import check_keys
from model.method import Released

BACKBONE, CLASSIFIER = "pretrained.model.", "cls_head."
UNUSED = {   # in every file, and no output depends on them
    *(f"{BACKBONE}{name}" for name in ("bkg_token", "norm.weight", "norm.bias", "head.weight", "head.bias")),
    *(f"scratch.layer{number}_rn.weight" for number in (1, 2, 3, 4)),
}


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Released | None:
    """A released ACR file is known by the prefix of its backbone, and what it was trained on by its classifier."""
    plain = {key.removeprefix("module."): shape for key, shape in shapes.items()}
    if not any(key.startswith(BACKBONE) for key in plain):
        return None
    sizes = (plain.get(f"{CLASSIFIER}{name}") for name in ("weight", "bias"))
    classes = next((shape[0] for shape in sizes if shape), 20)
    hybrid = any(key.startswith(f"{BACKBONE}patch_embed.backbone.") for key in plain)
    return Released("acr_voc_vit" if not hybrid else "acr_coco" if classes == 80 else "acr_voc", classes)


def from_official(weights: dict[str, Tensor], network: ACRNetwork) -> dict[str, Tensor]:
    """Our state dict from a released one; UNUSED keys must be there, and are dropped.

    Raises UserError naming the first missing, unexpected or misshaped key.
    """
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    vit, own = network.backbone, network.state_dict()
    names = {official_name(name): name for name in own if not name.startswith(("backbone.token", "backbone.patch_pos"))}
    positions = vit.tokens.shape[1] + vit.patch_pos.shape[1]
    expected = {official: tuple(own[name].shape) for official, name in names.items()}
    expected |= {f"{BACKBONE}cls_token": (1, 1, vit.embed_dim), f"{BACKBONE}pos_embed": (1, positions, vit.embed_dim)}
    check_keys(weights, {**expected, **dict.fromkeys(UNUSED)}, "official ACR weights")
    class_token, table = weights[f"{BACKBONE}cls_token"], weights[f"{BACKBONE}pos_embed"]
    tokens = {"tokens": class_token, "token_pos": table[:, :1], "patch_pos": table[:, 1:]}
    made = {name: weights[official] for official, name in names.items()}
    return {name: value.float() for name, value in (made | {f"backbone.{k}": v for k, v in tokens.items()}).items()}


def official_name(own: str) -> str:
    """The released name of a tensor of our network, but for tokens and positions."""
    part, _, rest = own.partition(".")
    return {"backbone": BACKBONE, "classifier": CLASSIFIER}[part] + rest
