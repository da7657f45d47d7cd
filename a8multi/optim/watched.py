"""The dictionary of all state, and whether anybody else has it.

A step passes on the addresses of a model's whole state, which were read once. Who has a tensor can put its elements
elsewhere without making another tensor: ``share_memory_()``, ``tensor.data = ...``, a queue of torch.multiprocessing.
"""

from __future__ import annotations

from typing import Any

import torch


class WatchedState(torch.optim.Optimizer):
    """An optimizer that knows whether its state has been handed out.

    Attributes:
        _states: what ``state`` is, for the optimizer itself.
        _is_handed_out: whether anybody has asked for ``state`` since the optimizer was built; ``state_dict()`` and
            pickling do. From then on each step has to look where the state lies.
    """

    _states: Any
    _is_handed_out = False

    @property
    def state(self) -> Any:
        """For each parameter its state, a dictionary: as torch.optim.Optimizer has it."""
        self._is_handed_out = True
        return self._states

    @state.setter
    def state(self, states: Any) -> None:
        self._states = states

    def __setstate__(self, saved: dict[str, Any]) -> None:
        # torch writes past the setter.
        rest = {name: value for name, value in saved.items() if name != "state"}
        self._states = saved["state"]
        super().__setstate__(rest)
