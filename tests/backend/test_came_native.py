"""CAME and the norm-growth limiter in the compiled library, driven by hand-made plans: its bits against themselves, and
its numbers against a float64 oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from a8multi import settings
from a8multi.backend.native import NativeBackend
from a8multi.loader.structs import Flag, Phase
from a8multi.plan import Item, Moments, MomentSpec, StepPlan, matrix_shape
from a8multi.plan.step_plan import HYPER
from a8multi.quant.formats import FORMATS

CPU = torch.device("cpu")
# One tile of 512 x 1024 and several, both ways; rows that begin anywhere in a block, and columns that suit the vectors.
ODD = ((1, 70), (70, 1), (3, 5, 7), (33, 47), (65, 300), (515, 131), (3, 2049))
EVEN = ((5, 32), (40, 96), (66, 128), (8, 4, 4, 8), (515, 160), (3, 2080))
VECTORS = ((129,), (16385,))
FIRST = ("nf4", "int8", "bf16", "fp32")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Flags, and whether there is a confidence: the paper's order of CAME, that of adafactor8bit 0.2.4, Adafactor, and the
# paper's order without a confidence.
ORDERS = {
    "paper": (Flag.AVERAGE_UPDATE, True),
    "gradient": (Flag(0), True),
    "none": (Flag(0), False),
    "average": (Flag.AVERAGE_UPDATE, False),
}


pytestmark = pytest.mark.usefixtures("native")


def item(
    shape: Sequence[int],
    first: str = "fp32",
    *,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    block_size: int = 128,
    confidence: bool = True,
    limiter: bool = False,
    seed: int = 0,
    hyper: int = 0,
) -> Item:
    """A parameter before its first step. A vector has an element-wise second moment and no confidence."""
    param = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).mul(0.1).to(dtype)
    fmt = FORMATS[first]
    codes, blocks = fmt.allocate(param.shape, block_size, CPU)
    factored = param.ndim > 1
    rows, cols = matrix_shape(shape) if factored else (0, 0)
    third = MomentSpec(None) if factored and confidence else None
    second = MomentSpec(None) if factored else MomentSpec(FORMATS["fp32"])
    return Item(
        param=param,
        grad_dtype=grad_dtype or dtype,
        state={},
        moments=Moments(MomentSpec(fmt, block_size if blocks is not None else 0), second, third, limiter),
        first=codes,
        first_block=blocks,
        second=torch.zeros(rows if factored else param.shape),
        second_block=torch.zeros(cols) if factored else None,
        third=torch.zeros(rows) if third else None,
        third_block=torch.zeros(cols) if third else None,
        limiter=torch.zeros(()) if limiter else None,
        rows=rows,
        cols=cols,
        hyper=hyper,
        noise_id=seed,
        name=f"parameter {seed}",
    )


# In double precision; the library gets them, and one minus each beta, rounded once.
VALUES = {
    **dict.fromkeys(("bias1", "clip", "step"), 1.0),
    **dict(zip(("lr", "weight_decay", "growth", "bias2"), (0.01, 0.1, 1.01, 3.4e38), strict=True)),
    **dict(zip(("beta1", "beta2", "beta3"), (0.9, 0.99, 0.999), strict=True)),
    **dict(zip(("eps", "eps2", "eps3"), (1e-15, 1e-3, 1e-16), strict=True)),
}


def hyper(order: str = "paper", flags: int = 0, **changes: float) -> np.ndarray:
    """One row of hyper-parameters."""
    row = np.zeros(1, HYPER)
    for name, value in {**VALUES, **changes}.items():
        row[name] = value
        if name.startswith("beta"):
            row[f"one_minus_{name}"] = 1.0 - value
    row["flags"] = int(ORDERS[order][0]) | flags
    return row


def gradient(like: Item, step: int) -> Tensor:
    """Heavy-tailed, of bfloat16 numbers that float16 holds too: the same values in every type. Every ninth row zero."""
    generator = torch.Generator().manual_seed(like.noise_id + 1009 * (step + 1))
    shape = like.param.shape
    values = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp() * 1e-2
    values = torch.where(values.abs() < 1e-4, 0.0, values.clamp(-1e4, 1e4)).bfloat16()
    if values.ndim > 1:
        values[4::9] = 0
    return values.to(like.grad_dtype)


def run(
    backend: NativeBackend,
    items: Sequence[Item],
    hypers: np.ndarray,
    steps: Sequence[int] = range(3),
    *,
    gradients: Callable[[Item, int], Tensor] = gradient,
    apart: Sequence[Phase] = (),
) -> None:
    """Some steps. apart: phases that are run one by one."""
    plan = StepPlan(CPU, items)
    asked = apart or (plan.phases,)
    for step in steps:
        plan.grads = [gradients(item, step) for item in items]
        hypers["step"] = step + 1
        for plan.phases in asked:
            backend.adafactor(plan, hypers)


NAMES = ("param", "first", "first_block", "second", "second_block", "third", "third_block", "limiter")


def raw(made: Item, names: Sequence[str] = NAMES) -> dict[str, bytes]:
    tensors = {name: getattr(made, name) for name in names}
    return {k: t.reshape(-1).view(torch.uint8).numpy().tobytes() for k, t in tensors.items() if t is not None}


def differences(ours: Sequence[Item], theirs: Sequence[Item], names: Sequence[str] = NAMES) -> list[str]:
    """Which tensors of which items are not the same bytes."""
    pairs = [(a, raw(a, names), raw(b, names)) for a, b in zip(ours, theirs, strict=True)]
    return [f"{a.name} {tuple(a.param.shape)}: {k}" for a, x, y in pairs for k in x if x[k] != y[k]]


def model(shapes: Sequence[Sequence[int]], order: str, **options: Any) -> list[Item]:
    options = {"confidence": ORDERS[order][1], "limiter": True, **options}
    return [item(shape, seed=i, **options) for i, shape in enumerate(shapes)]


# --- The same bits. ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("order", ["paper", "gradient", "none"])
def test_every_variant_and_thread_count(
    native: NativeBackend, monkeypatch: pytest.MonkeyPatch, order: str, first: str, dtype: torch.dtype
) -> None:
    shapes = (*ODD, *EVEN, *VECTORS)
    flags = Flag.STOCHASTIC_WRITE | Flag.SCALE_PARAMETER
    expected = None
    for isa in native.library.info.isa_usable:
        monkeypatch.setenv(settings.CPU_ISA.name, isa)
        for threads in (1, 2, 3) if isa == native.library.info.isa_best else (1,):
            torch.set_num_threads(threads)
            found = model(shapes, order, first=first, dtype=dtype)
            run(native, found, hyper(order, flags=flags), range(2))
            assert native.isa_ran == isa, "the forced variant did not run"
            expected = expected or found
            assert not differences(found, expected), f"{isa} with {threads} threads"
    assert all(made.param.isfinite().all() for made in expected or ())


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("order", ["paper", "gradient", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_and_plain_loops(
    native: NativeBackend, dtype: torch.dtype, order: str, first: str, maximize: bool
) -> None:
    """float16 gradients take the general path; the same values in the other types take the fast one."""
    flags = Flag.STOCHASTIC_WRITE | (Flag.MAXIMIZE if maximize else Flag(0))
    general = model(EVEN, order, first=first, dtype=dtype, grad_dtype=torch.float16)
    run(native, general, hyper(order, flags=flags))
    for grad_dtype in (torch.float32, torch.bfloat16):
        fast = model(EVEN, order, first=first, dtype=dtype, grad_dtype=grad_dtype)
        run(native, fast, hyper(order, flags=flags))
        assert not differences(fast, general), grad_dtype


@pytest.mark.parametrize("block_size", [32, 64, 128, 2048])
@pytest.mark.parametrize("first", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("order", ["paper", "gradient"])
def test_a_quantised_moment_is_read_where_it_lies(
    native: NativeBackend, order: str, first: str, block_size: int
) -> None:
    """A step from codes is the step from the numbers that they stand for, wherever rows begin in their blocks."""
    quantised = model((*ODD, *EVEN), order, first=first, block_size=block_size)
    run(native, quantised, hyper(order), range(2))
    twins = model((*ODD, *EVEN), order)
    for twin, made in zip(twins, quantised, strict=True):
        for name in set(NAMES) - {"first", "first_block"}:
            getattr(twin, name).copy_(getattr(made, name))
        assert twin.first is not None
        assert made.first is not None
        if made.first_block is None:
            twin.first.copy_(made.first)
        else:
            native.dequantize(made.first, made.first_block, twin.first, FORMATS[first], block_size)
    run(native, quantised, hyper(order), [2])
    run(native, twins, hyper(order), [2])
    assert not differences(twins, quantised, sorted(set(NAMES) - {"first", "first_block"}))


@pytest.mark.parametrize("order", ["paper", "gradient"])
def test_maximize_turns_the_gradient(native: NativeBackend, order: str) -> None:
    up, down = (model((*ODD, *EVEN, *VECTORS), order, first="int8") for _ in range(2))
    run(native, up, hyper(order, flags=Flag.MAXIMIZE), gradients=lambda like, step: -gradient(like, step))
    run(native, down, hyper(order))
    assert not differences(up, down)


PHASES = {
    "paper": ("REDUCE", "MOMENTS", "NORM", "RESIDUAL", "CONFIDENCE", "LIMIT", "APPLY"),
    "gradient": ("REDUCE", "MOMENTS", "RESIDUAL", "CONFIDENCE", "NORM", "LIMIT", "APPLY"),
}


@pytest.mark.parametrize("order", PHASES)
def test_phases_one_by_one(native: NativeBackend, order: str) -> None:
    together, apart = (model((*ODD, *EVEN, *VECTORS), order, first="int8") for _ in range(2))
    run(native, together, hyper(order))
    run(native, apart, hyper(order), apart=[Phase[name] for name in PHASES[order]])
    assert not differences(apart, together)


def test_orders_side_by_side(native: NativeBackend) -> None:
    """Neighbours in a batch whose phases come in another order, with and without confidence and limiter."""
    orders = ("paper", "gradient", "none")
    made: list[list[Item]] = []
    for _ in range(2):
        items = [item(s, "nf4", seed=i, hyper=i % 3) for i, s in enumerate((*ODD, *EVEN, *VECTORS))]
        for i, entry in enumerate(items):
            options = {"confidence": ORDERS[orders[i % 3]][1], "limiter": i % 2 == 0}
            items[i] = item(entry.param.shape, "nf4", seed=i, hyper=i % 3, **options)
        made.append(items)
    together, alone = made
    run(native, together, np.concatenate([hyper(order) for order in orders]))
    for entry in alone:
        order, entry.hyper = orders[entry.hyper], 0
        run(native, [entry], hyper(order))
    assert not differences(together, alone)


# --- The right numbers. ---


def oracle(param: Tensor, grad: Tensor, old: dict[str, Tensor], h: dict[str, float], order: str) -> Tensor:
    """One step in float64; ``old`` becomes the new state. Shazeer & Stern 2018, Algorithm 4; CAME: Luo et al. 2023,
    Algorithm 2, or with a moment of the gradient; the limiter: Chen et al. 2024, section 3.3. The new parameter.
    """

    def averaged(name: str, x: Tensor, beta: float) -> Tensor:
        old[name] = beta * old[name] + (1 - beta) * x
        return old[name]

    def outer(row: Tensor, col: Tensor) -> Tensor:
        return torch.outer(row / row.mean().clamp(min=1e-300), col).reshape(param.shape)

    def limited(u: Tensor) -> Tensor:
        if "limiter" not in old:
            return u
        norm, last = float(u.norm()), float(old["limiter"])
        factor = h["growth"] * last / norm if last > 0 and norm > h["growth"] * last else 1.0
        if norm > 0:
            old["limiter"] = torch.tensor(norm * factor, dtype=torch.float64)
        old["bitten"] = old.get("bitten", torch.zeros(())) + (factor < 1)
        return u * factor

    def clipped(u: Tensor) -> Tensor:
        return u / max(1.0, float(u.square().mean().sqrt()) / h["clip"]) if h["clip"] else u

    def means(name: str, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        matrix = x.reshape(matrix_shape(x.shape))
        return averaged(f"{name}_row", matrix.mean(1), beta), averaged(f"{name}_col", matrix.mean(0), beta)

    factored = param.ndim > 1
    if factored:
        row, col = means("second", grad.square(), h["beta2"])
        root = 1 / outer(row, col).sqrt().clamp(min=h["eps"])
    else:
        root = 1 / averaged("second", grad.square(), h["beta2"]).sqrt().clamp(min=h["eps"])
    if ORDERS[order][0]:
        u = clipped(grad * root)
        m = averaged("first", u, h["beta1"])
        if factored and order == "paper":
            m = m / outer(*means("third", (u - m).square() + h["eps3"], h["beta3"])).sqrt()
        u = limited(m)
    else:
        m = averaged("first", grad, h["beta1"])
        if factored and order == "gradient":
            s_row, s_col = means("third", ((grad - m) * root).square() + h["eps3"], h["beta3"])
            root = 1 / outer(row * s_row, col * s_col).sqrt().clamp(min=h["eps"])
        u = clipped(limited(m * root))
    return param * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * u


def close(ours: Tensor, theirs: Tensor, size: float, what: str) -> None:
    worst = float((ours.double() - theirs).abs().max())
    assert worst <= 1e-5 * size, f"{what}: off by {worst:.3g}, {worst / size:.1e} of {size:.3g}"


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("limiter", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 70), (70, 1), (33, 47), (8, 4, 4, 8), (515, 160), (3, 2049), (129,)], ids=str)
def test_float64(native: NativeBackend, shape: tuple[int, ...], order: str, limiter: bool, clip: float) -> None:
    made = item(shape, confidence=ORDERS[order][1], limiter=limiter)
    start = param = made.param.double()
    kept = dict.fromkeys(("second", "second_row", "second_col", "third_row", "third_col"), torch.zeros(()))
    kept["first"] = torch.zeros_like(param)
    if limiter:
        kept["limiter"] = torch.zeros(())
    # Shrinking norms, so that the limiter has something to do.
    changes = {"clip": clip, "growth": 0.7}
    steps = range(5)
    run(native, [made], hyper(order, **changes), steps)
    for step in steps:
        param = oracle(param, gradient(made, step).double(), kept, {**VALUES, **changes}, order)
    way = float((param - start).abs().max())
    assert way > 0
    # A parameter is rounded at every step.
    worst = float((made.param.double() - param).abs().max())
    assert worst <= 1e-5 * way + 5 * 2.0**-24 * float(param.abs().max()), f"{worst:.3g} of {way:.3g}"
    pairs = {"first": made.first, "second_row": made.second, "second_col": made.second_block}
    pairs |= {"third_row": made.third, "third_col": made.third_block, "limiter": made.limiter}
    for name, ours in pairs.items():
        theirs = kept["second" if name == "second_row" and len(shape) == 1 else name] if ours is not None else None
        if ours is not None and theirs is not None:
            close(ours, theirs, float(theirs.abs().max()), name)
    if limiter:
        assert float(kept["bitten"]) > 0, "the limiter had nothing to do"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(33, 47), (40, 96), (129,)], ids=str)
def test_zero_gradients_do_not_lock_the_limiter(native: NativeBackend, order: str, shape: tuple[int, ...]) -> None:
    """Pitfall 16: the norm of a zero update is nothing to compare with."""

    def gradients(like: Item, step: int) -> Tensor:
        return torch.zeros_like(like.param) if step == 0 else gradient(like, step)

    limited, free = (item(shape, confidence=ORDERS[order][1], limiter=on) for on in (True, False))
    for made in (limited, free):
        start = made.param.clone()
        run(native, [made], hyper(order, weight_decay=0.0), [0], gradients=gradients)
        assert torch.equal(made.param, start)
    assert float(limited.limiter) == 0.0  # type: ignore[arg-type]
    for made in (limited, free):
        run(native, [made], hyper(order, weight_decay=0.0), [1], gradients=gradients)
    assert torch.equal(limited.param, free.param)
    assert not torch.equal(limited.param, start)
    assert float(limited.limiter) > 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("order", ["paper", "gradient"])
def test_what_is_not_finite_stays_in_its_tensor(native: NativeBackend, order: str, wrong: float) -> None:
    bad = 3

    def gradients(like: Item, step: int) -> Tensor:
        grad = gradient(like, step)
        if step == 1 and like.noise_id == bad:
            grad.view(-1)[5] = wrong
        return grad

    clean, spoilt = (model((*ODD, *EVEN, *VECTORS), order, first="int8") for _ in range(2))
    run(native, clean, hyper(order))
    run(native, spoilt, hyper(order), gradients=gradients)
    assert not spoilt[bad].param.isfinite().all()
    assert float(spoilt[bad].limiter) < math.inf  # type: ignore[arg-type]
    del clean[bad], spoilt[bad]
    assert not differences(spoilt, clean)
