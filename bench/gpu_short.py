"""Two steps of every kernel, small enough for compute-sanitizer.

    compute-sanitizer --tool memcheck|racecheck|initcheck --error-exitcode 9 python bench/gpu_short.py

Needs a8multi, installed or on PYTHONPATH, with its CUDA library; bench/gpu.sh runs all three tools. Lengths are at the
edges of a vector, a block, a chunk and a tile, so that a step past an end is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

import a8multi
from a8multi import functional

SHAPES = ((65, 300), (513, 1032), (3, 8193), (16385,), (4097,), (129,), (4, 33, 5), (1,))
# Where chunks are many, a block of threads takes several: of one tensor, of two, and one that is cut off in an eight.
MANY_CHUNKS = ((34_000_000,), (20_000,), (30_003,))
FIRST = ("int8", "nf4", "bf16", "fp32")
CASES: list[tuple[str, dict[str, Any]]] = [
    *[("AdamW8bit", {"first_moment": f, "second_moment": s}) for f, s in product(FIRST, ("log8", "fp32"))],
    ("AdamW8bit", {"skip_nonfinite": True}),
    ("Lion8bit", {}),
    ("Lion8bit", {"first_moment": "nf4"}),
    ("SGD8bit", {"momentum": 0.9, "first_moment": "nf4"}),
    ("LARS8bit", {"momentum": 0.9, "first_moment": "nf4"}),
    ("RMSprop8bit", {}),
    ("RMSprop8bit", {"momentum": 0.9, "centered": True}),
    ("SGD8bit", {}),
    ("SGD8bit", {"momentum": 0.9}),
    ("Adagrad8bit", {}),
    ("AdEMAMix8bit", {}),
    ("LAMB8bit", {}),
    ("LARS8bit", {"momentum": 0.9}),
    *[("Adafactor8bit", {"beta1": 0.9, "first_moment": f, "factored": b}) for f, b in product(FIRST, (True, False))],
    *[("Adafactor8bit", {"factored": b, "enable_fira_for_adafactor": True}) for b in (True, False)],
    ("Adafactor8bit", {"beta1": 0.9, "beta3": 0.999, "came_order": "adafactor8bit"}),
    *[("CAME8bit", {"first_moment": f}) for f in FIRST[:3]],
    ("APOLLO8bit", {"rank": 2}),
]


def params_of(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, skew: int) -> list[torch.nn.Parameter]:
    """Random parameters with gradients; skew: elements by which both miss the allocator's alignment."""

    def made(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        numel = torch.Size(shape).numel()
        return (torch.randn(numel + skew, device="cuda") * scale).to(dtype)[skew:].view(shape)

    params = [torch.nn.Parameter(made(shape, 0.02)) for shape in shapes]
    for param in params:
        param.grad = made(tuple(param.shape), 1e-3)
    return params


def step(name: str, options: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
    build: Callable[..., Any] = getattr(a8multi, name)
    optimizer = build(params, stochastic_rounding_writeback=params[0].dtype is not torch.float32, **options)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()


def main() -> None:
    for (name, options), (dtype, skew) in product(CASES, ((torch.float32, 1), (torch.float32, 0), (torch.bfloat16, 0))):
        params = params_of(SHAPES, dtype, skew)
        if name == "APOLLO8bit":
            params = [param for param in params if param.ndim == 2]
        step(name, options, params)
    for block_size in (128, 2048):
        options = {"factored": False, "block_size": block_size}
        step("Adafactor8bit", options, params_of(MANY_CHUNKS, torch.bfloat16, 0))
    for fmt, dtype in product(("int8", "nf4", "log8"), (torch.float32, torch.bfloat16)):
        values = torch.rand(40001, device="cuda").to(dtype)
        codes, blocks = functional.quantize_blockwise(values, fmt)
        functional.dequantize_blockwise(codes, blocks, fmt, shape=tuple(values.shape), dtype=dtype)
    torch.cuda.synchronize()
    print(f"{len(CASES)} optimizers stepped on {a8multi.backend_for('cuda:0', 'adafactor').name}")


if __name__ == "__main__":
    main()
