"""The attention of timm's transformer blocks: handed out while the block runs, never kept on it."""

from collections.abc import Callable
from typing import Any

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

OfAttention = Callable[[Tensor], Any]   # takes the maps (B, heads, N, N) of one block, after the softmax


def hands_out(block: nn.Module) -> bool:
    """Whether `block` is of the plain form, whose attention can be handed out."""
    attn = getattr(block, "attn", None)
    return (
        type(block) is Block and type(attn) is Attention and attn.attn_drop.p == 0
        and getattr(attn, "gate", None) is None and isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity)
    )


def block_and_attention(block: Block, x: Tensor, of_attention: OfAttention | None) -> tuple[Tensor, Any]:
    """What the block makes of tokens (B, N, D), and what `of_attention` makes of its attention maps; None: they are not
    made.

    The backward needs the maps of all heads once more: they stay until then, and nothing else of that size does.
    """
    if of_attention is None:
        return block(x), None
    q, k, v = queries_keys_values(block, x)
    maps = attention_maps(block, q, k)
    return behind_attention(block, x, maps @ v), of_attention(maps)


def queries_keys_values(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, heads, N, d) each, of tokens (B, N, D)."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def attention_maps(block: Block, q: Tensor, k: Tensor) -> Tensor:
    """(B, heads, n, N) after the softmax, of n queries and N keys."""
    return (q * block.attn.scale @ k.transpose(-2, -1)).softmax(-1)


def behind_attention(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of the block, from tokens (B, n, D) and what their queries read, (B, heads, n, d)."""
    read = block.attn.proj_drop(block.attn.proj(attended.transpose(1, 2).flatten(2)))
    x = x + block.drop_path1(block.ls1(read))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
