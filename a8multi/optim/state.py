"""The state of one parameter: plain tensors with plain names, and the number of steps.

    step            steps taken: int; with ``capturable`` or ``skip_nonfinite`` int64, 0-d, on the parameter's device
    exp_avg         first moment: codes of the parameter's shape (nf4: packed bytes), or float values
    exp_avg_block   its block headers, when quantised
    exp_avg_sq, exp_avg_sq_block        second moment, element by element
    row_var, col_var                    or, when factored, means of g^2 over columns and rows, float32
    exp_avg_slow, exp_avg_slow_block    third moment, element by element
    row_conf, col_conf                  or, when factored, CAME's confidence: means over columns and rows, float32
    update_norm     norm of the last update, float32, 0-d, where its growth is limited

Here state is made, checked, loaded and converted from one format to another; nothing else knows these names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from a8multi.backend.registry import backend_for
from a8multi.errors import StateFormatError
from a8multi.plan import Moments, MomentSpec, is_plain, matrix_shape, plain
from a8multi.quant.formats import FORMATS, StateFormat

State = dict[str, Any]
Specs = Callable[[dict[str, Any], Tensor], Moments]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class _Slot(NamedTuple):
    """Names of a moment's tensors: element by element, its headers, and its row and column means when factored."""

    values: str
    block: str
    row: str = ""
    col: str = ""


_FIRST = _Slot("exp_avg", "exp_avg_block")
_SECOND = _Slot("exp_avg_sq", "exp_avg_sq_block", "row_var", "col_var")
_THIRD = _Slot("exp_avg_slow", "exp_avg_slow_block", "row_conf", "col_conf")
_LIMITER = "update_norm"
# What a rule is known by, beside its formats.
_RULE_OPTIONS = ("betas", "momentum", "alpha", "lr_decay", "bias_correction", "trust_coefficient", "beta2_decay")


def _slots(moments: Moments) -> list[tuple[_Slot, MomentSpec]]:
    """The moments that there are."""
    wanted = ((_FIRST, moments.first), (_SECOND, moments.second), (_THIRD, moments.third))
    return [(slot, spec) for slot, spec in wanted if spec is not None]


def layout(param: Tensor, moments: Moments) -> Layout:
    """Shape and dtype of every tensor of the state in these formats."""
    tensors: Layout = {}
    shape = moments.shape_of(param)
    for slot, spec in _slots(moments):
        if spec.format is None:
            rows, cols = matrix_shape(shape)
            tensors[slot.row], tensors[slot.col] = ((rows,), torch.float32), ((cols,), torch.float32)
            continue
        tensors[slot.values] = (spec.format.codes_shape(shape), spec.format.dtype)
        if spec.format.header is not None:
            tensors[slot.block] = (spec.format.blocks_shape(shape.numel(), spec.block_size), spec.format.header)
    if moments.limiter:
        tensors[_LIMITER] = ((), torch.float32)
    return tensors


def _held(state: State) -> Layout:
    """As ``layout``, of the tensors that are there."""
    return {
        name: (tuple(value.shape), value.dtype)
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    }


def counts_on_device(group: dict[str, Any]) -> bool:
    """Whether a group's steps are counted in tensors: those of a graph that replays, or that the device may skip."""
    return bool(group["capturable"] or group["skip_nonfinite"])


def _step(steps: Any, device: torch.device, on_device: bool) -> int | Tensor:
    """The number of steps as a group keeps it. A tensor on a device is read only if an integer is wanted."""
    if not on_device:
        return int(steps)
    if isinstance(steps, Tensor):
        return steps if _counts(steps) else steps.detach().reshape(()).to(device, torch.int64)
    return torch.full((), int(steps), dtype=torch.int64, device=device)


def _counts(step: Any) -> bool:
    return isinstance(step, Tensor) and step.dtype is torch.int64 and step.ndim == 0


def is_ready(state: State, param: Tensor, moments: Moments, on_device: bool) -> bool:
    """Whether ``ensure`` would leave everything as it is."""
    step = state.get("step")
    return (
        (_counts(step) if on_device else type(step) is int)
        and _held(state) == layout(param, moments)
        and all(v.device == param.device and is_plain(v) for v in state.values() if isinstance(v, Tensor))
    )


def ensure(state: State, param: Tensor, moments: Moments, on_device: bool) -> None:
    """Make the state, or bring what is there into these formats without losing it."""
    for name, value in state.items():
        # The model was moved after a step, or the user put a view there.
        if isinstance(value, Tensor) and not (value.device == param.device and is_plain(value)):
            state[name] = plain(value.to(param.device))
    wanted, held = layout(param, moments), _held(state)
    step = _step(state.get("step", 0), param.device, on_device)
    if held == wanted:
        state["step"] = step
        return
    made: State = {"step": step}
    for slot, spec in _slots(moments):
        # A moment whose format stays is taken over: reading and storing it would round it once more.
        names = [name for name in slot if name in wanted]
        if all(held.get(name) == wanted[name] for name in names) and not (set(slot) - set(names)) & set(held):
            made.update({name: state[name] for name in names})
        elif spec.format is None:
            made[slot.row], made[slot.col] = _means(state, slot, param, moments)
        else:
            _put(made, slot, spec, moments.shape_of(param), param.device, _read(state, slot, param, moments))
    if moments.limiter:
        made[_LIMITER] = state.get(_LIMITER, torch.zeros((), device=param.device))
    state.clear()
    state.update(made)


def check(state: State, param: Tensor, moments: Moments) -> None:
    """Raise StateFormatError for what ``ensure`` cannot bring into these formats; nothing is written."""
    if _held(state) == layout(param, moments):
        return
    shape = moments.shape_of(param)
    for slot, _ in _slots(moments):
        if slot.row and slot.row in state:
            _factors(state, slot, shape)
        elif slot.values in state:
            _held_format(slot, state, shape)


