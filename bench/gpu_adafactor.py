"""Adafactor on the CUDA library: its bytes beside the CPU library's. Part of gpu_check.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from gpu_common import (
    ARRAYS,
    CHUNK,
    FORMATS,
    TORCH,
    Library,
    differences,
    float_type,
    gradient,
    moment_bytes,
    random_params,
)

from loader.structs import Batch, Chunk, Dtype, Flag, Hyper, Phase, Tensor, TensorFlag

TILE_ROWS, TILE_COLS, TOTALS = 512, 1024, 4
FLT_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class Case:
    """One tensor to step. rows 0: not factored. skew: elements by which every array misses alignment. known: whether
    later steps may trust the sums of p^2; exchanged: whether somebody writes the parameter between steps regardless."""

    numel: int
    rows: int = 0
    param: Dtype = Dtype.BF16
    grad: Dtype = Dtype.BF16
    first: str = "none"
    second: str = "factored"
    first_block: int = 128
    second_block: int = 2048
    skew: int = 0
    hyper: int = 0
    scale: float = 1e-3
    known: bool = True
    exchanged: bool = False

    @property
    def cols(self) -> int:
        return self.numel // self.rows if self.rows else 0

    def sizes(self) -> dict[str, int]:
        """Bytes of every array."""
        factored = self.second == "factored"
        return {
            "param": self.numel * TORCH[self.param].itemsize,
            "grad": self.numel * TORCH[self.grad].itemsize,
            "first": moment_bytes(self.first, self.numel),
            "first_block": 4 * -(-self.numel // self.first_block) if self.first in ("int8", "nf4") else 0,
            "second": 4 * self.rows if factored else moment_bytes(self.second, self.numel),
            "second_block": 4 * self.cols if factored else 4 * -(-self.numel // self.second_block),
        }

    def unit(self, name: str) -> int:
        """Bytes to which an array is always aligned."""
        if name in ("param", "grad"):
            return TORCH[self.param if name == "param" else self.grad].itemsize
        state = float_type(name, self.param, self.first, self.second)
        return state.itemsize if state is not None else 4 if name == "second_block" else 1


class Run:
    """The tensors of some cases in one library's memory, with tables and scratch. Offsets in the scratch have gaps of
    `gap` floats, so that not all are aligned to 16 bytes; trust: whether to set SQUARES_KNOWN."""

    def __init__(self, library: Library, cases: list[Case], params: list[torch.Tensor], gap: int, trust: bool) -> None:
        self.library, self.cases, self.trust = library, cases, trust
        self.arrays: list[dict[str, torch.Tensor]] = []
        self.tensors = (Tensor * len(cases))()
        chunks: list[tuple[int, int]] = []
        tiles: list[tuple[int, int]] = []
        floats = 0
        for index, (case, param) in enumerate(zip(cases, params, strict=True)):
            arrays = {}
            for name, size in case.sizes().items():
                skew = case.skew * case.unit(name)
                arrays[name] = torch.zeros(size + 64, dtype=torch.uint8, device=library.device)[skew : skew + size]
            arrays["param"].copy_(param.view(torch.uint8))
            self.arrays.append(arrays)
            down, across = -(-case.rows // TILE_ROWS), -(-case.cols // TILE_COLS)
            tensor = Tensor(
                **{name: array.data_ptr() if array.numel() else None for name, array in arrays.items()},
                numel=case.numel, rows=case.rows, cols=case.cols, chunk_at=len(chunks), tile_at=len(tiles),
                chunks=-(-case.numel // CHUNK), tiles=down * across, hyper=case.hyper, noise_id=index,
                first_block_size=case.first_block, second_block_size=case.second_block, param_dtype=case.param,
                grad_dtype=case.grad, first_format=FORMATS[case.first], second_format=FORMATS[case.second],
                row_at=floats, col_at=floats + across * case.rows,
                sum_at=floats + across * case.rows + down * case.cols,
            )  # fmt: skip
            floats = -(-(tensor.sum_at + TOTALS + 3 * tensor.chunks) // 4) * 4 + gap
            self.tensors[index] = tensor
            chunks += [(index, part) for part in range(tensor.chunks)]
            tiles += [(index, part) for part in range(tensor.tiles)]
        self.scratch = torch.full((floats,), float("nan"), device=library.device)
        self.chunk_table = library.upload((Chunk * len(chunks))(*chunks))
        self.tile_table = library.upload((Chunk * max(len(tiles), 1))(*tiles))
        self.chunk_count, self.tile_count = len(chunks), len(tiles)

    def batch(self, hypers: list[Hyper], known: bool) -> Batch:
        for case, tensor in zip(self.cases, self.tensors, strict=True):
            tensor.flags = TensorFlag.SQUARES_KNOWN if known and self.trust and case.known else 0
        self.tensor_table = self.library.upload(self.tensors)
        self.hyper_table = self.library.upload((Hyper * len(hypers))(*hypers))
        return Batch(
            tensors=self.tensor_table.data_ptr(), chunks=self.chunk_table.data_ptr(),
            tiles=self.tile_table.data_ptr(), hypers=self.hyper_table.data_ptr(), tensor_count=len(self.cases),
            chunk_count=self.chunk_count, tile_count=self.tile_count, hyper_count=len(hypers),
        )  # fmt: skip

    def load(self, grads: Sequence[torch.Tensor]) -> None:
        for arrays, grad in zip(self.arrays, grads, strict=True):
            arrays["grad"].copy_(grad.view(torch.uint8))

    def step(self, batch: Batch, phases: Sequence[int] = (Phase.ALL_PHASES,)) -> None:
        for phase in phases:
            self.library.run("a8_adafactor", batch, int(phase), scratch=self.scratch)


def hyper(step: int, lr: float = 1e-2, wd: float = 0.0, eps: float = 2.0**-23, clip: float = 1.0, flags: int = 0,
          most: float = FLT_MAX) -> Hyper:  # fmt: skip
    beta2 = 1 - step**-0.8
    return Hyper(
        lr=lr, beta1=0.9, beta2=beta2, one_minus_beta1=1 - 0.9, one_minus_beta2=1 - beta2, eps=eps, eps2=1e-3,
        weight_decay=wd, bias1=1.0, bias2=most, clip=clip, flags=flags, seed_low=12345, seed_high=678, step=step,
    )  # fmt: skip


def hypers_of(step: int) -> list[Hyper]:
    """The default, then every flag, with and without clipping; last, an eps outside the fast paths' range."""
    noise = Flag.STOCHASTIC_STATE | Flag.STOCHASTIC_WRITE
    return [
        hyper(step, flags=Flag.SCALE_PARAMETER),
        hyper(step, flags=noise | Flag.MAXIMIZE, clip=0.0, wd=0.1),
        hyper(step, flags=Flag.SCALE_DECAY | Flag.STOCHASTIC_STATE, wd=0.1, eps=2.0**-7, most=1e-3),
        hyper(step, flags=noise | Flag.SCALE_PARAMETER | Flag.MAXIMIZE | Flag.SCALE_DECAY, wd=0.1),
        hyper(step, flags=Flag.SCALE_PARAMETER | Flag.STOCHASTIC_WRITE, clip=0.0),
        hyper(step, flags=Flag.SCALE_PARAMETER, eps=1e-30, clip=0.5),
    ]


