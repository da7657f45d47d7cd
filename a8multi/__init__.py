"""Low-bit PyTorch optimizers: the same code, the same checkpoint and the same bits on GPU and CPU-only machines.

Importing this package loads no library, makes no CUDA context, prints nothing and does not import torch; every name
below is resolved when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Started in a checkout, Python finds this folder there before the installed package, and a8multi.loader, which a build
# puts inside, lies beside it.
if not any(Path(place, "loader").is_dir() for place in __path__):
    __path__ = [*__path__, str(Path(__path__[0]).parent)]

# Public name -> the module that defines it.
_EXPORTS = {
    "AdamW8bit": "a8multi.optim",
    "Adam8bit": "a8multi.optim",
    "Adafactor8bit": "a8multi.optim",
    "Adafactor8Bit": "a8multi.optim",
    "AdEMAMix8bit": "a8multi.optim",
    "Adagrad8bit": "a8multi.optim",
    "LAMB8bit": "a8multi.optim",
    "LARS8bit": "a8multi.optim",
    "Lion8bit": "a8multi.optim",
    "RMSprop8bit": "a8multi.optim",
    "SGD8bit": "a8multi.optim",
    "CAME8bit": "a8multi.optim",
    "APOLLO8bit": "a8multi.optim",
    "backends": "a8multi.backend",
    "backend_for": "a8multi.backend",
    "explain": "a8multi.backend",
    "use_backend": "a8multi.backend",
    "convert_state_dict": "a8multi.convert",
    "functional": "a8multi.functional",
    "build_param_groups": "a8multi.groups",
    "estimate_state_bytes": "a8multi.estimate",
    "A8MultiError": "a8multi.errors",
    "BackendUnavailable": "a8multi.errors",
    "LibraryError": "a8multi.errors",
    "LibraryIncompatible": "a8multi.errors",
    "LibraryNotFound": "a8multi.errors",
    "NativeError": "a8multi.errors",
    "SettingError": "a8multi.errors",
    "StateFormatError": "a8multi.errors",
}

__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604  (the keys of a literal)

if TYPE_CHECKING:
    from a8multi import functional as functional
    from a8multi.backend import backend_for as backend_for
    from a8multi.backend import backends as backends
    from a8multi.backend import explain as explain
    from a8multi.backend import use_backend as use_backend
    from a8multi.convert import convert_state_dict as convert_state_dict
    from a8multi.errors import A8MultiError as A8MultiError
    from a8multi.errors import BackendUnavailable as BackendUnavailable
    from a8multi.errors import LibraryError as LibraryError
    from a8multi.errors import LibraryIncompatible as LibraryIncompatible
    from a8multi.errors import LibraryNotFound as LibraryNotFound
    from a8multi.errors import NativeError as NativeError
    from a8multi.errors import SettingError as SettingError
    from a8multi.errors import StateFormatError as StateFormatError
    from a8multi.estimate import estimate_state_bytes as estimate_state_bytes
    from a8multi.groups import build_param_groups as build_param_groups
    from a8multi.optim import Adafactor8Bit as Adafactor8Bit
    from a8multi.optim import Adafactor8bit as Adafactor8bit
    from a8multi.optim import Adagrad8bit as Adagrad8bit
    from a8multi.optim import Adam8bit as Adam8bit
    from a8multi.optim import AdamW8bit as AdamW8bit
    from a8multi.optim import AdEMAMix8bit as AdEMAMix8bit
    from a8multi.optim import APOLLO8bit as APOLLO8bit
    from a8multi.optim import CAME8bit as CAME8bit
    from a8multi.optim import LAMB8bit as LAMB8bit
    from a8multi.optim import LARS8bit as LARS8bit
    from a8multi.optim import Lion8bit as Lion8bit
    from a8multi.optim import RMSprop8bit as RMSprop8bit
    from a8multi.optim import SGD8bit as SGD8bit

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("a8multi")
    elif name in _EXPORTS:
        module = importlib.import_module(_EXPORTS[name])
        value = module if module.__name__ == f"a8multi.{name}" else getattr(module, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
