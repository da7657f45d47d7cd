"""What is stepped on the CPU library and on the emulated CUDA library alike. A new case is one line."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from emulation.driver import Case, Family

from a8multi.loader.structs import Flag, RuleKind, ScheduleRule
from a8multi.plan import Schedule

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
STATE, WRITE = Flag.STOCHASTIC_STATE, Flag.STOCHASTIC_WRITE

# At and past the edges of a pair, a block, a unit, a span and a chunk.
LENGTHS = (1, 2, 31, 33, 127, 129, 257, 4095, 4097, 16385)
# Some whole units of 256, and 40 more.
UNITS = 1320

# --- Element by element. ---

# Plain, then every flag; the last three are outside of the ranges of fast paths.
ROWS = (
    {"weight_decay": 1e-2},
    {"weight_decay": 1e-2, "flags": STATE | WRITE | Flag.MAXIMIZE | Flag.NESTEROV},
    {"weight_decay": 0.1, "flags": Flag.L2_DECAY},
    {"weight_decay": 0.1, "flags": STATE | WRITE | Flag.L2_DECAY | Flag.MAXIMIZE},
    {"eps": 0.0},
    {"eps": 1e-30, "lr": 3.0},
    {"lr": 0.0, "flags": WRITE},
)


def element_cases(*formats: tuple[str, str, str]) -> tuple[Case, ...]:
    """Cases of a rule whose moments are stored in these formats; the first one's are gone into."""
    usual = formats[0]
    types = tuple(product(DTYPES, DTYPES))
    return (
        *(Case((n,), *usual, dtype=DTYPES[(i + k) % 3], row=k) for i, n in enumerate(LENGTHS) for k in (0, 1)),
        *(Case((UNITS,), *usual, dtype=d, grad=g, row=row) for d, g in types for row in range(len(ROWS))),
        *(Case((UNITS,), *usual, dtype=d, grad=g, row=1, skew=1) for d, g in types),
        *(
            Case((n,), *each, dtype=d, grad=F32, row=row, blocks=(size, size, size))
            for each in formats
            for n, d, row, size in ((1, BF16, 0, 128), (777, BF16, 3, 64), (4700, F32, 3, 128), (2600, F16, 0, 4096))
        ),
        *(
            Case((n,), *each, blocks=blocks)
            for each in formats[:2]
            for n, blocks in ((2500, (32, 32, 32)), (5000, (64, 4096, 256)), (5001, (4096, 64, 64)))
        ),
        # Scales that leave the fast path's ranges in some blocks, gradients that overflow or are lost.
        *(
            Case((512,), *usual, dtype=d, scale=scale, row=row)
            for d, scale, row in product((F32, BF16), (1e-12, 1e-18, 1e-25, 1e-36, 1e6, 1e18), (0, 2))
        ),
        *(Case((1024,), *each, dtype=d, odd=True) for each, d in product(formats, (F32, BF16))),
        Case((3, 5, 7), *usual, skew=1),
    )


def lane_cases(*formats: tuple[str, str, str]) -> tuple[Case, ...]:
    """More of a rule's cases in these formats, for the path that takes any: all types, past its ranges and its ends."""
    types = tuple(product(DTYPES, DTYPES))
    return (
        *(
            Case((UNITS,), *each, dtype=d, grad=g, row=(i + k) % len(ROWS), skew=int(k == i % len(types)))
            for i, each in enumerate(formats)
            for k, (d, g) in enumerate(types)
        ),
        *(
            Case((512,), *each, dtype=d, scale=scale, row=row)
            for each in formats
            for d, scale, row in ((F32, 1e-36, 0), (BF16, 1e-25, 2), (F32, 1e18, 1), (BF16, 1e6, 3))
        ),
        # Chunks of whole units, and the last of more than one.
        *(Case((n,), *each, row=row) for each, n, row in zip(formats, (33024, 16640, 16664), (1, 0, 3), strict=False)),
    )


# Five chunks in one stretch.
LONG = Case((70001,), "int8", "log8")

