"""The CUDA kernels give the CPU library's bytes: emulated on the host, so that it is known before a GPU sees them.

What the emulator cannot show: the compiler's work (fma, flush-to-zero, NaN patterns), real concurrency, speed. That is
bench/gpu_check.py's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from emulation.driver import EmulatedBackend, Run, bytes_of, differ, differences, placed
from emulation.families import DTYPES, FAMILIES

from a8multi.backend.native import NativeBackend
from a8multi.errors import NativeError
from a8multi.loader import Library, geometry, structs
from a8multi.plan.schedule import SCHEDULE
from a8multi.plan.step_plan import HYPER
from a8multi.quant.formats import FORMATS

_SCHEDULES, _HYPERS = ctypes.POINTER(structs.Schedule), ctypes.POINTER(structs.Hyper)

STEPS = 3


class Variant(NamedTuple):
    """architecture: 750 has shuffles and plain loads, 900 asynchronous copies and packed conversions. order: of threads
    and blocks, and when copies are done (device/fibers.h). multiprocessors: 0 makes the groups of chunks as large as
    they get. hints: of the batches, whatever is in them; families: to which alone it matters, or all. by_kind: the
    chunks in the order that a GPU gets, else in the tensors'."""

    architecture: int
    order: int
    multiprocessors: int
    by_phases: bool
    hints: structs.BatchHint
    families: tuple[str, ...] | None = None
    by_kind: bool = False


_USUAL, _OTHER = structs.BatchHint(0), structs.BatchHint.OTHER_FORMATS
VARIANTS = {
    "sm_75 by phases": Variant(750, 0, 1, True, _USUAL),
    "sm_90 shuffled in groups": Variant(900, 6, 0, False, _OTHER),
    "sm_90 usual formats": Variant(900, 6, 0, False, _USUAL, ("adam", "lion", "sgd", "lars")),
    # Of the others sm_75 shows the same: it copies at once.
    "sm_90 copies at once": Variant(900, 7, 1, False, _USUAL, ("adam", "adafactor"), by_kind=True),
}

_expected: dict[str, Run] = {}


def expected(family: str) -> Run:
    """The CPU library's run."""
    if family not in _expected:
        _expected[family] = run = Run(FAMILIES[family], NativeBackend("cpu"))
        for _ in range(STEPS):
            run.step()
    return _expected[family]


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(family, variant, id=f"{family}-{name}")
        for family, (name, variant) in product(FAMILIES, VARIANTS.items())
        if variant.families is None or family in variant.families
    ],
)
def test_steps(emulated: Callable[[int], Library], family: str, variant: Variant) -> None:
    backend = EmulatedBackend(emulated(variant.architecture), variant.order, variant.multiprocessors)
    found = Run(FAMILIES[family], backend, variant.by_phases, variant.hints, variant.by_kind)
    for _ in range(STEPS):
        found.step()
    wrong = differences(expected(family), found)
    assert not wrong, f"{len(wrong)} arrays of {len(found.arrays)} parameters:\n" + "\n".join(wrong[:20])


def _backends(emulated: Callable[[int], Library], architecture: int) -> tuple[NativeBackend, NativeBackend]:
    return NativeBackend("cpu"), EmulatedBackend(emulated(architecture), order=7)


@pytest.mark.parametrize("architecture", [750, 900])
def test_a_skipped_step_writes_nothing(emulated: Callable[[int], Library], architecture: int) -> None:
    for name, family in FAMILIES.items():
        # The first rows of hyper-parameters, which move the parameters.
        cases = tuple(case for case in family.cases if case.row < 4 and not case.exchanged)[::10]
        backend = EmulatedBackend(emulated(architecture))
        skipped, kept = (Run(replace(family, cases=cases), backend) for _ in range(2))
        skipped.step()
        kept.step()
        skipped.plan.skip = torch.ones(())
        skipped.step()
        assert not differences(kept, skipped), name
        skipped.plan.skip.zero_()
        skipped.step()
        assert differences(kept, skipped), name