MATRICES = [(1, 1), (1, 5), (5, 1), (1, 4096), (4096, 1), (3, 7), (16, 4096), (4096, 16), (64, 576), (300, 65),
            (70, 64), (513, 72), (600, 100), (1100, 256), (520, 1032), (33, 2050), (64, 1024), (130, 3000),
            (2, 20000)]  # fmt: skip
LENGTHS = [1, 7, 8, 255, 264, 4095, 4096, 16384, 16392, 40000, 50001, 500000]


def cases() -> list[Case]:
    f32, bf16, f16 = Dtype.F32, Dtype.BF16, Dtype.F16
    found = []
    for count, (rows, cols) in enumerate(MATRICES):
        kinds = itertools.product(("none", "nf4", "int8", "f32", "bf16"), (f32, bf16, f16))
        for number, (first, dtype) in enumerate(kinds):
            if rows * cols < 1e5 or number % 4 == count % 4:  # of the large ones, four each
                found.append(Case(rows * cols, rows, dtype, dtype, first, hyper=number % 6, known=len(found) % 3 != 0))
    for p, g in itertools.product((f32, bf16, f16), repeat=2):
        for h, skew in itertools.product(range(6), (0, 1)):
            first = ("none", "nf4", "int8")[h % 3]
            found.append(Case(129 * 264, 129, p, g, first, skew=skew, hyper=h))
            found.append(Case(20480 + 480, 0, p, g, first, "log8", skew=skew, hyper=h))
    for count, n in enumerate(LENGTHS):
        for first, second, dtype in itertools.product(("none", "nf4", "f32"), ("log8", "f32"), (f32, bf16)):
            found.append(Case(n, 0, dtype, dtype, first, second, hyper=(count + len(found)) % 6))
    for block, first in itertools.product((32, 64, 128, 256, 512, 1024, 2048, 4096), ("none", "int8", "nf4")):
        found += [Case(n, 0, bf16, bf16, first, "log8", 128, block, hyper=h) for n, h in ((20000, 0), (16384, 3))]
        found.append(Case(9000, 0, f32, f32, first, "log8", block, 256, hyper=2))
    for dtype, first in itertools.product((f32, bf16), ("none", "int8", "nf4")):
        for scale in (1e-12, 1e-18, 1e-25, 1e6, 1e18):
            found.append(Case(130 * 256, 130, dtype, dtype, first, scale=scale))
            found.append(Case(33280, 0, dtype, dtype, first, "log8", scale=scale, hyper=3))
    scaled = [case for case in found if case.hyper in (0, 3) and case.numel > 4096]
    found += [replace(case, exchanged=True, known=True) for case in scaled[::8]]
    return found


