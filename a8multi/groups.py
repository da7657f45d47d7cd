"""Parameter groups of a model: which parameters get safe settings, and what the user wants otherwise.

Receives a model; returns groups as an optimizer takes them. Reads names, types and shapes, and touches no tensor.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from a8multi import optim
from a8multi.optim import apollo

# Preset -> the optimizer of a8multi that the groups are for, whose options they may hold.
PRESETS = {
    "adamw": "AdamW8bit",
    "adam": "Adam8bit",
    "lion": "Lion8bit",
    "sgd": "SGD8bit",
    "rmsprop": "RMSprop8bit",
    "adagrad": "Adagrad8bit",
    "ademamix": "AdEMAMix8bit",
    "lamb": "LAMB8bit",
    "lars": "LARS8bit",
    "adafactor": "Adafactor8bit",
    "came": "CAME8bit",
    "apollo": "APOLLO8bit",
}

# 32-bit state of full rank, by the options of all optimizers: each takes those that it has.
_SAFE = {
    "quantize": False,
    "first_moment": "fp32",
    "second_moment": "fp32",
    "third_moment": "fp32",
    "apollo_rank": 0,
    "weight_decay": 0.0,
}

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_NORM_CLASS = re.compile(r"(Layer|RMS|Group|Batch|Instance)Norm|Norm(\d+d)?$")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Layers whose weights are matrices, however they are named: a projection called "patch_embed" is none that looks up.
_MATRICES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
_BIAS_NAME = re.compile(r"(^|_)bias(_|$)")
_EMBEDDING_NAME = re.compile(r"embed|^wte$|^wpe$|_tokens?$")
# Of modules outside numbered layers: inside of one, "output" or "fc" is a part of the layer.
_HEAD_NAME = re.compile(
    r"(lm_|qa_)?(head|output)s?|output_(layer|projection)|embed_out|proj_out|unembed|to_logits|classifier|score|fc|cls"
)


@dataclass
class _Tensor:
    """One parameter of the model under every name that it has; the first is that of ``named_parameters``."""

    param: Parameter
    names: list[str] = field(default_factory=list)
    owners: list[nn.Module] = field(default_factory=list)


@dataclass
class _Group:
    options: dict[str, Any]
    tensors: list[_Tensor] = field(default_factory=list)


def build_param_groups(
    model: nn.Module,
    preset: str = "adamw",
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    weight_decay: float | None = None,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Groups of a model's parameters for one of our optimizers.

    Embeddings, output heads, normalisation, biases and all other parameters of fewer than two dimensions get 32-bit
    state of full rank and no weight decay; every other parameter is left to the optimizer's own arguments. The type of
    the module decides first, names second. Tied parameters appear once, frozen ones (``requires_grad=False``) not at
    all. Parameters with equal options share a group, and the groups hold ``param_names``, so that errors name them.

    Args:
        model: its parameters keep their order within a group; groups are in the order of their first parameter.
        preset: the optimizer that the groups are for: adamw, adam, lion, sgd, rmsprop, adagrad, ademamix, lamb, lars,
            adafactor, came or apollo.
        overrides: options of that optimizer by pattern, plain literals throughout, as a YAML file holds them. A pattern
            is the name of a parameter, or of a module for all that is below it, as in ``model.named_parameters()``, or
            a glob for either (``*`` matches dots too). The later of two that match a parameter wins, option by option.
        weight_decay: of the parameters that have no safe settings; None: that of the optimizer.
        verbose: print what was chosen for which parameters, and why.

    Returns:
        One dictionary a group: ``params``, ``param_names`` and the options that differ from the optimizer's arguments.

    Raises:
        ValueError: an unknown preset; a pattern that matches nothing; an option that the optimizer does not have, or a
            value that it refuses.
        TypeError: the model is not a module, or an override is not a mapping.

    Example, with what bitsandbytes' ``GlobalOptimManager.register_module_override`` is used for:
        >>> groups = a8multi.build_param_groups(
        ...     model,
        ...     "adamw",
        ...     weight_decay=0.1,
        ...     overrides={
        ...         "model.embed_tokens": {"first_moment": "fp32", "second_moment": "fp32", "lr": 1e-4},
        ...         "*.mlp.*": {"block_size": 256},
        ...         "model.layers.0": {"betas": [0.9, 0.95]},
        ...     },
        ... )
        >>> optimizer = a8multi.AdamW8bit(groups, lr=1e-3)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    # An optimizer of nothing: knows its options, and judges them.
    judge = getattr(optim, PRESETS[preset])([_nothing()], lr=0.0)
    tensors = _tensors(model)
    kept = _checked_overrides(overrides or {}, preset, judge, tensors)
    safe = {name: value for name, value in _SAFE.items() if name in judge.defaults}
    usual = {} if weight_decay is None else {"weight_decay": weight_decay}

    groups: list[_Group] = []
    reasons: dict[tuple[str, int], list[_Tensor]] = {}
    for tensor in tensors:
        if not tensor.param.requires_grad:
            continue
        role, reason = _role(tensor)
        options = dict(usual if role == "matrix" else safe)
        for pattern, wanted in kept.items():
            if _matches(pattern, tensor):
                options.update(wanted)
                reason += f" + {pattern!r}"
        number = _number_of(options, groups)
        if number == len(groups):
            _judge(options, judge, f"options of {tensor.names[0]!r}")
            groups.append(_Group(options))
        groups[number].tensors.append(tensor)
        reasons.setdefault((reason, number), []).append(tensor)
    if verbose:
        frozen = [tensor for tensor in tensors if not tensor.param.requires_grad]
        print(_report(preset, groups, reasons, frozen))
    return [
        {
            "params": [tensor.param for tensor in group.tensors],
            "param_names": [tensor.names[0] for tensor in group.tensors],
            **group.options,
        }
        for group in groups
    ]


def _nothing() -> Parameter:
    return Parameter(torch.empty(0))


def _tensors(model: nn.Module) -> list[_Tensor]:
    """In the order of ``named_parameters``."""
    found: dict[int, _Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(path, recurse=False, remove_duplicate=False):
            tensor = found.setdefault(id(param), _Tensor(param))
            tensor.names.append(name)
            tensor.owners.append(module)
    return list(found.values())


# --- Which settings a parameter gets. ---


def _role(tensor: _Tensor) -> tuple[str, str]:
    """What a parameter is, and that in words with its reason. A tied one is whatever is safe in any of its places."""
    places = zip(tensor.names, tensor.owners, strict=True)
    roles = [_role_at(name, owner, tensor.param.ndim) for name, owner in places]
    return next((role for role in roles if role[0] != "matrix"), roles[0])


def _role_at(name: str, owner: nn.Module, ndim: int) -> tuple[str, str]:
    kind = type(owner).__name__
    *path, own = name.split(".")
    if isinstance(owner, _NORMS) or _NORM_CLASS.search(kind):
        return "norm", f"norm ({kind})"
    looks_up = not isinstance(owner, _MATRICES)
    if isinstance(owner, _EMBEDDINGS) or (looks_up and "Embed" in kind):
        return "embedding", f"embedding ({kind})"
    if _BIAS_NAME.search(own):
        return "bias", "bias (name)"
    if ndim < 2:
        return "vector", f"vector ({ndim}-d)"
    outside = path[: next((i for i, part in enumerate(path) if part.isdigit()), len(path))]
    if head := next(filter(_HEAD_NAME.fullmatch, outside), None):
        return "head", f"head (name {head})"
    if looks_up and any(_EMBEDDING_NAME.search(part) for part in (own, *path[-1:])):
        return "embedding", "embedding (name)"
    return "matrix", "matrix"


def _number_of(options: dict[str, Any], groups: list[_Group]) -> int:
    """Of the group with these options; one past the last where there is none."""
    return next((number for number, group in enumerate(groups) if group.options == options), len(groups))


# --- Overrides. ---


def _matches(pattern: str, tensor: _Tensor) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for full in tensor.names for name in _and_modules(full))


def _and_modules(name: str) -> Iterable[str]:
    """A parameter's name and those of all modules that it is below of."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _checked_overrides(
    overrides: Any, preset: str, judge: torch.optim.Optimizer, tensors: list[_Tensor]
) -> dict[str, dict[str, Any]]:
    """The overrides with the names of options that groups have."""
    aliases = apollo.NAMES if preset == "apollo" else ()
    in_groups = apollo.in_groups if preset == "apollo" else dict
    kept: dict[str, dict[str, Any]] = {}
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must map patterns to options, not {type(overrides).__name__}")
    for pattern, options in overrides.items():
        if not isinstance(pattern, str) or not isinstance(options, Mapping):
            raise TypeError(f"overrides must map patterns to options, not {pattern!r} to {options!r}")
        if not any(_matches(pattern, tensor) for tensor in tensors):
            known = dict.fromkeys(part for tensor in tensors for name in tensor.names for part in _and_modules(name))
            close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or list(known)[:3]
            raise ValueError(
                f"overrides[{pattern!r}] matches no parameter and no module that has some. Closest names: "
                f"{', '.join(close) or 'none, the model has no parameters'}. See model.named_parameters()"
            )
        for option in options:
            if option not in judge.defaults and option not in aliases:
                raise ValueError(
                    f"overrides[{pattern!r}]: {type(judge).__name__} has no option {option!r} of groups; it has "
                    f"{', '.join(dict.fromkeys((*aliases, *judge.defaults)))}"
                )
        try:
            kept[pattern] = in_groups(options)
        except ValueError as error:
            raise ValueError(f"overrides[{pattern!r}]: {error}") from error
    return kept


