"""Adagrad with an 8-bit sum of squares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from a8multi.loader.structs import Flag, RuleKind, ScheduleRule
from a8multi.plan import Moments, Schedule

from .checks import check_number
from .elementwise import SIZES, ElementwiseOptimizer, options
from .roster import Group


class Adagrad8bit(ElementwiseOptimizer):
    r"""Adagrad with a quantised sum of squares, as :class:`torch.optim.Adagrad`.

    .. math::
        v \leftarrow v + g^2, \quad p \leftarrow p - \frac{lr}{1 + (t - 1)\, \eta} \frac{g}{\sqrt v + \epsilon}

    with :math:`g + \lambda p` in the place of g.

    Args:
        params: parameters or groups, float32, bfloat16 or float16.
        lr: learning rate, >= 0; a float or a tensor of one element, see :class:`AdamW8bit`.
        lr_decay: eta, >= 0.
        weight_decay: >= 0, added to the gradient (L2).
        initial_accumulator_value: what v begins with, >= 0.
        eps: added to the root, >= 0.
        maximize: ascend instead of descend.
        second_moment: "log8" or "fp32".
        block_size: elements that share a header, a power of two from 32 to 4096.
        min_quantized_numel: parameters with fewer elements keep a float32 sum.
        stochastic_rounding: of log8 codes. Needed here more than elsewhere: a step adds one part in t to the sum, which
            rounding to nearest would soon lose. See :class:`AdamW8bit`.
        stochastic_rounding_writeback, seed, capturable, skip_nonfinite: see :class:`AdamW8bit`.

    Raises:
        ValueError: naming the parameter that is not valid.

    Defaults are those of torch and bitsandbytes. State: 1.03 bytes a parameter. With ``second_moment="fp32"`` it equals
    :class:`torch.optim.Adagrad`.

    Differences from ``torch.optim.Adagrad``: the state is made at the first step, as by the other optimizers, not when
    the optimizer is built; sparse gradients are refused.

    Source: Duchi, Hazan & Singer 2011, Adaptive Subgradient Methods, Journal of Machine Learning Research 12, section
    1.3 (the diagonal case).

    Example:
        >>> optimizer = a8multi.Adagrad8bit(model.parameters(), lr=1e-2)
    """

    _rule = RuleKind.ADAGRAD
    _format_options = ("second_moment", *SIZES)
    _decay_flag = Flag.L2_DECAY

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
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
        for name in ("lr_decay", "initial_accumulator_value", "eps"):
            check_number(name, group[name], 0.0)

    def _moments(self, group: Group, param: Tensor) -> Moments:
        second = super()._moments(group, param).second
        assert second is not None
        return Moments(second=replace(second, start=float(group["initial_accumulator_value"])))

    def _fields(self, group: Group) -> dict[str, Any]:
        return {"eps": group["eps"]}

    def _schedule(self, group: Group) -> Schedule:
        return Schedule(ScheduleRule.UNBIASED | ScheduleRule.LR_DECAYS, decay=float(group["lr_decay"]))