_FIRST = ("int8", "nf4", "bf16", "fp32")
_TWO = tuple((first, second, "") for first, second in product(_FIRST, ("log8", "fp32")))
_ONE = tuple((first, "", "") for first in _FIRST)
_ADAM = Schedule(ScheduleRule.ADAM_BIAS, beta1=0.9, beta2=0.999)
_UNBIASED = Schedule(ScheduleRule.UNBIASED, beta1=0.9, beta2=0.999)
_SLOW = Schedule(
    ScheduleRule.ADAM_BIAS | ScheduleRule.MIX_WARMS_UP | ScheduleRule.BETA3_WARMS_UP,
    beta1=0.9,
    beta2=0.999,
    beta3=0.9999,
    mix=5.0,
    mix_steps=10.0,
    beta3_steps=10.0,
)
_LR_DECAYS = Schedule(ScheduleRule.UNBIASED | ScheduleRule.LR_DECAYS, decay=0.01)
_DAMPENED = Schedule(ScheduleRule.UNBIASED | ScheduleRule.FIRST_WHOLE, beta1=0.9, decay=0.1)

# --- Adafactor and CAME. ---

FLOOR = {"eps": 2.0**-23}
FACTOR_ROWS = (
    {**FLOOR, "flags": STATE | Flag.SCALE_PARAMETER},
    {**FLOOR, "flags": STATE | WRITE | Flag.MAXIMIZE, "clip": 0.0, "weight_decay": 0.1},
    {"eps": 2.0**-7, "flags": STATE | Flag.SCALE_DECAY, "weight_decay": 0.1},
    {**FLOOR, "flags": STATE | WRITE | Flag.SCALE_PARAMETER | Flag.MAXIMIZE | Flag.SCALE_DECAY, "weight_decay": 0.1},
    {**FLOOR, "flags": WRITE | Flag.SCALE_PARAMETER, "clip": 0.0},
    # Outside of the fast paths' range.
    {"eps": 1e-30, "flags": STATE | Flag.SCALE_PARAMETER, "clip": 0.5},
)
# The same, where the first moment averages the clipped update.
CAME_ROWS = tuple({**row, "flags": row["flags"] | Flag.AVERAGE_UPDATE} for row in FACTOR_ROWS)

# Narrow and wide ones, at and past the edges of a run, a tile and a chunk.
MATRICES = (
    *((1, 1), (1, 5), (5, 1), (3, 7), (8, 4, 3, 3), (1, 4096), (4096, 1), (70, 64), (130, 65), (520, 9)),
    *((33, 1032), (513, 72), (3, 2050)),
)


def matrix_cases(third: str, firsts: tuple[str, ...], limited: bool = False) -> tuple[Case, ...]:
    """Cases with a factored second moment, and a third in this format. limited: every other one's norm is."""

    def case(shape: tuple[int, ...], number: int, first: str, **more: Any) -> Case:
        limiter = limited and number % 2 == 1
        return Case(shape, first, "factored", third, limiter=limiter, row=number % len(FACTOR_ROWS), **more)

    return (
        *(
            case(shape, i + k, first, dtype=d)
            for i, shape in enumerate(MATRICES)
            for k, (first, d) in enumerate(product(firsts, (BF16, F32)))
            if math.prod(shape) < 3000 or k % 3 == i % 3
        ),
        *(
            case((9, 264), k + j, firsts[(k + j) % len(firsts)], dtype=d, grad=g, skew=j % 2)
            for k, (d, g) in enumerate(product(DTYPES, DTYPES))
            for j in range(4)
        ),
        *(case((17, 128), k, first, dtype=F32, skew=k % 2) for k, first in enumerate(("fp32", "bf16") * 3)),
        # A whole tile's columns, which have loops of their own.
        *(case((3, 1024), k, first, dtype=d) for k, (first, d) in enumerate(product(firsts, DTYPES))),
        *(
            case((13, 128), 3, first, dtype=d, scale=scale)
            for d in (F32, BF16)
            for first, scale in zip(firsts * 2, (1e-12, 1e-18, 1e-25, 1e6, 1e18), strict=False)
        ),
        *(case((9, cols), k, first, odd=True) for k, (first, cols) in enumerate(product(firsts, (128, 129)))),
        case((65, 256), 0, firsts[0], exchanged=True),
        case((24, 1030), 3, firsts[-1], exchanged=True),
    )


