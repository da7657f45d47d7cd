"""Adafactor with quantised moments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from a8multi.backend.base import Backend
from a8multi.backend.registry import backend_for, use_backend
from a8multi.loader.structs import Flag, ScheduleRule
from a8multi.plan import Moments, MomentSpec, Schedule
from a8multi.quant.formats import check_block_size

from .checks import check_flags, check_lr, check_number, check_seed
from .elementwise import averages, common_flags, moment_spec, options
from .projected import ProjectedOptimizer
from .roster import Group

# Its square is the smallest normal float32: below it 1 / eps1 would meet a second moment that underflowed to zero.
_LEAST_EPS1 = 1.1e-19
_FIRST_FORMATS = ("nf4", "int8", "bf16", "fp32")
_CAME_ORDERS = ("paper", "adafactor8bit")
# Added to CAME's squared residual (the paper's epsilon_2).
CONFIDENCE_EPS = 1e-16


class Adafactor8bit(ProjectedOptimizer):
    r"""Adafactor with an optional first moment, its element-wise state quantised. Alias: ``Adafactor8Bit``.

    Names and defaults are those of the package ``adafactor8bit`` 0.2.4, but for ``block_size``: 128 where it has 2048,
    and its sizes above 4096 are refused. Without ``beta1`` and with float32 state (``quantize=False``),
    ``scale_weight_decay=False`` it equals :class:`torch.optim.Adafactor` on parameters of one and two dimensions.
    Arithmetic is float32 whatever the parameter's type, the same bits on every compiled backend, instruction set and
    number of threads.

    The update, with :math:`\hat v` the second moment, :math:`\rho = \min(lr, 1/\sqrt t)` (``relative_step``) or
    :math:`lr`, and :math:`\alpha = \rho \max(\epsilon_2, RMS(p))` (``scale_parameter``) or :math:`\rho`:

    .. math::
        u = m / \max(\sqrt{\hat v}, \epsilon_1), \quad
        p \leftarrow p (1 - \alpha \lambda) - \alpha\, u / \max(1, RMS(u) / d)

    where m is the gradient or, with ``beta1``, its moving average. Then :math:`\alpha` is multiplied by the bias
    corrections :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)` (fixed ``beta2``) or :math:`1 / (1 - \beta_1^t)`, unless
    ``relative_step`` is on.

    Args:
        params: parameters or groups, float32, bfloat16 or float16. Each of the options below may differ by group.
        lr: learning rate, >= 0; a float or a tensor of one element, see :class:`AdamW8bit`.
        beta1: decay of the first moment, in [0, 1); None: no first moment.
        beta2: fixed decay of the second moment, in [0, 1); None: ``1 - t ** beta2_decay``.
        beta2_decay: <= 0.
        beta3: decay of CAME's confidence, in [0, 1): a large one, such as 0.9999. Needs ``beta1``, and ``factored``.
            None: no confidence. See ``came_order`` and :class:`CAME8bit`.
        eps: (eps1, eps2). eps1 bounds the root of the second moment from below; None: the machine epsilon of each
            parameter's own dtype. eps2 bounds the parameter's RMS in the step size.
        weight_decay: >= 0, decoupled; see ``scale_weight_decay``.
        d: bound on the update's RMS, >= 0; 0 disables it (as does a very large one).
        maximize: ascend instead of descend.
        relative_step: bound lr by ``1 / sqrt(step)``.
        scale_parameter: multiply the step by the parameter's RMS.
        factored: keep row and column means of the squared gradient instead of an element-wise second moment, for
            parameters of two or more dimensions.
        quantize: quantise the element-wise state. May be changed between steps: the state is converted, not lost.
        block_size: of an element-wise second moment (log8), a power of two from 32 to 4096. The default is more
            accurate and faster than adafactor8bit's 2048, for 0.03 bytes a parameter.
        m_block_size: of the first moment, likewise.
        min_8bit_size: parameters with fewer elements keep float32 state.
        use_cuda_kernel: False: run on the ``torch`` backend.
        scale_weight_decay: weight decay uses :math:`\alpha` (True) or :math:`\rho`.
        enable_fira_for_adafactor: limit the growth of the update's norm from one step to the next (Fira's norm-growth
            limiter), of parameters that APOLLO does not project. Zero updates are not remembered: they say nothing of
            how large the next may be.
        fira_margin: by how much the norm may grow, >= 0; 0.01 is one per cent.
        came_order: what ``beta3`` does: "paper" (the first moment averages the clipped update, and the step is that
            average over the root of the confidence) or "adafactor8bit" (as that package: the first moment averages the
            gradient, and the confidence multiplies the second moment).
        first_moment: "nf4" (packed, 4 bits), "int8", "bf16" or "fp32". None: nf4, but int8 where APOLLO projects: that
            moment is small, and with nf4 the loss suffers (docs/optimizers.md, Formats).
        stochastic_rounding: of log8 codes, see :class:`AdamW8bit`.
        stochastic_rounding_writeback: round bfloat16 and float16 parameters stochastically when they are written.
        seed: of the noise, 0 to 2**64 - 1.
        capturable: steps may be captured in a CUDA graph, see :class:`AdamW8bit`. ``beta2_decay``, ``relative_step``
            and APOLLO's projections go on from replay to replay.
        skip_nonfinite: see :class:`AdamW8bit`.
        apollo_rank: of APOLLO's projection, for parameters of two or more dimensions; 0: no projection. One above the
            smaller dimension of a matrix is lowered to it.
        apollo_update_proj_gap: steps after which another random projection is drawn, >= 1.
        apollo_scale_type: "channel" (each row or column of the gradient has its scale) or "tensor" (one for all).
        apollo_scale: factor of these scales, under a root: 1, or 128 for rank 1 with "tensor" (APOLLO-Mini).
        apollo_eps: added to the root of the projected second moment, which is 2 sqrt(rank) times the paper's, > 0.
        apollo_factorize: keep the projected second moment as row and column means.
        enable_fira_for_apollo: limit the growth of projected updates likewise, as APOLLO's paper and adafactor8bit
            always do.

    Raises:
        ValueError: naming the parameter that is not valid.

    State: row and column means in float32 (0.01 bytes a parameter for a 768 x 3072 matrix), or one byte a parameter
    when not factored; 0.53 bytes more for an nf4 first moment, 1.03 for int8.

    Differences. From ``torch.optim.Adafactor``: tensors of more than two dimensions are factored as the most compact
    matrix of the same memory order (see ``plan.matrix_shape``), not over their last two dimensions; weight decay is
    scaled by alpha unless ``scale_weight_decay=False``, then by rho, which ``relative_step`` bounds, not by lr; eps1
    is resolved for each parameter. From ``adafactor8bit`` 0.2.4: row and column means are not quantised; the update
    uses the first moment before it is quantised; block sizes are powers of two up to 4096.

    Source: Shazeer & Stern 2018, arXiv:1804.04235, Algorithms 4 and 5; section 8 for beta2_decay. CAME: Luo et al.
    2023, arXiv:2307.02047, Algorithm 2. Limiter: Chen et al. 2024, arXiv:2410.01623, section 3.3.

    Example:
        >>> optimizer = a8multi.Adafactor8bit(model.parameters(), lr=1e-3, relative_step=False, beta2=0.999)
    """

    _op = "adafactor"
    _format_options = (
        "quantize",
        "factored",
        "first_moment",
        "block_size",
        "m_block_size",
        "min_8bit_size",
        "enable_fira_for_adafactor",
        "enable_fira_for_apollo",
        "apollo_rank",
        "apollo_factorize",
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        beta1: float | None = None,
        beta2: float | None = None,
        beta2_decay: float = -0.8,
        beta3: float | None = None,
        eps: tuple[float | None, float] = (None, 1e-3),
        weight_decay: float = 0.0,
        d: float = 1.0,
        maximize: bool = False,
        relative_step: bool = True,
        scale_parameter: bool = True,
        factored: bool = True,
        quantize: bool = True,
        block_size: int = 128,
        m_block_size: int = 128,
        min_8bit_size: int = 4096,
        use_cuda_kernel: bool = True,
        apollo_rank: int = 0,
        apollo_update_proj_gap: int = 200,
        apollo_scale_type: str = "channel",
        apollo_eps: float = 1e-8,
        apollo_factorize: bool = False,
        scale_weight_decay: bool = True,
        enable_fira_for_adafactor: bool = False,
        fira_margin: float = 0.01,
        *,
        first_moment: str | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_writeback: bool = False,
        seed: int = 0,
        capturable: bool = False,
        skip_nonfinite: bool = False,
        came_order: str = "paper",
        apollo_scale: float = 1.0,
        enable_fira_for_apollo: bool = True,
    ) -> None:
        super().__init__(params, options(locals()))

    def _check_group(self, group: Group) -> None:
        check_lr(group["lr"])
        for name in ("beta1", "beta2", "beta3"):
            if group[name] is not None:
                check_number(name, group[name], 0.0, 1.0)
        if not (isinstance(group["beta2_decay"], (int, float)) and -math.inf < group["beta2_decay"] <= 0):
            raise ValueError(f"beta2_decay must be a finite number <= 0, not {group['beta2_decay']!r}")
        if not isinstance(group["eps"], (tuple, list)) or len(group["eps"]) != 2:
            raise ValueError(f"eps must be two numbers, the first of them possibly None, not {group['eps']!r}")
        if group["eps"][0] is not None:
            check_number("eps[0]", group["eps"][0], 0.0)
        check_number("eps[1]", group["eps"][1], 0.0)
        check_number("weight_decay", group["weight_decay"], 0.0)
        check_number("d", group["d"], 0.0)
        check_number("min_8bit_size", group["min_8bit_size"], 0)
        check_seed(group["seed"])
        check_flags(group, self._named)
        check_number("fira_margin", group["fira_margin"], 0.0)
        if group["came_order"] not in _CAME_ORDERS:
            raise ValueError(f"came_order must be one of {', '.join(_CAME_ORDERS)}, not {group['came_order']!r}")
        if group["beta3"] is not None and (group["beta1"] is None or not group["factored"]):
            raise ValueError(
                f"beta3={group['beta3']!r} needs a first moment and row and column statistics: set beta1, and leave "
                f"factored=True"
            )
        check_block_size("block_size", group["block_size"])
        check_block_size("m_block_size", group["m_block_size"])
        if group["first_moment"] not in (None, *_FIRST_FORMATS):
            raise ValueError(
                f"first_moment must be None or one of {', '.join(_FIRST_FORMATS)}, not {group['first_moment']!r}"
            )
        self._check_apollo(group)

    def _moments(self, group: Group, param: Tensor) -> Moments:
        if self._is_projected(group, param):
            return self._projected_moments(group, param)
        min_numel = group["min_8bit_size"]
        first = second = None
        if group["beta1"] is not None:
            name = group["first_moment"] or "nf4" if group["quantize"] else "fp32"
            first = moment_spec(name, group["m_block_size"], param.numel(), min_numel)
        if param.ndim >= 2 and group["factored"]:
            second = MomentSpec(None)
        else:
            name = "log8" if group["quantize"] else "fp32"
            second = moment_spec(name, group["block_size"], param.numel(), min_numel)
        third = MomentSpec(None) if group["beta3"] is not None and second.format is None else None
        return Moments(first, second, third, group["enable_fira_for_adafactor"])

    def _hyper(self, group: Group, dtype: torch.dtype) -> dict[str, Any]:
        eps1, eps2 = group["eps"]
        flags = Flag.SCALE_PARAMETER if group["scale_parameter"] else Flag(0)
        flags |= Flag.SCALE_DECAY if group["scale_weight_decay"] else Flag(0)
        flags |= Flag.AVERAGE_UPDATE if _is_came(group) else Flag(0)
        return {
            **averages(*(group[name] or 0.0 for name in ("beta1", "beta2", "beta3"))),
            "eps": max(torch.finfo(dtype).eps if eps1 is None else eps1, _LEAST_EPS1),
            "eps2": eps2,
            "eps3": CONFIDENCE_EPS,
            "growth": 1.0 + group["fira_margin"],
            "weight_decay": group["weight_decay"],
            "clip": group["d"],
            "flags": int(flags) | common_flags(group),
        }

    def _schedule(self, group: Group) -> Schedule:
        rules = ScheduleRule(0)
        if group["relative_step"]:
            rules |= ScheduleRule.RELATIVE_STEP
        elif group["beta1"] is not None and not _is_came(group):
            rules |= ScheduleRule.CORRECT_BIAS
        beta1 = float(group["beta1"] or 0.0)
        if group["beta2"] is None:
            return Schedule(rules | ScheduleRule.BETA2_DECAYS, beta1, beta2_decay=float(group["beta2_decay"]))
        return Schedule(rules, beta1, float(group["beta2"]))

    def _backend(self, device: torch.device) -> Backend:
        if all(group["use_cuda_kernel"] for group in self.param_groups):
            return super()._backend(device)
        with use_backend("torch"):
            return backend_for(device, self._op)


def _is_came(group: Group) -> bool:
    """Whether the first moment averages the update, as in the paper, which has no bias corrections."""
    return group["beta3"] is not None and group["came_order"] == "paper"


Adafactor8Bit = Adafactor8bit  # the name that the package adafactor8bit gives it
