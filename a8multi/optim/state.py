"""The state of one parameter: plain tensors with plain names, and the number of steps.

    step            steps taken: int; with ``capturable`` int64, 0-d, on the parameter's device
    exp_avg         first moment: codes of the parameter's shape (nf4: packed bytes), or float values
    exp_avg_block   its block headers, when quantised
    exp_avg_sq      second moment, element by element: codes or float32 values
    exp_avg_sq_block
    row_var, col_var  second moment when factored: means of g^2 over columns and rows, float32

Here state is made, checked, loaded and converted from one format to another; nothing else knows these names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from a8multi.backend.registry import backend_for
from a8multi.errors import StateFormatError
from a8multi.plan import MomentSpec, matrix_shape
from a8multi.quant.formats import FORMATS, StateFormat

State = dict[str, Any]
Specs = Callable[[dict[str, Any], Tensor], tuple[MomentSpec | None, MomentSpec]]

_FIRST, _SECOND, _ROW, _COL = "exp_avg", "exp_avg_sq", "row_var", "col_var"
_BLOCK_NAMES = {_FIRST: "exp_avg_block", _SECOND: "exp_avg_sq_block"}


def _block_name(name: str) -> str:
    return _BLOCK_NAMES[name]


def layout(
    param: Tensor, first: MomentSpec | None, second: MomentSpec
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of the state in these formats."""
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, spec in ((_FIRST, first), (_SECOND, second)):
        if spec is None:
            continue
        if spec.format is None:
            rows, cols = matrix_shape(param.shape)
            tensors[_ROW], tensors[_COL] = ((rows,), torch.float32), ((cols,), torch.float32)
            continue
        tensors[name] = (spec.format.codes_shape(param.shape), spec.format.dtype)
        if spec.format.header is not None:
            shape = spec.format.blocks_shape(param.numel(), spec.block_size)
            tensors[_block_name(name)] = (shape, spec.format.header)
    return tensors


def _held(state: State) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """As ``layout``, of the tensors that are there."""
    return {
        name: (tuple(value.shape), value.dtype)
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    }


def _step(steps: Any, device: torch.device, capturable: bool) -> int | Tensor:
    """The number of steps as a group keeps it. A tensor on a device is read only if an integer is wanted."""
    if not capturable:
        return int(steps)
    if isinstance(steps, Tensor):
        return steps if _counts(steps) else steps.detach().reshape(()).to(device, torch.int64)
    return torch.full((), int(steps), dtype=torch.int64, device=device)


def _counts(step: Any) -> bool:
    return isinstance(step, Tensor) and step.dtype is torch.int64 and step.ndim == 0


def is_ready(state: State, param: Tensor, first: MomentSpec | None, second: MomentSpec, capturable: bool) -> bool:
    """Whether ``ensure`` would leave everything as it is."""
    step = state.get("step")
    return (
        (_counts(step) if capturable else type(step) is int)
        and _held(state) == layout(param, first, second)
        and all(v.device == param.device and v.is_contiguous() for v in state.values() if isinstance(v, Tensor))
    )


def ensure(state: State, param: Tensor, first: MomentSpec | None, second: MomentSpec, capturable: bool) -> None:
    """Make the state, or bring what is there into these formats without losing it."""
    for name, value in state.items():
        # The model was moved after a step, or the user put a view there.
        if isinstance(value, Tensor) and not (value.device == param.device and value.is_contiguous()):
            state[name] = value.to(param.device).contiguous()
    wanted, held = layout(param, first, second), _held(state)
    step = _step(state.get("step", 0), param.device, capturable)
    if held == wanted:
        state["step"] = step
        return
    made: State = {"step": step}

    def kept(moment: str) -> bool:
        """Takes over a moment whose format stays: reading and storing it would round it once more."""
        names = (moment, _block_name(moment))
        same = moment in held and all(held.get(name) == wanted.get(name) for name in names)
        made.update({name: state[name] for name in names if same and name in state})
        return same

    if first is not None and not kept(_FIRST):
        _put(made, _FIRST, first, param, _read(state, _FIRST, param))
    if second.format is not None:
        if not kept(_SECOND):
            _put(made, _SECOND, second, param, _read_second(state, param))
    else:
        made[_ROW], made[_COL] = _means(state, param)
    state.clear()
    state.update(made)


