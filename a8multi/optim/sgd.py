"""SGD with an 8-bit momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from a8multi.loader.structs import Flag, RuleKind, ScheduleRule
from a8multi.plan import Schedule

from .checks import check_number
from .elementwise import SIZES, ElementwiseOptimizer, options
from .roster import Group


class MomentumOptimizer(ElementwiseOptimizer):
    """What SGD8bit and LARS8bit share; not for use by itself."""

    _format_options = ("first_moment", *SIZES)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("momentum", group["momentum"], 0.0, 1.0)
        check_number("dampening", group["dampening"], 0.0)
        if group["nesterov"] and (not group["momentum"] or group["dampening"]):
            raise ValueError(
                f"nesterov=True needs a momentum and no dampening, not momentum={group['momentum']!r}, "
                f"dampening={group['dampening']!r}"
            )

    def _format_of(self, group: Group, moment: str) -> str | None:
        return super()._format_of(group, moment) if group["momentum"] else None

    def _fields(self, group: Group) -> dict[str, Any]:
        # Without momentum torch does not dampen either; with it the schedule says how much of the gradient enters.
        return {"beta1": group["momentum"], "one_minus_beta1": 1.0}

    def _flags(self, group: Group) -> int:
        return super()._flags(group) | (Flag.NESTEROV if group["nesterov"] else 0)

    def _schedule(self, group: Group) -> Schedule:
        if not group["momentum"]:
            return Schedule(ScheduleRule.UNBIASED)
        return Schedule(ScheduleRule.UNBIASED | ScheduleRule.FIRST_WHOLE, decay=float(group["dampening"]))


class SGD8bit(MomentumOptimizer):
    r"""SGD whose momentum is quantised, as :class:`torch.optim.SGD`.

    .. math::
        m \leftarrow \mu m + (1 - \tau) g, \quad p \leftarrow p - lr\, m

    with :math:`g + \lambda p` in the place of g, the whole of it at the first step. ``nesterov``: :math:`g + \mu m` in
    the place of m in the step.

    Args:
        params: parameters or groups, float32, bfloat16 or float16.
        lr: learning rate, >= 0; a float or a tensor of one element, see :class:`AdamW8bit`.
        momentum: mu, in [0, 1); 0: no moment is kept, and nothing but the number of steps.
        dampening: tau, >= 0; without momentum it does nothing, as in torch.
        weight_decay: >= 0, added to the gradient (L2).
        nesterov: Nesterov's momentum; needs a momentum and no dampening.
        maximize: ascend instead of descend.
        first_moment: "int8", "nf4" (4 bits), "bf16" or "fp32".
        block_size: elements that share a header, a power of two from 32 to 4096.
        min_quantized_numel: parameters with fewer elements keep a float32 moment.
        stochastic_rounding: of log8 codes: none here. Taken so that the optimizers have the same options.
        stochastic_rounding_writeback, seed, capturable, skip_nonfinite: see :class:`AdamW8bit`.

    Raises:
        ValueError: naming the parameter that is not valid.

    Defaults are those of torch. State: 1.03 bytes a parameter with momentum, none without. With ``first_moment="fp32"``
    it equals :class:`torch.optim.SGD`.

    Differences from ``torch.optim.SGD``: a momentum that is switched on later begins at zero, not with the whole
    gradient of that step. From bitsandbytes: momentum may be 0, and lr has a default.

    Source: Sutskever et al. 2013, On the importance of initialization and momentum in deep learning, section 2; in the
    form of torch, where the learning rate is outside of the momentum.

    Example:
        >>> optimizer = a8multi.SGD8bit(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    """

    _rule = RuleKind.SGD
    _decay_flag = Flag.L2_DECAY

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        first_moment: str = "int8",
        block_size: int = 128,
        min_quantized_numel: int = 4096,
        stochastic_rounding: bool = True,
        stochastic_rounding_writeback: bool = False,
        seed: int = 0,
        capturable: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(params, options(locals()))
