"""Reads what a step looks at of many tensors and dictionaries in one native call, ``a8_read_*`` of the CPU library.

Python takes three calls a tensor for the gradient, its metadata and its address, which bounds the step of a model of
many small ones. Where the library, torch's table of C functions (DLPack 1.3, torch >= 2.10) or the interpreter's lock
is missing, there is no reader, and roster.py looks by itself: docs/decisions/0017-reader.md.
"""

from __future__ import annotations

import ctypes
import sysconfig
from ctypes import c_int64, c_uint64, c_void_p
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi import settings
from a8multi.errors import A8MultiError
from a8multi.loader import Library, load
from a8multi.loader.structs import Interpreter, Op

_CAPSULE = "__dlpack_c_exchange_api__", b"dlpack_exchange_api"
_VERSION_MAJOR = 1  # of DLPack, in which the layout of a tensor stays
_GRAD = "grad"  # kept alive: the library has its address
_found: dict[tuple[object, ...], tuple[Library, Any] | str] = {}  # by _look, by the settings of that time


class _Exchange(ctypes.Structure):
    """DLPackExchangeAPI of DLPack 1.3."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", c_void_p),
        ("allocate", c_void_p),
        ("managed_from_object", c_void_p),
        ("managed_to_object", c_void_p),
        ("tensor_from_object", c_void_p),
        ("current_stream", c_void_p),
    ]


class UnreadableError(Exception):
    """There is no reader here, or what was read is not what it was."""


class TensorReader:
    """Looks at tensors and their gradients again and again.

    Args:
        params: whose gradients have their shapes.
    Attributes:
        addresses: uint64 [2, len(params)]: of the parameters' and of the gradients' data, as last read.
    Raises:
        UnreadableError: there is no reader here.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self._library, self._python = _reader()
        if any(type(param) not in (Tensor, torch.nn.Parameter) for param in params):
            raise UnreadableError("a subclass may have a gradient that is no tensor of torch's")
        self.addresses = np.empty((2, len(params)), np.uint64)
        self._facts = np.empty(sum(4 + 4 * param.dim() for param in params), np.int64)
        self._facts_at = self._facts.ctypes.data_as(ctypes.POINTER(c_int64))
        self._addresses_at = self.addresses.ctypes.data_as(ctypes.POINTER(c_uint64))
        self._read(params, learns=True)

    def grads(self, params: list[Tensor]) -> list[Tensor]:
        """The gradients, and ``addresses`` read anew.

        Raises:
            UnreadableError: one is missing, or type, device, shape or strides of a tensor are not what they were.
        """
        return self._read(params, learns=False)

    def _read(self, params: list[Tensor], learns: bool) -> list[Tensor]:
        grads: list[Any] = [None] * len(params)
        facts, addresses = (self._facts_at, len(self._facts)), self._addresses_at
        _call(self._library, "a8_read_tensors", self._python, params, grads, len(params), *facts, addresses, learns)
        return grads


def check_values(dicts: list[dict[str, Any]], values: list[Any]) -> None:
    """Raise UnreadableError unless the values of the dictionaries, one after the other, are these very objects."""
    library, python = _reader()
    _call(library, "a8_read_values", python, dicts, len(dicts), values, len(values))


def _call(library: Library, entry: str, *arguments: Any) -> None:
    try:
        library.call(entry, *arguments)
    except Exception as error:  # torch's for a tensor without memory, too
        raise UnreadableError(str(error)) from None


def _reader() -> tuple[Library, Any]:
    """The library, and a pointer to ``a8_interpreter``."""
    found = _find()
    if isinstance(found, str):
        raise UnreadableError(found)
    return found


def _find() -> tuple[Library, Any] | str:
    """``_look``, anew only after a variable has changed: every step asks."""
    key = settings.deciding()
    found = _found.get(key)
    if found is None:
        found = _found[key] = _look()
    return found


def _look() -> tuple[Library, Any] | str:
    """``_reader``, or why there is none."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "this interpreter has no lock"
    capsule = getattr(Tensor, _CAPSULE[0], None)
    if capsule is None:
        return f"torch {torch.__version__} has no {_CAPSULE[0]}"
    try:
        library = load("cpu")
    except A8MultiError as error:
        return str(error)
    if not Op.READER & library.info.ops:
        return f"{library.path} has no reader"
    api = ctypes.pythonapi
    pointer_of = ctypes.PYFUNCTYPE(c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", api))
    try:
        exchange = _Exchange.from_address(pointer_of(capsule, _CAPSULE[1]))
    except ValueError as error:
        return f"torch {torch.__version__}: {error}"
    if exchange.major != _VERSION_MAJOR or not exchange.tensor_from_object:
        return f"torch {torch.__version__} has DLPack {exchange.major}.{exchange.minor} without what is needed"
    python = Interpreter(
        *(ctypes.cast(function, c_void_p) for function in (api.PyList_GetItem, api.PyList_SetItem)),
        *(ctypes.cast(function, c_void_p) for function in (api.PyObject_GetAttr, api.PyDict_Next)),
        exchange.tensor_from_object,
        id(None),
        id(_GRAD),
    )
    settings.logger().debug("gradients are read by %s", library.path)
    return library, ctypes.pointer(python)
