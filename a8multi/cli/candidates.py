"""The optimizers that `a8multi bench` times: ours, torch's, and those of the peers that are installed.

Each row is data: what to import, and its options. Nothing is imported until it is built. A peer that cannot be built or
run on this machine raises whatever it raises: bench.py turns that into a row.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

LR = 1e-3
PEER_PACKAGES = ("bitsandbytes", "torchao", "adafactor8bit")
APOLLO_RANK = 256

Groups = list[Parameter] | list[dict[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """One row of a benchmark.

    Attributes:
        name: package and optimizer, with what differs from its defaults.
        target: its class, "module:class".
        options: arguments of the class; all that the row does not say is as its package has it.
        grouped: makes the groups of a list of parameters, where they do not all have the same options.
    """

    name: str
    target: str
    options: Mapping[str, Any] = field(default_factory=lambda: {"lr": LR})
    grouped: Callable[[list[Parameter]], Groups] = list

    @property
    def package(self) -> str:
        """What has to be importable."""
        return self.target.partition(":")[0].partition(".")[0]

    @property
    def optimizer_class(self) -> type[Optimizer]:
        """Imports it. Raises ImportError or AttributeError if it is not there."""
        module, _, name = self.target.partition(":")
        kind: type[Optimizer] = getattr(importlib.import_module(module), name)
        return kind

    def build(self, parameters: list[Parameter]) -> Optimizer:
        return self.optimizer_class(self.grouped(parameters), **self.options)


def _apollo_groups(parameters: list[Parameter]) -> Groups:
    """APOLLO_RANK, or the smaller dimension of a matrix where that is less; a group for each rank."""
    from a8multi.plan import matrix_shape

    groups: dict[int, list[Parameter]] = {}
    for parameter in parameters:
        rank = min(APOLLO_RANK, *matrix_shape(parameter.shape)) if parameter.ndim > 1 else APOLLO_RANK
        groups.setdefault(rank, []).append(parameter)
    return [{"params": members, "apollo_rank": rank} for rank, members in groups.items()]


def _row(name: str, target: str, grouped: Callable[[list[Parameter]], Groups] = list, **options: Any) -> Candidate:
    return Candidate(name, target, {"lr": LR, **options}, grouped)


# adafactor8bit has one class; with these options its rule is CAME's, or APOLLO's.
_PEER_CAME: dict[str, Any] = {"relative_step": False, "beta1": 0.9, "beta2": 0.999, "beta3": 0.9999}
_PEER_APOLLO: dict[str, Any] = {"relative_step": False, "beta1": 0.9, "beta2": 0.999}

# Every time is compared with this one, stepped in turns with the candidate.
REFERENCE = _row("torch AdamW fused", "torch.optim:AdamW", fused=True)

CANDIDATES = (
    _row("a8multi AdamW8bit", "a8multi:AdamW8bit"),
    _row("a8multi AdamW8bit nf4", "a8multi:AdamW8bit", first_moment="nf4"),
    _row("a8multi Lion8bit", "a8multi:Lion8bit"),
    _row("a8multi RMSprop8bit", "a8multi:RMSprop8bit"),
    _row("a8multi Adagrad8bit", "a8multi:Adagrad8bit"),
    _row("a8multi AdEMAMix8bit", "a8multi:AdEMAMix8bit"),
    _row("a8multi LAMB8bit", "a8multi:LAMB8bit"),
    _row("a8multi Adafactor8bit factored", "a8multi:Adafactor8bit"),
    _row("a8multi Adafactor8bit factored + nf4", "a8multi:Adafactor8bit", beta1=0.9),
    _row("a8multi Adafactor8bit full", "a8multi:Adafactor8bit", factored=False),
    _row("a8multi CAME8bit", "a8multi:CAME8bit"),
    _row("a8multi CAME8bit nf4", "a8multi:CAME8bit", first_moment="nf4"),
    _row("a8multi APOLLO8bit rank 256", "a8multi:APOLLO8bit", _apollo_groups),
    _row("torch AdamW foreach", "torch.optim:AdamW", foreach=True),
    _row("torch Adafactor", "torch.optim:Adafactor"),
    _row("bitsandbytes AdamW8bit", "bitsandbytes.optim:AdamW8bit"),
    _row("bitsandbytes Lion8bit", "bitsandbytes.optim:Lion8bit"),
    _row("torchao AdamW8bit", "torchao.optim:AdamW8bit"),
    _row("adafactor8bit factored", "adafactor8bit:Adafactor8Bit"),
    _row("adafactor8bit factored + momentum", "adafactor8bit:Adafactor8Bit", beta1=0.9),
    _row("adafactor8bit CAME", "adafactor8bit:Adafactor8Bit", **_PEER_CAME),
    _row("adafactor8bit APOLLO rank 256", "adafactor8bit:Adafactor8Bit", _apollo_groups, **_PEER_APOLLO),
)


def is_installed(package: str) -> bool:
    """Whether the package can be found; importing it may still fail."""
    return importlib.util.find_spec(package) is not None
