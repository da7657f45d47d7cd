"""What APOLLO adds to Adafactor's optimizer: parameters whose gradients are projected, with plans of their own."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi.backend.base import Backend
from a8multi.loader.structs import Flag, ScheduleRule
from a8multi.plan import Moments, MomentSpec, Schedule, matrix_shape

from .base import LowBitOptimizer
from .checks import check_flag, check_number
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

    def _check_apollo(self, group: Group) -> None:
        for name, least in (("apollo_rank", 0), ("apollo_update_proj_gap", 1)):
            if not isinstance(group[name], int) or isinstance(group[name], bool) or group[name] < least:
                raise ValueError(f"{name} must be an integer >= {least}, not {group[name]!r}")
        if group["apollo_scale_type"] not in _SCALE_TYPES:
            raise ValueError(
                f"apollo_scale_type must be one of {', '.join(_SCALE_TYPES)}, not {group['apollo_scale_type']!r}"
            )
        check_number("apollo_eps", group["apollo_eps"], 0.0, least_open=True)
        check_number("apollo_scale", group["apollo_scale"], 0.0, least_open=True)
        check_flag("apollo_factorize", group["apollo_factorize"])
        if not group["apollo_rank"]:
            return
        if group["beta3"] is not None:
            raise ValueError(
                f"beta3={group['beta3']!r} and apollo_rank={group['apollo_rank']!r} exclude each other: CAME needs the "
                f"whole gradient's statistics"
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
        return Moments(first, second, limiter=True, shape=shape)

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

    def _plan(self, work: Work, capturing: bool) -> None:
        super()._plan(work, capturing)
        work.projection, work.drawn = None, Drawn()
        self._warn_of_rank(work)

    def _projection(self, work: Work, indices: list[int], params: list[Tensor]) -> Projection:
        items = [self._item(work, i, param) for i, param in zip(indices, params, strict=True)]
        projectors = [self._projector(work.groups[i], work.params[i].shape) for i in indices]
        return Projection(work.device, indices, items, projectors)

    def _projection_of_contiguous(self, work: Work) -> Projection | None:
        flat = [i for i in work.projected if work.params[i].is_contiguous() and work.grads[i].is_contiguous()]
        return self._projection(work, flat, [work.params[i] for i in flat]) if flat else None

    def _warn_of_rank(self, work: Work) -> None:
        ranks = {
            work.groups[i]["apollo_rank"]
            for i in work.projected
            if work.groups[i]["apollo_rank"] > min(matrix_shape(work.params[i].shape))
        }
        if ranks:
            warnings.warn(
                f"apollo_rank={max(ranks)} is above the smaller dimension of some matrices: there it is lowered to it",
                stacklevel=4,
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

    def _run(self, work: Work, backend: Backend, hypers: np.ndarray, *more: Any) -> None:
        # Before the base class counts the parameters as written.
        if work.projected:
            step: _Projecting = work.projecting
            work.projecting = None
            if step.projection is not None:
                step.projection.run(backend, work, step.tables, step.drawn)
            for index in step.apart(work):
                param = work.params[index]
                copy = param.contiguous()
                self._projection(work, [index], [copy]).run(backend, work, step.tables, step.drawn)
                if copy is not param:
                    param.copy_(copy)
            scaled = step.tables.scaled[1]
            for live in more:
                live.staged_bytes += scaled.staged_bytes if scaled is not None else 0
        super()._run(work, backend, hypers, *more)


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


def _steps_taken(work: Work) -> list[int | Tensor]:
    """Of every row. What the device counts is copied, for the step moves the counters on."""
    taken = [step for _, step, _ in work.row_keys]
    counters = {row: step for row in {work.rows[i] for i in work.projected} if isinstance(step := taken[row], Tensor)}
    if counters:
        for row, copy in zip(counters, torch.stack(list(counters.values())).unbind(), strict=True):
            taken[row] = copy
    return taken
