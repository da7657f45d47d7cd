"""The ``torch`` backend: the updates in plain torch operations, on any device. The readable reference.

The formulas are math.h's, one operation at a time in its order, on slices of a tensor so that temporaries stay small.
On x86 CPUs, Adam and the formats give the same bits as the compiled library, for every format and dtype, subnormals
included (tests/backend/test_torch.py); a NaN may differ from a NaN. Adafactor differs by the order in which sums are
added. Nothing is read back to the host, so nothing synchronises, unless step counters or learning rates live there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from a8multi.loader.structs import Flag
from a8multi.plan import Item, Live, MomentSpec, StepPlan
from a8multi.quant.formats import StateFormat

from . import torch_formats as formats
from .base import BackendReport
from .torch_formats import add, constant, div, mul, sqrt, sub

# Elements worked on at once: a power of two above the largest block, and temporaries of 16 MiB each.
SLICE = 1 << 22


class TorchBackend:
    """Every operation on every device, with nothing compiled. Methods as in ``Backend``."""

    name = "torch"

    def report(self) -> BackendReport:
        ops = ("codec", "elementwise", "adafactor")
        return BackendReport(self.name, True, "", None, str(torch.__version__), "plain torch operations", ops)

    @torch.no_grad()
    def elementwise(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        hypers = live.read(hypers) if live is not None else hypers
        for item, grad in zip(plan.items, plan.grads, strict=True):
            hyper = Hyper.of(hypers[item.hyper])
            rule = AdamRule.of(hyper)
            for start, stop in _slices(item.param.numel()):
                _adam(item, grad, hyper, rule, start, stop)

    @torch.no_grad()
    def adafactor(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        hypers = live.read(hypers) if live is not None else hypers
        for item, grad in zip(plan.items, plan.grads, strict=True):
            if item.param.numel():
                _adafactor(item, grad, Hyper.of(hypers[item.hyper]))

    @torch.no_grad()
    def quantize(
        self,
        values: Tensor,
        codes: Tensor,
        blocks: Tensor,
        fmt: StateFormat,
        block_size: int,
        stochastic: bool,
        seed: int,
    ) -> None:
        phase = formats.phase_key(seed, 0, 0) if stochastic else None
        for start, stop in _slices(values.numel()):
            formats.encode(fmt, formats.load(values, start, stop), codes, blocks, block_size, start, phase)

    @torch.no_grad()
    def dequantize(self, codes: Tensor, blocks: Tensor, values: Tensor, fmt: StateFormat, block_size: int) -> None:
        for start, stop in _slices(values.numel()):
            formats.store(formats.decode(fmt, codes, blocks, block_size, start, stop), values, start)


def _slices(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, SLICE):
        yield start, min(start + SLICE, numel)


# --- What both updates share. ---

_ZERO, _ONE = np.float32(0), np.float32(1)


def _flushed(value: np.float32) -> np.float32:
    return _ZERO if abs(value) < formats.SMALLEST_NORMAL else value


@dataclass(frozen=True)
class Hyper:
    """The fields of ``a8_hyper`` that the updates read, as the libraries see them: float32, subnormals flushed."""

    lr: np.float32
    beta1: float
    beta2: float
    one_minus_beta1: float
    one_minus_beta2: float
    eps: float
    eps2: float
    weight_decay: np.float32
    bias1: np.float32
    bias2: np.float32
    clip: float
    flags: Flag
    seed: int
    step: int

    @classmethod
    def of(cls, record: np.void) -> Hyper:
        def number(name: str) -> np.float32:
            return _flushed(np.float32(record[name]))

        return cls(
            lr=number("lr"),
            beta1=float(number("beta1")),
            beta2=float(number("beta2")),
            one_minus_beta1=float(number("one_minus_beta1")),
            one_minus_beta2=float(number("one_minus_beta2")),
            eps=float(number("eps")),
            eps2=float(number("eps2")),
            weight_decay=number("weight_decay"),
            bias1=number("bias1"),
            bias2=number("bias2"),
            clip=float(number("clip")),
            flags=Flag(int(record["flags"])),
            seed=int(record["seed_low"]) | int(record["seed_high"]) << 32,
            step=int(record["step"]),
        )

    def write_noise(self, item: Item) -> formats.Noise | None:
        return formats.noise_key(self.seed, self.step, item.noise_id) if self.flags & Flag.STOCHASTIC_WRITE else None

    def phase(self, item: Item) -> int | None:
        return formats.phase_key(self.seed, self.step, item.noise_id) if self.flags & Flag.STOCHASTIC_STATE else None


def _gradient(grad: Tensor, hyper: Hyper, start: int, stop: int) -> Tensor:
    gradient = formats.load(grad, start, stop)
    return gradient.neg_() if hyper.flags & Flag.MAXIMIZE else gradient


def _decode(
    spec: MomentSpec | None, codes: Tensor | None, blocks: Tensor | None, start: int, stop: int
) -> Tensor | None:
    """The values of a moment; None where there is none or it is factored."""
    if spec is None or spec.format is None or codes is None:
        return None
    return formats.decode(spec.format, codes, blocks, spec.block_size, start, stop)


def _encode(
    spec: MomentSpec | None,
    values: Tensor | None,
    codes: Tensor | None,
    blocks: Tensor | None,
    start: int,
    phase: int | None,
) -> None:
    """The inverse of ``_decode``; nothing where that gave None."""
    if spec is None or spec.format is None or values is None or codes is None:
        return
    formats.encode(spec.format, values, codes, blocks, spec.block_size, start, phase, keep_grid=True)


def _store(item: Item, hyper: Hyper, start: int, p: Tensor, m: Tensor | None, v: Tensor | None) -> None:
    formats.store(p, item.param, start, hyper.write_noise(item))
    _encode(item.moments.first, m, item.first, item.first_block, start, None)
    _encode(item.moments.second, v, item.second, item.second_block, start, hyper.phase(item))


# --- Adam: Kingma & Ba 2015, Algorithm 1; AdamW: Loshchilov & Hutter 2019, Algorithm 2. ---


@dataclass(frozen=True)
class AdamRule:
    """``a8_rule``, without what ``Hyper`` holds already.

    decay: of the parameter; l2: factor of the parameter added to the gradient; step_size: lr / (1 - beta1^t).
    """

    decay: float
    l2: float
    step_size: float

    @classmethod
    def of(cls, hyper: Hyper) -> AdamRule:
        with np.errstate(all="ignore"):
            decay = _ONE - _flushed(hyper.lr * hyper.weight_decay)
            step_size = _flushed(hyper.lr * hyper.bias1)
        if hyper.flags & Flag.L2_DECAY:
            return cls(1.0, float(hyper.weight_decay), float(step_size))
        return cls(float(decay), 0.0, float(step_size))


def _adam(item: Item, grad: Tensor, hyper: Hyper, rule: AdamRule, start: int, stop: int) -> None:
    p = formats.load(item.param, start, stop)
    g = _gradient(grad, hyper, start, stop)
    # With no L2 term the gradient is untouched: 0 * p is not 0 for an infinite p.
    if rule.l2 != 0.0:
        g = add(g, mul(p, rule.l2))
    m = _decode(item.moments.first, item.first, item.first_block, start, stop)
    v = _decode(item.moments.second, item.second, item.second_block, start, stop)
    if m is None or v is None:
        raise ValueError(f"{item.name}: an Adam step needs both moments, element by element")
    m = add(mul(m, hyper.beta1), mul(g, hyper.one_minus_beta1))
    v = add(mul(v, hyper.beta2), mul(mul(g, hyper.one_minus_beta2), g))
    root = add(mul(sqrt(v), float(hyper.bias2)), hyper.eps)
    p = sub(mul(p, rule.decay), mul(div(m, root), rule.step_size))
    _store(item, hyper, start, p, m, v)


# --- Adafactor: Shazeer & Stern 2018, Algorithms 4 and 5, with torch.optim.Adafactor's eps1 and weight decay. ---


def _average(hyper: Hyper, average: Tensor, x: Tensor) -> Tensor:
    return add(mul(average, hyper.beta2), mul(x, hyper.one_minus_beta2))


def _reciprocal_root(x: Tensor) -> Tensor:
    return div(constant(1.0, x), sqrt(x))


def _update_means(item: Item, grad: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor]:
    """Moves the row and column means; returns what a row and a column contribute to 1 / sqrt(v), [rows] and [cols]."""
    rows, cols = item.second, item.second_block
    if cols is None:
        raise ValueError(f"{item.name}: a factored moment needs its column means in second_block")
    row_sums = torch.empty_like(rows)
    col_sums = torch.zeros_like(cols)
    step = max(1, SLICE // item.cols)
    for top in range(0, item.rows, step):
        bottom = min(top + step, item.rows)
        g = formats.load(grad, top * item.cols, bottom * item.cols).view(-1, item.cols)
        squares = mul(g, g)
        row_sums[top:bottom] = squares.sum(1)
        col_sums += squares.sum(0)
    rows.copy_(_average(hyper, rows, div(row_sums, constant(item.cols, rows))))
    cols.copy_(_average(hyper, cols, div(col_sums, constant(item.rows, rows))))
    # clamp leaves NaN alone, as the libraries' comparisons do.
    mean = div(rows.sum(), constant(item.rows, rows)).clamp_(min=hyper.eps)
    return _reciprocal_root(div(rows, mean)), _reciprocal_root(cols)


def _factored_roots(item: Item, factors: tuple[Tensor, Tensor], start: int, stop: int) -> Tensor:
    """1 / sqrt(v) of the flattened elements start to stop."""
    first = start // item.cols
    last = (stop - 1) // item.cols + 1
    outer = mul(factors[0][first:last, None], factors[1])
    return outer.view(-1)[start - first * item.cols : stop - first * item.cols]


def _update(
    item: Item, grad: Tensor, hyper: Hyper, factors: tuple[Tensor, Tensor] | None, start: int, stop: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The update before clipping, and the new moments that are stored element by element."""
    g = _gradient(grad, hyper, start, stop)
    v = _decode(item.moments.second, item.second, item.second_block, start, stop)
    if factors is not None:
        roots = _factored_roots(item, factors, start, stop)
    elif v is not None:
        v = _average(hyper, v, mul(g, g))
        roots = _reciprocal_root(v)
    else:
        raise ValueError(f"{item.name}: an Adafactor step needs a second moment")
    with np.errstate(divide="ignore", over="ignore"):
        roots = roots.clamp(max=float(_ONE / np.float32(hyper.eps)))
    m = _decode(item.moments.first, item.first, item.first_block, start, stop)
    if m is None:
        return mul(g, roots), None, v
    m = add(mul(m, hyper.beta1), mul(g, hyper.one_minus_beta1))
    return mul(m, roots), m, v


