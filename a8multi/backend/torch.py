"""The ``torch`` backend: the updates in plain torch operations, on any device. The readable reference.

The formulas are those of native/include/a8, one operation at a time in their order, on slices of a tensor so that
temporaries stay small: torch_rules.py, torch_adafactor.py and, for the formats, torch_formats.py. On x86 CPUs the
element-wise rules and the formats give the same bits as the compiled library, for every format and dtype, subnormals
included (tests/backend/test_torch.py); a NaN may differ from a NaN. Adafactor, LAMB and LARS differ by the order in
which sums are added. Nothing is read back to the host, so nothing synchronises, unless step counters or learning rates
live there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from a8multi.plan import Item, Live, StepPlan
from a8multi.plan.schedule import cannot_be_captured
from a8multi.quant.formats import StateFormat

from . import torch_adafactor, torch_rules, torch_step
from . import torch_formats as formats
from .base import BackendReport
from .torch_step import Hyper, slices


class TorchBackend:
    """Every operation on every device, with nothing compiled. Methods as in ``Backend``."""

    name = "torch"

    def report(self) -> BackendReport:
        ops = ("codec", "elementwise", "adafactor")
        return BackendReport(self.name, True, "", None, str(torch.__version__), "plain torch operations", ops)

    @torch.no_grad()
    def elementwise(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        def update(item: Item, grad: Tensor, hyper: Hyper, skip: Tensor | None) -> None:
            torch_rules.update(item, grad, hyper, plan.rule, skip)

        _run(update, plan, hypers, live)

    @torch.no_grad()
    def adafactor(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        _run(torch_adafactor.update, plan, hypers, live)

    @torch.no_grad()
    def sums(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> list[tuple[Tensor, Tensor]]:
        for item, grad, places in zip(plan.items, plan.grads, plan.factors, strict=True):
            for place, sums in zip(places, torch_adafactor.sums(item, grad), strict=True):
                place.copy_(sums)
        return plan.factors

    @torch.no_grad()
    def adafactor_scaled(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        of_item = {id(item): pair for item, pair in zip(plan.items, plan.factors, strict=True)}

        def update(item: Item, grad: Tensor, hyper: Hyper, skip: Tensor | None) -> None:
            torch_adafactor.update(item, grad, hyper, skip, of_item[id(item)])

        _run(update, plan, hypers, live)

    @torch.no_grad()
    def screen(
        self, plan: StepPlan, scale: Tensor | None, found: Tensor, hypers: np.ndarray, live: Live | None = None
    ) -> None:
        for grad in plan.grads:
            found.masked_fill_(~torch_step.screened(grad, scale), 1.0)

    @torch.no_grad()
    def draw(self, matrix: Tensor, taken: Tensor, before: Tensor | None, gap: int, seed: int, noise_id: int) -> None:
        if matrix.is_cuda and torch.cuda.is_current_stream_capturing():
            raise cannot_be_captured()
        interval = int(taken) // gap
        if before is None or int(before) // gap != interval:
            drawn = formats.random_integers(seed, interval, noise_id, matrix.numel(), matrix.device)
            matrix.copy_(drawn.view(matrix.shape))

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
        phase = formats.phase_key(seed, 0, 0) if stochastic and fmt.name == "log8" else None
        for start, stop in slices(values.numel()):
            formats.encode(fmt, formats.load(values, start, stop), codes, blocks, block_size, start, phase)

    @torch.no_grad()
    def dequantize(self, codes: Tensor, blocks: Tensor, values: Tensor, fmt: StateFormat, block_size: int) -> None:
        for start, stop in slices(values.numel()):
            formats.store(formats.decode(fmt, codes, blocks, block_size, start, stop), values, start)


def _run(
    update: Callable[[Item, Tensor, Hyper, Tensor | None], None], plan: StepPlan, hypers: np.ndarray, live: Live | None
) -> None:
    """``update`` for every parameter that has elements, unless the step is to be skipped."""
    # Before the counters are read, for a step that is skipped is not counted.
    known, skip = _skips(plan, live)
    if known:
        return
    hypers = live.read(hypers) if live is not None else hypers
    for item, grad in zip(plan.items, plan.grads, strict=True):
        if item.param.numel():
            update(item, grad, Hyper.of(hypers[item.hyper]), skip)


def _skips(plan: StepPlan, live: Live | None) -> tuple[bool, Tensor | None]:
    """Whether the step is known to be skipped, and otherwise the bool 0-d that says so on the device.

    It is read where that costs nothing: on a CPU, and where counters on the device are read for the step anyway.
    """
    if plan.skip is None:
        return False, None
    if plan.device.type == "cpu" or (live is not None and not live.capturing):
        return bool(plan.skip), None
    return False, plan.skip != 0
