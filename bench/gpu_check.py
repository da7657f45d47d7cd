"""Compares the CUDA library with the CPU library byte for byte, beneath the optimizers.

Receives paths of both libraries; exits non-zero when a byte differs. Run by bench/gpu.sh, which builds them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass

import gpu_adafactor
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

from loader.structs import Batch, BatchHint, Chunk, Codec, Dtype, Flag, Format, Hyper, Phase, Tensor


@dataclass
class Case:
    """One tensor to step: its length, types and formats. skew: elements (of quantised state, bytes) by which
    every array misses alignment."""

    numel: int
    param: Dtype = Dtype.F32
    grad: Dtype = Dtype.F32
    first: str = "int8"
    second: str = "log8"
    first_block: int = 128
    second_block: int = 128
    skew: int = 0
    hyper: int = 0
    scale: float = 1e-3

    def sizes(self) -> dict[str, int]:
        """Bytes of every array."""

        def blocks(size: int) -> int:
            return -(-self.numel // size)

        return {
            "param": self.numel * TORCH[self.param].itemsize,
            "grad": self.numel * TORCH[self.grad].itemsize,
            "first": moment_bytes(self.first, self.numel),
            "first_block": 4 * blocks(self.first_block) if self.first in ("int8", "nf4") else 0,
            "second": moment_bytes(self.second, self.numel),
            "second_block": 4 * blocks(self.second_block) if self.second == "log8" else 0,
        }


class Run:
    """The tensors of some cases in one library's memory, with the tables of a step. hints: of its batches."""

    def __init__(self, library: Library, cases: list[Case], params: list[torch.Tensor], hints: int) -> None:
        self.library, self.cases, self.hints = library, cases, hints
        self.arrays: list[dict[str, torch.Tensor]] = []
        for case, param in zip(cases, params, strict=True):
            arrays = {}
            for name, size in case.sizes().items():
                unit = {"param": TORCH[case.param].itemsize, "grad": TORCH[case.grad].itemsize}
                skew = case.skew * unit.get(name, 4 if name.endswith("block") else 1)
                arrays[name] = torch.zeros(size + 64, dtype=torch.uint8, device=library.device)[skew : skew + size]
            arrays["param"].copy_(param.view(torch.uint8))
            self.arrays.append(arrays)
        self.tensors = (Tensor * len(cases))()
        chunks = []
        for index, (case, arrays) in enumerate(zip(cases, self.arrays, strict=True)):
            count = -(-case.numel // CHUNK)
            self.tensors[index] = Tensor(
                **{name: array.data_ptr() if array.numel() else None for name, array in arrays.items()},
                numel=case.numel, chunk_at=len(chunks), chunks=count, hyper=case.hyper, noise_id=index,
                first_block_size=case.first_block, second_block_size=case.second_block, param_dtype=case.param,
                grad_dtype=case.grad, first_format=FORMATS[case.first], second_format=FORMATS[case.second],
            )  # fmt: skip
            chunks += [(index, part) for part in range(count)]
        self.tensor_table = library.upload(self.tensors)
        self.chunk_table = library.upload((Chunk * len(chunks))(*chunks))
        self.chunk_count = len(chunks)

    def batch(self, hypers: list[Hyper]) -> Batch:
        self.hyper_table = self.library.upload((Hyper * len(hypers))(*hypers))
        return Batch(
            tensors=self.tensor_table.data_ptr(),
            chunks=self.chunk_table.data_ptr(),
            hypers=self.hyper_table.data_ptr(),
            tensor_count=len(self.cases),
            chunk_count=self.chunk_count,
            hyper_count=len(hypers),
            hints=self.hints,
        )

    def step(self, hypers: list[Hyper], grads: list[torch.Tensor]) -> None:
        for arrays, grad in zip(self.arrays, grads, strict=True):
            arrays["grad"].copy_(grad.view(torch.uint8))
        self.library.run("a8_elementwise", self.batch(hypers), int(Phase.ALL_PHASES))


def hyper(
    step: int,
    lr: float = 1e-3,
    wd: float = 1e-2,
    eps: float = 1e-8,
    beta2: float = 0.999,
    flags: int = Flag.STOCHASTIC_STATE,
) -> Hyper:
    return Hyper(
        lr=lr, beta1=0.9, beta2=beta2, one_minus_beta1=1 - 0.9, one_minus_beta2=1 - beta2, eps=eps, weight_decay=wd,
        bias1=1 / (1 - 0.9**step), bias2=1 / (1 - beta2**step) ** 0.5, flags=flags,
        seed_low=12345, seed_high=678, step=step,
    )  # fmt: skip


def hypers_of(step: int) -> list[Hyper]:
    """Ordinary, then every flag, then rules outside the ranges of the fast path."""
    state, write = Flag.STOCHASTIC_STATE, Flag.STOCHASTIC_WRITE
    return [
        hyper(step),
        hyper(step, flags=state | write | Flag.MAXIMIZE),
        hyper(step, flags=Flag.L2_DECAY, wd=0.1),
        hyper(step, flags=state | write | Flag.L2_DECAY | Flag.MAXIMIZE, wd=0.1),
        hyper(step, eps=0.0),
        hyper(step, eps=1e-30, lr=3.0, beta2=0.9),
        hyper(step, lr=0.0, flags=write),
    ]


def cases() -> list[Case]:
    f32, bf16, f16 = Dtype.F32, Dtype.BF16, Dtype.F16
    sizes = (1, 2, 31, 33, 127, 128, 129, 256, 257, 4095, 4097, 16383, 16384, 16385, 32768, 65536, 70001)
    found = [Case(n, p, p, hyper=0) for n in sizes for p in (f32, bf16, f16)]
    for p, g in itertools.product((f32, bf16, f16), repeat=2):
        found += [Case(20000 + 480, p, g, hyper=h, skew=s) for h in range(7) for s in (0, 1)]
    for first, second in itertools.product(("int8", "nf4", "bf16", "f32"), ("log8", "f32")):
        found += [Case(n, p, p, first, second, hyper=h) for n in (1, 777, 16640) for p in (f32, bf16) for h in (0, 3)]
        found += [Case(n, bf16, f32, first, second, b, b) for n in (5000, 16384) for b in (32, 64, 256, 1024, 4096)]
        found += [Case(9999, bf16, bf16, first, second, a, b) for a, b in ((32, 4096), (2048, 64), (128, 256))]
    # Scales that leave the fast path's ranges in some blocks, and gradients that overflow or are lost.
    for p, scale in itertools.product((f32, bf16), (1e-12, 1e-18, 1e-25, 1e-36, 1e6, 1e18)):
        found += [Case(16384, p, p, scale=scale, hyper=h) for h in (0, 2)]
    return found


def check_adam(cpu: Library, cuda: Library, steps: int) -> int:
    generator = torch.Generator().manual_seed(0)
    todo = cases()
    params = random_params([case.numel for case in todo], [case.param for case in todo], generator)
    # Each hint chooses another kernel.
    runs = [
        Run(library, todo, params, hints) for library, hints in ((cpu, 0), (cuda, 0), (cuda, BatchHint.OTHER_FORMATS))
    ]
    for step in range(1, steps + 1):
        grads = [gradient(case.numel, case.grad, case.scale, generator, step) for case in todo]
        for run in runs:
            run.step(hypers_of(step), grads)
        torch.cuda.synchronize()
    wrong = 0
    pairs = [pair for run in runs[1:] for pair in zip(todo, runs[0].arrays, run.arrays, strict=True)]
    for case, a, b in pairs:
        for name in ARRAYS:
            count = differences(a[name], b[name].cpu(), float_type(name, case.param, case.first, case.second))
            if count:
                wrong += 1
                if wrong <= 12:
                    print(f"DIFFERENT {name}: {count} of {a[name].numel()} bytes in {case}")
    elements = sum(case.numel for case in todo)
    print(f"adam: {len(todo)} tensors, {elements} elements, {steps} steps: {wrong} arrays differ", flush=True)
    return wrong


def check_codec(cpu: Library, cuda: Library) -> int:
    generator = torch.Generator().manual_seed(1)
    wrong = count = 0
    formats = (Format.INT8, Format.NF4, Format.LOG8)
    for fmt, dtype, block, n, stochastic in itertools.product(
        formats, Dtype, (32, 128, 4096), (1, 127, 4097, 40001), (0, 1)
    ):
        x = torch.randn(n, generator=generator) * torch.exp(4 * torch.randn(n, generator=generator))
        x = (x * x if fmt is Format.LOG8 else x).to(TORCH[dtype])
        results = []
        for library in (cpu, cuda):
            values, back = x.to(library.device), torch.zeros(n, dtype=TORCH[dtype], device=library.device)
            codes = torch.zeros((n + 1) // 2 if fmt is Format.NF4 else n, dtype=torch.uint8, device=library.device)
            headers = torch.zeros(-(-n // block), dtype=torch.int32, device=library.device)
            for entry, array in (("a8_quantize", values), ("a8_dequantize", back)):
                library.run(entry, Codec(
                    values=array.data_ptr(), codes=codes.data_ptr(), blocks=headers.data_ptr(), numel=n,
                    block_size=block, stochastic=stochastic, seed_low=7, seed_high=8, dtype=dtype, format=fmt,
                ))  # fmt: skip
            results.append([t.cpu().view(torch.uint8) for t in (codes, headers, back)])
        count += 1
        if any(not torch.equal(a, b) for a, b in zip(*results, strict=True)):
            wrong += 1
            print(f"DIFFERENT codec {fmt!r} {dtype!r} block {block} n {n} stochastic {stochastic}")
    print(f"codec: {count} cases: {wrong} differ", flush=True)
    return wrong


def check_large(cuda: Library) -> int:
    """More than 2^31 elements: the last block of one array must be quantised as it is alone."""
    n, tail = 2**31 + 128, 128
    x = torch.zeros(n, dtype=torch.bfloat16, device=cuda.device)
    x[-tail:] = torch.randn(tail, device=cuda.device).bfloat16()
    results = []
    for values in (x, x[-tail:].clone()):
        codes = torch.full((values.numel(),), 9, dtype=torch.uint8, device=cuda.device)
        headers = torch.zeros(values.numel() // 128, dtype=torch.int32, device=cuda.device)
        cuda.run("a8_quantize", Codec(
            values=values.data_ptr(), codes=codes.data_ptr(), blocks=headers.data_ptr(), numel=values.numel(),
            block_size=128, dtype=Dtype.BF16, format=Format.INT8,
        ))  # fmt: skip
        results.append((codes[-tail:].cpu(), headers[-1:].cpu(), int(codes[:-tail].count_nonzero())))
    same = torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    wrong = not same or results[0][2] != 0
    print(f"large: {n} elements: {'WRONG' if wrong else 'ok'}", flush=True)
    return int(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", required=True, help="liba8multi_cpu")
    parser.add_argument("--cuda", required=True, help="liba8multi_cuda")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rule", choices=("adamw", "adafactor"), help="check this one only")
    options = parser.parse_args()
    cpu, cuda = Library(options.cpu, "cpu"), Library(options.cuda, "cuda:0")
    built = f"library {cuda.info.version.decode()} for {cuda.info.architectures.decode()}"
    print(torch.cuda.get_device_name(0), "torch", torch.__version__, built)
    wrong = 0
    if options.rule != "adafactor":
        wrong += check_codec(cpu, cuda)
        wrong += check_adam(cpu, cuda, options.steps)
        wrong += check_large(cuda)
    if options.rule != "adamw":
        wrong += gpu_adafactor.check(cpu, cuda, options.steps)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