def _adafactor(item: Item, grad: Tensor, hyper: Hyper) -> None:
    factors = _update_means(item, grad, hyper) if item.moments.factored else None
    param_squares, update_squares = constant(0.0, item.param), constant(0.0, item.param)
    for start, stop in _slices(item.param.numel()):
        if hyper.flags & Flag.SCALE_PARAMETER:
            p = formats.load(item.param, start, stop)
            param_squares += mul(p, p).sum()
        if hyper.clip > 0.0:
            u = _update(item, grad, hyper, factors, start, stop)[0]
            update_squares += mul(u, u).sum()
    decay, step_size = _adafactor_rule(item, hyper, param_squares, update_squares)
    for start, stop in _slices(item.param.numel()):
        u, m, v = _update(item, grad, hyper, factors, start, stop)
        p = formats.load(item.param, start, stop)
        _store(item, hyper, start, sub(mul(p, decay), mul(u, step_size)), m, v)


def _adafactor_rule(item: Item, hyper: Hyper, param_squares: Tensor, update_squares: Tensor) -> tuple[Tensor, Tensor]:
    """Decay of the parameter and step size, 0-d on the device. bias2 bounds lr; bias1 corrects the moments' bias."""
    numel = constant(item.param.numel(), param_squares)
    rho = constant(float(min(hyper.lr, hyper.bias2)), param_squares)
    alpha = rho
    if hyper.flags & Flag.SCALE_PARAMETER:
        alpha = mul(sqrt(div(param_squares, numel)).clamp_(min=hyper.eps2), rho)
    alpha = mul(alpha, float(hyper.bias1))
    decayed = alpha if hyper.flags & Flag.SCALE_DECAY else rho
    decay = sub(constant(1.0, rho), mul(decayed, float(hyper.weight_decay)))
    if hyper.clip > 0.0:
        excess = div(sqrt(div(update_squares, numel)), constant(hyper.clip, rho))
        alpha = div(alpha, excess.clamp_(min=1.0))
    return decay, alpha
