"""What the torch backend's updates share: hyper-parameters, slices of a tensor, reading and writing of moments.

Receives items and gradients of one step; nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from a8multi.loader.structs import Flag
from a8multi.plan import Item, MomentSpec

from . import torch_formats as formats

# Elements worked on at once: a power of two above the largest block, and temporaries of 16 MiB each.
SLICE = 1 << 22

ZERO, ONE = np.float32(0), np.float32(1)


def slices(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, SLICE):
        yield start, min(start + SLICE, numel)


def flushed(value: np.float32) -> np.float32:
    return ZERO if abs(value) < formats.SMALLEST_NORMAL else value


@dataclass(frozen=True)
class Hyper:
    """The fields of ``a8_hyper`` that the updates read, as the libraries see them: float32, subnormals flushed."""

    lr: float
    beta1: float
    beta2: float
    beta3: float
    one_minus_beta1: float
    one_minus_beta2: float
    one_minus_beta3: float
    eps: float
    eps2: float
    eps3: float
    weight_decay: float
    bias1: float
    bias2: float
    clip: float
    growth: float
    mix: float
    trust: float
    flags: Flag
    seed: int
    step: int

    @classmethod
    def of(cls, record: np.void) -> Hyper:
        def number(name: str) -> float:
            return float(flushed(np.float32(record[name])))

        return cls(
            lr=number("lr"),
            beta1=number("beta1"),
            beta2=number("beta2"),
            beta3=number("beta3"),
            one_minus_beta1=number("one_minus_beta1"),
            one_minus_beta2=number("one_minus_beta2"),
            one_minus_beta3=number("one_minus_beta3"),
            eps=number("eps"),
            eps2=number("eps2"),
            eps3=number("eps3"),
            weight_decay=number("weight_decay"),
            bias1=number("bias1"),
            bias2=number("bias2"),
            clip=number("clip"),
            growth=number("growth"),
            mix=number("mix"),
            trust=number("trust"),
            flags=Flag(int(record["flags"])),
            seed=int(record["seed_low"]) | int(record["seed_high"]) << 32,
            step=int(record["step"]),
        )

    def write_noise(self, item: Item) -> formats.Noise | None:
        return formats.noise_key(self.seed, self.step, item.noise_id) if self.flags & Flag.STOCHASTIC_WRITE else None

    def phase(self, item: Item) -> int | None:
        return formats.phase_key(self.seed, self.step, item.noise_id) if self.flags & Flag.STOCHASTIC_STATE else None


def gradient(grad: Tensor, hyper: Hyper, start: int, stop: int) -> Tensor:
    loaded = formats.load(grad, start, stop)
    return loaded.neg_() if hyper.flags & Flag.MAXIMIZE else loaded


@dataclass
class Moments:
    """The moments of a slice's elements as float32; one that is missing or factored is a 0-d zero, and not stored."""

    first: Tensor
    second: Tensor
    third: Tensor

    @classmethod
    def of(cls, item: Item, start: int, stop: int) -> Moments:
        def decoded(spec: MomentSpec | None, codes: Tensor | None, blocks: Tensor | None) -> Tensor:
            if spec is None or spec.format is None or codes is None:
                return formats.constant(0.0, item.param)
            return formats.decode(spec.format, codes, blocks, spec.block_size, start, stop)

        return cls(
            decoded(item.moments.first, item.first, item.first_block),
            decoded(item.moments.second, item.second, item.second_block),
            decoded(item.moments.third, item.third, item.third_block),
        )

    def store(self, item: Item, hyper: Hyper, start: int, skip: Tensor | None, phases_first: bool = False) -> None:
        """phases_first: ``a8_rule_phases_first``."""
        specs = item.moments
        for spec, values, codes, blocks, phase in (
            (specs.first, self.first, item.first, item.first_block, hyper.phase(item) if phases_first else None),
            (specs.second, self.second, item.second, item.second_block, hyper.phase(item)),
            (specs.third, self.third, item.third, item.third_block, None),
        ):
            if spec is not None and spec.format is not None and codes is not None:
                place = codes, blocks, spec.block_size, start, phase
                formats.encode(spec.format, values, *place, keep_grid=True, skip=skip)


def store(
    item: Item,
    hyper: Hyper,
    start: int,
    p: Tensor,
    moments: Moments,
    skip: Tensor | None,
    phases_first: bool = False,
) -> None:
    """Writes the parameter and the moments from element ``start`` on, unless the 0-d ``skip`` is true."""
    formats.store(p, item.param, start, hyper.write_noise(item), skip)
    moments.store(item, hyper, start, skip, phases_first)


def screened(grad: Tensor, scale: Tensor | None) -> Tensor:
    """``a8_screen`` of one gradient: divides it in place; whether all of it is finite then, 0-d."""
    finite = torch.ones((), dtype=torch.bool, device=grad.device)
    for start, stop in slices(grad.numel()):
        if scale is not None:
            formats.store(formats.div(formats.load(grad, start, stop), scale), grad, start)
        finite &= grad.view(-1)[start:stop].isfinite().all()
    return finite
