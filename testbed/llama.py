"""One block of a Llama-like language model, as far as its time goes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LlamaBlock(nn.Module):
    """Causal attention and a gated MLP, each behind an RMSNorm and beside a shortcut; no layer has a bias.

    The rotation of queries and keys is left out: it has no weights, and is the same before and after compression.

    Args:
        dim: features of a token, a multiple of ``heads``.
        hidden: width of the MLP.
        heads: number of heads, of queries as of keys and values.
    """

    def __init__(self, dim: int = 4096, hidden: int = 11008, heads: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(dim)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim)
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, length, dim)`` to the same shape."""
        normed = self.attention_norm(x)
        projected = (self.q_proj(normed), self.k_proj(normed), self.v_proj(normed))
        query, key, value = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in projected)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.o_proj(heads.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(x)
        output: Tensor = x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return output
