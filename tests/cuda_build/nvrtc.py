"""NVRTC through ctypes: just enough to compile a text for an architecture, as CuPy does."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple


class Compiled(NamedTuple):
    """Of one compilation: NVRTC's status and log; ptx and cubin are empty when it failed."""

    status: int
    log: str
    ptx: str
    cubin: bytes


class Nvrtc:
    """The library at ``path``."""

    def __init__(self, path: Path) -> None:
        # NVRTC looks for its builtins by name alone, and finds them if they are there already.
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(path))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        assert status == 0, f"{name} failed with status {status}"

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.raw

    def version(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def compile(self, text: str, name: str, options: tuple[str, ...]) -> Compiled:
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        try:
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), array)
            log = self._bytes("ProgramLog", program).rstrip(b"\0").decode()
            if status != 0:
                return Compiled(status, log, "", b"")
            ptx = self._bytes("PTX", program).rstrip(b"\0").decode()
            return Compiled(status, log, ptx, self._bytes("CUBIN", program))
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))
