"""The optimizers of `a8multi train`, each 8-bit one beside the fp32 one that follows the same rule.

One home for their names, default learning rates and matched settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

Parameters = Iterable[Parameter]


@dataclass(frozen=True)
class Choice:
    """An optimizer that can be asked for by name.

    Attributes:
        twin: name of the same rule with the other kind of state.
        lr: default learning rate, one for both twins.
        op: what its step asks of an a8multi backend; None for an optimizer of torch.
        build: from parameters, learning rate, seed of the rounding noise, and the parameters' dtype.
    """

    twin: str
    lr: float
    op: str | None
    build: Callable[[Parameters, float, int, torch.dtype], Optimizer]


def _adamw8bit(parameters: Parameters, lr: float, seed: int, dtype: torch.dtype) -> Optimizer:
    import a8multi

    return a8multi.AdamW8bit(parameters, lr=lr, seed=seed, stochastic_rounding_writeback=dtype != torch.float32)


def _adafactor8bit(parameters: Parameters, lr: float, seed: int, dtype: torch.dtype) -> Optimizer:
    import a8multi

    # torch's rule, said in full: alpha = max(eps2, RMS(p)) * min(lr, 1 / sqrt(t)), no momentum, decay not scaled.
    return a8multi.Adafactor8bit(
        parameters,
        lr=lr,
        relative_step=True,
        scale_parameter=True,
        scale_weight_decay=False,
        seed=seed,
        stochastic_rounding_writeback=dtype != torch.float32,
    )


def _adamw(parameters: Parameters, lr: float, _seed: int, _dtype: torch.dtype) -> Optimizer:
    parameters = list(parameters)
    # The default loop is several times slower; other devices may have no fused kernel.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(parameters, lr=lr, fused=fused or None)


def _adafactor(parameters: Parameters, lr: float, _seed: int, _dtype: torch.dtype) -> Optimizer:
    return torch.optim.Adafactor(parameters, lr=lr)


# Adafactor's steps are relative to the RMS of a weight (0.02 at the start), hence the larger number.
OPTIMIZERS: dict[str, Choice] = {
    "adamw8bit": Choice("adamw", 1e-3, "elementwise", _adamw8bit),
    "adafactor8bit": Choice("adafactor", 3e-2, "adafactor", _adafactor8bit),
    "adamw": Choice("adamw8bit", 1e-3, None, _adamw),
    "adafactor": Choice("adafactor8bit", 3e-2, None, _adafactor),
}


def backend_name(choice: Choice, device: torch.device) -> str:
    """Which code runs the step: a backend of a8multi, or torch's own optimizer."""
    if choice.op is None:
        return "torch.optim"
    import a8multi

    return str(a8multi.backend_for(device, op=choice.op).name)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of memory that the tensors of the optimizer's state keep; what several of them share counts once."""
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in _plain_tensors(value):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _plain_tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors with memory of their own in a tensor, or in a subclass that wraps some (as torchao's state does)."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value