def tensors(state: State, moments: Moments) -> dict[str, Tensor | None]:
    """The tensors of an item by the names that it has for them."""
    found: dict[str, Tensor | None] = {"limiter": state[_LIMITER] if moments.limiter else None}
    for name, slot, spec in (
        ("first", _FIRST, moments.first),
        ("second", _SECOND, moments.second),
        ("third", _THIRD, moments.third),
    ):
        factored = spec is not None and spec.format is None
        held = (slot.row, slot.col) if factored else (slot.values, slot.block)
        found[name], found[f"{name}_block"] = (None, None) if spec is None else (state[held[0]], state.get(held[1]))
    return found


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
                wanted = layout(param, specs(saved_group, param))
                saved = _checked_state(given["state"][key], param, wanted, number)
                if saved:
                    saved["step"] = _step(saved["step"], param.device, counts_on_device(group))
                result[number] = saved
            number += 1
    return result


def _require_same_options(
    kind: str, where: int, group: dict[str, Any], saved: dict[str, Any], options: tuple[str, ...]
) -> None:
    # Those of the rule too: some rules have the same moments, and would go on with a stranger's.
    for name in (*options, *_RULE_OPTIONS):
        if name in group and name not in saved:
            raise StateFormatError(
                f"param_groups[{where}] of the state dict has no {name!r}: it was not saved by {kind}. State of other "
                f"optimizers cannot be loaded; a8multi.convert_state_dict takes that of other packages."
            )
    for name in options:
        if saved[name] != group[name]:
            raise StateFormatError(
                f"param_groups[{where}] of the state dict was saved with {name}={saved[name]!r}, this {kind} has "
                f"{name}={group[name]!r}. Build the optimizer with the option it was saved with."
            )


def _checked_state(saved: State, param: Tensor, wanted: Layout, number: int) -> State:
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


def _words(tensors: Layout) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, (shape, dtype) in tensors.items()) or "no tensors"


# --- From one format to another. ---


def _held_format(slot: _Slot, state: State, shape: torch.Size) -> tuple[StateFormat, int]:
    """The format in which a moment is held, and its block size, from its tensors alone."""
    codes, blocks = state[slot.values], state.get(slot.block)
    for fmt in FORMATS.values():
        if fmt.dtype is codes.dtype and fmt.codes_shape(shape) == tuple(codes.shape):
            if fmt.header is None and blocks is None:
                return fmt, 0
            if fmt.header is not None and blocks is not None and fmt.header is blocks.dtype:
                sizes = (1 << k for k in range(32))
                held = tuple(blocks.shape)
                for size in sizes:
                    if fmt.blocks_shape(shape.numel(), size) == held and size >= 32:
                        return fmt, size
    raise _misfit(slot.values, state, shape)


def _misfit(name: str, state: State, shape: torch.Size) -> StateFormatError:
    return StateFormatError(
        f"{name} in the state of a parameter of shape {tuple(shape)} is in no format for that shape: the state "
        f"holds {_words(_held(state))}. A parameter keeps its shape once it has state; to start it anew, delete its "
        f"entry of optimizer.state"
    )


def _factors(state: State, slot: _Slot, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Row and column means that are held, if they are those of this shape."""
    row, col = state[slot.row], state.get(slot.col)
    if col is None or len(shape) < 2 or (row.numel(), col.numel()) != matrix_shape(shape):
        raise _misfit(slot.row, state, shape)
    return row, col


def _read(state: State, slot: _Slot, param: Tensor, moments: Moments) -> Tensor | None:
    """A moment as float32 values, element by element; None when there is none yet.

    From row and column means if need be: v = row * col / mean(row).
    """
    shape = moments.shape_of(param)
    if slot.row and slot.row in state:
        row, col = _factors(state, slot, shape)
        mean = row.mean().clamp(min=torch.finfo(torch.float32).tiny)
        return torch.outer(row / mean, col).reshape(shape)
    if slot.values not in state:
        return None
    fmt, block_size = _held_format(slot, state, shape)
    if not fmt.quantized:
        values: Tensor = state[slot.values].float()
        return values
    values = torch.empty(shape, dtype=torch.float32, device=param.device)
    backend_for(param.device, "codec").dequantize(state[slot.values], state[slot.block], values, fmt, block_size)
    return values


def _means(state: State, slot: _Slot, param: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Row and column means of a moment; zeros when there is none yet."""
    shape = moments.shape_of(param)
    if slot.row in state:
        return _factors(state, slot, shape)
    rows, cols = matrix_shape(shape)
    values = _read(state, slot, param, moments)
    if values is None:
        return torch.zeros(rows, device=param.device), torch.zeros(cols, device=param.device)
    matrix = values.reshape(rows, cols)
    return matrix.mean(dim=1), matrix.mean(dim=0)


def _put(
    state: State, slot: _Slot, spec: MomentSpec, shape: torch.Size, device: torch.device, values: Tensor | None
) -> None:
    """Store a moment; None: what it starts with."""
    fmt = spec.format
    assert fmt is not None
    if values is None and spec.start:
        values = torch.full(shape, spec.start, device=device)
    codes, blocks = fmt.allocate(shape, spec.block_size, device)
    if values is not None and blocks is not None:
        backend_for(device, "codec").quantize(values, codes, blocks, fmt, spec.block_size, False, 0)
    elif values is not None:
        codes.copy_(values)
    state[slot.values] = codes
    if blocks is not None:
        state[slot.block] = blocks
