"""The self-test of `a8multi info`: two steps of each 8-bit optimizer on a device, against the plain PyTorch backend.

The first step shows the update and the encoding of the state, the second one the decoding. The judge is the `torch`
backend because it needs no compiled code; tests/ judge every backend against float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

LR = 1e-2
STEPS = 2
# A matrix with a partial last block, a vector above the size that is quantised, one below.
SHAPES = ((67, 130), (5000,), (9,))
# Backends may round a code differently by one, rarely. With gradients of one magnitude (below) that moves a parameter
# by about a hundredth of a step; a wrong formula or a misread block moves it by a whole one.
TOLERANCE = 0.05 * LR
OPS = {"AdamW8bit": "elementwise", "Adafactor8bit": "adafactor"}


@dataclass(frozen=True)
class SelfTest:
    """One optimizer on one device.

    Attributes:
        backend: the one that was chosen and ran; None if the choice itself failed.
        max_difference: largest absolute difference of a parameter from the torch backend's; None if it did not run.
        moved: largest absolute change of a parameter, to compare with.
        error: why it did not run.
    """

    device: str
    optimizer: str
    backend: str | None
    max_difference: float | None
    moved: float | None
    tolerance: float
    passed: bool
    error: str | None = None


def self_test(device: str, optimizer: str) -> SelfTest:
    """Runs both backends and compares. Never raises: a failure is what this is here to report."""
    import a8multi

    backend = None
    try:
        backend = str(a8multi.backend_for(torch.device(device), op=OPS[optimizer]).name)
        start, _ = _tensors(device)
        chosen = _steps(device, optimizer)
        with a8multi.use_backend("torch"):
            reference = _steps(device, optimizer)
    except Exception as error:
        return SelfTest(device, optimizer, backend, None, None, TOLERANCE, False, f"{type(error).__name__}: {error}")
    difference = _largest_difference(chosen, reference)
    moved = _largest_difference(chosen, start)
    if not (math.isfinite(difference) and math.isfinite(moved)):
        # NaN is no JSON, and says less than these words.
        return SelfTest(device, optimizer, backend, None, None, TOLERANCE, False, "the parameters are not finite")
    # An optimizer that does nothing might agree with a reference that does nothing.
    passed = difference <= TOLERANCE and moved > TOLERANCE
    return SelfTest(device, optimizer, backend, difference, moved, TOLERANCE, passed)


def _steps(device: str, name: str) -> list[torch.Tensor]:
    """The parameters after STEPS steps."""
    import a8multi

    start, gradients = _tensors(device)
    parameters = [torch.nn.Parameter(tensor) for tensor in start]
    build: type[Optimizer] = getattr(a8multi, name)
    # Adafactor's step is lr times the RMS of the parameter, which is about 1 here; without it two rules, two scales.
    optimizer = build(parameters, lr=LR)  # type: ignore[call-arg]
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if step % 2 == 0 else gradient.flip(0)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def _tensors(device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters N(0, 1) and gradients of magnitude 0.5 to 1.5 and random sign, drawn on the CPU."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [
        (torch.rand(shape, generator=generator) + 0.5) * (1.0 - 2.0 * torch.randint(2, shape, generator=generator))
        for shape in SHAPES
    ]
    return [one.to(device) for one in parameters], [one.to(device) for one in gradients]


def _largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    # torch's max() keeps a NaN, so that a broken backend cannot pass by it.
    return float(torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max())