@pytest.mark.parametrize("architecture", [750, 900])
def test_codec(emulated: Callable[[int], Library], architecture: int) -> None:
    numbers = torch.Generator().manual_seed(3)
    for fmt, dtype, (n, block, skew), stochastic in product(
        (fmt for fmt in FORMATS.values() if fmt.quantized),
        DTYPES,
        ((1, 32, 0), (31, 32, 1), (129, 128, 0), (4097, 64, 1), (5000, 4096, 0), (20000, 256, 0)),
        (False, True),
    ):
        values = torch.randn(n, generator=numbers) * torch.randn(n, generator=numbers).exp()
        values[torch.rand(n, generator=numbers) < 0.1] = 0
        if n == 5000:
            values[7], values[4500] = float("inf"), float("nan")
        made = []
        for backend in _backends(emulated, architecture):
            arrays = [placed("values", values.to(dtype), skew), placed("decoded", torch.zeros(n, dtype=dtype), skew)]
            arrays += [placed("codes", fmt.allocate(values.shape, block, values.device)[0], skew)]
            arrays += [placed("blocks", torch.zeros(-(-n // block), dtype=fmt.header), skew)]
            given, decoded, codes, blocks = (array.data for array in arrays)
            backend.quantize(given, codes, blocks, fmt, block, stochastic, 5)
            backend.dequantize(codes, blocks, decoded, fmt, block)
            made.append(arrays)
        wrong = [f"{x.name} {what}" for x, y in zip(*made, strict=True) if (what := differ(x, y))]
        assert not wrong, (fmt.name, dtype, n, block, skew, stochastic, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw(emulated: Callable[[int], Library], dtype: torch.dtype) -> None:
    """Another interval, the same one, and none before; sizes that fill no pair, and more than a grid."""
    for numel, skew in ((1, 0), (1023, 1), (8192 * 256 * 2 + 3, 0)):
        for taken, before in ((20, None), (20, 9), (20, 14)):
            made = []
            for backend in _backends(emulated, 900):
                matrix = placed("matrix", torch.full((numel,), 99.0, dtype=dtype), skew)
                counter = None if before is None else torch.tensor(before)
                backend.draw(matrix.data, torch.tensor(taken), counter, 7, 0xABCDEF0123, 300)
                made.append(matrix)
            assert not (what := differ(*made)), (numel, skew, before, what)
            assert bool((made[1].data != 99.0).all()) is (before != 14)


@pytest.mark.parametrize("scale", [None, 8.0, 1e-35])
def test_screen(emulated: Callable[[int], Library], scale: float | None) -> None:
    """Gradients are divided, and it is told whether one is not finite afterwards."""
    divisor = None if scale is None else torch.tensor(scale)
    told = set()
    for odd in (False, True):
        cases = tuple(case for case in FAMILIES["adam"].cases if case.odd is odd)
        family = replace(FAMILIES["adam"], cases=cases)
        runs = [Run(family, backend) for backend in _backends(emulated, 900)]
        for step in (1, 2):
            flags = [torch.zeros(()) for _ in runs]
            for run, found in zip(runs, flags, strict=True):
                run.load()
                run.backend.screen(run.plan, divisor, found, family.hypers(step), None)
            wrong = [what for x, y in zip(runs[0].grads, runs[1].grads, strict=True) if (what := differ(x, y))]
            assert not wrong, wrong[:20]
            infinite = any(not bool(grad.data.isfinite().all()) for grad in runs[0].grads)
            assert [float(found) for found in flags] == [float(infinite)] * 2
            told.add(infinite)
    assert told == {True, False}


def test_derive(emulated: Callable[[int], Library]) -> None:
    """Every family's schedule, with a counter, without one, and skipped."""
    schedules = [family.schedule for family in FAMILIES.values()]
    tables = []
    for backend in _backends(emulated, 900):
        counters, skip = torch.zeros(len(schedules), dtype=torch.int64), torch.zeros(())
        records = np.array([schedule.record() for schedule in schedules * 2], SCHEDULE)
        records["step"][: len(schedules)] = counters.data_ptr() + 8 * np.arange(len(schedules))
        records["skip"][: len(schedules) : 2] = skip.data_ptr()
        hypers = np.zeros(len(records), HYPER)
        seen = []
        for step, advance in enumerate((1, 0, 1, 1, 1, 1, 1)):
            skip.fill_(float(step == 3))
            pointers = records.ctypes.data_as(_SCHEDULES), hypers.ctypes.data_as(_HYPERS)
            backend._call_once("a8_derive", counters.device, *pointers, len(records), advance)
            seen.append((hypers.tobytes(), counters.tolist()))
        tables.append(seen)
    assert tables[0] == tables[1]
    assert tables[1][-1][1] == [5 + k % 2 for k in range(len(schedules))]


@pytest.mark.parametrize("size", [0, 4, 96, 1020, geometry()["A8_UPLOAD_BYTES"]])
def test_upload(emulated: Callable[[int], Library], size: int) -> None:
    """So many bytes, none beyond them."""
    data = bytes(torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(size)).tolist())
    backend, there = EmulatedBackend(emulated(900), order=6), placed("there", torch.zeros(size // 4 + 1), 0)
    expected = placed("there", there.data, 0)
    bytes_of(expected)[:size] = np.frombuffer(data, np.uint8)
    backend._upload(backend._where(there.data.device), data, there.data.data_ptr())
    assert not (what := differ(expected, there)), what


def test_what_cannot_be_uploaded_is_refused(emulated: Callable[[int], Library]) -> None:
    backend, there = EmulatedBackend(emulated(900)), torch.zeros(1000)
    to, most = there.data_ptr(), geometry()["A8_UPLOAD_BYTES"]
    for words, data, at in (
        ("from or to is null", bytes(4), 0),
        ("not aligned to 4 bytes", bytes(4), to + 2),
        ("6 bytes: not a multiple of 4", bytes(6), to),
        (f"{most + 4} bytes: .*more than {most}", bytes(most + 4), to),
    ):
        with pytest.raises(NativeError, match=words):
            backend._upload(backend._where(there.device), data, at)
    assert not there.any()
