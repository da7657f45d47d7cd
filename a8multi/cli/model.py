"""The byte-level transformer that `a8multi train` trains: pre-norm, causal, learned positions, tied output head.

Receives bytes as int64 [batch, context] and returns logits; knows nothing of optimizers or data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTE_COUNT = 256
INITIAL_STD = 0.02


class Block(nn.Module):
    """Attention and a GELU MLP, each behind a LayerNorm and added to the residual stream (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        heads = self.query_key_value(self.attention_norm(x)).view(batch, context, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, context, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class ByteTransformer(nn.Module):
    """Predicts the next byte.

    Args:
        width: size of the residual stream; a multiple of `heads`.
        layers: number of blocks.
        heads: attention heads of each block.
        context: longest sequence, in bytes.
        seed: of the initial weights, drawn in float32 on the CPU, so that every device and dtype starts from the same.
    Raises:
        ValueError: if width is not a multiple of heads.
    """

    def __init__(self, width: int, layers: int, heads: int, context: int, seed: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.byte_embedding = nn.Embedding(BYTE_COUNT, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self._initialise(layers, torch.Generator().manual_seed(seed))

    def _initialise(self, layers: int, generator: torch.Generator) -> None:
        # Two additions to the residual stream a layer: dividing by their root keeps its variance (GPT-2, section 2.3).
        residual_std = INITIAL_STD / math.sqrt(2 * layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                std = residual_std if name.endswith(("attention_out.weight", "mlp_out.weight")) else INITIAL_STD
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, context, 256] of the byte after each position of int64 tokens [batch, context]."""
        x = self.byte_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.final_norm(x), self.byte_embedding.weight)


def next_byte_loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte, in float32 whatever the parameters' dtype.

    Args:
        sequences: int64 [batch, context + 1]; each byte after the first is a target.
    """
    logits = model(sequences[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
