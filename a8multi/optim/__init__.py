"""The optimizers. Each is imported when it is first asked for: who needs one does not wait for all."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Class -> its module.
_MODULES = {
    "APOLLO8bit": "apollo",
    "AdEMAMix8bit": "ademamix",
    "Adafactor8Bit": "adafactor",
    "Adafactor8bit": "adafactor",
    "Adagrad8bit": "adagrad",
    "Adam8bit": "adamw",
    "AdamW8bit": "adamw",
    "CAME8bit": "came",
    "LAMB8bit": "lamb",
    "LARS8bit": "lars",
    "Lion8bit": "lion",
    "RMSprop8bit": "rmsprop",
    "SGD8bit": "sgd",
}

__all__ = [*_MODULES]  # noqa: PLE0604  (the keys of a literal)

if TYPE_CHECKING:
    from .adafactor import Adafactor8Bit as Adafactor8Bit
    from .adafactor import Adafactor8bit as Adafactor8bit
    from .adagrad import Adagrad8bit as Adagrad8bit
    from .adamw import Adam8bit as Adam8bit
    from .adamw import AdamW8bit as AdamW8bit
    from .ademamix import AdEMAMix8bit as AdEMAMix8bit
    from .apollo import APOLLO8bit as APOLLO8bit
    from .came import CAME8bit as CAME8bit
    from .lamb import LAMB8bit as LAMB8bit
    from .lars import LARS8bit as LARS8bit
    from .lion import Lion8bit as Lion8bit
    from .rmsprop import RMSprop8bit as RMSprop8bit
    from .sgd import SGD8bit as SGD8bit


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