def tensors(
    state: State, first: MomentSpec | None, second: MomentSpec
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """The tensors of an item: first, first_block, second, second_block."""
    of_first = (state[_FIRST], state.get(_block_name(_FIRST))) if first is not None else (None, None)
    if second.format is None:
        return *of_first, state[_ROW], state[_COL]
    return *of_first, state[_SECOND], state.get(_block_name(_SECOND))


def checked(
    optimizer: torch.optim.Optimizer, given: dict[str, Any], options: tuple[str, ...], specs: Specs
) -> dict[int, State]:
    """Copies of the saved states by the parameter's number, on the parameters' devices.

    Raises:
        StateFormatError: a state is not in the formats that its group declares, or the group's formats are not those
            of this optimizer's group.
    """
    groups, saved_groups = optimizer.param_groups, given["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
        return {}  # torch's own error says what differs
    result: dict[int, State] = {}
    number = 0
    for where, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        _require_same_options(type(optimizer).__name__, where, group, saved_group, options)
        for param, key in zip(group["params"], saved_group["params"], strict=True):
            if key in given["state"]:
                first, second = specs(saved_group, param)
                saved = _checked_state(given["state"][key], param, layout(param, first, second), number)
                if saved:
                    saved["step"] = _step(saved["step"], param.device, group["capturable"])
                result[number] = saved
            number += 1
    return result


def _require_same_options(
    kind: str, where: int, group: dict[str, Any], saved: dict[str, Any], options: tuple[str, ...]
) -> None:
    for name in options:
        if name not in saved:
            raise StateFormatError(
                f"param_groups[{where}] of the state dict has no {name!r}: it was not saved by {kind}. State of other "
                f"optimizers cannot be loaded."
            )
        if saved[name] != group[name]:
            raise StateFormatError(
                f"param_groups[{where}] of the state dict was saved with {name}={saved[name]!r}, this {kind} has "
                f"{name}={group[name]!r}. Build the optimizer with the option it was saved with."
            )


def _checked_state(
    saved: State, param: Tensor, wanted: dict[str, tuple[tuple[int, ...], torch.dtype]], number: int
) -> State:
    held = _held(saved)
    if not saved:
        return {}
    step = saved.get("step")
    if held != wanted or not (_counts(step) or isinstance(step, int)):
        raise StateFormatError(
            f"state of parameter {number}, of shape {tuple(param.shape)}: expected an integer step and {_words(wanted)}"
            f"; found step={saved.get('step')!r} and {_words(held)}"
        )
    copies = {k: v.detach().to(param.device, copy=True) for k, v in saved.items() if isinstance(v, Tensor)}
    return {"step": step, **copies}


def _words(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, (shape, dtype) in tensors.items()) or "no tensors"


# --- From one format to another. ---


def _held_format(name: str, state: State, param: Tensor) -> tuple[StateFormat, int]:
    """The format in which a moment is held, and its block size, from its tensors alone."""
    codes, blocks = state[name], state.get(_block_name(name))
    for fmt in FORMATS.values():
        if fmt.dtype is codes.dtype and fmt.codes_shape(param.shape) == tuple(codes.shape):
            if fmt.header is None and blocks is None:
                return fmt, 0
            if fmt.header is not None and blocks is not None and fmt.header is blocks.dtype:
                sizes = (1 << k for k in range(32))
                held = tuple(blocks.shape)
                for size in sizes:
                    if fmt.blocks_shape(param.numel(), size) == held and size >= 32:
                        return fmt, size
    raise _misfit(name, state, param)


def _misfit(name: str, state: State, param: Tensor) -> StateFormatError:
    return StateFormatError(
        f"{name} in the state of a parameter of shape {tuple(param.shape)} is in no format for that shape: the state "
        f"holds {_words(_held(state))}. A parameter keeps its shape once it has state; to start it anew, delete its "
        f"entry of optimizer.state"
    )


def _factors(state: State, param: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column means that are held, if they are those of this shape."""
    row, col = state[_ROW], state[_COL]
    if param.ndim < 2 or (row.numel(), col.numel()) != matrix_shape(param.shape):
        raise _misfit(_ROW, state, param)
    return row, col


def _read(state: State, name: str, param: Tensor) -> Tensor | None:
    """A moment as float32 values of the parameter's shape; None when there is none yet."""
    if name not in state:
        return None
    fmt, block_size = _held_format(name, state, param)
    if not fmt.quantized:
        values: Tensor = state[name].float()
        return values
    values = torch.empty(param.shape, dtype=torch.float32, device=param.device)
    backend_for(param.device, "codec").dequantize(state[name], state[_block_name(name)], values, fmt, block_size)
    return values


def _read_second(state: State, param: Tensor) -> Tensor | None:
    """The second moment element by element, from row and column means if need be: v = row * col / mean(row)."""
    if _ROW not in state:
        return _read(state, _SECOND, param)
    row, col = _factors(state, param)
    mean = row.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.outer(row / mean, col).reshape(param.shape)


def _means(state: State, param: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column means of the second moment."""
    if _ROW in state:
        return _factors(state, param)
    rows, cols = matrix_shape(param.shape)
    values = _read(state, _SECOND, param)
    if values is None:
        return torch.zeros(rows, device=param.device), torch.zeros(cols, device=param.device)
    matrix = values.reshape(rows, cols)
    return matrix.mean(dim=1), matrix.mean(dim=0)


def _put(state: State, name: str, spec: MomentSpec, param: Tensor, values: Tensor | None) -> None:
    """Store a moment; None: zeros."""
    fmt = spec.format
    assert fmt is not None
    codes, blocks = fmt.allocate(param.shape, spec.block_size, param.device)
    if values is not None and blocks is not None:
        backend_for(param.device, "codec").quantize(values, codes, blocks, fmt, spec.block_size, False, 0)
    elif values is not None:
        codes.copy_(values)
    state[name] = codes
    if blocks is not None:
        state[_block_name(name)] = blocks
