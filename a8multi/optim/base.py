"""What every optimizer shares: from ``step()`` to one backend call a device.

A subclass says how a group's options become formats (``_moments``) and hyper-parameters (``_hyper``); this class
checks the inputs, keeps the plans, calls the backend and counts the steps. State is described in optim/state.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from a8multi.backend import streams
from a8multi.backend.base import Backend
from a8multi.backend.registry import backend_for
from a8multi.errors import StateFormatError
from a8multi.loader.structs import Flag, RuleKind
from a8multi.plan import Item, Live, Moments, Schedule, StepPlan, matrix_shape, plain

from . import state as state_of
from .checks import check_grad, check_params
from .hooked import hooked_if_watched
from .hypers import hypers_of
from .roster import Group, Roster, Work
from .screen import Screen
from .watched import WatchedState

# Options that say how the optimizer runs, not what it computes.
_OF_THE_RUN = ("capturable", "skip_nonfinite")
# Options that say which moments there are. They are loaded with a state, unlike formats, which have to be equal.
_OF_MOMENTS = ("beta1", "beta3", "momentum", "centered")


class LowBitOptimizer(WatchedState):
    """Base of the optimizers; not for use by itself."""

    # The registry's name of the operation, which rule of the element-wise ones it is, and the group options that decide
    # how state is stored.
    _op: ClassVar[str]
    _rule: ClassVar[RuleKind] = RuleKind.ADAM
    _format_options: ClassVar[tuple[str, ...]]
    # Other options that plans are made of: they are made anew when one changes.
    _plan_options: ClassVar[tuple[str, ...]] = ()
    # Whether a step has run outside of a capture since the optimizer was built or loaded.
    _has_run = False

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        super().__init__(params, {"skip_nonfinite": False, **defaults})
        self._roster: Roster | None = None
        self._screen: Screen | None = None

    # --- For subclasses. ---

    def _check_group(self, group: Group) -> None:
        """Raise ValueError, naming the parameter, for an option that is not valid."""
        raise NotImplementedError

    def _moments(self, group: Group, param: Tensor) -> Moments:
        """How the moments of this parameter are to be stored."""
        raise NotImplementedError

    def _hyper(self, group: Group, dtype: torch.dtype) -> dict[str, Any]:
        """Fields of ``a8_hyper`` for the parameters of this group and type, but for lr, seed and the schedule's."""
        raise NotImplementedError

    def _schedule(self, group: Group) -> Schedule:
        """How the other fields follow from the step."""
        raise NotImplementedError

    def _is_projected(self, group: Group, param: Tensor) -> bool:
        """Whether this parameter's gradient is projected, so that it belongs to no plan of the base class."""
        return False

    # --- torch.optim.Optimizer. ---

    def __setstate__(self, saved: dict[str, Any]) -> None:
        super().__setstate__(saved)
        for group in self.param_groups:
            for name in _OF_THE_RUN:
                group.setdefault(name, False)
        self._roster = self._screen = None
        self._has_run = False

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, as torch.optim.Optimizer does.

        Raises:
            ValueError: for an option that is not valid, parameters that are complex, sparse, not floating or parts of a
                DTensor, or one that is there twice.
        """
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._check_group(group)
            check_params(group["params"])
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave, every tensor with the type it was saved in, on the parameter's device.

        ``capturable`` and ``skip_nonfinite`` are not loaded: they say how this optimizer runs, and the steps taken
        become integers or tensors as it needs them. After loading, a CUDA graph has to be captured again.

        Raises:
            StateFormatError: the state is not of this optimizer, or was saved with other formats; nothing is changed.
            ValueError: the groups differ in number or size.
        """
        # As the last of the pre-hooks, so that those of the user still see the whole; torch itself would cast the
        # codes to the parameter's type.
        kept: dict[int, dict[str, Any]] = {}

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            kept.update(state_of.checked(self, given, self._format_options, self._moments))
            own = [{name: group[name] for name in _OF_THE_RUN} for group in self.param_groups]
            # Other numbers of groups are torch's to refuse.
            groups = [{**group, **mine} for group, mine in zip(given["param_groups"], own, strict=False)]
            return {**given, "state": {}, "param_groups": groups + given["param_groups"][len(own) :]}

        def put(_: torch.optim.Optimizer) -> None:
            params = [param for group in self.param_groups for param in group["params"]]
            for index, saved in kept.items():
                self._states[params[index]] = saved
            self._roster = None

        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(put, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """For torch.amp.GradScaler: the step takes ``grad_scale`` and ``found_inf``, and nobody reads them back."""
        return any(group["skip_nonfinite"] for group in self.param_groups)

    @property
    def skipped_steps(self) -> int:
        """Steps that ``skip_nonfinite`` has skipped since the optimizer was built or loaded. Waits for the device."""
        return self._screen.skipped() if self._screen is not None else 0

    @hooked_if_watched
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
            RuntimeError: the step is being captured in a CUDA graph, and a group is not ``capturable``, no step has
                run since the optimizer was built or loaded, or a parameter has no state yet.
        """
        capturing = self._is_captured()
        if capturing:
            self._check_capturable()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Kept only if the step succeeds: what an error has interrupted is looked at anew.
        roster, self._roster = self._roster, None
        try:
            if roster is None or not roster.holds(self, self._check_group):
                roster = self._survey(capturing)
            self._update(roster, capturing)
        finally:
            if roster is not None:
                roster.drop_grads()
        self._roster = roster
        self._has_run |= bool(roster.works) and not capturing
        return loss

    # --- One step. ---

    def _is_captured(self) -> bool:
        """Whether the stream of one of the parameters' devices is being captured in a CUDA graph."""
        if not torch.cuda.is_initialized():
            return False
        devices: Iterable[torch.device] = self._roster.works if self._roster is not None else ()
        return streams.is_captured(
            devices or {param.device for group in self.param_groups for param in group["params"]}
        )

    def _check_capturable(self) -> None:
        for where, group in enumerate(self.param_groups):
            if not group["capturable"]:
                raise RuntimeError(
                    f"step() of {type(self).__name__} is being captured in a CUDA graph, but param_groups[{where}] has "
                    f"capturable=False: every replay would repeat the step number of the capture. Build the optimizer "
                    f"with capturable=True"
                )
        if not self._has_run:
            raise self._captured_too_early()

    def _captured_too_early(self) -> RuntimeError:
        return RuntimeError(
            f"step() of {type(self).__name__} is being captured in a CUDA graph before it has run like this since the "
            f"optimizer was built or loaded: what it makes once would belong to the graph. Take a step before"
        )

    def _survey(self, capturing: bool) -> Roster:
        """Parameters with gradients by device, all checked and with their states: the next thing is to update them."""
        # torch adds defaults of its own when a state is loaded, which groups do not have.
        options = [name for name in self.defaults if all(name in group for group in self.param_groups)]
        kept = {*self._format_options, *self._plan_options, *_OF_THE_RUN, *_OF_MOMENTS}
        formats = [name for name in options if name in kept]
        roster = Roster(self, [name for name in options if name not in ("lr", *formats)], formats)
        if len({bool(group["skip_nonfinite"]) for group in self.param_groups}) > 1:
            raise ValueError("skip_nonfinite must be the same in all groups: a step is skipped as a whole")
        number = 0
        for group in self.param_groups:
            self._check_group(group)
            for param in group["params"]:
                grad = param.grad
                if grad is not None:
                    check_grad(param, grad, partial(self._name, number))
                if grad is None or not param.numel():
                    roster.idle.append(param)
                else:
                    # Not self._states[param]: a later error must leave no trace.
                    state = self._states.get(param, {})
                    roster.work(param.device).add(param, grad, group, number, state, self._is_projected(group, param))
                number += 1
        for device, work in roster.works.items():
            work.native = self._backend(device).name != "torch"
        for work in roster.works.values():
            self._check_states(work)
        for work in roster.works.values():
            self._plan(work, capturing)
        roster.remember()
        return roster

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

    def _check_states(self, work: Work) -> None:
        """Raise StateFormatError for a state that cannot be brought into its group's formats; nothing is written."""
        work.moments = [self._moments(group, param) for group, param in zip(work.groups, work.params, strict=True)]
        for number, state, param, moments in zip(work.numbers, work.states, work.params, work.moments, strict=True):
            try:
                state_of.check(state, param, moments)
            except StateFormatError as error:
                raise StateFormatError(f"{self._name(number)}: {error}") from None

    def _plan(self, work: Work, capturing: bool) -> None:
        """Make the states of all parameters, or bring them into their groups' formats, and plan the contiguous ones."""
        wanted = zip(work.states, work.params, work.moments, work.groups, strict=True)
        arguments = [(state, param, m, state_of.counts_on_device(group)) for state, param, m, group in wanted]
        if capturing:
            # Made now, it would belong to the graph, and every replay would start it anew.
            for number, each in zip(work.numbers, arguments, strict=True):
                if not state_of.is_ready(*each):
                    raise RuntimeError(
                        f"step() of {type(self).__name__} is being captured in a CUDA graph, but the state of "
                        f"{self._name(number)} is not there yet, or not in the group's format. Take a step with the "
                        f"same gradients present before the capture"
                    )
        for each in arguments:
            state_of.ensure(*each)
        for param, state in zip(work.params, work.states, strict=True):
            self._states[param] = state
        work.assign_rows()
        items = [self._item(work, i, work.params[i]) for i in work.planned(list(range(len(work.params))))]
        # A replay writes parameters without a word to the host, so nothing that it knows of their squares would hold.
        carries = self._op == "adafactor" and not any(map(state_of.counts_on_device, work.groups))
        work.plan = StepPlan(work.device, items, rule=self._rule, carries_squares=carries)

    def _item(self, work: Work, index: int, param: Tensor) -> Item:
        owner, state, number = work.params[index], work.states[index], work.numbers[index]
        moments = work.moments[index]
        rows, cols = matrix_shape(owner.shape) if moments.factored else (0, 0)
        return Item(
            param=param,
            grad_dtype=work.grads[index].dtype,
            state=state,
            moments=moments,
            **state_of.tensors(state, moments),
            rows=rows,
            cols=cols,
            hyper=work.rows[index],
            noise_id=number,
            name=self._name(number),
        )

    def _update(self, roster: Roster, capturing: bool) -> None:
        works = list(roster.works.values())
        backends = [self._backend(work.device) for work in works]
        screen = self._screen_of(works, capturing)
        flags = {} if screen is None else screen.found
        tables = [self._tables(work, capturing, flags.get(work.device)) for work in works]
        for work in works:
            work.plan.skip = flags.get(work.device)
            work.plan.grads = work.planned(work.grads)
            work.plan.addresses = work.addresses
        try:
            if screen is not None:
                self._look_at_gradients(screen, list(zip(works, backends, tables, strict=True)))
            for work, backend, (hypers, live) in zip(works, backends, tables, strict=True):
                self._run(work, backend, hypers, *(() if live is None else (live,)))
        finally:
            for work in works:
                work.plan.grads, work.plan.addresses = [], None
        roster.count_steps()

    def _tables(self, work: Work, capturing: bool, skip: Tensor | None) -> tuple[np.ndarray, Live | None]:
        return hypers_of(work, self._hyper, self._schedule, capturing, skip)

    def _screen_of(self, works: list[Work], capturing: bool) -> Screen | None:
        """The flags of the devices, where steps may be skipped."""
        if not self._step_supports_amp_scaling:
            return None
        if self._screen is None:
            self._screen = Screen()
        devices = [work.device for work in works]
        if capturing and not self._screen.knows(devices):
            raise self._captured_too_early()
        self._screen.prepare(devices)
        return self._screen

    def _look_at_gradients(self, screen: Screen, runs: list[tuple[Work, Backend, Any]]) -> None:
        # GradScaler sets both before a step and deletes them after it.
        given = getattr(self, "grad_scale", None)
        screen.begin(getattr(self, "found_inf", None))
        for work, backend, table in runs:
            scale = None if given is None else given.to(work.device, torch.float32)
            self._look_at(screen, work, backend, scale, table)
        screen.end()

    def _look_at(
        self, screen: Screen, work: Work, backend: Backend, scale: Tensor | None, table: tuple[np.ndarray, Live | None]
    ) -> None:
        """Divide and look at the gradients of one device."""
        if work.plan.items:
            backend.screen(work.plan, scale, screen.found[work.device], *table)
        screen.look_at(work.device, [work.grads[i] for i in work.strided], scale)

    def _run(self, work: Work, backend: Backend, hypers: Any, *more: Any) -> None:
        try:
            self._write(work, backend, hypers, *more)
        finally:
            # Kernels write through raw pointers: without this autograd would not notice a parameter saved for backward.
            # A step that fails may have written some.
            _bump_versions(work.params)
        plan = work.plan
        if plan.squares is not None:
            asked = (hypers["flags"] & Flag.SCALE_PARAMETER) != 0
            plan.squares.leave(asked[plan.tensors["hyper"]])

    def _write(self, work: Work, backend: Backend, hypers: Any, *more: Any) -> None:
        """All parameters of a work and their states."""
        run = getattr(backend, self._op)
        if work.plan.items:
            run(work.plan, hypers, *more)
        for indices in work.strided_waves():
            self._update_strided(run, work, indices, hypers, *more)

    def _update_strided(self, run: Callable[..., None], work: Work, indices: list[int], *hypers: Any) -> None:
        """Parameters that are not ``is_plain``, or whose gradients are not, by way of copies."""
        items = [self._item(work, i, plain(work.params[i])) for i in indices]
        plan = StepPlan(work.device, items, rule=self._rule)
        plan.grads = [plain(work.grads[i]) for i in indices]
        plan.skip = work.plan.skip
        run(plan, *hypers)
        for i, item in zip(indices, items, strict=True):
            if item.param is not work.params[i]:
                work.params[i].copy_(item.param)


def _bump_versions(params: list[Tensor]) -> None:
    try:
        torch.autograd.graph.increment_version(params)
    except TypeError:  # torch < 2.6 takes one tensor
        for param in params:
            torch.autograd.graph.increment_version(param)
