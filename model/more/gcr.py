"""Graph Category Representation (MoRe, section 3.2): class tokens gather their neighbours among all tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GraphCategoryRepresentation(nn.Module):
    """Class tokens (B, K, D) and patch tokens (B, N, D) -> class tokens (B, K, D).

    Each class is the head of directed edges to its k = int(ratio * K) most similar tokens, the tails.
    Patch tokens are read without gradient.
    """

    def __init__(self, dim: int, ratio: float = 0.5) -> None:
        super().__init__()
        self.ratio = ratio
        self.head_proj = nn.Linear(dim, dim)
        self.tail_proj = nn.Linear(dim, dim)
        self.linear1 = nn.Linear(dim, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, class_tokens: Tensor, patch_tokens: Tensor) -> Tensor:
        head = self.head_proj(class_tokens)                                          # (B, K, D)
        tail = self.tail_proj(torch.cat([class_tokens, patch_tokens.detach()], 1))   # (B, K+N, D)
        k = int(self.ratio * class_tokens.shape[1])
        similarity, index = (head * head.shape[-1] ** -0.5 @ tail.transpose(1, 2)).topk(k, dim=-1)  # (B, K, k)
        rows = torch.arange(len(tail), device=tail.device)[:, None, None]
        tails = tail[rows, index]                                                    # (B, K, k, D)
        weight = similarity.softmax(-1).unsqueeze(-1)
        head_k = head.unsqueeze(2)
        relation = (1 - weight) * head_k + weight * tails
        gate = (head_k + relation).tanh()
        attention = (tails.sum(-1) * gate.sum(-1)).softmax(-1)   # a product of two sums over D, as released
        message = (attention.unsqueeze(-1) * tails).sum(2)       # (B, K, D)
        added = F.leaky_relu(self.linear1((head + message) * 0.1 + class_tokens))
        multiplied = F.leaky_relu(self.linear2(head * message * 0.1 + class_tokens))
        return self.norm(added + multiplied)
