"""``convert_state_dict``: from what another package saved to what ``load_state_dict`` of ours takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from a8multi.errors import StateFormatError
from a8multi.loader.structs import Flag
from a8multi.optim import state as state_of
from a8multi.optim.base import LowBitOptimizer
from a8multi.plan import Moments, MomentSpec
from a8multi.quant.formats import FORMATS

from . import from_adafactor8bit, from_bitsandbytes, from_torch, from_torchao
from .held import INTACT, Factors, Fields, Held, Options, Place, as_number

_SOURCES = {
    "torch": from_torch,
    "bitsandbytes": from_bitsandbytes,
    "torchao": from_torchao,
    "adafactor8bit": from_adafactor8bit,
}
_SLOTS = ("first", "second", "third")
# Options that the groups of one package alone have.
_MARKS = {
    "stochastic_rounding": "a8multi",
    "foreach": "torch",
    "t_beta3": "bitsandbytes",
    "m_block_size": "adafactor8bit",
}


def convert_state_dict(state_dict: Mapping[str, Any], source: str, *, optimizer: LowBitOptimizer) -> dict[str, Any]:
    """Carry the state of a running job over from another package's optimizer.

    Moments are dequantised to float32 and stored in the formats of ``optimizer`` (to nearest); numbers of steps and
    hyper-parameters (learning rate, betas, eps, weight decay ...) are those of the state dict, and what only says how
    state is stored or steps are run stays as ``optimizer`` has it. Neither argument is changed.

    What is read:

    - "torch": AdamW, Adam, Adafactor, SGD, RMSprop and Adagrad of torch.optim, into the class of ours of that name.
    - "bitsandbytes" (0.50.2): Adam and AdamW (both of them decouple weight decay: load AdamW8bit), AdEMAMix, LAMB,
      Lion, SGD, RMSprop and Adagrad, 8-bit block-wise or 32-bit. Its LAMB has the moments of ours, but another step.
      Overrides of GlobalOptimManager are not in a state dict: see :func:`build_param_groups`.
    - "torchao" (0.18): its Adam and AdamW of 8 bits, 4 bits and fp8. Their state is tensor subclasses: import
      ``torchao.optim`` before ``torch.load``. Whether weight decay was decoupled is not saved: choose the same class.
    - "adafactor8bit" (0.2.4): without APOLLO. CAME goes on in its own order (``came_order="adafactor8bit"``).

    Only for torchao must the package be installed.

    Args:
        state_dict: what ``state_dict()`` of the other optimizer gave.
        source: the package that it is of.
        optimizer: the optimizer to load, over the same parameters in the same groups and order.
    Returns:
        A state dict for ``optimizer.load_state_dict``. It may share float32 tensors with ``state_dict``.
    Raises:
        StateFormatError: something cannot be carried over. Names parameter and key, why, and what to do. So are refused
            amsgrad, percentile clipping, APOLLO's projections, sparse and distributed tensors, the LARS of bitsandbytes
            (its momentum is not scaled), a state dict of another package, options that are not there, moments that are
            not finite, and every entry that is not known: nothing is lost silently.
        TypeError, ValueError: an argument is not valid.

    A tensor of more than two dimensions that torch or adafactor8bit have factored is factored otherwise here (see
    :class:`Adafactor8bit`): our means are those of the moment that theirs stand for.

    Example:
        >>> saved = torch.load("optimizer.pt")  # of bitsandbytes.optim.AdamW8bit
        >>> optimizer = a8multi.AdamW8bit(model.parameters())
        >>> optimizer.load_state_dict(a8multi.convert_state_dict(saved, "bitsandbytes", optimizer=optimizer))
    """
    if source not in _SOURCES:
        raise ValueError(f"source must be one of {', '.join(_SOURCES)}, not {source!r}")
    if not isinstance(optimizer, LowBitOptimizer):
        raise TypeError(
            f"optimizer must be an optimizer of a8multi, built over the parameters to train, not {optimizer!r}"
        )
    saved_groups = _groups_of(state_dict, source, optimizer)
    left = dict(state_dict["state"])
    groups: list[dict[str, Any]] = []
    states: dict[int, dict[str, Any]] = {}
    number = 0
    with torch.no_grad():
        for where, (saved, own) in enumerate(zip(saved_groups, optimizer.param_groups, strict=True)):
            place = Place(source, f"param_groups[{where}]")
            _check_source(saved, source, place)
            options = _SOURCES[source].options(saved, _kind(optimizer), place)
            numbers = list(range(number, number + len(own["params"])))
            number += len(numbers)
            held = {
                n: _read(source, left.pop(key), param, optimizer, n)
                for n, key, param in zip(numbers, saved["params"], own["params"], strict=True)
                if left.get(key)
            }
            group = _group(saved, options, own, optimizer, place)
            groups.append({**group, "params": numbers})
            for n, found in held.items():
                param = own["params"][n - numbers[0]]
                if found is not None and param.numel():
                    states[n] = _stored(found, param, group, optimizer, _place(source, optimizer, n, param))
    if any(left.values()):
        raise Place(source, "state").error(
            ", ".join(repr(key) for key, value in left.items() if value),
            "belongs to no parameter of the groups",
            "Is the state dict complete? Delete what you do not need from it.",
        )
    return {"state": states, "param_groups": groups}


def _kind(optimizer: LowBitOptimizer) -> str:
    """The rule that it follows, as the sources name it."""
    return "adafactor" if optimizer._op == "adafactor" else optimizer._rule.name.lower()


def _place(source: str, optimizer: LowBitOptimizer, number: int, param: Tensor) -> Place:
    return Place(source, f"parameter {number}, {optimizer._name(number)} of shape {tuple(param.shape)}")


def _groups_of(state_dict: Mapping[str, Any], source: str, optimizer: LowBitOptimizer) -> list[dict[str, Any]]:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise StateFormatError(
            f"convert_state_dict(source={source!r}): a state dict has 'state' and 'param_groups', this has "
            f"{', '.join(map(repr, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__}. "
            f"Pass what state_dict() of an optimizer gave"
        )
    whole, state, saved = Place(source, "state dict"), state_dict["state"], state_dict["param_groups"]
    for name, value, kind in (("state", state, Mapping), ("param_groups", saved, (list, tuple))):
        if not isinstance(value, kind):
            raise whole.error(name, f"is a {type(value).__name__}", INTACT)
    for key, value in state.items():
        if not isinstance(value, Mapping):
            raise whole.error(f"state[{key!r}]", f"is a {type(value).__name__}", INTACT)
    for where, group in enumerate(saved):
        if not isinstance(group, Mapping):
            raise whole.error(f"param_groups[{where}]", f"is a {type(group).__name__}", INTACT)
        params = Place(source, f"param_groups[{where}]").required(group, ("params",))["params"]
        if not isinstance(params, (list, tuple)):
            raise whole.error(f"param_groups[{where}]['params']", f"is a {type(params).__name__}", INTACT)
    sizes, own = ([len(group["params"]) for group in groups] for groups in (saved, optimizer.param_groups))
    if sizes != own:
        raise StateFormatError(
            f"convert_state_dict(source={source!r}): the state dict has groups of {sizes} parameters, the optimizer of "
            f"{own}. Build it with the same groups, over the same parameters in the same order"
        )
    return list(saved)


def _check_source(group: Mapping[str, Any], source: str, place: Place) -> None:
    owner, mark = next(((owner, mark) for mark, owner in _MARKS.items() if mark in group), (source, ""))
    if owner != source:
        do = f"Pass source={owner!r}." if owner in _SOURCES else "Give the state dict to load_state_dict as it is."
        raise place.error(f"option {mark}", f"this is a group of {owner}", do)


def _read(source: str, state: Mapping[str, Any], param: Tensor, optimizer: LowBitOptimizer, number: int) -> Held | None:
    fields = Fields(state, _place(source, optimizer, number, param))
    held = _SOURCES[source].moments(fields, param.shape, _kind(optimizer))
    fields.done()
    return held


# --- Groups. ---


def _group(
    saved: Mapping[str, Any], options: Options, own: dict[str, Any], optimizer: LowBitOptimizer, place: Place
) -> dict[str, Any]:
    """The group to load: our options with the source's values, and what the user has put there (``initial_lr`` ...)."""
    name_of_ours = type(optimizer).__name__
    group = {name: value for name, value in own.items() if name != "params"}
    for name, value in options.values.items():
        if name not in group:
            if value:
                raise place.error(
                    f"{name}={value!r}", f"{name_of_ours} has no such option", "Build the class of ours that has it."
                )
        elif name in optimizer._format_options and group[name] != value:
            raise place.error(
                f"{name}={value!r}",
                f"this {name_of_ours} has {name}={group[name]!r}, which decides what state there is",
                f"Build it with {name}={value!r}.",
            )
        else:
            group[name] = _like(group[name], value, place) if name == "lr" else _plain(value)
    known = {*options.read, *optimizer.defaults, "params", "param_names"}
    group.update({name: value for name, value in saved.items() if name not in known})
    try:
        optimizer._check_group(group)
    except (ValueError, NotImplementedError) as error:
        raise place.error("options", str(error), f"Choose another optimizer than {name_of_ours}.") from error
    _check_decay(group, options, optimizer, place)
    return group


