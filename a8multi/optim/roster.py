"""What a step has found and checked, so that the next one compares instead of checking again.

A step of an unchanged model should cost well under a microsecond a parameter. So ``Roster.holds`` looks at whole lists,
by identity, and anything that differs sends the optimizer back to the full survey that makes a new roster, with its
error messages. Nothing here judges whether a value is valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from a8multi.plan import Moments, StepPlan, is_plain

from .reader import TensorReader, UnreadableError, check_values
from .watched import WatchedState

_COPIED = 16 << 20  # bytes of what is not plain, at a time

Group = dict[str, Any]
State = dict[str, Any]


class Work:
    """The parameters of one device that have gradients, as columns.

    Attributes:
        params, groups, numbers, states: the parameters, and each one's group, number in the optimizer and state.
        grads: the gradients, while a step runs; else empty, so that their memory is free for the next backward.
        strided: indices of the parameters that are not ``is_plain``, or their gradients are not.
        projected: indices of the parameters whose gradients are projected, which have plans of their own.
        rows: for each parameter its row in the table of hyper-parameters.
        row_keys: for each row its group, the steps that its parameters have taken and their type. Parameters whose
            steps are counted on the device have a row each, and their counter in the place of a number.
        outlines: what hypers.py keeps of the table of hyper-parameters while no option changes.
        moments: of each parameter, as its group wants it stored.
        plan: of all but those two; set when everything has been checked.
        projection, drawn: the plans of the projected ones, and their random matrices; None: there are none.
        projecting: while a step runs, what the projected ones take for it.
        native: whether another backend than torch's updates them, so that a native library may read them too.
    """

    plan: StepPlan
    projection: Any = None
    drawn: Any = None
    projecting: Any = None
    native = False
    _reader: TensorReader | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.groups: list[Group] = []
        self.numbers: list[int] = []
        self.states: list[State] = []
        self.moments: list[Moments] = []
        self.strided: list[int] = []
        self.projected: list[int] = []
        self.rows: list[int] = []
        self.row_keys: list[tuple[Group, int | Tensor, torch.dtype]] = []
        self.outlines: dict[Any, Any] = {}

    def add(
        self, param: Tensor, grad: Tensor, group: Group, number: int, state: State, projected: bool = False
    ) -> None:
        if projected:
            self.projected.append(len(self.params))
        elif not (is_plain(param) and is_plain(grad)):
            self.strided.append(len(self.params))
        self.params.append(param)
        self.grads.append(grad)
        self.groups.append(group)
        self.numbers.append(number)
        self.states.append(state)

    def strided_waves(self) -> list[list[int]]:
        """``strided`` in parts that are copied together: of no more bytes than _COPIED, or of one that is larger."""
        waves: list[list[int]] = []
        room = 0
        for i in self.strided:
            size = sum(one.nbytes for one in (self.params[i], self.grads[i]) if not is_plain(one))
            room -= size
            if room < 0 or not waves:
                waves.append([])
                room = _COPIED - size
            waves[-1].append(i)
        return waves

    def planned(self, column: list[Any]) -> list[Any]:
        """The entries of a column that belong to the plan."""
        if not (self.strided or self.projected):
            return column
        apart = {*self.strided, *self.projected}
        return [value for i, value in enumerate(column) if i not in apart]

    def assign_rows(self) -> None:
        """One row for each group, step and type that occurs. Parameters of a row stay together while all take steps."""
        known: dict[tuple[int, int, torch.dtype], int] = {}
        for param, group, state in zip(self.params, self.groups, self.states, strict=True):
            step = state.get("step", 0)
            if isinstance(step, Tensor):
                self.rows.append(len(self.row_keys))
                self.row_keys.append((group, step, param.dtype))
                continue
            key = (id(group), step, param.dtype)
            if key not in known:
                known[key] = len(self.row_keys)
                self.row_keys.append((group, step, param.dtype))
            self.rows.append(known[key])

    @property
    def addresses(self) -> np.ndarray | None:
        """Of the plan's parameters and gradients, uint64 [2, items]; None: not read, or not of the plan's alone."""
        if self._reader is None or self.strided or self.projected:
            return None
        return self._reader.addresses

    def remember_metadata(self) -> None:
        self._learn()
        self._metadata = [_facts(tensor) for tensor in self.params + self.grads]
        # torch's negative bit, which the reader cannot see, is a view's of a complex number's conjugate: of more than
        # one element that is not contiguous.
        self._single = [i for i, param in enumerate(self.params) if param.numel() == 1]

    def _learn(self) -> None:
        try:
            self._reader = TensorReader(self.params) if self.native else None
        except UnreadableError:
            self._reader = None

    def take_grads(self) -> bool:
        """Fetch this step's gradients. False: one is missing, or parameters and gradients are not what they were."""
        if self._reader is not None:
            try:
                self.grads = self._reader.grads(self.params)
                if not any(self.grads[i].is_neg() for i in self._single):
                    return True
            except UnreadableError:
                pass  # perhaps in a way that is nothing to a step
        grads: list[Any] = [param.grad for param in self.params]
        self.grads = grads
        try:
            if [_facts(tensor) for tensor in self.params + grads] != self._metadata:
                return False
        except (AttributeError, TypeError, RuntimeError):
            # A gradient that is None, or a sparse one, which has no memory format.
            return False
        self._learn()
        return True

    def count_steps(self) -> None:
        """Add one to the steps of every row. Counters on the device stay: the step itself has moved them on."""
        self.row_keys = [
            (group, step if isinstance(step, Tensor) else step + 1, dtype) for group, step, dtype in self.row_keys
        ]


