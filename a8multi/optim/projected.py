"""What APOLLO adds to Adafactor's optimizer: parameters whose gradients are projected, with plans of their own."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi.backend.base import Backend
from a8multi.loader.structs import Flag, ScheduleRule
from a8multi.plan import Moments, MomentSpec, Schedule, matrix_shape

from .base import LowBitOptimizer, check_flag, check_number
from .elementwise import averages, moment_spec
from .hypers import hypers_of
from .projection import Drawn, Projection, Projector
from .roster import Group, Work

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
        for name in ("capturable", "skip_nonfinite"):
            if group[name]:
                raise ValueError(
                    f"{name} is not available with apollo_rank={group['apollo_rank']!r}: the host draws the projection "
                    f"by the number of steps, which would be known to the device only"
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
            name = group["first_moment"] if group["quantize"] else "fp32"
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
        flat = [i for i in work.projected if work.params[i].is_contiguous() and work.grads[i].is_contiguous()]
        if flat:
            work.projection = self._projection(work, flat, [work.params[i] for i in flat])

    def _projection(self, work: Work, indices: list[int], params: list[Tensor]) -> Projection:
        items = [self._item(work, i, param) for i, param in zip(indices, params, strict=True)]
        projectors = [self._projector(work.groups[i], work.params[i].shape) for i in indices]
        return Projection(work.device, work.drawn, indices, items, projectors)

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

    def _run(self, work: Work, backend: Backend, hypers: np.ndarray, *more: Any) -> None:
        # Before the base class counts the parameters as written.
        if work.projected:
            low, _ = hypers_of(work, self._low_hyper, self._low_schedule, False, lr=-1.0)
            scaled, live = hypers_of(work, self._scaled_hyper, self._scaled_schedule, False)
            planned = work.projection.members if work.projection is not None else []
            if work.projection is not None:
                work.projection.run(backend, work, low, scaled, live)
            apart = set(work.projected) - set(planned) if len(planned) < len(work.projected) else ()
            for index in apart:
                param = work.params[index]
                copy = param.contiguous()
                self._projection(work, [index], [copy]).run(backend, work, low, scaled, live)
                if copy is not param:
                    param.copy_(copy)
        super()._run(work, backend, hypers, *more)
