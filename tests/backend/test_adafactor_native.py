"""Adafactor with an element-wise second moment in the compiled library, against numpy to the bit: with float32 state
numpy's float32 is the same arithmetic, and every sum that clips or scales the update shows in it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from a8multi.backend.native import NativeBackend
from a8multi.loader import geometry
from a8multi.loader.structs import Flag, ScheduleRule
from a8multi.plan import Schedule

from .plans import canonical_sum, hypers_of, plan_of, run, spread

# Within a line and a round, at the end of one, and several chunks, the last of them cut off anywhere.
SIZES = (1, 257, 2048, 2049, 16384, 16385, 40003, 150000)
ONE = np.float32(1)


def dealt_sum(values: np.ndarray) -> np.ndarray:
    """Of one chunk: the lines of 256 elements go to eight sums in turn, which are folded in halves."""
    sizes = geometry()
    lanes, dealt = sizes["A8_LANES"], sizes["A8_DEALT"]
    padded = np.zeros(-(-len(values) // (lanes * dealt)) * lanes * dealt, np.float32)
    padded[: len(values)] = values
    sums = [canonical_sum(line.reshape(-1)) for line in padded.reshape(-1, dealt, lanes).swapaxes(0, 1)]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True)]
    return sums[0]


def squares(values: np.ndarray) -> np.ndarray:
    """The sum over a tensor of what are squares already."""
    size = geometry()["A8_CHUNK"]
    return canonical_sum(np.array([dealt_sum(values[k : k + size]) for k in range(0, len(values), size)]))


# The last eps is one whose bound has no square in float32.
@pytest.mark.parametrize("eps", [1e-3, 1e-8, 1e-30])
@pytest.mark.parametrize("momentum", [False, True])
def test_float32_state_is_numpys(momentum: bool, eps: float, native: NativeBackend) -> None:
    params = [spread((n,), i) for i, n in enumerate(SIZES)]
    exact = [param.numpy().copy() for param in params]
    plan = plan_of(params, {"first": "fp32", "second": "fp32"} if momentum else {"second": "fp32"})
    m, v = ([np.zeros(n, np.float32) for n in SIZES] for _ in range(2))
    fields = {"lr": 0.01, "weight_decay": 0.1, "eps": eps, "eps2": 1e-3, "clip": 0.5, "bias1": 1.0, "bias2": 3e38}
    for step in range(3):
        grads = [spread((n,), 100 * step + i).clamp_(-100, 100) for i, n in enumerate(SIZES)]
        grads[-1][0] = 3e19  # whose square overflows: it counts for nothing
        h = hypers_of(step + 1, Schedule(ScheduleRule(0)), beta1=0.9, beta2=0.99, **fields)
        h["flags"] = int(Flag.SCALE_PARAMETER)
        run(native, "adafactor", plan, grads, h)
        (h,) = h
        for i, grad in enumerate(grads):
            p, g, count = exact[i], grad.numpy(), np.float32(SIZES[i])
            m[i] = h["beta1"] * m[i] + h["one_minus_beta1"] * g if momentum else g
            bound = ONE / h["eps"]
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                v[i] = h["beta2"] * v[i] + h["one_minus_beta2"] * (g * g)
                root = np.minimum(ONE / np.sqrt(v[i]), bound)
                without_root = m[i] * np.minimum(ONE / v[i], bound * bound) * m[i]
            update_squares = (m[i] * root) ** 2 if eps == 1e-30 else without_root
            alpha = np.maximum(np.sqrt(squares(p * p) / count), h["eps2"]) * h["lr"]
            excess = np.maximum(np.sqrt(squares(update_squares) / count) / h["clip"], ONE)
            exact[i] = p * (ONE - h["lr"] * h["weight_decay"]) - alpha / excess * (m[i] * root)
    for size, param, wanted in zip(SIZES, params, exact, strict=True):
        assert np.isfinite(wanted).all()
        assert torch.equal(param, torch.from_numpy(wanted)), f"{size} elements"