def vector_cases(firsts: tuple[str, ...], limited: bool = False) -> tuple[Case, ...]:
    """Cases with a second moment that is kept element by element."""

    def case(n: int, number: int, first: str, second: str = "log8", block: int = 2048, **more: Any) -> Case:
        limiter = limited and number % 2 == 1
        row = number % len(FACTOR_ROWS)
        return Case((n,), first, second, blocks=(128, block, 0), limiter=limiter, row=row, **more)

    return (
        *(
            case(n, i, first, second, dtype=d)
            for i, n in enumerate((1, 7, 8, 255, 264, 4096))
            for first, second, d in product((*firsts, "fp32"), ("log8", "fp32"), (F32, BF16))
        ),
        *(
            case(2528, k + j, (*firsts, "bf16")[(k + j) % 4], dtype=d, grad=g, skew=j % 2)
            for k, (d, g) in enumerate(product(DTYPES, DTYPES))
            for j in range(4)
        ),
        *(case(5000, 3, first, block=block) for first in firsts[:2] for block in (32, 64, 256, 1024, 4096)),
        # The usual block, which has loops of its own.
        *(case(n, k, first, block=128, dtype=d) for k, (n, first, d) in enumerate(product((40, 2600), firsts, DTYPES))),
        *(
            case(1664, 3, first, block=128, dtype=d, grad=g, scale=scale, odd=scale == 1.0)
            for first in firsts[:2]
            for d, g, scale in ((F32, F32, 1e-18), (BF16, F32, 1e18), (BF16, BF16, 1.0))
        ),
        # Roots that are guarded, but not infinite, and no clipping, which would make up for a common error.
        *(case(1664, 4, first, block=128, dtype=F32, scale=1e16) for first in firsts[:2]),
        *(
            case(1664, 3, first, dtype=d, scale=scale)
            for d in (F32, BF16)
            for first, scale in zip(firsts * 2, (1e-12, 1e-18, 1e-25, 1e6, 1e18), strict=False)
        ),
        *(case(1536, k, first, odd=True) for k, first in enumerate(firsts)),
        case(16392, 2, firsts[0]),
        case(17000, 0, firsts[-1], exchanged=True),
        # Runs of chunks: their ends, one that is cut off in an eight, and more than a block of threads takes.
        *(case(n, k, first, block=128) for k, (n, first) in enumerate(((40000, firsts[0]), (33003, firsts[-1])))),
        *(case(17000, 0, firsts[0], block=block, dtype=F32) for block in (128, 512)),
        case(134000, 3, firsts[0], block=128, exchanged=True),
    )


_BETA2_DECAYS = Schedule(ScheduleRule.BETA2_DECAYS, beta1=0.9, beta2_decay=-0.8)
_CORRECTED = Schedule(ScheduleRule.CORRECT_BIAS | ScheduleRule.RELATIVE_STEP, beta1=0.9, beta2=0.999)
_ANY = ("", "nf4", "int8")
_SOME = ("int8", "nf4", "fp32")

_CAME = Schedule(ScheduleRule(0), beta1=0.9, beta2=0.999)


def _elements(rule: RuleKind, schedule: Schedule, *formats: tuple[str, str, str]) -> Family:
    return Family(rule, schedule, ROWS, element_cases(*formats) + lane_cases(*reversed(formats)))


FAMILIES = {
    "adam": Family(RuleKind.ADAM, _ADAM, ROWS, (*element_cases(*_TWO), *lane_cases(*_TWO[1:]), LONG)),
    "lion": _elements(RuleKind.LION, _UNBIASED, *_ONE),
    "rmsprop": _elements(
        RuleKind.RMSPROP,
        _UNBIASED,
        *(("int8", "log8", "int8"), ("", "log8", ""), ("nf4", "fp32", "bf16"), ("fp32", "log8", "nf4")),
    ),
    "sgd": _elements(RuleKind.SGD, _DAMPENED, *_ONE, ("", "", "")),
    "adagrad": _elements(RuleKind.ADAGRAD, _LR_DECAYS, ("", "log8", ""), ("", "fp32", "")),
    "ademamix": _elements(
        RuleKind.ADEMAMIX,
        _SLOW,
        *(("int8", "log8", "int8"), ("nf4", "log8", "nf4"), ("bf16", "fp32", "bf16"), ("fp32", "fp32", "fp32")),
    ),
    "lamb": _elements(RuleKind.LAMB, _ADAM, *_TWO),
    "lars": _elements(RuleKind.LARS, _UNBIASED, *_ONE),
    "adafactor": Family(None, _BETA2_DECAYS, FACTOR_ROWS, matrix_cases("", _ANY) + vector_cases(_ANY)),
    "came": Family(
        None, _CAME, CAME_ROWS, matrix_cases("factored", _SOME, limited=True) + vector_cases(_SOME, limited=True)[::2]
    ),
    "came as adafactor8bit has it": Family(
        None,
        _CORRECTED,
        FACTOR_ROWS,
        # Every third and fifth: what is left out is gone into above.
        matrix_cases("factored", _SOME, limited=True)
        + matrix_cases("", _ANY, limited=True)[::5]
        + vector_cases(_ANY, limited=True)[::3],
    ),
}
