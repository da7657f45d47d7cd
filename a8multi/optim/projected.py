"""What APOLLO adds to Adafactor's optimizer: parameters whose gradients are projected, with plans of their own."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from a8multi.backend.base import Backend
from a8multi.errors import StateFormatError
from a8multi.loader.structs import Flag, ScheduleRule
from a8multi.plan import Moments, MomentSpec, Schedule, is_plain, matrix_shape, plain

from .base import LowBitOptimizer
from .checks import check_number
from .elementwise import averages, moment_spec
from .hypers import hypers_of
from .projection import Drawn, Projection, Projector, Table, Tables
from .roster import Group, Work
from .screen import Screen

_SCALE_TYPES = ("channel", "tensor")
# So that 1 / eps does not bound the scales.
_NO_BOUND = 1e-38


class ProjectedOptimizer(LowBitOptimizer):
    """Base of Adafactor8bit: what concerns the group options ``apollo_*``."""

    # A Projector's.
    _plan_options = ("seed", "apollo_scale", "apollo_scale_type", "apollo_update_proj_gap")
    # Options of the groups that the constructor of a subclass calls otherwise, and how: for messages.
    _named: ClassVar[Mapping[str, str]] = {}
    _has_warned = False
    # To which rank the state of each parameter is projected, if it has one, as far as this optimizer knows; 0: not.
    _ranks: dict[Tensor, int]

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        super().__init__(params, defaults)
        self._ranks = {}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        super().__setstate__(saved)
        self._ranks = {}

    def _name_of(self, option: str) -> str:
        return self._named.get(option, option)

    def _check_apollo(self, group: Group) -> None:
        for option, least in (("apollo_rank", 0), ("apollo_update_proj_gap", 1)):
            value = group[option]
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{self._name_of(option)} must be an integer >= {least}, not {value!r}")
        if group["apollo_scale_type"] not in _SCALE_TYPES:
            raise ValueError(
                f"{self._name_of('apollo_scale_type')} must be one of {', '.join(_SCALE_TYPES)}, not "
                f"{group['apollo_scale_type']!r}"
            )
        for option in ("apollo_eps", "apollo_scale"):
            check_number(self._name_of(option), group[option], 0.0, least_open=True)
        if group["apollo_rank"] and group["beta3"] is not None:
            raise ValueError(
                f"beta3={group['beta3']!r} and {self._name_of('apollo_rank')}={group['apollo_rank']!r} exclude each "
                f"other: CAME needs the whole gradient's statistics"
            )

    def _is_projected(self, group: Group, param: Tensor) -> bool:
        return bool(group["apollo_rank"]) and param.ndim >= 2

    def _projector(self, group: Group, shape: torch.Size) -> Projector:
        rows, cols = matrix_shape(shape)
        return Projector(
            rows=rows,
            cols=cols,
            rank=min(group["apollo_rank"], rows, cols),
            whole=group["apollo_scale_type"] == "tensor",
            gain=math.sqrt(group["apollo_scale"]),
            seed=group["seed"],
            gap=group["apollo_update_proj_gap"],
        )

    def _projected_moments(self, group: Group, param: Tensor) -> Moments:
        shape = self._projector(group, param.shape).shape
        first = None
        if group["beta1"] is not None:
            name = group["first_moment"] or "int8" if group["quantize"] else "fp32"
            first = moment_spec(name, group["m_block_size"], shape.numel(), group["min_8bit_size"])
        second = MomentSpec(None)
        if not group["apollo_factorize"]:
            name = "log8" if group["quantize"] else "fp32"
            second = moment_spec(name, group["block_size"], shape.numel(), group["min_8bit_size"])
        return Moments(first, second, limiter=group["enable_fira_for_apollo"], shape=shape)

    # --- Hyper-parameters. ---

    def _low_hyper(self, group: Group, dtype: torch.dtype) -> dict[str, Any]:
        """Of Adam on the projected gradients. Its "parameter" starts at zero and lr is -1: it ends as the update."""
        return {
            **averages(group["beta1"] or 0.0, group["beta2"] or 0.0),
            "eps": group["apollo_eps"],
            "flags": int(Flag.STOCHASTIC_STATE) if group["stochastic_rounding"] else 0,
        }

    def _low_schedule(self, group: Group) -> Schedule:
        beta1, beta2 = float(group["beta1"] or 0.0), float(group["beta2"] or 0.0)
        rules = ScheduleRule(0) if group["beta2"] is not None else ScheduleRule.BETA2_DECAYS
        if group["apollo_factorize"]:
            rules |= ScheduleRule(0) if group["relative_step"] else ScheduleRule.CORRECT_BIAS
        else:
            rules |= ScheduleRule.UNBIASED if group["relative_step"] else ScheduleRule.ADAM_BIAS
        return Schedule(rules, beta1, beta2, float(group["beta2_decay"]))

    def _scaled_hyper(self, group: Group, dtype: torch.dtype) -> dict[str, Any]:
        """Of the parameters: Adafactor's, whose moments are elsewhere."""
        return {**self._hyper(group, dtype), "eps": _NO_BOUND}

    def _scaled_schedule(self, group: Group) -> Schedule:
        return Schedule(ScheduleRule.RELATIVE_STEP if group["relative_step"] else ScheduleRule(0))

    # --- One step. ---

    def _rank(self, group: Group, param: Tensor) -> int:
        return self._projector(group, param.shape).rank if self._is_projected(group, param) else 0

    def _check_states(self, work: Work) -> None:
        # First: moments of one rank may have the shapes of another's.
        for number, state, group, param in zip(work.numbers, work.states, work.groups, work.params, strict=True):
            rank = self._rank(group, param)
            before = self._ranks.get(param, rank) if state else rank
            if before != rank:
                raise StateFormatError(
                    f"{self._name(number)} of shape {tuple(param.shape)}: apollo_rank was {before} and is {rank} now, "
                    f"but its moments are those of the gradient projected to {before or 'no'} rank. Set it back, or "
                    f"delete the parameter's entry of optimizer.state to start them anew"
                )
            self._ranks[param] = rank
        super()._check_states(work)

    def _plan(self, work: Work, capturing: bool) -> None:
        super()._plan(work, capturing)
        work.projection, work.drawn = None, Drawn()
        self._warn_of_rank(work)

    def _projection(self, work: Work, indices: list[int], params: list[Tensor]) -> Projection:
        items = [self._item(work, i, param) for i, param in zip(indices, params, strict=True)]
        projectors = [self._projector(work.groups[i], work.params[i].shape) for i in indices]
        return Projection(work.device, indices, items, projectors)

    def _projection_of_contiguous(self, work: Work) -> Projection | None:
        flat = [i for i in work.projected if is_plain(work.params[i]) and is_plain(work.grads[i])]
        return self._projection(work, flat, [work.params[i] for i in flat]) if flat else None

    def _warn_of_rank(self, work: Work) -> None:
        ranks = {
            work.groups[i]["apollo_rank"]
            for i in work.projected
            if work.groups[i]["apollo_rank"] > min(matrix_shape(work.params[i].shape))
        }
        if ranks and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._name_of('apollo_rank')}={max(ranks)} is above the smaller dimension of some matrices: there "
                f"it is lowered to it",
                stacklevel=_levels_to_user(),
            )

    def _tables(self, work: Work, capturing: bool, skip: Tensor | None) -> Table:
        table = super()._tables(work, capturing, skip)
        if work.projected:
            low = hypers_of(work, self._low_hyper, self._low_schedule, capturing, skip, lr=-1.0)
            scaled = hypers_of(work, self._scaled_hyper, self._scaled_schedule, capturing, skip)
            if low[1] is not None:
                # Adam is the first to run, and moves the counters of all on.
                for live in (scaled[1], table[1]):
                    if live is not None:
                        live.advance = 0
            projection, drawn = work.projection, work.drawn
            if capturing:
                # The graph may outlive these, and its memory is of no use to a step outside of it.
                projection, drawn = self._projection_of_contiguous(work), Drawn()
            elif projection is None:
                projection = work.projection = self._projection_of_contiguous(work)
            work.projecting = _Projecting(projection, drawn, Tables(low, scaled, _steps_taken(work)))
        return table

    def _look_at(self, screen: Screen, work: Work, backend: Backend, scale: Tensor | None, table: Table) -> None:
        super()._look_at(screen, work, backend, scale, table)
        if work.projected:
            step: _Projecting = work.projecting
            if step.projection is not None:
                step.projection.screen(backend, work, scale, screen.found[work.device], step.tables)
            screen.look_at(work.device, [work.grads[i] for i in step.apart(work)], scale)

    def _write(self, work: Work, backend: Backend, hypers: np.ndarray, *more: Any) -> None:
        if work.projected:
            self._write_projected(work, backend, *more)
        super()._write(work, backend, hypers, *more)

    def _write_projected(self, work: Work, backend: Backend, *more: Any) -> None:
        step: _Projecting = work.projecting
        work.projecting = None
        if step.projection is not None:
            step.projection.run(backend, work, step.tables, step.drawn)
        for index in step.apart(work):
            param = work.params[index]
            copy = plain(param)
            self._projection(work, [index], [copy]).run(backend, work, step.tables, step.drawn)
            if copy is not param:
                param.copy_(copy)
        scaled = step.tables.scaled[1]
        for live in more:
            live.staged_bytes += scaled.staged_bytes if scaled is not None else 0


@dataclass
class _Projecting:
    """One step of the projected parameters of a work.

    Attributes:
        projection: of those that are contiguous; None: there are none.
        drawn: random matrices in memory that lives as long as the projection's.
        tables: hyper-parameters.
    """

    projection: Projection | None
    drawn: Drawn
    tables: Tables

    def apart(self, work: Work) -> list[int]:
        """The projected parameters that have no place in the projection."""
        planned = self.projection.members if self.projection is not None else []
        return [] if len(planned) == len(work.projected) else sorted({*work.projected} - {*planned})


def _levels_to_user() -> int:
    """``stacklevel`` for the caller's warning to point at the first line outside of this package and torch."""
    levels, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("a8multi", "torch"):
        levels, frame = levels + 1, frame.f_back
    return levels


def _steps_taken(work: Work) -> list[int | Tensor]:
    """Of every row. What the device counts is copied, for the step moves the counters on."""
    taken = [step for _, step, _ in work.row_keys]
    counters = {row: step for row in {work.rows[i] for i in work.projected} if isinstance(step := taken[row], Tensor)}
    if counters:
        for row, copy in zip(counters, torch.stack(list(counters.values())).unbind(), strict=True):
            taken[row] = copy
    return taken
