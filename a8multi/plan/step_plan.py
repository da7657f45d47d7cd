"""The tensor table and chunk map of one step on one device, built once and reused while nothing but addresses change.

Receives items; returns numpy records in the layout of the C structs. Knows nothing of optimizers or backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi.loader import geometry, structs

from .carried_squares import CarriedSquares
from .item import Item, MomentSpec

TENSOR = np.dtype(structs.Tensor)
CHUNK = np.dtype(structs.Chunk)
HYPER = np.dtype(structs.Hyper)

DTYPES = {
    torch.float32: int(structs.Dtype.F32),
    torch.bfloat16: int(structs.Dtype.BF16),
    torch.float16: int(structs.Dtype.F16),
}


# Read once: plans of strided parameters are made at every step.
sizes = cache(geometry)


def has_norm(rule: structs.RuleKind) -> bool:
    """``a8_rule_has_norm``: whether the step needs sums over the tensor first, and so the scratch."""
    return rule in (structs.RuleKind.LAMB, structs.RuleKind.LARS)


class StepPlan:
    """All items of one step on one device.

    Attributes:
        device: of every tensor.
        items: the parameters, in the optimizer's order.
        rule: what an element-wise step does; Adafactor's steps do not look at it.
        grads: their gradients while a step runs, else empty: a plan must not keep gradients alive.
        addresses: uint64 [2, items], of the parameters' and the gradients' data while a step runs; None: not read yet.
        skip: float32 0-d on the device: when it is not 0, the step writes nothing. None: steps are never skipped.
        edition: a number that grows whenever ``tensors`` changes.
        device_tables: for the backend that copies the tables below to the device: what it keeps of them.
        squares: which sums in the scratch still hold; None: steps of this plan leave none.
    """

    def __init__(
        self,
        device: torch.device,
        items: Sequence[Item],
        *,
        rule: structs.RuleKind = structs.RuleKind.ADAM,
        carries_squares: bool = False,
    ) -> None:
        self.device = device
        self.rule = rule
        self.items = list(items)
        self.grads: list[Tensor] = []
        self.addresses: np.ndarray | None = None
        self.skip: Tensor | None = None
        self.edition = 0
        self.device_tables: Any = None
        self._params = [item.param for item in self.items]
        self.squares = CarriedSquares(self._params) if carries_squares else None
        self._addressed = b""

    @cached_property
    def tensors(self) -> np.ndarray:
        """One ``a8_tensor`` an item, with host values of every device address. The tables below follow from it."""
        size = sizes()
        items = self.items
        table = np.zeros(len(items), TENSOR)
        table["numel"] = [item.param.numel() for item in items]
        table["rows"] = [item.rows for item in items]
        table["cols"] = [item.cols for item in items]
        table["noise_id"] = [item.noise_id for item in items]
        table["hyper"] = [item.hyper for item in items]
        table["param_dtype"] = [DTYPES[item.param.dtype] for item in items]
        table["grad_dtype"] = [DTYPES[item.grad_dtype] for item in items]
        _fill_moment(table, "first", [(item.moments.first, item.first, item.first_block) for item in items])
        _fill_moment(table, "second", [(item.moments.second, item.second, item.second_block) for item in items])
        _fill_moment(table, "third", [(item.moments.third, item.third, item.third_block) for item in items])
        table["limiter"] = [item.limiter.data_ptr() if item.limiter is not None else 0 for item in items]
        table["chunks"] = -(-table["numel"] // size["A8_CHUNK"])
        row_tiles = -(-table["rows"] // size["A8_TILE_ROWS"])
        col_tiles = -(-table["cols"] // size["A8_TILE_COLS"])
        table["tiles"] = row_tiles * col_tiles
        table["chunk_at"] = _starts(table["chunks"])
        table["tile_at"] = _starts(table["tiles"])
        # Scratch: partial row sums, partial column sums, both again for the confidence, then the totals, and two sums
        # and a fingerprint a chunk. Each begins at a multiple of 16 bytes, which the GPU's wide loads need.
        row_floats, col_floats = _padded(col_tiles * table["rows"]), _padded(row_tiles * table["cols"])
        residual_floats = np.where(table["third_format"] == structs.Format.FACTORED, row_floats + col_floats, 0)
        sum_floats = _padded(size["A8_TOTALS"] + 3 * table["chunks"].astype(np.int64))
        table["row_at"] = _starts(row_floats + col_floats + residual_floats + sum_floats)
        table["col_at"] = table["row_at"] + row_floats
        table["residual_at"] = table["col_at"] + col_floats
        table["sum_at"] = table["residual_at"] + residual_floats
        return table

    @cached_property
    def chunks(self) -> np.ndarray:
        return _units(self.tensors["chunks"])

    @cached_property
    def tiles(self) -> np.ndarray:
        return _units(self.tensors["tiles"])

    @cached_property
    def chunks_by_kind(self) -> tuple[np.ndarray, int]:
        """``chunks`` with those of factored tensors first, and how many those are.

        A GPU has kernels of their own for them, each of which is launched for its chunks only.
        """
        factored = self.tensors["second_format"][self.chunks["tensor"]] == structs.Format.FACTORED
        return self.chunks[np.argsort(~factored, kind="stable")], int(factored.sum())

    @cached_property
    def phases(self) -> structs.Phase:
        """The phases of an Adafactor step that have something to do."""
        phase = structs.Phase
        found = phase.REDUCE | phase.MOMENTS | phase.NORM | phase.APPLY
        if any(item.moments.third is not None for item in self.items):
            found |= phase.RESIDUAL | phase.CONFIDENCE
        if any(item.limiter is not None for item in self.items):
            found |= phase.LIMIT
        return found

    @cached_property
    def hints(self) -> structs.BatchHint:
        """What a backend may choose its kernels by."""
        usual = sum(item.param.numel() for item in self.items if _is_usual(item))
        few = 2 * usual < sum(item.param.numel() for item in self.items)
        return structs.BatchHint.OTHER_FORMATS if few else structs.BatchHint(0)

    @property
    def scratch_floats(self) -> int:
        last = self.tensors[-1]
        return int(last["sum_at"]) + sizes()["A8_TOTALS"] + 3 * int(last["chunks"])

    @cached_property
    def scratch(self) -> Tensor:
        """Partial sums of an Adafactor step, float32 [scratch_floats]. Kept with the plan: 0.01 bytes a parameter."""
        return torch.empty(self.scratch_floats, dtype=torch.float32, device=self.device)

    @cached_property
    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Where the scratch keeps what belongs to each row and each column: views [rows] and [cols] of every item.

        After the reduce phase sums of g^2, after the moments phase factors of 1 / sqrt(v). Ones at first.
        """
        found = []
        scratch = self.scratch.fill_(1.0)
        for record in self.tensors:
            sides = ((int(record["row_at"]), int(record["rows"])), (int(record["col_at"]), int(record["cols"])))
            rows, cols = (scratch[at : at + length] for at, length in sides)
            found.append((rows, cols))
        return found

    def address(self) -> np.ndarray:
        """``tensors`` with what may change at every step: the addresses of parameters and gradients, and flags.

        For backends that are about to run a step on ``scratch``; with ``squares``, call it once a step.
        """
        table, addresses = self.tensors, self.addresses
        if addresses is None:
            addresses = np.array(
                [list(map(Tensor.data_ptr, tensors)) for tensors in (self._params, self.grads)], np.uint64
            )
        if addresses.tobytes() != self._addressed:
            table["param"], table["grad"] = addresses
            self._addressed = addresses.tobytes()
            self.edition += 1
        if self.squares is not None:
            flags = self.squares.flags(addresses[0])
            if (table["flags"] != flags).any():
                table["flags"] = flags
                self.edition += 1
        return table


