"""What every optimizer shares: from ``step()`` to one backend call a device.

A subclass says how a group's options become formats (``_moment_specs``) and hyper-parameters (``_hyper``); this class
checks the inputs, keeps the plans, calls the backend and counts the steps. State is described in optim/state.py.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from a8multi.backend.base import Backend
from a8multi.backend.registry import backend_for
from a8multi.plan import Item, MomentSpec, StepPlan, matrix_shape
from a8multi.plan.step_plan import DTYPES, HYPER

from . import state as state_of

Group = dict[str, Any]


class LowBitOptimizer(torch.optim.Optimizer):
    """Base of the optimizers; not for use by itself."""

    # The registry's name of the operation, and the group options that decide how state is stored.
    _op: ClassVar[str]
    _format_options: ClassVar[tuple[str, ...]]

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        super().__init__(params, defaults)
        self._plans: dict[torch.device, tuple[Any, StepPlan]] = {}

    # --- For subclasses. ---

    def _check_group(self, group: Group) -> None:
        """Raise ValueError, naming the parameter, for an option that is not valid."""
        raise NotImplementedError

    def _moment_specs(self, group: Group, param: Tensor) -> tuple[MomentSpec | None, MomentSpec]:
        """How the moments of this parameter are to be stored."""
        raise NotImplementedError

    def _hyper(self, group: Group, lr: float, step: int, dtype: torch.dtype) -> dict[str, Any]:
        """Fields of ``a8_hyper`` for the parameters of this group and type at this step."""
        raise NotImplementedError

    # --- torch.optim.Optimizer. ---

    def __setstate__(self, saved: dict[str, Any]) -> None:
        super().__setstate__(saved)
        self._plans = {}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, as torch.optim.Optimizer does.

        Raises:
            ValueError: for an option that is not valid, or parameters that are complex, sparse or not floating.
        """
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._check_group(group)
            for param in group["params"]:
                _check_param(param)
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave, every tensor with the type it was saved in, on the parameter's device.

        Raises:
            StateFormatError: the state is not of this optimizer, or was saved with other formats; nothing is changed.
            ValueError: the groups differ in number or size.
        """
        # As the last of the pre-hooks, so that those of the user still see the whole; torch itself would cast the
        # codes to the parameter's type.
        kept: dict[int, dict[str, Any]] = {}

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            kept.update(state_of.checked(self, given, self._format_options, self._moment_specs))
            return {**given, "state": {}}

        def put(_: torch.optim.Optimizer) -> None:
            params = [param for group in self.param_groups for param in group["params"]]
            for index, saved in kept.items():
                self.state[params[index]] = saved
            self._plans.clear()

        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(put, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss; called with gradients enabled.
        Returns:
            What the closure returned, or None.
        Raises:
            ValueError: a gradient is sparse or of another shape or device, or a hyper-parameter is not valid. Nothing
                has been written then.
            BackendUnavailable: the backend that was asked for cannot run here.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for device, work in self._collect().items():
            self._step_device(device, work)
        return loss

    # --- One step. ---

    def _collect(self) -> dict[torch.device, _Work]:
        """Parameters with gradients by device, all checked: the next thing is to write."""
        works: dict[torch.device, _Work] = {}
        number = 0
        for group in self.param_groups:
            self._check_group(group)
            for param in group["params"]:
                grad = param.grad
                if grad is not None:
                    shape = param.shape
                    self._check_grad(param, grad, shape, number)
                    if 0 not in shape:
                        device = param.device
                        work = works.get(device)
                        if work is None:
                            work = works[device] = _Work()
                        # Not self.state[param]: a later error must leave no trace.
                        work.add(param, grad, shape, group, number, self.state.get(param, {}))
                number += 1
        return works

    def _check_grad(self, param: Tensor, grad: Tensor, shape: torch.Size, number: int) -> None:
        if grad.layout is not torch.strided:
            raise ValueError(
                f"gradient of {self._name(number)}: sparse gradients are not supported; build the embedding with "
                f"sparse=False"
            )
        if grad.dtype not in DTYPES or param.dtype not in DTYPES:
            raise ValueError(
                f"gradient of {self._name(number)}: {grad.dtype} for a parameter of {param.dtype} is not supported"
            )
        if grad.shape != shape or grad.device != param.device:
            raise ValueError(
                f"gradient of {self._name(number)}: shape {tuple(grad.shape)} on {grad.device} does not fit the "
                f"parameter's {tuple(shape)} on {param.device}"
            )

    def _name(self, number: int) -> str:
        """The parameter's name where the groups have names (torch >= 2.6), else its number."""
        first = 0
        for where, group in enumerate(self.param_groups):
            if number - first < len(group["params"]):
                names = group.get("param_names")
                return str(names[number - first]) if names else f"param_groups[{where}]['params'][{number - first}]"
            first += len(group["params"])
        raise IndexError(number)

    def _backend(self, device: torch.device) -> Backend:
        return backend_for(device, self._op)

    def _step_device(self, device: torch.device, work: _Work) -> None:
        backend = self._backend(device)
        run = getattr(backend, self._op)
        plan = self._plan(device, work)
        hypers = self._hypers(plan, work)
        if plan.items:
            run(plan, hypers)
        for index in work.strided:
            # One at a time: a contiguous copy of the parameter is the only temporary.
            param = work.params[index]
            item = self._item(work, index, param.contiguous(), work.grads[index].contiguous())
            item.hyper = work.rows[index]
            run(StepPlan(device, [item]), hypers)
            if item.param is not param:
                param.copy_(item.param)
        _bump_versions(work.params)
        for state, step in zip(work.states, work.steps, strict=True):
            state["step"] = step

    def _plan(self, device: torch.device, work: _Work) -> StepPlan:
        """The plan of the contiguous parameters: the last one if only values and gradients have changed."""
        # beta1: an optimizer may have no first moment.
        names = (*self._format_options, "beta1")
        options = [tuple([group.get(name) for name in names]) for group in self.param_groups]
        key = (options, work.numbers, work.shapes, work.strided)
        known, plan = self._plans.get(device, (None, None))
        if plan is not None and key == known and work.matches(plan):
            for item, grad in zip(plan.items, work.contiguous(work.grads), strict=True):
                item.grad = grad
            return plan
        strided = set(work.strided)
        items = [self._item(work, i, p, work.grads[i]) for i, p in enumerate(work.params) if i not in strided]
        plan = StepPlan(device, items)
        self._plans[device] = (key, plan)
        return plan

    def _item(self, work: _Work, index: int, param: Tensor, grad: Tensor) -> Item:
        """The parameter with its state, which is made or converted to the group's formats where it has to be."""
        owner, state, number = work.params[index], work.states[index], work.numbers[index]
        first_spec, second_spec = self._moment_specs(work.groups[index], owner)
        state_of.ensure(state, owner, first_spec, second_spec)
        self.state[owner] = state
        rows, cols = matrix_shape(owner.shape) if second_spec.format is None else (0, 0)
        first, first_block, second, second_block = state_of.tensors(state, first_spec, second_spec)
        return Item(
            param=param,
            grad=grad,
            state=state,
            first=first,
            first_block=first_block,
            second=second,
            second_block=second_block,
            first_spec=first_spec,
            second_spec=second_spec,
            rows=rows,
            cols=cols,
            hyper=0,
            noise_id=number,
            name=self._name(number),
        )

    def _hypers(self, plan: StepPlan, work: _Work) -> np.ndarray:
        """The hyper-parameter table: one row for each group, step and type that occurs."""
        rows: dict[tuple[int, int, torch.dtype], int] = {}
        records: list[dict[str, Any]] = []
        for param, group, state in zip(work.params, work.groups, work.states, strict=True):
            step = state.get("step", 0) + 1
            key = (id(group), step, param.dtype)
            row = rows.get(key)
            if row is None:
                row = rows[key] = len(records)
                seed = int(group["seed"])
                record = self._hyper(group, float(group["lr"]), step, param.dtype)
                record.update(step=step & 0xFFFFFFFF, seed_low=seed & 0xFFFFFFFF, seed_high=seed >> 32)
                records.append(record)
            work.steps.append(step)
            work.rows.append(row)
        hypers = np.zeros(len(records), HYPER)
        for at, record in zip(hypers, records, strict=True):
            for name, value in record.items():
                at[name] = value
        for item, row in zip(plan.items, work.contiguous(work.rows), strict=True):
            item.hyper = row
        return hypers


