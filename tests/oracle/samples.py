"""Inputs for the tests of formats and updates: spread over many octaves, with zeros, the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor


def positive(numel: int, *, seed: int = 0, octaves: float = 8.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Log-normal values with a standard deviation of ``octaves``, every eleventh or so zero; on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.exp2(octaves * torch.randn(numel, generator=generator))
    values[torch.rand(numel, generator=generator) < 0.09] = 0.0
    return values.clamp(max=torch.finfo(dtype).max).to(dtype)


def signed(numel: int, *, seed: int = 0, octaves: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """``positive`` with random signs."""
    values = positive(numel, seed=seed, octaves=octaves, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.where(torch.rand(numel, generator=generator) < 0.5, -values, values)


def blocks_of(values: Tensor, block_size: int) -> list[Tensor]:
    """The blocks of the flattened tensor; the last one may be shorter."""
    return list(values.reshape(-1).split(block_size))
