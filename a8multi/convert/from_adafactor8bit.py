"""State of the package adafactor8bit 0.2.4: second moments in a logarithm of eight bits, the first in four.

Second moments and CAME's confidence: code q of a block with scale s is 2 ** (q * s / 255 - 126). First moment: two
codes a byte, the first of them in the high half, of a table that is nearly, but not quite, NF4's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .held import Factors, Fields, Held, Options, Place, factor_shapes

_TABLE = (
    *(-1.0, -0.6961928, -0.52507306, -0.3895074, -0.27408478, -0.17286907, -0.07958022, 0.0),
    *(0.07958022, 0.17286907, 0.27408478, 0.3895074, 0.52507306, 0.6961928, 0.8641379, 1.0),
)
_LEAST_LOG2 = -126.0
_CARRIED = (
    *("lr", "beta1", "beta2", "beta2_decay", "beta3", "eps", "weight_decay", "d", "maximize", "relative_step"),
    *("scale_parameter", "scale_weight_decay", "enable_fira_for_adafactor", "fira_margin"),
    *("apollo_rank", "apollo_update_proj_gap", "apollo_scale_type", "apollo_eps", "apollo_factorize"),
)
# Formats are the choice of the optimizer to load.
_FORMATS = {"factored", "quantize", "block_size", "m_block_size", "min_8bit_size", "use_cuda_kernel"}
_REFUSED = {
    "apollo_seed": (
        "these are moments of a gradient that APOLLO projected with torch's random numbers; our projection is another",
        "Delete the state of this parameter from the state dict: it starts anew. The others can be carried over.",
    )
}


def options(group: Mapping[str, Any], kind: str, place: Place) -> Options:
    if kind != "adafactor" or "beta2_decay" not in group:
        raise place.error(
            f"options {', '.join(name for name in group if name != 'params')}",
            f"these are to be of Adafactor8Bit, and the optimizer to load is of the kind {kind}",
            "Build an Adafactor8bit.",
        )
    values = place.required(group, _CARRIED)
    # What its beta3 means.
    values["came_order"] = "adafactor8bit"
    if values["apollo_rank"]:
        values["enable_fira_for_apollo"] = True  # always
    return Options(values, {*_CARRIED, *_FORMATS}, True)


def moments(fields: Fields, shape: Sequence[int], kind: str) -> Held | None:
    fields.refuse(_REFUSED)
    fields.drop("is_quantized", "block_size")
    held = Held(fields.steps(), _first(fields, shape))
    if len(shape) >= 2 and ("row_var" in fields or "row_var_q" in fields):
        rows, cols = factor_shapes(shape)
        held.second = Factors(_second(fields, "row_var", rows), _second(fields, "col_var", cols))
        if "conf_row" in fields or "conf_row_q" in fields:
            held.third = Factors(_second(fields, "conf_row", rows), _second(fields, "conf_col", cols))
    else:
        held.second = _second(fields, "variance", shape)
    if "fira_prev_norm" in fields:
        held.limiter = torch.tensor(fields.number("fira_prev_norm"), dtype=torch.float32)
    return held


def _second(fields: Fields, name: str, shape: Sequence[int]) -> Tensor:
    if f"{name}_q" not in fields:
        return fields.shaped(name, fields.dense(name), shape)
    codes, scale = (fields.codes(f"{name}_q", torch.uint8), fields.codes(f"{name}_scale", torch.float32))
    codes, scale = codes.reshape(-1), scale.reshape(-1)
    fields.drop(f"{name}_shape", f"{name}_pad")
    blocks = _blocks(fields, f"{name}_q", codes, scale, math.prod(shape))
    values = torch.pow(2.0, blocks.float() * scale.unsqueeze(1) * (1 / 255) + _LEAST_LOG2)
    # Code 0 is the floor that zero was raised to. As a number it would stretch the range of a block of ours over all of
    # float32, for nothing: the square of eps1 is above it.
    return torch.where(blocks == 0, 0.0, values).reshape(-1)[: math.prod(shape)].reshape(tuple(shape))


def _first(fields: Fields, shape: Sequence[int]) -> Tensor | None:
    if "m_q" not in fields:
        return fields.values("m", shape)
    packed, scale = fields.codes("m_q", torch.uint8), fields.codes("m_scale", torch.float32).reshape(-1)
    fields.drop("m_block_size")
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)
    blocks = _blocks(fields, "m_q", codes, scale, math.prod(shape))
    table = torch.tensor(_TABLE, dtype=torch.float32, device=packed.device)
    return (table[blocks.int()] * scale.unsqueeze(1)).reshape(-1)[: math.prod(shape)].reshape(tuple(shape))


def _blocks(fields: Fields, name: str, codes: Tensor, scale: Tensor, numel: int) -> Tensor:
    """Codes as [blocks, block size]; the last block is padded."""
    count = scale.numel()
    size = codes.numel() // max(count, 1)
    if count * size != codes.numel() or not numel <= codes.numel() < numel + max(size, 1):
        raise fields.place.error(
            name,
            f"{codes.numel()} codes in {count} blocks do not fit {numel} values",
            "Build the optimizer over the same parameters, in the same order.",
        )
    return codes.reshape(count, size)
