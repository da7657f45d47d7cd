"""From tensors to the structs of the ABI: what the compiled library and the CuPy kernels receive alike."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from a8multi.loader import structs
from a8multi.plan import StepPlan
from a8multi.plan.step_plan import DTYPES
from a8multi.quant.formats import StateFormat

_ALIGNMENT = 256  # of a table in device memory, bytes


def batch_of(plan: StepPlan, hypers: np.ndarray) -> structs.Batch:
    """The batch of a plan. ``plan`` and ``hypers`` must live until the call that uses it has returned.

    On CUDA the tables are copied to the device in stream order, without a synchronisation, and only those that have
    changed since the last step; the plan keeps the copies.
    """
    tensors = plan.address()
    if plan.device.type == "cuda":
        if plan.device_tables is None:
            plan.device_tables = _DeviceTables()
        addresses = plan.device_tables.updated(plan, hypers)
    else:
        addresses = [_address(table) for table in (hypers, tensors, plan.chunks, plan.tiles)]
    batch = structs.Batch(
        tensor_count=len(tensors), chunk_count=len(plan.chunks), tile_count=len(plan.tiles), hyper_count=len(hypers)
    )
    batch.hypers, batch.tensors, batch.chunks, batch.tiles = addresses
    return batch


def _address(table: np.ndarray) -> int | None:
    return table.ctypes.data if len(table) else None


class _DeviceTables:
    """A plan's tables in one piece of device memory, hypers first, then tensors, chunks and tiles.

    That is from what changes most often to what never does, so that what has changed is always a prefix: one copy.
    """

    def __init__(self) -> None:
        self._edition = -1  # of plan.tensors, as last copied
        self._hypers = b""
        self._starts: list[int] = []
        self._memory: Tensor | None = None

    def updated(self, plan: StepPlan, hypers: np.ndarray) -> list[int | None]:
        """Addresses of the four tables, None for an empty one, after copying what is not up to date."""
        tables = [hypers, plan.tensors, plan.chunks, plan.tiles]
        data = hypers.tobytes()
        memory = self._memory
        if memory is None or len(data) != len(self._hypers):
            ends = np.cumsum([-(-table.nbytes // _ALIGNMENT) * _ALIGNMENT for table in tables])
            self._starts = [0, *ends[:-1].tolist()]
            # The old memory, if any, is freed for this stream's later use only.
            memory = self._memory = torch.empty(int(ends[-1]), dtype=torch.uint8, device=plan.device)
            changed = len(tables)
        elif self._edition != plan.edition:
            changed = 2
        else:
            changed = int(data != self._hypers)
        if changed:
            self._copy(memory, tables[:changed])
            self._edition, self._hypers = plan.edition, data
        base = memory.data_ptr()
        return [base + start if len(table) else None for start, table in zip(self._starts, tables, strict=True)]

    def _copy(self, memory: Tensor, tables: list[np.ndarray]) -> None:
        size = self._starts[len(tables) - 1] + tables[-1].nbytes
        host = _pinned(size)
        view = host.numpy()
        for start, table in zip(self._starts, tables, strict=False):
            view[start : start + table.nbytes] = table.view(np.uint8).reshape(-1)
        memory[:size].copy_(host, non_blocking=True)


def _pinned(size: int) -> Tensor:
    # torch caches pinned memory and hands none out again before the copy that read it is done.
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def codec_of(
    values: Tensor,
    codes: Tensor,
    blocks: Tensor,
    fmt: StateFormat,
    block_size: int,
    stochastic: bool = False,
    seed: int = 0,
) -> structs.Codec:
    """The codec of one array. The tensors must live until the call that uses it has returned."""
    return structs.Codec(
        values=values.data_ptr(),
        codes=codes.data_ptr(),
        blocks=blocks.data_ptr(),
        numel=values.numel(),
        block_size=block_size,
        stochastic=int(stochastic),
        seed_low=seed & 0xFFFFFFFF,
        seed_high=seed >> 32 & 0xFFFFFFFF,
        dtype=DTYPES[values.dtype],
        format=fmt.code,
    )
