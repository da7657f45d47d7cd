"""AdEMAMix with 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from a8multi.loader.structs import RuleKind, ScheduleRule
from a8multi.plan import Schedule

from .checks import check_number
from .elementwise import SIZES, ElementwiseOptimizer, averages, check_betas, options
from .roster import Group


class AdEMAMix8bit(ElementwiseOptimizer):
    r"""AdEMAMix: AdamW with a second, slow average of the gradient; its two fast moments are quantised.

    .. math::
        m_1 \leftarrow \beta_1 m_1 + (1 - \beta_1) g, \quad m_2 \leftarrow \beta_3 m_2 + (1 - \beta_3) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        p \leftarrow p (1 - lr\, \lambda) - lr\, \frac{\hat m_1 + \alpha m_2}{\sqrt{\hat v} + \epsilon}

    where :math:`\hat m_1` and :math:`\hat v` are corrected for their bias as in Adam.

    Args:
        params: parameters or groups, float32, bfloat16 or float16.
        lr: learning rate, >= 0; a float or a tensor of one element, see :class:`AdamW8bit`.
        betas: decay of the fast average, of the squares, and of the slow average, each in [0, 1).
        alpha: weight of the slow average, >= 0.
        t_alpha: steps over which alpha grows evenly from 0, >= 0; None: it is constant.
        t_beta3: steps over which beta3 grows from beta1 so that the average's half-life grows evenly, >= 0; None: it is
            constant. The paper sets both to the number of all steps; without them the early steps may diverge.
        eps: added to the root of the second moment, >= 0.
        weight_decay: >= 0, decoupled.
        maximize: ascend instead of descend.
        first_moment: of the fast average, "int8", "nf4" (4 bits), "bf16" or "fp32".
        second_moment: "log8" or "fp32".
        third_moment: of the slow average, as ``first_moment``. "fp32", because a step changes it by a ten-thousandth:
            rounded to nearest it stalls. Measured error of the slow average with beta3 = 0.9999: int8 0.3 to 0.7 after
            2000 steps, bf16 0.05 after 2000 and 0.4 after 20,000.
        block_size: elements that share a header, a power of two from 32 to 4096.
        min_quantized_numel: parameters with fewer elements keep float32 moments.
        stochastic_rounding, stochastic_rounding_writeback, seed, capturable, skip_nonfinite: see :class:`AdamW8bit`.

    Raises:
        ValueError: naming the parameter that is not valid.

    The other defaults are those of bitsandbytes. State: 6.06 bytes a parameter; 3.09 with ``third_moment="int8"``. With
    "fp32" for each moment it equals the paper's algorithm.

    Differences from bitsandbytes: the formats of the two averages are separate.

    Source: Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137, Algorithm 1; section 3.1 for the two schedules.

    Example:
        >>> optimizer = a8multi.AdEMAMix8bit(model.parameters(), lr=1e-3, t_alpha=100_000, t_beta3=100_000)
    """

    _rule = RuleKind.ADEMAMIX
    _format_options = ("first_moment", "second_moment", "third_moment", *SIZES)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        first_moment: str = "int8",
        second_moment: str = "log8",
        third_moment: str = "fp32",
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
        check_betas(group["betas"], 3)
        check_number("alpha", group["alpha"], 0.0)
        check_number("eps", group["eps"], 0.0)
        for name in ("t_alpha", "t_beta3"):
            if group[name] is not None:
                check_number(name, group[name], 0.0)

    def _fields(self, group: Group) -> dict[str, Any]:
        return {**averages(*group["betas"]), "mix": group["alpha"], "eps": group["eps"]}

    def _schedule(self, group: Group) -> Schedule:
        rules = ScheduleRule.ADAM_BIAS
        rules |= ScheduleRule.MIX_WARMS_UP if group["t_alpha"] else ScheduleRule(0)
        rules |= ScheduleRule.BETA3_WARMS_UP if group["t_beta3"] else ScheduleRule(0)
        beta1, beta2, beta3 = map(float, group["betas"])
        return Schedule(
            rules,
            beta1,
            beta2,
            beta3=beta3,
            mix=float(group["alpha"]),
            mix_steps=float(group["t_alpha"] or 0),
            beta3_steps=float(group["t_beta3"] or 0),
        )