def _like(own: Any, lr: Any, place: Place) -> Any:
    """A learning rate as the optimizer has it: torchao always keeps a tensor, which schedulers would have to fill."""
    rate = as_number(lr)
    if rate is None:
        raise place.error("lr", f"{lr!r} is not a number", INTACT)
    return torch.full_like(own, rate) if isinstance(own, Tensor) else rate


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return tuple(_plain(each) for each in value) if isinstance(value, (list, tuple)) else value


def _check_decay(group: dict[str, Any], options: Options, optimizer: LowBitOptimizer, place: Place) -> None:
    if options.decoupled is None or not group["weight_decay"]:
        return
    ours = not optimizer._hyper(group, torch.float32)["flags"] & Flag.L2_DECAY
    if ours != options.decoupled:
        words = {True: "apart from the gradient, as AdamW", False: "part of the gradient (L2), as Adam"}
        raise place.error(
            f"weight_decay={group['weight_decay']!r}",
            f"in the source it is {words[options.decoupled]}; in {type(optimizer).__name__}, {words[ours]}",
            "Build the class that decays in the same way (AdamW8bit decouples, Adam8bit does not), or set the source's "
            "weight_decay to 0.",
        )


# --- State. ---


def _stored(
    held: Held, param: Tensor, group: dict[str, Any], optimizer: LowBitOptimizer, place: Place
) -> dict[str, Any]:
    """The state in the formats of the group."""
    wanted = optimizer._moments(group, param)
    _check_moments(held, wanted, group, param, optimizer, place)
    found = [_as_we_factor(value, param) for value in (held.first, held.second, held.third)]
    first, second, third = map(_spec, found)
    names = state_of.layout(param, Moments(first, second, third, held.limiter is not None))
    tensors = [tensor for value in (*found, held.limiter) for tensor in _tensors(value)]
    state: dict[str, Any] = {"step": held.step, **dict(zip(names, tensors, strict=True))}
    state_of.ensure(state, param, wanted, state_of.counts_on_device(group))
    return state


