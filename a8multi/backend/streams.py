"""Devices and streams of CUDA as torch has them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# What torch.compile asks for the stream: an integer at once, where the public way makes an object first.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

_STAY: AbstractContextManager[Any] = nullcontext()  # on the device that is current


def current(device: torch.device) -> int:
    """Address of torch's current stream of a device."""
    if _raw_stream is not None and device.index is not None:
        return int(_raw_stream(device.index))
    return int(torch.cuda.current_stream(device).cuda_stream)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device current, and afterwards the one that was.

    By torch and not by the CUDA runtime, whose cudaSetDevice starts a device that nobody has used yet: to go back to
    device 0 would cost a process that works on another one some hundred MB there.
    """
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return _STAY
    return torch.cuda.device(device)


def is_captured(devices: Iterable[torch.device]) -> bool:
    """Whether the current stream of one of the devices is being captured in a CUDA graph."""
    for device in devices:
        with on(device):
            if torch.cuda.is_current_stream_capturing():
                return True
    return False


class Followed:
    """Tells torch's allocator on which streams memory is used that is kept from step to step.

    It knows the stream on which memory was taken. Freed, it would be handed out again while another one still reads it.
    """

    def __init__(self) -> None:
        self._last: int | None = None

    def use(self, device: torch.device, kept: Iterable[Tensor]) -> None:
        """A step is about to use all that is kept, on the current stream of this CUDA device."""
        stream = current(device)
        if self._last not in (None, stream):
            for tensor in kept:
                tensor.record_stream(torch.cuda.current_stream(device))
        self._last = stream
