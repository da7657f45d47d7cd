"""`a8multi info --model-size`: what the state of each optimizer takes for a model of that size."""

from __future__ import annotations

import math
from typing import Any

from a8multi.cli.console import CommandError, format_table
from a8multi.cli.parameter_sets import llama_like

# Rows beside each optimizer with its defaults: options that change what is stored.
_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "AdamW8bit": [{"first_moment": "nf4"}],
    "Adafactor8bit": [{"beta1": 0.9}, {"factored": False}],
    "SGD8bit": [{"momentum": 0.9}],
    "LARS8bit": [{"momentum": 0.9}],
    "RMSprop8bit": [{"momentum": 0.9}],
    "CAME8bit": [{"first_moment": "nf4"}],
    "APOLLO8bit": [{"rank": 1, "scale_type": "tensor"}],
    "AdEMAMix8bit": [{"third_moment": "int8"}],
}
# torch.optim.AdamW: two moments of the parameters' dtype, and a float32 step a tensor.
_TORCH_ADAMW = {"fp32": 4, "bf16": 2}
_TORCH_STEP_BYTES = 4


def collect(parameters: float) -> dict[str, Any]:
    """State bytes of every optimizer, as JSON-compatible data.

    Keys: `model_size` (what was asked for); `parameters`, `tensors`, `width` and `layers` of the model that was
    counted; `optimizers` (optimizer, options, state_bytes, bytes_per_parameter, bytes_by_format).

    Raises:
        CommandError: there is no such model.
    """
    try:
        shapes = llama_like(parameters)
    except ValueError as error:
        raise CommandError(f"--model-size: {error}") from None
    count = sum(map(math.prod, shapes))
    return {
        "model_size": parameters,
        "parameters": count,
        "tensors": len(shapes),
        "width": shapes[0][1],
        "layers": (len(shapes) - 3) // 9,
        "optimizers": [*_torch_rows(count, len(shapes)), *_rows(shapes)],
    }


def _torch_rows(parameters: int, tensors: int) -> list[dict[str, Any]]:
    rows = []
    for dtype, itemsize in _TORCH_ADAMW.items():
        moments, steps = 2 * itemsize * parameters, _TORCH_STEP_BYTES * tensors
        by_format = {dtype: moments, "scalars": steps}
        rows.append(_row("torch AdamW", {"parameters": dtype}, moments + steps, parameters, by_format))
    return rows


def _rows(shapes: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    from a8multi.estimate import estimate_state_bytes, optimizers

    rows = []
    for kind in optimizers().values():
        for options in ({}, *_VARIANTS.get(kind.__name__, [])):
            found = estimate_state_bytes(shapes, kind, **options)
            row = _row(found.optimizer, options, found.total_bytes, found.parameters, found.bytes_by_format)
            rows.append(row)
    return rows


def _row(
    optimizer: str, options: dict[str, Any], state_bytes: int, parameters: int, by_format: dict[str, int]
) -> dict[str, Any]:
    return {
        "optimizer": optimizer,
        "options": options,
        "state_bytes": state_bytes,
        "bytes_per_parameter": state_bytes / parameters,
        "bytes_by_format": by_format,
    }


def text(report: dict[str, Any]) -> str:
    """collect() for people."""
    rows = [
        [
            " ".join([row["optimizer"], *(f"{name}={value}" for name, value in row["options"].items())]),
            f"{row['state_bytes'] / 2**30:.3f}",
            f"{row['bytes_per_parameter']:.3f}",
        ]
        for row in report["optimizers"]
    ]
    title = (
        f"Optimizer state of a Llama of {report['parameters'] / 1e9:.3f} G parameters: {report['layers']} layers of "
        f"width {report['width']}, {report['tensors']} tensors"
    )
    return f"{title}\n{format_table(['optimizer', 'state GiB', 'bytes a parameter'], rows)}"
