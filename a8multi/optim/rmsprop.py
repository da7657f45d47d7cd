"""RMSprop with 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from a8multi.loader.structs import Flag, RuleKind, ScheduleRule
from a8multi.plan import Schedule

from .checks import check_number
from .elementwise import SIZES, ElementwiseOptimizer, averages, options
from .roster import Group


class RMSprop8bit(ElementwiseOptimizer):
    r"""RMSprop with quantised moments, as :class:`torch.optim.RMSprop`.

    .. math::
        v \leftarrow \alpha v + (1 - \alpha) g^2, \quad u = g / (\sqrt v + \epsilon), \quad
        b \leftarrow \mu b + u, \quad p \leftarrow p - lr\, b

    with :math:`g + \lambda p` in the place of g. ``centered``: :math:`v - \bar g^2` in the place of v in the root, and
    :math:`\bar g` averages g as v averages its square.

    Args:
        params: parameters or groups, float32, bfloat16 or float16.
        lr: learning rate, >= 0; a float or a tensor of one element, see :class:`AdamW8bit`.
        alpha: decay of the second moment, in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: >= 0, added to the gradient (L2).
        momentum: in [0, 1); 0: no first moment is kept.
        centered: divide by the standard deviation. Its two averages are always kept in float32: their difference is
            small, and where rounding makes it vanish the step is g / eps. With either of them in 8 bits, or the average
            gradient in bfloat16, steps a million times too long were measured.
        maximize: ascend instead of descend.
        first_moment: of the momentum, "int8", "nf4" (4 bits), "bf16" or "fp32".
        second_moment: "log8" or "fp32".
        block_size: elements that share a header, a power of two from 32 to 4096.
        min_quantized_numel: parameters with fewer elements keep float32 moments.
        stochastic_rounding, stochastic_rounding_writeback, seed, capturable, skip_nonfinite: see :class:`AdamW8bit`.

    Raises:
        ValueError: naming the parameter that is not valid.

    Defaults are those of torch and bitsandbytes. State: 1.03 bytes a parameter, with momentum 2.06; centered, 8 and
    9.03. With ``first_moment="fp32", second_moment="fp32"`` it equals :class:`torch.optim.RMSprop`.

    Differences from ``torch.optim.RMSprop``: a difference :math:`v - \bar g^2` that rounding made negative counts as
    zero, where torch gives NaN; a momentum that is switched on later begins at zero.

    Source: Hinton 2012, Neural Networks for Machine Learning, lecture 6e; centered: Graves 2013, arXiv:1308.0850,
    equations 38 to 45.

    Example:
        >>> optimizer = a8multi.RMSprop8bit(model.parameters(), lr=1e-3, momentum=0.9)
    """

    _rule = RuleKind.RMSPROP
    _format_options = ("first_moment", "second_moment", *SIZES)
    _decay_flag = Flag.L2_DECAY

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        first_moment: str = "int8",
        second_moment: str = "log8",
        block_size: int = 128,
        min_quantized_numel: int = 4096,
        stochastic_rounding: bool = True,
        stochastic_rounding_writeback: bool = False,
        seed: int = 0,
        capturable: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(params, options(locals()))

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("alpha", group["alpha"], 0.0, 1.0)
        check_number("eps", group["eps"], 0.0)
        check_number("momentum", group["momentum"], 0.0, 1.0)

    def _format_of(self, group: Group, moment: str) -> str | None:
        if moment == "first_moment" and not group["momentum"]:
            return None
        if moment != "first_moment" and group["centered"]:
            return "fp32"
        return super()._format_of(group, moment)

    def _fields(self, group: Group) -> dict[str, Any]:
        alpha = group["alpha"]
        fields = averages(group["momentum"], alpha, alpha)
        if not group["centered"]:
            fields.update(beta3=0.0, one_minus_beta3=0.0)
        return {**fields, "eps": group["eps"]}

    def _schedule(self, group: Group) -> Schedule:
        return Schedule(ScheduleRule.UNBIASED)