class Roster:
    """All that a step depends on, but for the values of gradients and learning rates.

    Args:
        optimizer: whose parameters, groups and state it is.
        options: names of the group options that may change between steps without changing any format.
        formats: names of those that decide how state is stored.
    """

    def __init__(self, optimizer: WatchedState, options: Sequence[str], formats: Sequence[str]) -> None:
        self.works: dict[torch.device, Work] = {}
        self.idle: list[Tensor] = []  # without gradient, or without elements
        self._state = optimizer._states
        self._groups = list(optimizer.param_groups)
        self._params = [list(group["params"]) for group in self._groups]
        self._alone = [_scalars(params) for params in self._params]
        self._options_of, self._formats_of = _values_of(options), _values_of(formats)
        self._options = [self._options_of(group) for group in self._groups]
        self._formats = [self._formats_of(group) for group in self._groups]
        self._fixed = [_constant(self._options[i] + self._formats[i]) for i in range(len(self._groups))]

    def work(self, device: torch.device) -> Work:
        if device not in self.works:
            self.works[device] = Work(device)
        return self.works[device]

    def remember(self) -> None:
        """Everything has been checked and the states are made: from now on ``holds`` compares with what is there."""
        for work in self.works.values():
            work.remember_metadata()
        self._owners = list(self._state)
        self._owners_alone = _scalars(self._owners)
        self._runs: list[_Run] = []
        counted: list[State] = []
        at = len(self._state)
        for work in self.works.values():
            for row, states in _counted(work):
                width, step_at = len(states[0]), list(states[0]).index("step")
                end = at + width * len(states)
                self._runs.append(_Run(work, row, states, slice(at + step_at, end, width)))
                counted += states
                at = end
        known = set(map(id, counted))
        others = [state for state in self._state.values() if id(state) not in known]
        # The states are values themselves, of the optimizer's dictionary.
        self._dicts = [self._state, *counted, *others]
        self._held = _flat(one.values() for one in self._dicts)
        self._held_alone = _scalars(self._held)
        self._tensors = [value for value in self._held if isinstance(value, Tensor)]
        self._at = _places(self._tensors)

    def holds(self, optimizer: WatchedState, check: Callable[[Group], None]) -> bool:
        """Whether this is still all there is to know; then every work has its gradients.

        Args:
            check: raises what is wrong with a group's options; called for groups where one was changed.
        """
        groups = optimizer.param_groups
        return (
            optimizer._states is self._state
            and _same(groups, self._groups)
            and all(map(_identical, [group["params"] for group in groups], self._params, self._alone))
            and self._options_hold(check)
            and all(param.grad is None or not param.numel() for param in self.idle)
            and self._states_hold()
            and (not optimizer._is_handed_out or _places(self._tensors) == self._at)
            and all(work.take_grads() for work in self.works.values())
        )

    def _options_hold(self, check: Callable[[Group], None]) -> bool:
        for i, group in enumerate(self._groups):
            options, formats = self._options_of(group), self._formats_of(group)
            same = _same(formats, self._formats[i])
            if same and self._fixed[i] and _same(options, self._options[i]):
                continue
            check(group)
            if not same:
                return False
            self._options[i], self._fixed[i] = options, _constant(options + formats)
            for work in self.works.values():
                work.outlines.clear()
        return True

    def _states_hold(self) -> bool:
        """Whether every parameter's state is the very dictionary, with the very tensors and step, that was left."""
        if not _identical(list(self._state), self._owners, self._owners_alone):
            return False
        if all(work.native for work in self.works.values()):
            try:
                check_values(self._dicts, self._held)
                return True
            except UnreadableError:
                pass  # there is no reader, or an equal number has taken a number's place
        found = _flat(one.values() for one in self._dicts)
        count = len(self._owners)
        return _same(found[:count], self._held[:count]) and _identical(found, self._held, self._held_alone)

    def count_steps(self) -> None:
        """All works have taken a step."""
        for work in self.works.values():
            work.count_steps()
        for work, row, states, at in self._runs:
            step = work.row_keys[row][1]
            self._held[at] = [step] * len(states)
            for state in states:
                state["step"] = step

    def drop_grads(self) -> None:
        for work in self.works.values():
            work.grads = []