def _spec(value: Tensor | Factors | None) -> MomentSpec | None:
    if value is None:
        return None
    return MomentSpec(None if isinstance(value, Factors) else FORMATS["fp32"])


def _tensors(value: Tensor | Factors | None) -> list[Tensor]:
    if isinstance(value, Factors):
        return [each.reshape(-1) for each in value]
    return [] if value is None else [value]


def _as_we_factor(value: Tensor | Factors | None, param: Tensor) -> Tensor | Factors | None:
    """Of more than two dimensions the moment itself, v = row * col / mean(row): our rows and columns are others."""
    if not isinstance(value, Factors) or param.ndim == 2:
        return value
    mean = value.row.mean(dim=-2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return value.row / mean * value.col


def _check_moments(
    held: Held, wanted: Moments, group: dict[str, Any], param: Tensor, optimizer: LowBitOptimizer, place: Place
) -> None:
    ours = f"{type(optimizer).__name__} with these options"
    if wanted.shape_of(param) != param.shape:
        raise place.error(
            "state",
            f"{ours} keeps moments of a projected gradient",
            "Build it without a projection, or delete the state.",
        )
    if held.first is not None and optimizer._hyper(group, param.dtype)["flags"] & Flag.AVERAGE_UPDATE:
        raise place.error(
            "first moment",
            f"it averages the gradient, in {ours} the update",
            'Build Adafactor8bit(came_order="adafactor8bit"), or delete the state of this parameter.',
        )
    for name in (*_SLOTS, "limiter"):
        has, wants = getattr(held, name) is not None, bool(getattr(wanted, name))
        what = "norm of the last update" if name == "limiter" else f"{name} moment"
        if has and not wants:
            raise place.error(
                what, f"{ours} does not keep one", "Build it with the option that does, or delete it from the state."
            )
        # Without a last update there is nothing to limit, as before a first step.
        if wants and not has and name != "limiter":
            raise place.error(
                what, f"{ours} keeps one, and there is none", "Build it without, or delete the state: it starts anew."
            )
    for name in _SLOTS:
        for tensor in _tensors(getattr(held, name)):
            if not bool(tensor.isfinite().all()):
                raise place.error(
                    f"{name} moment",
                    "there are values that are not finite",
                    "Delete the state of this parameter from the state dict: it starts anew.",
                )
    if any(bool((tensor < 0).any()) for tensor in _tensors(held.second)):
        raise place.error(
            "second moment", "there are negative values", "Is the optimizer of the rule that wrote the state?"
        )
