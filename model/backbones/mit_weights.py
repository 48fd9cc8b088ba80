"""Weights of a Mix Transformer under the names of three codebases, brought to those of SegFormer's ImageNet files."""

import re

import torch
from torch import Tensor

from utils.errors import UserError

PREFIX = r"(?:(?:segformer\.)?encoder\.|backbone\.)?"
LEFT_OUT = re.compile(PREFIX + r"(head|classifier)\.(weight|bias)")
LETTERS = {"S": r"(?P<S>[1-4])", "T": r"(?P<T>[0-3])", "B": r"(?P<B>\d+)", "W": r"(?P<W>weight|bias)"}
NAMES = [   # SegFormer, Hugging Face, MMSegmentation. S: stage from 1, T: stage from 0, B: block, W: weight or bias
    ("patch_embedS.proj.W", "patch_embeddings.T.proj.W", "layers.T.0.projection.W"),
    ("patch_embedS.norm.W", "patch_embeddings.T.layer_norm.W", "layers.T.0.norm.W"),
    ("blockS.B.norm1.W", "block.T.B.layer_norm_1.W", "layers.T.1.B.norm1.W"),
    ("blockS.B.attn.q.W", "block.T.B.attention.self.query.W"),
    ("blockS.B.attn.kv.W",),
    ("blockS.B.attn.proj.W", "block.T.B.attention.output.dense.W", "layers.T.1.B.attn.attn.out_proj.W"),
    ("blockS.B.attn.sr.W", "block.T.B.attention.self.sr.W", "layers.T.1.B.attn.sr.W"),
    ("blockS.B.attn.norm.W", "block.T.B.attention.self.layer_norm.W", "layers.T.1.B.attn.norm.W"),
    ("blockS.B.norm2.W", "block.T.B.layer_norm_2.W", "layers.T.1.B.norm2.W"),
    ("blockS.B.mlp.fc1.W", "block.T.B.mlp.dense1.W", "layers.T.1.B.ffn.layers.0.W"),
    ("blockS.B.mlp.dwconv.dwconv.W", "block.T.B.mlp.dwconv.dwconv.W", "layers.T.1.B.ffn.layers.1.W"),
    ("blockS.B.mlp.fc2.W", "block.T.B.mlp.dense2.W", "layers.T.1.B.ffn.layers.4.W"),
    ("normS.W", "layer_norm.T.W", "layers.T.2.W"),
]
PARTS = [(row[0], "whole", name) for row in NAMES for name in row]   # (SegFormer's, part of it or of theirs, theirs)
PARTS += [("blockS.B.attn.kv.W", part, f"block.T.B.attention.self.{part}.W") for part in ("key", "value")]
PARTS += [(f"blockS.B.attn.{part}.W", part, "layers.T.1.B.attn.attn.in_proj_W") for part in ("q", "kv")]
TABLE = [(re.compile(PREFIX + re.sub("[STBW]", lambda letter: LETTERS[letter[0]], re.escape(theirs))), ours, part)
         for ours, part, theirs in PARTS]


def segformer_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An image model's weights under the names of SegFormer's ImageNet files; classifiers are left out.

    weights: under those names, Hugging Face's (`nvidia/mit-b*`) or MMSegmentation's, also below `encoder.` or
    `backbone.`. Every other key stays as it is, for `check_keys` to name it.
    Raises UserError naming a key without its value (or the reverse, or another shape), and two keys of one layer.
    """
    found: dict[str, list[tuple[str, str, Tensor]]] = {}   # SegFormer's name -> [(part, their key, tensor)]
    for key, tensor in weights.items():
        if not LEFT_OUT.fullmatch(key):
            matches = [(pattern.fullmatch(key), ours, part) for pattern, ours, part in TABLE]
            ours = [(_filled(ours, match), part) for match, ours, part in matches if match] or [(key, "whole")]
            for name, part in ours:
                found.setdefault(name, []).append((part, key, _cut(tensor, part, key)))
    return {name: _joined(name, pieces) for name, pieces in found.items()}


def _filled(name: str, match: re.Match) -> str:
    letters = {"S": str(int(match.groupdict().get("T", 0)) + 1)} | match.groupdict()
    return re.sub("[SBW]", lambda letter: letters[letter[0]], name)


def _cut(tensor: Tensor, part: str, key: str) -> Tensor:
    """The rows of q, or of k and v, from a projection to all three; a 1x1 convolution as the linear layer it is."""
    if part in ("q", "kv"):
        rows = torch.atleast_1d(tensor)
        return rows[:len(rows) // 3] if part == "q" else rows[len(rows) // 3:]
    return tensor[:, :, 0, 0] if ".ffn.layers." in key and tensor.shape[2:] == (1, 1) else tensor


def _joined(name: str, pieces: list[tuple[str, str, Tensor]]) -> Tensor:
    parts, keys, tensors = zip(*sorted(pieces, key=lambda piece: piece[:2]), strict=True)
    if parts == ("key", "value") and tensors[0].shape == tensors[1].shape:
        return torch.cat(torch.atleast_1d(*tensors))
    if len(parts) > 1 or parts[0] in ("key", "value"):
        raise UserError(f"start weights: {name!r} is given by {' and '.join(keys)}; expected is one tensor, or a key "
                        "and a value of one shape")
    return tensors[0]