def _is_usual(item: Item) -> bool:
    """Whether moments, formats and types are those of most steps, for which there are kernels."""
    types = item.param.dtype, item.grad_dtype
    block = sizes()["A8_USUAL_BLOCK"]
    stored = (item.moments.first, structs.Format.INT8), (item.moments.second, structs.Format.LOG8)
    formats = all(spec is None or (spec.code == fmt and spec.block_size == block) for spec, fmt in stored)
    typed = types[0] == types[1] or types == (torch.bfloat16, torch.float32)
    return item.moments.first is not None and formats and typed


def _fill_moment(
    table: np.ndarray, name: str, moments: Sequence[tuple[MomentSpec | None, Tensor | None, Tensor | None]]
) -> None:
    table[f"{name}_format"] = [spec.code if spec is not None else 0 for spec, _, _ in moments]
    table[f"{name}_block_size"] = [spec.block_size if spec is not None else 0 for spec, _, _ in moments]
    table[name] = [codes.data_ptr() if codes is not None else 0 for _, codes, _ in moments]
    table[f"{name}_block"] = [blocks.data_ptr() if blocks is not None else 0 for _, _, blocks in moments]


def _padded(floats: np.ndarray) -> np.ndarray:
    return -(-floats // 4) * 4


def _starts(counts: np.ndarray) -> np.ndarray:
    counts = counts.astype(np.int64)
    return np.cumsum(counts) - counts


def _units(counts: np.ndarray) -> np.ndarray:
    """(tensor, part) for every part of every tensor, in order."""
    units = np.empty(int(counts.sum()), CHUNK)
    units["tensor"] = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    units["part"] = np.arange(len(units)) - np.repeat(_starts(counts), counts)
    return units
