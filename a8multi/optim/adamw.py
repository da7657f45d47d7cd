"""Adam and AdamW with 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from a8multi.loader.structs import Flag, ScheduleRule
from a8multi.plan import Moments, MomentSpec, Schedule
from a8multi.quant.formats import FORMATS, check_block_size

from .base import LowBitOptimizer, check_flag, check_lr, check_number, check_seed
from .roster import Group

_FIRST_FORMATS = ("int8", "nf4", "bf16", "fp32")
_SECOND_FORMATS = ("log8", "fp32")


class AdamW8bit(LowBitOptimizer):
    r"""AdamW with quantised moments: decoupled weight decay, as in :class:`torch.optim.AdamW`.

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

    _op = "elementwise"
    _format_options = ("first_moment", "second_moment", "block_size", "min_quantized_numel")
    _decay_flag: ClassVar[int] = 0

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
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "first_moment": first_moment,
                "second_moment": second_moment,
                "block_size": block_size,
                "min_quantized_numel": min_quantized_numel,
                "stochastic_rounding": stochastic_rounding,
                "stochastic_rounding_writeback": stochastic_rounding_writeback,
                "seed": seed,
                "capturable": capturable,
            },
        )

    def _check_group(self, group: Group) -> None:
        check_lr(group["lr"])
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, not {betas!r}")
        check_number("betas[0]", betas[0], 0.0, 1.0)
        check_number("betas[1]", betas[1], 0.0, 1.0)
        check_number("eps", group["eps"], 0.0)
        check_number("weight_decay", group["weight_decay"], 0.0)
        check_number("min_quantized_numel", group["min_quantized_numel"], 0)
        check_seed(group["seed"])
        check_flag("capturable", group["capturable"])
        check_block_size("block_size", group["block_size"])
        for name, known in (("first_moment", _FIRST_FORMATS), ("second_moment", _SECOND_FORMATS)):
            if group[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {group[name]!r}")

    def _moments(self, group: Group, param: Tensor) -> Moments:
        return Moments(
            moment_spec(group["first_moment"], group["block_size"], param, group["min_quantized_numel"]),
            moment_spec(group["second_moment"], group["block_size"], param, group["min_quantized_numel"]),
        )

    def _hyper(self, group: Group, dtype: torch.dtype) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        flags = self._decay_flag if group["weight_decay"] else 0
        return {
            "beta1": beta1,
            "beta2": beta2,
            "one_minus_beta1": 1.0 - beta1,
            "one_minus_beta2": 1.0 - beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "flags": flags | common_flags(group),
        }

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


def moment_spec(name: str, block_size: int, param: Tensor, min_numel: int) -> MomentSpec:
    """The format of that name, or float32 where the parameter is too small to be quantised."""
    fmt = FORMATS[name]
    if not fmt.quantized:
        return MomentSpec(fmt)
    return MomentSpec(fmt, block_size) if param.numel() >= min_numel else MomentSpec(FORMATS["fp32"])


def common_flags(group: Group) -> int:
    """Bits of ``a8_hyper.flags`` that every optimizer has."""
    flags = Flag.MAXIMIZE if group["maximize"] else 0
    flags |= Flag.STOCHASTIC_STATE if group["stochastic_rounding"] else 0
    flags |= Flag.STOCHASTIC_WRITE if group["stochastic_rounding_writeback"] else 0
    return int(flags)
