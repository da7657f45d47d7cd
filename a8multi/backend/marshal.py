"""From tensors to the structs of the ABI: what the compiled library and the CuPy kernels receive alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from a8multi.loader import structs
from a8multi.plan import Live, StepPlan
from a8multi.plan.schedule import SCHEDULE
from a8multi.plan.step_plan import DTYPES, sizes
from a8multi.quant.formats import StateFormat

from .streams import Followed

_ALIGNMENT = 256  # of a table in device memory, bytes
_NOTHING = np.empty(0, SCHEDULE)

# Writes bytes to an address in device memory, in the order of the current stream: at most A8_UPLOAD_BYTES of them.
Upload = Callable[[bytes, int], None]


def batch_of(
    plan: StepPlan, hypers: np.ndarray, live: Live | None = None, upload: Upload | None = None
) -> tuple[structs.Batch, int | None]:
    """The batch of a plan, and the address of the schedules from which its hypers are to be derived first, if any.

    ``plan``, ``hypers`` and ``live`` must live until the calls that use them have returned. On CUDA the tables are
    copied to the device in stream order, without a synchronisation, and only those that have changed since the last
    step; the plan keeps the copies, and the batch until its next one. In a captured step everything is copied, to
    memory of the graph's own.

    upload: for a few bytes of the tables; None: all go by way of pinned memory.
    """
    plan.address()
    if plan.device.type == "cuda" and not (live is not None and live.capturing):
        if plan.device_tables is None:
            plan.device_tables = _DeviceTables()
        plan.device_tables.follow(plan)
        found: tuple[structs.Batch, int | None] = plan.device_tables.batch(plan, hypers, live, upload)
        return found
    tables = _tables_of(plan, hypers, live)
    if plan.device.type == "cuda" and live is not None:
        return _batch_at(plan, tables, _captured(plan, tables, live))
    return _batch_at(plan, tables, [_address(table) for table in tables])


def _tables_of(plan: StepPlan, hypers: np.ndarray, live: Live | None) -> list[np.ndarray]:
    """Schedules, hypers, then tensors, chunks and tiles: from what changes most often to what never does."""
    schedules = live.records if live is not None else _NOTHING
    chunks = plan.chunks if plan.device.type == "cpu" else plan.chunks_by_kind[0]
    return [schedules, hypers, plan.tensors, chunks, plan.tiles]


def _batch_at(
    plan: StepPlan, tables: list[np.ndarray], addresses: list[int | None]
) -> tuple[structs.Batch, int | None]:
    """``batch_of`` of tables that are at these addresses."""
    batch = structs.Batch(
        tensor_count=len(plan.tensors),
        chunk_count=len(plan.chunks),
        tile_count=len(plan.tiles),
        hyper_count=len(tables[1]),
        factored_chunks=0 if plan.device.type == "cpu" else plan.chunks_by_kind[1],
        rule=int(plan.rule),
        hints=int(plan.hints),
        skip=_flag_of(plan),
    )
    first, batch.hypers, batch.tensors, batch.chunks, batch.tiles = addresses
    return batch, first


def _flag_of(plan: StepPlan) -> int | None:
    return plan.skip.data_ptr() if plan.skip is not None else None


def scratch_of(plan: StepPlan, live: Live | None) -> Tensor:
    """The plan's scratch. A captured step has one of its own: the graph may outlive the plan."""
    if live is None or not live.capturing:
        return plan.scratch
    scratch = torch.empty(plan.scratch_floats, dtype=torch.float32, device=plan.device)
    live.kept.append(scratch)
    return scratch


def _address(table: np.ndarray) -> int | None:
    return table.ctypes.data if len(table) else None


