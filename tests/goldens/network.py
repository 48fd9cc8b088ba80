"""The goldens' small network as a method of ours."""

from collections.abc import Sequence

from engine.config import RunConfig, load_config
from model import build_method
from model.method import Method


def golden_method(golden, arrays, overrides: Sequence[str] = ()) -> tuple[Method, RunConfig]:
    """MoRe with the goldens' weights, and its config; the size is read from the `cfg_*` entries of `arrays`."""
    size = {name: int(arrays[f"cfg_{name}"]) for name in ("embed_dim", "depth", "num_heads", "img_size", "patch_size")}
    classes = int(arrays["cfg_num_classes"]) - 1
    own = [f"model.aux_block={int(arrays['cfg_aux_layer'])}", f"model.backbone_args={size}"]
    own += [f"model.registers={int(arrays['cfg_num_attri']) - classes}"]
    config = load_config("more_voc", [*own, *overrides])
    method = build_method(config, classes)
    method.load_state_dict(method.from_official(golden("more/network_state_dict.safetensors")))
    return method.eval(), config