def check(cpu: Library, cuda: Library, steps: int, todo: list[Case] | None = None) -> int:
    """Steps every case on the CPU and three times on the GPU: alike, phase by phase, and without trusting any sum."""
    generator = torch.Generator().manual_seed(2)
    todo = todo or cases()
    params = random_params([case.numel for case in todo], [case.param for case in todo], generator)
    single = (Phase.REDUCE, Phase.MOMENTS, Phase.NORM, Phase.APPLY)
    runs = [("cpu", Run(cpu, todo, params, 0, True), (Phase.ALL_PHASES,)),
            ("cuda", Run(cuda, todo, params, 0, True), (Phase.ALL_PHASES,)),
            ("cuda again, by phases, unaligned scratch", Run(cuda, todo, params, 1, True), single),
            ("cuda, no sums carried over", Run(cuda, todo, params, 0, False), (Phase.ALL_PHASES,))]  # fmt: skip
    for step in range(1, steps + 1):
        grads = [gradient(case.numel, case.grad, case.scale, generator, step) for case in todo]
        if step % 7 == 0:
            for index, case in enumerate(todo):
                if case.exchanged:
                    new = (torch.randn(case.numel, generator=generator) * 0.1).to(TORCH[case.param]).view(torch.uint8)
                    for _, run, _ in runs:
                        run.arrays[index]["param"].copy_(new)
        for _, run, phases in runs:
            run.load(grads)
            run.step(run.batch(hypers_of(step), known=step > 1), phases)
            if run.library.device.type == "cuda":
                torch.cuda.synchronize()
    wrong = 0
    reference = runs[0][1]
    for label, run, _ in runs[1:]:
        for case, a, b in zip(todo, reference.arrays, run.arrays, strict=True):
            for name in ARRAYS:
                count = differences(a[name], b[name].cpu(), float_type(name, case.param, case.first, case.second))
                if count:
                    wrong += 1
                    if wrong <= 12:
                        print(f"DIFFERENT {label}: {name}: {count} of {a[name].numel()} bytes in {case}")
    elements = sum(case.numel for case in todo)
    print(f"adafactor: {len(todo)} tensors, {elements} elements, {steps} steps: {wrong} arrays differ", flush=True)
    return wrong
