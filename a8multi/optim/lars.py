"""LARS with an 8-bit momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from a8multi.loader.structs import RuleKind

from .checks import check_number
from .elementwise import options
from .roster import Group
from .sgd import MomentumOptimizer


class LARS8bit(MomentumOptimizer):
    r"""LARS whose momentum is quantised: SGD with a learning rate for each tensor.

    .. math::
        \eta = c\, |p| / (|g| + \lambda |p| + \epsilon), \quad
        m \leftarrow \mu m + (1 - \tau)\, \eta (g + \lambda p), \quad p \leftarrow p - lr\, m

    where :math:`\eta = 1` if either norm is zero, and the first step has no dampening.

    Args:
        params: parameters or groups, float32, bfloat16 or float16. The norms are those of each parameter.
        lr: learning rate, >= 0; a float or a tensor of one element, see :class:`AdamW8bit`. With 1, without momentum, a
            step changes a tensor by ``trust_coefficient`` of its norm: learning rates of SGD are far too small here.
        momentum: mu, in [0, 1); 0: no moment is kept, and nothing but the number of steps.
        dampening: tau, >= 0; without momentum it does nothing.
        weight_decay: lambda, >= 0.
        nesterov: Nesterov's momentum; needs a momentum and no dampening.
        trust_coefficient: c, > 0; the paper trains with 0.001.
        eps: added to the denominator, >= 0; the paper has none.
        maximize: ascend instead of descend.
        first_moment: "int8", "nf4" (4 bits), "bf16" or "fp32".
        block_size: elements that share a header, a power of two from 32 to 4096.
        min_quantized_numel: parameters with fewer elements keep a float32 moment.
        stochastic_rounding: of log8 codes: none here. Taken so that the optimizers have the same options.
        stochastic_rounding_writeback, seed, capturable, skip_nonfinite: see :class:`AdamW8bit`.

    Raises:
        ValueError: naming the parameter that is not valid.

    Defaults: trust_coefficient and eps are the paper's, momentum, dampening, weight_decay and nesterov those of torch's
    SGD and bitsandbytes; lr is 1 because trust_coefficient is the step size. State: 1.03 bytes a parameter with
    momentum, none without. With ``first_moment="fp32"`` it equals the paper's algorithm while lr is constant.

    Differences. From the paper: lr is outside of the momentum, as in :class:`torch.optim.SGD`, so that a new learning
    rate acts at once. From bitsandbytes: its ``max_unorm``, which bounds the update by a share of the parameter's norm,
    is another rule, which its 8-bit steps leave out, and not an argument here; momentum may be 0, and lr has a default.
    Biases and gains of norms are commonly left to :class:`SGD8bit`.

    Source: You, Gitman & Ginsburg 2017, arXiv:1708.03888, Algorithm 1.

    Example:
        >>> optimizer = a8multi.LARS8bit(model.parameters(), lr=2.0, momentum=0.9, weight_decay=5e-4)
    """

    _rule = RuleKind.LARS

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
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
        check_number("trust_coefficient", group["trust_coefficient"], 0.0, least_open=True)
        check_number("eps", group["eps"], 0.0)

    def _fields(self, group: Group) -> dict[str, Any]:
        return {**super()._fields(group), "trust": group["trust_coefficient"], "eps": group["eps"]}