def _judge(options: dict[str, Any], judge: torch.optim.Optimizer, what: str) -> None:
    try:
        judge.add_param_group({"params": [_nothing()], **options})
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{what}: {error}") from error


# --- The table that verbose=True prints. ---


def _report(
    preset: str, groups: list[_Group], reasons: dict[tuple[str, int], list[_Tensor]], frozen: list[_Tensor]
) -> str:
    rows = [
        (reason, tensors, str(number), ", ".join(f"{k}={v!r}" for k, v in groups[number].options.items()))
        for (reason, number), tensors in reasons.items()
    ]
    if frozen:
        rows.append(("frozen (requires_grad=False)", frozen, "-", "left out"))
    name = PRESETS[preset]
    width = max((len(row[0]) for row in rows), default=0)
    lines = [
        f"{len(groups)} groups for {name} (preset {preset})",
        f"{'what':<{width}}  {'tensors':>7}  {'parameters':>15}  {'group':>5}  options",
    ]
    for reason, tensors, group, options in rows:
        count = sum(tensor.param.numel() for tensor in tensors)
        chosen = options or f"as {name} is given them"
        lines.append(f"{reason:<{width}}  {len(tensors):>7}  {count:>15,}  {group:>5}  {chosen}")
    return "\n".join(lines)
