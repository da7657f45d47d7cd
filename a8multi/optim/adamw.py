"""Adam and AdamW with 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from a8multi.loader.structs import Flag, RuleKind, ScheduleRule
from a8multi.plan import Schedule

from .checks import check_number
from .elementwise import SIZES, ElementwiseOptimizer, averages, check_betas, options
from .roster import Group


class AdamW8bit(ElementwiseOptimizer):
    r"""AdamW with quantised moments: decoupled weight decay, as in :class:`torch.optim.AdamW`.

    Learning rate, betas, eps and weight decay have torch's defaults, so that nothing but the class has to be changed.
    State: 2.06 bytes a parameter with the defaults (one code for each moment, 8 bytes of headers a block of 128).
    Arithmetic is float32 whatever the parameter's type, and the same bits on every backend, instruction set and number
    of threads. With ``first_moment="fp32", second_moment="fp32"`` it equals :class:`torch.optim.AdamW`.

    Args:
        params: parameters or groups, float32, bfloat16 or float16; gradients may be of another of these types.
        lr: learning rate, >= 0; a float or a tensor of one element, read at every step: one on the device of the
            parameters by the kernels, without waiting for it, any other by the host.
        betas: decay of the first and of the second moment, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: >= 0; the parameter is multiplied by ``1 - lr * weight_decay`` before the update.
        maximize: ascend instead of descend.
        first_moment: "int8" (linear, scaled by the block's largest magnitude), "nf4" (4 bits), "bf16" or "fp32".
        second_moment: "log8" (8 bits of logarithm between the block's smallest and largest value) or "fp32".
        block_size: elements that share a header, a power of two from 32 to 4096.
        min_quantized_numel: parameters with fewer elements keep float32 moments.
        stochastic_rounding: of log8 codes. To nearest, an average with beta2 = 0.999 stalls as soon as a step changes
            it by less than half a code; rounded stochastically it is unbiased. The noise follows from seed, parameter
            number, step and element, so that replicas stay identical.
        stochastic_rounding_writeback: round bfloat16 and float16 parameters stochastically when they are written.
        seed: of the noise, 0 to 2**64 - 1.
        capturable: steps may be captured in a CUDA graph. The number of steps is then a tensor on the device, and all
            that follows from it is computed there, at every replay; a learning rate that is a tensor on the device is
            read there too, while anything else is as it was at the capture. Take a step before the capture. The bits
            are those of the same steps without a graph. On other devices nothing but the type of ``step`` changes.
        skip_nonfinite: skip a step whose gradients are not all finite, and do not count it. Decided on the device and
            not read back; ``skipped_steps`` tells how many there were. With torch.amp.GradScaler the gradients are
            unscaled by the step too. Steps are counted in tensors, as with ``capturable``.

    Raises:
        ValueError: naming the parameter that is not valid.

    Differences from ``torch.optim.AdamW``: no ``amsgrad``; ``step`` in the state is an int, with ``capturable`` an
    int64 tensor; ``capturable`` is not taken from a loaded state dict; a NaN or infinity in the gradient makes the
    whole block of 128 elements of an int8 or nf4 moment NaN, where torch loses one element.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2; block-wise 8-bit state: Dettmers et al. 2022,
    arXiv:2110.02861; nf4: Dettmers et al. 2023, arXiv:2305.14314, appendix E.

    Example:
        >>> optimizer = a8multi.AdamW8bit(model.parameters(), lr=1e-3)
        >>> loss.backward()
        >>> optimizer.step()
    """

    _rule = RuleKind.ADAM
    _format_options = ("first_moment", "second_moment", *SIZES)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
        return Schedule(ScheduleRule.ADAM_BIAS, float(beta1), float(beta2))


class Adam8bit(AdamW8bit):
    r"""Adam with quantised moments; weight decay is added to the gradient (L2), as in :class:`torch.optim.Adam`.

    Everything but the weight decay, whose default is 0, is as in :class:`AdamW8bit`; its arguments and notes apply.
    With ``first_moment="fp32", second_moment="fp32"`` it equals :class:`torch.optim.Adam`.

    Source: Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1.

    Example:
        >>> optimizer = a8multi.Adam8bit(model.parameters(), lr=1e-3)
        >>> loss.backward()
        >>> optimizer.step()
    """

    _decay_flag = Flag.L2_DECAY

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)