class _Run(NamedTuple):
    """States of one row with as many entries, and the step at the same place. at: where their steps are in _held."""

    work: Work
    row: int
    states: list[State]
    at: slice


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    """All of a tensor's metadata that matters to a step."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout, is_plain(tensor)


def _values_of(names: Sequence[str]) -> Callable[[Group], tuple[Any, ...]]:
    if len(names) == 1:
        return lambda group: (group[names[0]],)
    return itemgetter(*names)


def _constant(values: tuple[Any, ...]) -> bool:
    """Whether the same objects are the same values: none can be written in place."""
    return all(
        _constant(value) if isinstance(value, tuple) else value is None or isinstance(value, (str, int, float))
        for value in values
    )


def _counted(work: Work) -> Iterable[tuple[int, list[State]]]:
    """States whose steps are integers by row, those with as many entries and the step at the same place together."""
    found: dict[tuple[int, int, int], list[State]] = {}
    for row, state in zip(work.rows, work.states, strict=True):
        if not isinstance(state["step"], Tensor):
            found.setdefault((row, len(state), list(state).index("step")), []).append(state)
    return [(row, states) for (row, _, _), states in found.items()]


def _places(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether both hold the very same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))


def _scalars(values: Sequence[Any]) -> list[int]:
    """Where the tensors are that ``==`` compares by value: those of one element, or none."""
    return [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.numel() < 2]


def _identical(found: list[Any], held: list[Any], alone: Sequence[int]) -> bool:
    """``_same``, much faster, of lists that hold tensors and numbers; equal numbers are the same.

    alone: ``_scalars`` of those held.
    """
    # == takes identical objects for equal without a look. Other tensors it compares by value, which is an error unless
    # both have one element.
    try:
        return found == held and _same([found[i] for i in alone], [held[i] for i in alone])
    except (RuntimeError, TypeError):
        return False