def _starts_of(tables: list[np.ndarray]) -> tuple[list[int], int]:
    """Where each table begins in one piece of memory that holds them all, and its size."""
    ends = np.cumsum([-(-table.nbytes // _ALIGNMENT) * _ALIGNMENT for table in tables]).tolist()
    return [0, *ends[:-1]], ends[-1]


def _copy(memory: Tensor, host: Tensor, tables: list[np.ndarray], starts: list[int]) -> None:
    """Copies the first tables, as many as are given, by way of pinned memory of the same size."""
    view = host.numpy()
    for start, table in zip(starts, tables, strict=False):
        if table.size:
            view[start : start + table.nbytes] = table.view(np.uint8)
    memory.copy_(host, non_blocking=True)


def _pinned(size: int) -> Tensor:
    # torch caches pinned memory and hands none out again before the copy that read it is done.
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class _DeviceTables:
    """A plan's tables in one piece of device memory, in the order of ``_tables_of``, and the batch that points there.

    What has changed is always a prefix: one copy.
    """

    def __init__(self) -> None:
        self._edition = -1  # of plan.tensors, as last copied
        self._data = b""  # of schedules and hypers
        self._counts: tuple[int, int] = (0, 0)
        self._starts: list[int] = []
        self._memory: Tensor | None = None
        self._found: tuple[structs.Batch, int | None] = structs.Batch(), None
        self._followed = Followed()

    def follow(self, plan: StepPlan) -> None:
        """The tables and the plan's scratch are used on the current stream from now on."""
        scratch = vars(plan).get("scratch")  # if it has been made
        self._followed.use(plan.device, [one for one in (self._memory, scratch) if one is not None])

    def batch(
        self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None, upload: Upload | None = None
    ) -> tuple[structs.Batch, int | None]:
        """``batch_of``, after copying what is not up to date."""
        schedules = live.records if live is not None else _NOTHING
        data = hypers.tobytes() if not len(schedules) else schedules.tobytes() + hypers.tobytes()
        memory, counts = self._memory, (len(schedules), len(hypers))
        changed = 0  # so many of the tables
        if memory is None or self._counts != counts:
            tables = _tables_of(plan, hypers, live)
            self._starts, size = _starts_of(tables)
            # The old memory, if any, is freed for this stream's later use only. An error below leaves none.
            self._memory = None
            memory = torch.empty(size, dtype=torch.uint8, device=plan.device)
            self._found = _batch_at(plan, tables, _addresses(memory, self._starts, tables))
            changed = len(tables)
        elif self._edition != plan.edition:
            changed = 3
        elif self._data != data:
            if upload is not None and not len(schedules) and len(data) <= sizes()["A8_UPLOAD_BYTES"]:
                self._data = b""  # unknown, should this fail
                upload(data, memory.data_ptr())
            else:
                changed = 2
        if changed:
            tables = _tables_of(plan, hypers, live)[:changed]
            size = self._starts[changed - 1] + tables[-1].nbytes
            _copy(memory[:size], _pinned(size), tables, self._starts)
        self._memory, self._edition, self._data, self._counts = memory, plan.edition, data, counts
        if live is not None and len(schedules):
            live.staged_bytes += memory.numel()
            _staging.reserve(live.staged_bytes)
        self._found[0].skip = _flag_of(plan)
        return self._found


def _addresses(memory: Tensor, starts: list[int], tables: list[np.ndarray]) -> list[int | None]:
    base = memory.data_ptr()
    return [base + start if len(table) else None for start, table in zip(starts, tables, strict=True)]


# --- Capture in a CUDA graph. ---


class _Staging:
    """Pinned memory that is set aside while nothing is captured, for the tables of steps that are.

    Every replay copies from it, and nobody says when a graph is gone: what was handed out is kept while the process
    runs. That is 0.6 MB a capture for a model of 1.1 G parameters.
    """

    def __init__(self) -> None:
        self._spare = torch.empty(0, dtype=torch.uint8)
        self._taken: list[Tensor] = []

    def reserve(self, size: int) -> None:
        """Sees to it that as much is there for two captures in a row. Not while a stream is capturing."""
        if self._spare.numel() < size:
            self._spare = _pinned(2 * size)

    def take(self, size: int) -> Tensor:
        if self._spare.numel() < size:  # more captures than that without a step between
            self._spare = _pinned(size)
        taken, self._spare = self._spare[:size], self._spare[size:]
        self._taken.append(taken)
        return taken


_staging = _Staging()


def _captured(plan: StepPlan, tables: list[np.ndarray], live: Live) -> list[int | None]:
    """Addresses of the tables in memory of the graph, to which every replay copies them anew."""
    starts, size = _starts_of(tables)
    memory = torch.empty(size, dtype=torch.uint8, device=plan.device)
    live.kept.append(memory)
    _copy(memory, _staging.take(size), tables, starts)
    return _addresses(memory, starts, tables)


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
