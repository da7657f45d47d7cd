"""State of bitsandbytes: a code book and absmax a block (Dettmers et al. 2022, arXiv:2110.02861), or float32.

A state dict holds its own code books. It does not say which optimizer wrote it, only whether it had one state or two:
one is read as what the optimizer to load keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .held import INTACT, Fields, Held, Options, Place, as_number

# Under it bitsandbytes hides from FSDP what is not of the parameter's shape.
_WRAPPED = "__bnb_optimizer_quant_state__"
# Of 0.50.2, and of versions before 0.45.
_BLOCK_SIZES = (256, 2048)
_TWO_STATES = ("adam", "ademamix", "lamb")
# Kind -> our names of betas[0] and betas[1], and what else follows.
_ONE_STATE: dict[str, tuple[str | None, Mapping[str, Any]]] = {
    "lion": (None, {}),
    "sgd": ("momentum", {"dampening": 0.0, "nesterov": False}),
    "rmsprop": ("alpha", {"momentum": 0.0, "centered": False}),
    "adagrad": (None, {"lr_decay": 0.0}),
}
_TENSOR_WISE = ("it is of the 8-bit state for whole tensors, before there were blocks", "Save it block-wise.")
_REFUSED = {
    **dict.fromkeys(("max1", "max2", "new_max1", "new_max2"), _TENSOR_WISE),
    "gnorm_vec": (
        "percentile clipping's history of gradient norms has no place in our optimizers",
        "Delete it from the state, and clip gradients with torch.nn.utils.clip_grad_norm_.",
    ),
}
_UPDATE_NORM = {
    "unorm_vec": (
        "it was written with max_unorm, a bound on the update's norm, which this optimizer has not",
        "Delete it from the state if the step may go on without that bound.",
    )
}


def options(group: Mapping[str, Any], kind: str, place: Place) -> Options:
    if kind == "lars":
        raise place.error(
            "state1",
            "bitsandbytes averages the gradient as it is, ours the gradient scaled by LARS's coefficient",
            "Load an SGD8bit, or start LARS8bit without state.",
        )
    if kind not in (*_TWO_STATES, *_ONE_STATE) or "betas" not in group:
        raise place.error(
            f"options {', '.join(name for name in group if name != 'params')}",
            f"bitsandbytes has nothing with such options that could go on as {kind}",
            f"Known: {', '.join((*_TWO_STATES, *_ONE_STATE))}. Build the optimizer of ours that follows the same rule.",
        )
    two = kind in _TWO_STATES
    read = {"lr", "weight_decay", "betas", "eps", "alpha", "t_alpha", "t_beta3"}
    values = place.required(group, ("lr", "weight_decay"))
    eps = place.required(group, ("eps",))["eps"]
    given = group["betas"] if isinstance(group["betas"], (tuple, list)) else ()
    betas = tuple(beta for beta in map(as_number, given) if beta is not None)
    # Lion is given two betas, and the others with one state are too.
    _require(len(betas) == len(given) == (3 if kind == "ademamix" else 2), "betas", group, place)
    if two:
        names = ("alpha", "t_alpha", "t_beta3") if kind == "ademamix" else ()
        values.update(place.required(group, names), eps=eps, betas=betas)
        if kind == "lamb":
            values["bias_correction"] = True
        return Options(values, read, None if kind == "lamb" else True)
    # Lion and SGD write eps=0, and SGD, RMSprop and Adagrad nothing in betas[1] that is ever used.
    _require((as_number(eps) == 0) == (kind in ("lion", "sgd")), "eps", group, place)
    _require(kind == "lion" or betas[1] == 0, "betas", group, place)
    name, fixed = _ONE_STATE[kind]
    values.update(fixed)
    if kind == "lion":
        values["betas"] = betas
    else:
        values.update({} if name is None else {name: betas[0]})
        values.update({} if kind == "sgd" else {"eps": eps})
    return Options(values, read, kind == "lion")


def _require(fits: bool, name: str, group: Mapping[str, Any], place: Place) -> None:
    if not fits:
        raise place.error(
            f"{name}={group[name]!r}",
            "the optimizer to load never has that in bitsandbytes (which keeps, but does not use, a second number of "
            "SGD's and RMSprop's betas: dampening and momentum)",
            "Build the optimizer of ours that follows the same rule; set in the state dict what has no effect to 0.",
        )


def moments(fields: Fields, shape: Sequence[int], kind: str) -> Held | None:
    if _WRAPPED in fields:
        wrapped = fields.take(_WRAPPED)
        if not isinstance(wrapped, Mapping):
            raise fields.place.error(_WRAPPED, f"{wrapped!r} is not a state", INTACT)
        rest = {name: fields.take(name) for name in ("step", "unorm_vec") if name in fields}
        fields.done()
        return _unwrapped(Fields({**rest, **wrapped}, fields.place), shape, kind)
    return _unwrapped(fields, shape, kind)


def _unwrapped(fields: Fields, shape: Sequence[int], kind: str) -> Held:
    fields.refuse(_REFUSED)
    if kind == "lamb":
        fields.drop("unorm_vec")  # of the last update alone, and written anew by every one
    fields.refuse(_UPDATE_NORM)
    if ("state2" in fields) != (kind in _TWO_STATES):
        raise fields.place.error(
            "state2",
            "it is there with two states (Adam, LAMB, AdEMAMix), not with one (Lion, SGD, RMSprop, Adagrad, LARS), and "
            f"the optimizer to load is of the kind {kind}",
            "Build the optimizer of ours that follows the same rule.",
        )
    held = Held(fields.steps())
    if kind == "ademamix":
        held.first, held.third = _state(fields, "1", (2, *shape)).unbind()
    elif kind in ("rmsprop", "adagrad"):
        held.second = _state(fields, "1", shape)
    else:
        held.first = _state(fields, "1", shape)
    if kind in _TWO_STATES:
        held.second = _state(fields, "2", shape)
    fields.done()
    return held


def _state(fields: Fields, number: str, shape: Sequence[int]) -> Tensor:
    name = f"state{number}"
    if f"qmap{number}" not in fields:
        return fields.shaped(name, fields.dense(name), shape)
    codes = fields.shaped(name, fields.codes(name, torch.uint8), shape)
    qmap = fields.shaped(f"qmap{number}", fields.codes(f"qmap{number}", torch.float32), (256,))
    absmax = fields.codes(f"absmax{number}", torch.float32)
    # AdEMAMix's two averages are quantised each by itself.
    count = shape[0] if absmax.ndim == 2 and absmax.shape[:1] == codes.shape[:1] else 1
    parts, blocks = codes.reshape(count, -1), absmax.reshape(count, -1)
    for size in _BLOCK_SIZES:
        if -(-parts.shape[1] // size) == blocks.shape[1]:
            scale = blocks.repeat_interleave(size, dim=1)[:, : parts.shape[1]]
            return (qmap[parts.int()] * scale).reshape(tuple(shape))
    raise fields.place.error(
        f"absmax{number}",
        f"{list(absmax.shape)} for {list(codes.shape)} codes is no known block size",
        f"Known: {', '.join(map(str, _BLOCK_SIZES))}. Is the state intact?",
    )
