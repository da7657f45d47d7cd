"""From tensors to the structs of the ABI: what the compiled library and the CuPy kernels receive alike."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from a8multi.loader import structs
from a8multi.plan import StepPlan
from a8multi.plan.step_plan import DTYPES
from a8multi.quant.formats import StateFormat


def batch_of(plan: StepPlan, hypers: np.ndarray) -> structs.Batch:
    """The batch of a plan. ``plan`` and ``hypers`` must live until the call that uses it has returned.

    On CUDA the tables are copied to the device in stream order, without a synchronisation, and only those that have
    changed since the last step; the plan keeps the copies.
    """
    tables = {"tensors": plan.address(), "chunks": plan.chunks, "tiles": plan.tiles, "hypers": hypers}
    batch = structs.Batch()
    for name, table in tables.items():
        setattr(batch, f"{name[:-1]}_count", len(table))
        if len(table) == 0:
            continue
        on_device = plan.device.type == "cuda"
        setattr(batch, name, _uploaded(plan, name, table).data_ptr() if on_device else table.ctypes.data)
    return batch


def _uploaded(plan: StepPlan, name: str, table: np.ndarray) -> Tensor:
    data = table.tobytes()
    before, copy = plan.device_tables.get(name, (None, None))
    if copy is None or before != data:
        host = torch.frombuffer(bytearray(data), dtype=torch.uint8).pin_memory()
        copy = host.to(plan.device, non_blocking=True)
        plan.device_tables[name] = (data, copy)
    return copy


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
