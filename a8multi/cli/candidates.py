"""The optimizers that `a8multi bench` times: ours, torch's, and those of the peers that are installed.

Each entry says how its package builds it; nothing is imported until it is asked for. A peer that cannot be built or
run on this machine raises whatever it raises: bench.py turns that into a row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

LR = 1e-3
PEER_PACKAGES = ("bitsandbytes", "torchao", "adafactor8bit")


@dataclass(frozen=True)
class Candidate:
    """One row of the benchmark.

    Attributes:
        name: package and optimizer, with what differs from its defaults.
        package: what has to be importable.
        build: the optimizer of a list of parameters.
    """

    name: str
    package: str
    build: Callable[[list[Parameter]], Optimizer]


def _torch_adamw_fused(parameters: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, fused=True)


def _torch_adamw_foreach(parameters: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, foreach=True)


def _torch_adafactor(parameters: list[Parameter]) -> Optimizer:
    return torch.optim.Adafactor(parameters, lr=LR)


def _adamw8bit(parameters: list[Parameter]) -> Optimizer:
    import a8multi

    return a8multi.AdamW8bit(parameters, lr=LR)


def _adamw8bit_nf4(parameters: list[Parameter]) -> Optimizer:
    import a8multi

    return a8multi.AdamW8bit(parameters, lr=LR, first_moment="nf4")


def _adafactor8bit(parameters: list[Parameter]) -> Optimizer:
    import a8multi

    return a8multi.Adafactor8bit(parameters, lr=LR)


def _adafactor8bit_nf4(parameters: list[Parameter]) -> Optimizer:
    import a8multi

    return a8multi.Adafactor8bit(parameters, lr=LR, beta1=0.9)


def _adafactor8bit_full(parameters: list[Parameter]) -> Optimizer:
    import a8multi

    return a8multi.Adafactor8bit(parameters, lr=LR, factored=False)


def _bitsandbytes(parameters: list[Parameter]) -> Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=LR)


def _torchao(parameters: list[Parameter]) -> Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=LR)


def _peer_adafactor8bit(parameters: list[Parameter]) -> Optimizer:
    from adafactor8bit import Adafactor8Bit

    return Adafactor8Bit(parameters, lr=LR)


def _peer_adafactor8bit_nf4(parameters: list[Parameter]) -> Optimizer:
    from adafactor8bit import Adafactor8Bit

    return Adafactor8Bit(parameters, lr=LR, beta1=0.9)


# Every time is compared with this one, stepped in turns with the candidate.
REFERENCE = Candidate("torch AdamW fused", "torch", _torch_adamw_fused)

CANDIDATES = (
    Candidate("a8multi AdamW8bit", "a8multi", _adamw8bit),
    Candidate("a8multi AdamW8bit nf4", "a8multi", _adamw8bit_nf4),
    Candidate("a8multi Adafactor8bit factored", "a8multi", _adafactor8bit),
    Candidate("a8multi Adafactor8bit factored + nf4", "a8multi", _adafactor8bit_nf4),
    Candidate("a8multi Adafactor8bit full", "a8multi", _adafactor8bit_full),
    Candidate("torch AdamW foreach", "torch", _torch_adamw_foreach),
    Candidate("torch Adafactor", "torch", _torch_adafactor),
    Candidate("bitsandbytes AdamW8bit", "bitsandbytes", _bitsandbytes),
    Candidate("torchao AdamW8bit", "torchao", _torchao),
    Candidate("adafactor8bit factored", "adafactor8bit", _peer_adafactor8bit),
    Candidate("adafactor8bit factored + momentum", "adafactor8bit", _peer_adafactor8bit_nf4),
)


def is_installed(package: str) -> bool:
    """Whether the package can be found; importing it may still fail."""
    return importlib.util.find_spec(package) is not None
