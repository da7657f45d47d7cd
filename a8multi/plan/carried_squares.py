"""Which sums of p^2 in a plan's scratch still hold: those of parameters that nobody has written since the last step.

RMS(p) would cost one more pass over every parameter. The apply phase has the new values at hand and leaves the sums of
their squares for the next step (docs/decisions/0009-carried-squares.md). This class says where they are still right, as
far as the host can know; the kernels look at a sample of the elements besides (``a8_fingerprint``).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import numpy as np
from torch import Tensor

from a8multi.loader.structs import TensorFlag

_KNOWN = int(TensorFlag.SQUARES_KNOWN)
_VERSION = attrgetter("_version")


class CarriedSquares:
    """The sums of one plan.

    Args:
        params: of the plan, in its order.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        # After a step: version and address of each parameter, and the flags that they would earn.
        self._left: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._seen: tuple[np.ndarray, np.ndarray] | None = None

    def flags(self, addresses: np.ndarray) -> np.ndarray | int:
        """``a8_tensor.flags`` of every parameter, for a step that is about to run on the scratch.

        Args:
            addresses: of the parameters now, uint64.
        """
        versions = np.fromiter(map(_VERSION, self._params), np.int64, len(self._params))
        self._seen = versions, addresses.copy()
        if self._left is None:
            return 0
        old_versions, old_addresses, flags = self._left
        self._left = None  # a step that fails leaves nothing
        return np.where((versions == old_versions) & (addresses == old_addresses), flags, 0)

    def leave(self, scaled: np.ndarray) -> None:
        """The step has run, and every parameter's version is to be one higher than it was.

        Args:
            scaled: bool, for each parameter: its hyper-parameters asked for RMS(p), so that the sums were left.
        """
        # Not seen: the backend did not use the scratch.
        if self._seen is not None:
            versions, addresses = self._seen
            self._left = versions + 1, addresses, np.where(scaled, _KNOWN, 0)
        self._seen = None
