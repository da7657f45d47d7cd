"""Lion with an 8-bit moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from a8multi.loader.structs import RuleKind, ScheduleRule
from a8multi.plan import Schedule

from .elementwise import SIZES, ElementwiseOptimizer, averages, check_betas, options
from .roster import Group


class Lion8bit(ElementwiseOptimizer):
    r"""Lion with a quantised moment: the sign of an average of the gradient.

    .. math::
        u = \mathrm{sign}(\beta_1 m + (1 - \beta_1) g), \quad m \leftarrow \beta_2 m + (1 - \beta_2) g, \quad
        p \leftarrow p (1 - lr\, \lambda) - lr\, u

    Args:
        params: parameters or groups, float32, bfloat16 or float16.
        lr: learning rate, >= 0; a float or a tensor of one element, see :class:`AdamW8bit`. Every element moves by lr
            in a step, so that it is three to ten times smaller than AdamW's.
        betas: of the average whose sign is taken, and of the moment that is kept, each in [0, 1).
        weight_decay: >= 0, decoupled; three to ten times AdamW's, since it is multiplied by lr.
        maximize: ascend instead of descend.
        first_moment: "int8", "nf4" (4 bits), "bf16" or "fp32".
        block_size: elements that share a header, a power of two from 32 to 4096.
        min_quantized_numel: parameters with fewer elements keep a float32 moment.
        stochastic_rounding: of int8 codes, as :class:`AdamW8bit` rounds log8. To nearest, small values of so slow an
            average stay where they are, and their signs with them: the loss ends 0.03 higher.
        stochastic_rounding_writeback, seed, capturable, skip_nonfinite: see :class:`AdamW8bit`.

    Raises:
        ValueError: naming the parameter that is not valid.

    Defaults are those of the paper and bitsandbytes. State: 1.03 bytes a parameter; 0.53 with ``first_moment="nf4"``.
    With ``first_moment="fp32"`` it equals the paper's algorithm; the sign of zero is zero.

    Source: Chen et al. 2023, arXiv:2302.06675, Algorithm 2; section 5 for learning rate and decay.

    Example:
        >>> optimizer = a8multi.Lion8bit(model.parameters(), lr=1e-4, weight_decay=0.1)
    """

    _rule = RuleKind.LION
    _format_options = ("first_moment", *SIZES)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
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

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_betas(group["betas"], 2)

    def _fields(self, group: Group) -> dict[str, Any]:
        return averages(*group["betas"])

    def _schedule(self, group: Group) -> Schedule:
        return Schedule(ScheduleRule.UNBIASED)
