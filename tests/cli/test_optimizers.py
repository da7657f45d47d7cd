"""The optimizers of `a8multi train` and what their state weighs."""

from __future__ import annotations

from typing import Any

import torch

from a8multi.cli.optimizers import OPTIMIZERS, state_bytes


def test_twins_are_mutual_and_start_at_the_same_rate() -> None:
    for name, choice in OPTIMIZERS.items():
        twin = OPTIMIZERS[choice.twin]
        assert twin.twin == name
        assert twin.lr == choice.lr
        assert (twin.op is None) != (choice.op is None)


def test_state_bytes_counts_memory_once_and_inside_wrappers() -> None:
    class Wrapper:
        """As a traceable wrapper subclass looks to state_bytes."""

        def __init__(self) -> None:
            self.codes, self.scale = torch.zeros(40, dtype=torch.uint8), torch.zeros(2)

        def __tensor_flatten__(self) -> tuple[list[str], Any]:
            return ["codes", "scale"], None

    one, other = (torch.nn.Parameter(torch.zeros(10)) for _ in range(2))
    optimizer = torch.optim.SGD([one, other], lr=1.0)
    table = torch.zeros(256)
    optimizer.state[one] = {"step": 3, "table": table, "moment": torch.zeros(10, dtype=torch.bfloat16)}
    optimizer.state[other] = {"table": table, "wrapped": Wrapper(), "none": None}
    assert state_bytes(optimizer) == 4 * 256 + 2 * 10 + 40 + 4 * 2
