"""How the tests ask for a refusal, and read it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from convert.jobs import trained
from optim.helpers import parameters

import a8multi

SHAPES = ((129,), (8, 9))


def saved_by(make: Callable[..., Any]) -> Any:
    return copy.deepcopy(trained(make, SHAPES)[0].state_dict())


def refusal(saved: Any, source: str = "torch", ours: Callable[..., Any] = a8multi.AdamW8bit) -> str:
    with pytest.raises(a8multi.StateFormatError) as caught:
        a8multi.convert_state_dict(saved, source, optimizer=ours(parameters(SHAPES)))
    return str(caught.value)


def assert_says(message: str, *words: str) -> None:
    for word in words:
        assert word in message, message
