"""Every entry of the native libraries: its prototype and the capability that it belongs to.

The only place in Python where prototypes are written; tests/loader compares them with native/include/a8/abi.h and with
the symbols of the built libraries. A new entry is one row here and one declaration there.
"""

from __future__ import annotations

from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint32, c_uint64, c_void_p, py_object
from typing import Any, NamedTuple

from .structs import Batch, Codec, Exec, Hyper, Info, Interpreter, Op, Schedule


class Signature(NamedTuple):
    """Prototype of one entry. ``op`` is the bit of ``a8_info.ops`` that promises it; None: every library has it."""

    name: str
    restype: Any
    argtypes: tuple[Any, ...]
    op: Op | None

    @property
    def takes_objects(self) -> bool:
        """Whether it reads Python's objects, and so is to be called with the interpreter's lock held."""
        return py_object in self.argtypes


_EXEC = POINTER(Exec)
_PYTHON = POINTER(Interpreter)
_STATUS = c_int32

GET_INFO = Signature("a8_get_info", _STATUS, (POINTER(Info),), None)
LAST_ERROR = Signature("a8_last_error", c_char_p, (), None)

SIGNATURES: tuple[Signature, ...] = (
    GET_INFO,
    LAST_ERROR,
    Signature("a8_quantize", _STATUS, (_EXEC, POINTER(Codec)), Op.CODEC),
    Signature("a8_dequantize", _STATUS, (_EXEC, POINTER(Codec)), Op.CODEC),
    # The first two are promised with the element-wise rules; Adafactor uses them too.
    Signature("a8_derive", _STATUS, (_EXEC, POINTER(Schedule), POINTER(Hyper), c_uint32, c_uint32), Op.ELEMENTWISE),
    Signature("a8_screen", _STATUS, (_EXEC, POINTER(Batch), c_void_p, c_void_p), Op.ELEMENTWISE),
    Signature("a8_elementwise", _STATUS, (_EXEC, POINTER(Batch), c_uint32), Op.ELEMENTWISE),
    Signature(
        "a8_draw",
        _STATUS,
        (_EXEC, c_void_p, c_int64, c_uint32, c_void_p, c_void_p, c_int64, c_uint32, c_uint32, c_uint32),
        Op.ADAFACTOR,
    ),
    Signature("a8_adafactor", _STATUS, (_EXEC, POINTER(Batch), c_uint32), Op.ADAFACTOR),
    Signature(
        "a8_read_tensors",
        _STATUS,
        (_PYTHON, py_object, py_object, c_uint32, POINTER(c_int64), c_uint32, POINTER(c_uint64), c_uint32),
        Op.READER,
    ),
    Signature("a8_read_values", _STATUS, (_PYTHON, py_object, c_uint32, py_object, c_uint32), Op.READER),
    Signature("a8_upload", _STATUS, (_EXEC, c_void_p, c_void_p, c_uint32), Op.UPLOAD),
)
