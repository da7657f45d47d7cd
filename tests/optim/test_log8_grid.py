"""The header of a log8 block stays while its values fit, and moves as soon as they do not (docs/decisions/0008)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.helpers import apply, gradient
from torch import Tensor

import a8multi

BLOCK, NUMEL = 128, 128 * 64


class Run:
    """One parameter whose gradients differ by orders of magnitude."""

    def __init__(self, device: Any, **options: Any) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(NUMEL, device=device))]
        self.optimizer = a8multi.AdamW8bit(self.params, lr=0.0, **options)
        self.scale = gradient((NUMEL,), 3).abs()
        self.steps = 0

    def step(self, factor: float | Tensor = 1.0) -> Tensor:
        """Headers after one step, lo and step of each: int64 [blocks, 2]."""
        self.steps += 1
        noise = 1 + 0.3 * torch.randn(NUMEL, generator=torch.Generator().manual_seed(self.steps))
        apply(self.optimizer, self.params, [(self.scale * noise * factor).to(self.params[0].device)])
        word = self.optimizer.state[self.params[0]]["exp_avg_sq_block"].cpu().long()
        return torch.stack((word & ~0xFFFF, (word & 0xFFFF) << 8), dim=1)

    def codes(self) -> Tensor:
        return self.optimizer.state[self.params[0]]["exp_avg_sq"].view(-1, BLOCK).cpu()


@pytest.mark.parametrize("stochastic", [True, False])
def test_a_settled_block_keeps_its_header(backend: Any, stochastic: bool) -> None:
    run = Run(backend.device, stochastic_rounding=stochastic)
    for _ in range(300):
        before = run.step()
    kept = (run.step() == before).all(dim=1)
    assert kept.float().mean() > 0.8


@pytest.mark.parametrize("factor", [1e3, 1e-3])
def test_a_block_that_leaves_its_range_gets_a_new_header(backend: Any, factor: float) -> None:
    run = Run(backend.device, betas=(0.9, 0.9))
    for _ in range(20):
        before = run.step()
    for _ in range(1 if factor > 1 else 40):
        after = run.step(factor)
    assert (after != before).any(dim=1).all()
    top, old_top = after[:, 0] + 254 * after[:, 1], before[:, 0] + 254 * before[:, 1]
    assert ((top > old_top) == (factor > 1)).all()


def test_a_block_that_narrows_is_not_left_on_a_coarse_grid(backend: Any) -> None:
    run = Run(backend.device, betas=(0.9, 0.9))
    for _ in range(20):
        before = run.step()
    even = run.scale.mean() / run.scale  # from now on all gradients are alike
    for _ in range(400):
        after = run.step(even)
    assert (after[:, 1] < before[:, 1] / 2).all()
    codes = run.codes().int()
    # At most an eighth of the step is waste, and the room at both ends is 1/64 of the range.
    assert ((codes.amax(1) - codes.amin(1)) > 254 * 7 // 8 - 16).all()


def test_zeros_and_an_empty_block_keep_their_meaning(backend: Any) -> None:
    run = Run(backend.device)
    mask = torch.ones(NUMEL)
    mask[:BLOCK] = 0
    mask[BLOCK : 2 * BLOCK : 2] = 0
    for _ in range(30):
        headers = run.step(mask)
    codes = run.codes()
    assert headers[0].tolist() == [0, 256]
    assert (codes[0] == 0).all()
    assert (codes[1, ::2] == 0).all()
    assert (codes[1, 1::2] > 0).all()
    # The first values that come get a header of their own.
    assert (run.step()[0] != torch.tensor([0, 256])).any()
    assert (run.codes()[0] > 0).all()
