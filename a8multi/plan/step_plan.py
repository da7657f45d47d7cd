"""The tensor table and chunk map of one step on one device, built once and reused while nothing but addresses change.

Receives items; returns numpy records in the layout of the C structs. Knows nothing of optimizers or backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from a8multi.loader import geometry, structs

from .item import Item, MomentSpec

TENSOR = np.dtype(structs.Tensor)
CHUNK = np.dtype(structs.Chunk)
HYPER = np.dtype(structs.Hyper)

DTYPES = {
    torch.float32: int(structs.Dtype.F32),
    torch.bfloat16: int(structs.Dtype.BF16),
    torch.float16: int(structs.Dtype.F16),
}


class StepPlan:
    """All items of one step on one device.

    Attributes:
        device: of every tensor.
        items: the parameters, in the optimizer's order.
        device_tables: the tables below as they were last copied to the device, and the copies.
    """

    def __init__(self, device: torch.device, items: Sequence[Item]) -> None:
        self.device = device
        self.items = list(items)
        self.device_tables: dict[str, tuple[bytes, Tensor]] = {}

    @cached_property
    def tensors(self) -> np.ndarray:
        """One ``a8_tensor`` an item, with host values of every device address. The tables below follow from it."""
        sizes = geometry()
        table = np.zeros(len(self.items), TENSOR)
        for row, item in zip(table, self.items, strict=True):
            row["numel"] = item.param.numel()
            row["rows"], row["cols"] = item.rows, item.cols
            row["noise_id"] = item.noise_id
            _fill_moment(row, "first", item.first_spec, item.first, item.first_block)
            _fill_moment(row, "second", item.second_spec, item.second, item.second_block)
        table["chunks"] = -(-table["numel"] // sizes["A8_CHUNK"])
        row_tiles = -(-table["rows"] // sizes["A8_TILE_ROWS"])
        col_tiles = -(-table["cols"] // sizes["A8_TILE_COLS"])
        table["tiles"] = row_tiles * col_tiles
        table["chunk_at"] = _starts(table["chunks"])
        table["tile_at"] = _starts(table["tiles"])
        # Scratch: partial row sums, partial column sums, then two totals and two sums a chunk.
        row_floats, col_floats = col_tiles * table["rows"], row_tiles * table["cols"]
        sum_floats = 2 + 2 * table["chunks"].astype(np.int64)
        table["row_at"] = _starts(row_floats + col_floats + sum_floats)
        table["col_at"] = table["row_at"] + row_floats
        table["sum_at"] = table["col_at"] + col_floats
        return table

    @cached_property
    def chunks(self) -> np.ndarray:
        return _units(self.tensors["chunks"])

    @cached_property
    def tiles(self) -> np.ndarray:
        return _units(self.tensors["tiles"])

    @property
    def scratch_floats(self) -> int:
        last = self.tensors[-1]
        return int(last["sum_at"]) + 2 + 2 * int(last["chunks"])

    @cached_property
    def scratch(self) -> Tensor:
        """Partial sums of a factored step, float32 [scratch_floats]. Kept with the plan: 0.01 bytes a parameter."""
        return torch.empty(self.scratch_floats, dtype=torch.float32, device=self.device)

    def address(self) -> np.ndarray:
        """``tensors`` with what may change at every step: addresses and types, and the row of hyper-parameters."""
        table = self.tensors
        table["param"] = [item.param.data_ptr() for item in self.items]
        table["grad"] = [item.grad.data_ptr() for item in self.items]
        table["param_dtype"] = [DTYPES[item.param.dtype] for item in self.items]
        table["grad_dtype"] = [DTYPES[item.grad.dtype] for item in self.items]
        table["hyper"] = [item.hyper for item in self.items]
        return table


def _fill_moment(row: np.void, name: str, spec: MomentSpec | None, codes: Tensor | None, blocks: Tensor | None) -> None:
    if spec is None or codes is None:
        return
    row[f"{name}_format"] = spec.code
    row[f"{name}_block_size"] = spec.block_size
    row[name] = codes.data_ptr()
    row[f"{name}_block"] = blocks.data_ptr() if blocks is not None else 0


def _starts(counts: np.ndarray) -> np.ndarray:
    counts = counts.astype(np.int64)
    return np.cumsum(counts) - counts


def _units(counts: np.ndarray) -> np.ndarray:
    """(tensor, part) for every part of every tensor, in order."""
    units = np.empty(int(counts.sum()), CHUNK)
    units["tensor"] = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    units["part"] = np.arange(len(units)) - np.repeat(_starts(counts), counts)
    return units
