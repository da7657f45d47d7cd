"""What bench/fidelity.py and bench/losses.py compare: optimizers of ours and of the peers, by families of rules.

A name says the package, then the rule; what follows a comma says only how state is stored. So candidates whose names
are equal up to the comma share one reference, the same rule with fp32 state.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from a8multi.cli import candidates
from a8multi.cli.console import CommandError

Options = Mapping[str, Any]

# Options that say how state is stored, and no more.
_STORAGE = ("first_moment", "second_moment", "third_moment", "block_size", "stochastic_rounding")
# Above the size of any tensor: as the least size to quantise it leaves all state in fp32.
_NEVER = 2**62
# Steps of bitsandbytes with 8-bit state leave the ratio of norms out: without it the fp32 rule is the one they follow.
_OTHER_TWINS: dict[str, tuple[str, Options]] = {
    "bitsandbytes.optim:LAMB8bit": ("bitsandbytes.optim:LAMB", {"max_unorm": 0.0}),
    "bitsandbytes.optim:LARS8bit": ("bitsandbytes.optim:LARS", {"max_unorm": 0.0}),
}


class Candidate(candidates.Candidate):
    """One row of the table."""

    def with_fp32_state(self) -> Candidate:
        """The same rule without quantisation; several candidates share one, whatever their formats."""
        rule = {name: value for name, value in self.options.items() if name not in _STORAGE}
        known = inspect.signature(self.optimizer_class).parameters
        least = "min_quantized_numel" if "min_quantized_numel" in known else "min_8bit_size"
        target, more = _OTHER_TWINS.get(self.target, (self.target, {}))
        return Candidate(f"{self.name.partition(',')[0]} fp32", target, {**rule, **more, least: _NEVER})


def _ours(name: str, base: Options, **options: Any) -> Candidate:
    """name: its first word is the class."""
    return Candidate(f"a8multi {name}", f"a8multi:{name.split()[0].strip(',')}", {**base, **options})


def _bitsandbytes(name: str, base: Options, **options: Any) -> Candidate:
    return Candidate(f"bitsandbytes {name}", f"bitsandbytes.optim:{name}", {**base, **options})


def _adafactor8bit(name: str, base: Options, **options: Any) -> Candidate:
    return Candidate(f"adafactor8bit {name}", "adafactor8bit:Adafactor8Bit", {**base, **options})


ADAMW: Options = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1}
ADAFACTOR: Options = {"lr": 3e-2, "beta2": 0.999, "relative_step": False}
# adafactor8bit has one class: with these options its rule is AdamW's (eps as a lower bound instead of a summand).
_OFF = dict.fromkeys(("factored", "relative_step", "scale_parameter", "scale_weight_decay"), False) | {"d": 1e9}
_AS_ADAMW: Options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": (1e-8, 1e-3), **_OFF}

# No other family has weight decay: it would be the same in every row, and dilute the error of the rest. Without it the
# error does not depend on lr, which is such that bench/losses.py trains, and that seeds with fp32 state end within a
# few hundredths of each other: at three to ten times the rate their spread hides what rounding does.
_LION: Options = {"lr": 1e-4}
_RMSPROP: Options = {"lr": 3e-4}
_ADAGRAD: Options = {"lr": 2e-3}
_ADEMAMIX: Options = {"lr": 1e-3, "weight_decay": 0.0}
_SGD: Options = {"lr": 0.01, "momentum": 0.9}
_LAMB: Options = {"lr": 1e-2}
_LARS: Options = {"lr": 1.0, "momentum": 0.9}
# Without the ratio of norms (see above) learning rates are those of Adam and SGD.
_LAMB_OF_BITSANDBYTES: Options = {"lr": 1e-3}
_LARS_OF_BITSANDBYTES: Options = {"lr": 0.01, "momentum": 0.9}
_CAME: Options = {"lr": 1e-4, "betas": (0.9, 0.999, 0.9999)}
_CAME_OF_ADAFACTOR: Options = {**ADAFACTOR, "beta1": 0.9, "beta3": 0.9999}
_APOLLO: Options = {"lr": 1e-2, "rank": 16}
_APOLLO_OF_ADAFACTOR: Options = {**ADAFACTOR, "beta1": 0.9, "apollo_rank": 16}

FAMILIES: dict[str, tuple[Candidate, ...]] = {
    "adamw": (
        _ours("AdamW8bit", ADAMW),
        _ours("AdamW8bit, block size 256", ADAMW, block_size=256),
        _ours("AdamW8bit, m nf4", ADAMW, first_moment="nf4"),
        _ours("AdamW8bit, m fp32", ADAMW, first_moment="fp32"),
        _ours("AdamW8bit, v fp32", ADAMW, second_moment="fp32"),
        _ours("AdamW8bit, v to nearest", ADAMW, stochastic_rounding=False),
        # What the measure itself cannot resolve: another order of the same fp32 operations.
        _ours("AdamW8bit, m and v fp32", ADAMW, first_moment="fp32", second_moment="fp32"),
        _bitsandbytes("AdamW8bit", ADAMW),
        Candidate("torchao AdamW8bit", "torchao.optim:AdamW8bit", ADAMW),
        _adafactor8bit("AdamW preset", _AS_ADAMW),
    ),
    "classics": (
        _ours("Lion8bit", _LION),
        _ours("Lion8bit, to nearest", _LION, stochastic_rounding=False),
        _bitsandbytes("Lion8bit", _LION),
        _ours("RMSprop8bit", _RMSPROP),
        _bitsandbytes("RMSprop8bit", _RMSPROP),
        _ours("RMSprop8bit + momentum", _RMSPROP, lr=3e-5, momentum=0.9),
        _ours("Adagrad8bit", _ADAGRAD),
        _bitsandbytes("Adagrad8bit", _ADAGRAD),
        _ours("AdEMAMix8bit", _ADEMAMIX),
        _ours("AdEMAMix8bit, slow average int8", _ADEMAMIX, third_moment="int8"),
        _bitsandbytes("AdEMAMix8bit", _ADEMAMIX),
        _ours("SGD8bit", _SGD),
        _bitsandbytes("SGD8bit", _SGD),
        _ours("LAMB8bit", _LAMB),
        _bitsandbytes("LAMB8bit", _LAMB_OF_BITSANDBYTES),
        _ours("LARS8bit", _LARS),
        _bitsandbytes("LARS8bit", _LARS_OF_BITSANDBYTES),
    ),
    "adafactor": (
        _ours("Adafactor8bit factored", ADAFACTOR),
        _ours("Adafactor8bit factored + beta1, nf4", ADAFACTOR, beta1=0.9),
        _ours("Adafactor8bit factored + beta1, int8", ADAFACTOR, beta1=0.9, first_moment="int8"),
        _ours("Adafactor8bit full", ADAFACTOR, factored=False),
        _ours("Adafactor8bit full, block size 2048", ADAFACTOR, factored=False, block_size=2048),
        _ours("Adafactor8bit full + beta1, nf4", ADAFACTOR, factored=False, beta1=0.9),
        _ours("Adafactor8bit full + beta1, int8", ADAFACTOR, factored=False, beta1=0.9, first_moment="int8"),
        _adafactor8bit("factored", ADAFACTOR),
        _adafactor8bit("factored + beta1", ADAFACTOR, beta1=0.9),
        _adafactor8bit("full", ADAFACTOR, factored=False),
        _adafactor8bit("full + beta1", ADAFACTOR, factored=False, beta1=0.9),
    ),
    "came": (
        _ours("CAME8bit", _CAME),
        _ours("CAME8bit, nf4", _CAME, first_moment="nf4"),
        _ours("CAME8bit + limiter", _CAME, enable_fira=True),
        _ours("Adafactor8bit CAME, nf4", _CAME_OF_ADAFACTOR, lr=3e-3),
        _ours("Adafactor8bit CAME of adafactor8bit, nf4", _CAME_OF_ADAFACTOR, came_order="adafactor8bit"),
        _adafactor8bit("CAME", _CAME_OF_ADAFACTOR),
    ),
    "apollo": (
        _ours("APOLLO8bit rank 16", _APOLLO),
        _ours("APOLLO8bit rank 16, nf4", _APOLLO, first_moment="nf4"),
        _ours("APOLLO8bit rank 16 factorized", _APOLLO, factorize=True),
        _ours("Adafactor8bit APOLLO rank 16", _APOLLO_OF_ADAFACTOR),
        _ours("Adafactor8bit APOLLO rank 16, nf4", _APOLLO_OF_ADAFACTOR, first_moment="nf4"),
        _adafactor8bit("APOLLO rank 16", _APOLLO_OF_ADAFACTOR),
    ),
}
# The run whose gradients and parameters the others follow in bench/fidelity.py.
DRIVER = Candidate("torch AdamW fp32", "torch.optim:AdamW", ADAMW)
# Columns of the table; the last is how many steps a family is measured for.
REPORT_AT = dict.fromkeys(FAMILIES, (10, 100, 300, 600, 1000, 2000)) | {"adamw": (10, 200, 300, 1000, 2000)}
# What the steps of a family of ours ask of a backend.
OPERATIONS = dict.fromkeys(FAMILIES, "adafactor") | {"adamw": "elementwise", "classics": "elementwise"}


def reference_of(family: str, candidate: Candidate) -> Candidate:
    """What a candidate of a family is compared with: torch's AdamW, or its own rule with fp32 state."""
    return DRIVER if family == "adamw" else candidate.with_fp32_state()


def chosen(family: str, only: Sequence[str] | None) -> list[Candidate]:
    """The candidates of a family whose names match one of these globs, whatever their case; None: all of them.

    Raises:
        CommandError: there is none.
    """
    patterns = [name.lower() for name in only or ["*"]]
    found = [one for one in FAMILIES[family] if any(fnmatchcase(one.name.lower(), pattern) for pattern in patterns)]
    if not found:
        raise CommandError(f"--only {only!r} matches none of: {'; '.join(one.name for one in FAMILIES[family])}")
    return found
