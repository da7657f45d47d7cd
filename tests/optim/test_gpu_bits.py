"""The compiled CUDA library and the CuPy kernels leave the bytes of the CPU library, every optimizer but APOLLO, whose
products are torch's. Needs a GPU.

bench/gpu_check.py compares the two libraries beneath the optimizers, with hundreds of tensors at once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import BackendCase
from optim.helpers import differences, gradients, parameters, snapshot
from optim.test_same_bits import CASES, RULES

import a8multi

STEPS = 100
# Edges of a vector, a block, a chunk and a tile; one row, one column, four dimensions.
SHAPES = ((65, 300), (513, 1032), (130, 3000), (3, 8193), (16385,), (4097,), (129,), (4, 33, 5), (1, 4100), (4100, 1),
          (8, 4, 3, 3), (1,), ())  # fmt: skip
CAME: dict[str, tuple[str, dict[str, Any]]] = {
    "came": ("CAME8bit", {"weight_decay": 0.1}),
    "came nf4": ("CAME8bit", {"first_moment": "nf4", "enable_fira": True}),
    "came of adafactor8bit": ("Adafactor8bit", {"beta1": 0.9, "beta3": 0.99, "came_order": "adafactor8bit"}),
    "limiter": ("Adafactor8bit", {"enable_fira_for_adafactor": True}),
    "full limiter": ("Adafactor8bit", {"enable_fira_for_adafactor": True, "factored": False, "beta1": 0.9}),
    "skip": ("AdamW8bit", {"skip_nonfinite": True}),
    "skip factored": ("Adafactor8bit", {"skip_nonfinite": True}),
    "sgd plain": ("SGD8bit", {}),
    "sgd nf4": ("SGD8bit", {"momentum": 0.9, "first_moment": "nf4"}),
    "lion nf4": ("Lion8bit", {"first_moment": "nf4"}),
    "lars nf4": ("LARS8bit", {"momentum": 0.9, "first_moment": "nf4"}),
    "ademamix": ("AdEMAMix8bit", {"weight_decay": 0.1}),
}
ALL = {**CASES, **RULES, **CAME}


def _trained(device: str, case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> list[dict[str, Any]]:
    params = parameters(SHAPES, dtype, device)
    write_back = dtype is not torch.float32
    optimizer = getattr(a8multi, case[0])(params, lr=1e-2, stochastic_rounding_writeback=write_back, **case[1])
    sets = [gradients(params, k) for k in range(4)]
    if case[1].get("skip_nonfinite"):
        sets[2][3].view(-1)[77] = float("inf")
    for step in range(STEPS):
        for param, grad in zip(params, sets[step % 4], strict=True):
            param.grad = grad
        optimizer.step()
    found = snapshot(optimizer, params)
    for held, param in zip(found, params, strict=True):
        held["step"] = int(optimizer.state[param]["step"])
    return found


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cupy")], indirect=True
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL.keys())
def test_bits_of_the_cpu_library(backend: BackendCase, case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    found = _trained(backend.device, case, dtype)
    with a8multi.use_backend("cpu"):
        expected = _trained("cpu", case, dtype)
    assert not differences(found, expected)
    assert not differences(found, _trained(backend.device, case, dtype)), "from run to run"
