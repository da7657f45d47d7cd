"""Checks of the optimizers' arguments: each raises ValueError that names the parameter."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from a8multi.plan.step_plan import DTYPES

# Every option of every optimizer that is either True or False.
_FLAGS = (
    *("maximize", "stochastic_rounding", "stochastic_rounding_writeback", "capturable", "skip_nonfinite"),
    *("nesterov", "centered", "bias_correction", "enable_fira"),
    *("quantize", "factored", "relative_step", "scale_parameter", "scale_weight_decay", "use_cuda_kernel"),
    *("enable_fira_for_adafactor", "enable_fira_for_apollo", "apollo_factorize"),
)


def check_number(name: str, value: Any, least: float, below: float = math.inf, *, least_open: bool = False) -> None:
    """Raise ValueError unless ``value`` is a finite number in [least, below)."""
    is_tensor = isinstance(value, Tensor)
    one = value.numel() == 1 and not value.is_complex() if is_tensor else isinstance(value, numbers.Real)
    number = float(value) if one and not isinstance(value, bool) else math.nan
    if not (least <= number < below) or (least_open and number == least):
        bounds = f"{'>' if least_open else '>='} {least:g}" + ("" if below == math.inf else f" and < {below:g}")
        raise ValueError(f"{name} must be a finite number {bounds}, not {value!r}")


def check_lr(lr: Any) -> None:
    """Raise ValueError unless ``lr`` is a finite number >= 0, a tensor of one such, or one of any on another device."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, not of shape {tuple(lr.shape)}")
    # To look at a number on another device is to wait for that device.
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        check_number("lr", lr, 0.0)


def check_seed(seed: Any) -> None:
    """Raise ValueError unless ``seed`` is an integer from 0 to 2**64 - 1."""
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, not {seed!r}")


def check_flags(group: dict[str, Any], names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise ValueError unless every flag that a group has is True or False: "false" from a file would count as True.

    names: what the message calls an option, where that is not its name in the group.
    """
    for name in _FLAGS:
        if not isinstance(group.get(name, False), bool):
            raise ValueError(f"{names.get(name, name)} must be True or False, not {group[name]!r}")


def check_grad(param: Tensor, grad: Tensor, name: Callable[[], str]) -> None:
    """Raise ValueError unless a step takes the gradient. name: of the parameter."""
    if grad.layout is not torch.strided:
        problem = "sparse gradients are not supported; build the embedding with sparse=False"
    elif grad.dtype not in DTYPES or param.dtype not in DTYPES:
        problem = f"{grad.dtype} for a parameter of {param.dtype} is not supported"
    elif grad.shape != param.shape or grad.device != param.device:
        problem = (
            f"shape {tuple(grad.shape)} on {grad.device} does not fit the parameter's {tuple(param.shape)} on "
            f"{param.device}"
        )
    else:
        return
    raise ValueError(f"gradient of {name()}: {problem}")


def check_params(params: Sequence[Tensor]) -> None:
    """Raise ValueError unless a step takes all parameters of a group, each of which is there once."""
    for param in params:
        _check_param(param)
    if len(set(map(id, params))) < len(params):
        raise ValueError("params: a parameter is in the group twice, and would have two states; give it once")


def _check_param(param: Tensor) -> None:
    if hasattr(param, "full_tensor"):
        raise ValueError(
            "params: a DTensor (of fully_shard or a tensor-parallel layer) is not supported yet; "
            "DistributedDataParallel and ZeroRedundancyOptimizer are"
        )
    if param.is_complex():
        raise ValueError("params: complex parameters are not supported; optimize torch.view_as_real(param) instead")
    if param.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"params: a parameter of {param.dtype} is not supported, only {known}")