class _Work:
    """The parameters of one device at one step, as columns."""

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.shapes: list[torch.Size] = []
        self.groups: list[Group] = []
        self.numbers: list[int] = []
        self.states: list[dict[str, Any]] = []
        self.strided: list[int] = []  # indices of those that are not contiguous
        self.steps: list[int] = []
        self.rows: list[int] = []

    def add(
        self, param: Tensor, grad: Tensor, shape: torch.Size, group: Group, number: int, state: dict[str, Any]
    ) -> None:
        if not (param.is_contiguous() and grad.is_contiguous()):
            self.strided.append(len(self.params))
        self.params.append(param)
        self.grads.append(grad)
        self.shapes.append(shape)
        self.groups.append(group)
        self.numbers.append(number)
        self.states.append(state)

    def contiguous(self, column: list[Any]) -> list[Any]:
        """The entries of a column that belong to contiguous parameters."""
        if not self.strided:
            return column
        strided = set(self.strided)
        return [value for i, value in enumerate(column) if i not in strided]

    def matches(self, plan: StepPlan) -> bool:
        """Whether the plan was made for these very parameters, and their state still holds the tensors it knows."""
        params, states = self.contiguous(self.params), self.contiguous(self.states)
        return all(
            item.param is param and item.state is state and state_of.holds(item)
            for item, param, state in zip(plan.items, params, states, strict=True)
        )


def _check_param(param: Tensor) -> None:
    if param.is_complex():
        raise ValueError("params: complex parameters are not supported; optimize torch.view_as_real(param) instead")
    if param.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"params: a parameter of {param.dtype} is not supported, only {known}")


def _bump_versions(params: list[Tensor]) -> None:
    # Kernels write through raw pointers: without this autograd would not notice a parameter saved for backward.
    try:
        torch.autograd.graph.increment_version(params)
    except TypeError:  # torch < 2.6 takes one tensor
        for param in params:
            torch.autograd.graph.increment_version(param)


# --- Checks that the optimizers share. All name the parameter. ---


def check_number(name: str, value: Any, least: float, below: float = math.inf, *, least_open: bool = False) -> None:
    """Raise ValueError unless ``value`` is a finite number in [least, below)."""
    number = float(value) if isinstance(value, (numbers.Real, Tensor)) and not isinstance(value, bool) else math.nan
    if not (least <= number < below) or (least_open and number == least):
        bounds = f"{'>' if least_open else '>='} {least:g}" + ("" if below == math.inf else f" and < {below:g}")
        raise ValueError(f"{name} must be a finite number {bounds}, not {value!r}")


def check_lr(lr: Any) -> None:
    """Raise ValueError unless ``lr`` is a finite number >= 0 or a tensor of one such element."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, not of shape {tuple(lr.shape)}")
    check_number("lr", lr, 0.0)


def check_seed(seed: Any) -> None:
    """Raise ValueError unless ``seed`` is an integer from 0 to 2**64 - 1."""
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, not {seed!r}")
