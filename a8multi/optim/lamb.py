"""LAMB with 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from a8multi.loader.structs import RuleKind, ScheduleRule
from a8multi.plan import Schedule

from .checks import check_number
from .elementwise import SIZES, ElementwiseOptimizer, averages, check_betas, options
from .roster import Group


class LAMB8bit(ElementwiseOptimizer):
    r"""LAMB with quantised moments: Adam with a step size for each tensor.

    .. math::
        u = \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda p, \quad p \leftarrow p - lr\, \frac{|p|}{|u|}\, u

    with m and v the moments of Adam; the ratio of the norms is 1 if either is zero.

    Args:
        params: parameters or groups, float32, bfloat16 or float16. The norms are those of each parameter.
        lr: learning rate, >= 0; a float or a tensor of one element, see :class:`AdamW8bit`. A step changes a tensor by
            lr of its norm.
        bias_correction: correct the moments for their bias, as in the paper.
        betas: decay of the first and of the second moment, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: lambda, >= 0; part of the update whose norm is taken.
        maximize: ascend instead of descend.
        first_moment: "int8", "nf4" (4 bits), "bf16" or "fp32".
        second_moment: "log8" or "fp32".
        block_size: elements that share a header, a power of two from 32 to 4096.
        min_quantized_numel: parameters with fewer elements keep float32 moments.
        stochastic_rounding, stochastic_rounding_writeback, seed, capturable, skip_nonfinite: see :class:`AdamW8bit`.

    Raises:
        ValueError: naming the parameter that is not valid.

    Defaults are those of bitsandbytes. State: 2.06 bytes a parameter. With ``first_moment="fp32"`` and
    ``second_moment="fp32"`` it equals the paper's algorithm with :math:`\phi(z) = z`.

    Differences from bitsandbytes: ``amsgrad``, ``adam_w_mode`` and ``max_unorm`` are not arguments; its 8-bit LAMB has
    no ratio of norms at all, so that learning rates found with it do not carry over.

    Source: You et al. 2020, arXiv:1904.00962, Algorithm 2.

    Example:
        >>> optimizer = a8multi.LAMB8bit(model.parameters(), lr=2e-3, weight_decay=1e-2)
    """

    _rule = RuleKind.LAMB
    _format_options = ("first_moment", "second_moment", *SIZES)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
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
        check_betas(group["betas"], 2)
        check_number("eps", group["eps"], 0.0)

    def _fields(self, group: Group) -> dict[str, Any]:
        return {**averages(*group["betas"]), "eps": group["eps"]}

    def _schedule(self, group: Group) -> Schedule:
        beta1, beta2 = group["betas"]
        rule = ScheduleRule.ADAM_BIAS if group["bias_correction"] else ScheduleRule.UNBIASED
        return Schedule(rule, float(beta1), float(beta2))
