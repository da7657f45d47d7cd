"""CAME with quantised moments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from a8multi.loader.structs import Flag, ScheduleRule
from a8multi.plan import Moments, MomentSpec, Schedule
from a8multi.quant.formats import check_block_size

from .base import LowBitOptimizer
from .checks import check_flags, check_lr, check_number, check_seed
from .elementwise import averages, check_betas, common_flags, moment_spec, options
from .roster import Group

_FIRST_FORMATS = ("int8", "nf4", "bf16", "fp32")
# Its square is the smallest normal float32.
_LEAST_ROOT = 1.1e-19


class CAME8bit(LowBitOptimizer):
    r"""CAME: Adafactor whose update is averaged and divided by how far it strays from its average.

    With :math:`u = g / \sqrt{\hat v}` of the factored second moment, clipped to :math:`RMS(u) \le d`:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) u, \quad
        s \leftarrow \beta_3 s + (1 - \beta_3) ((u - m)^2 + \epsilon_2), \quad
        p \leftarrow p (1 - lr\, \lambda) - lr\, m / \sqrt{\hat s}

    where s, the confidence, is kept as means over rows and columns too. There are no bias corrections. Parameters of
    one dimension keep an element-wise second moment and have no confidence: their step is m.

    Args:
        params: parameters or groups, float32, bfloat16 or float16.
        lr: learning rate, >= 0; a float or a tensor of one element, see :class:`AdamW8bit`. The paper trains with about
            the learning rates of AdamW, or half of them.
        betas: decays of the first moment, the second, and the confidence, each in [0, 1). These, eps and clip_threshold
            have the defaults of the authors' code.
        eps: (epsilon_1, epsilon_2): the least value of the second moment, and what is added to the squared residual.
        clip_threshold: d, bound on the update's RMS before it is averaged, >= 0; 0 disables it.
        weight_decay: >= 0, decoupled: the parameter is multiplied by ``1 - lr * weight_decay``.
        maximize: ascend instead of descend.
        first_moment: "int8", "nf4" (4 bits), "bf16" or "fp32".
        second_moment: of parameters of one dimension, "log8" or "fp32"; row and column means are float32.
        block_size: elements that share a header, a power of two from 32 to 4096.
        min_quantized_numel: parameters with fewer elements keep float32 moments.
        enable_fira, fira_margin: limit the growth of the update's norm, see :class:`Adafactor8bit`.
        stochastic_rounding, stochastic_rounding_writeback, seed, capturable, skip_nonfinite: see :class:`AdamW8bit`.

    Raises:
        ValueError: naming the parameter that is not valid.

    State: 1.05 bytes a parameter with the defaults (an int8 average, and four vectors of means a matrix); 0.55 with
    ``first_moment="nf4"``. int8 is the default because the residual is taken from the average: what rounding does to it
    is mistaken for disagreement.

    Differences from the paper: epsilon_1 bounds the second moment from below where the paper adds it to the squared
    gradient; tensors of more than two dimensions are factored as the most compact matrix of the same memory order.

    Source: Luo et al. 2023, arXiv:2307.02047, Algorithm 2.

    Example:
        >>> optimizer = a8multi.CAME8bit(model.parameters(), lr=2e-4, weight_decay=1e-2)
    """

    _op = "adafactor"
    _format_options = ("first_moment", "second_moment", "block_size", "min_quantized_numel", "enable_fira")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        first_moment: str = "int8",
        second_moment: str = "log8",
        block_size: int = 128,
        min_quantized_numel: int = 4096,
        enable_fira: bool = False,
        fira_margin: float = 0.01,
        stochastic_rounding: bool = True,
        stochastic_rounding_writeback: bool = False,
        seed: int = 0,
        capturable: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(params, options(locals()))

    def _check_group(self, group: Group) -> None:
        check_lr(group["lr"])
        check_betas(group["betas"], 3)
        if not isinstance(group["eps"], (tuple, list)) or len(group["eps"]) != 2:
            raise ValueError(f"eps must be two numbers, not {group['eps']!r}")
        for i, eps in enumerate(group["eps"]):
            check_number(f"eps[{i}]", eps, 0.0)
        for name in ("clip_threshold", "weight_decay", "min_quantized_numel", "fira_margin"):
            check_number(name, group[name], 0.0)
        check_seed(group["seed"])
        check_flags(group)
        check_block_size("block_size", group["block_size"])
        for name, known in (("first_moment", _FIRST_FORMATS), ("second_moment", ("log8", "fp32"))):
            if group[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {group[name]!r}")

    def _moments(self, group: Group, param: Tensor) -> Moments:
        least = group["min_quantized_numel"]
        first = moment_spec(group["first_moment"], group["block_size"], param.numel(), least)
        if param.ndim >= 2:
            return Moments(first, MomentSpec(None), MomentSpec(None), group["enable_fira"])
        second = moment_spec(group["second_moment"], group["block_size"], param.numel(), least)
        return Moments(first, second, None, group["enable_fira"])

    def _hyper(self, group: Group, dtype: torch.dtype) -> dict[str, Any]:
        return {
            **averages(*group["betas"]),
            "eps": max(math.sqrt(group["eps"][0]), _LEAST_ROOT),
            "eps3": group["eps"][1],
            "weight_decay": group["weight_decay"],
            "clip": group["clip_threshold"],
            "growth": 1.0 + group["fira_margin"],
            "flags": int(Flag.AVERAGE_UPDATE) | common_flags(group),
        }

    def _schedule(self, group: Group) -> Schedule:
        beta1, beta2, _ = group["betas"]
        return Schedule(ScheduleRule(0), float(beta1), float(beta2))
