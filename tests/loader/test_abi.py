"""loader/structs.py and loader/signatures.py against native/include/a8/abi.h: names, order, types, layouts."""

import ctypes
import re
import subprocess
from itertools import zip_longest
from pathlib import Path

import pytest

from a8multi.loader import signatures, structs

INCLUDE = Path(__file__).parents[2] / "native" / "include"
HEADER = re.sub(r"//.*", "", (INCLUDE / "a8" / "abi.h").read_text(encoding="utf-8"))

SCALARS = {
    "double": ctypes.c_double,
    "float": ctypes.c_float,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint8_t": ctypes.c_uint8,
    "uint16_t": ctypes.c_uint16,
    "uint32_t": ctypes.c_uint32,
}


def header_structs() -> dict[str, list[tuple[str, object]]]:
    """Fields of each struct of the header as (name, ctypes type), without the prefix ``a8_``."""
    found = {}
    for tag, body, name in re.findall(r"typedef struct (\w+) \{(.*?)\} (\w+);", HEADER, re.DOTALL):
        assert tag == name
        fields = []
        for line in filter(None, map(str.strip, body.splitlines())):
            parts = re.fullmatch(r"(?:const )?(\w+)(\*?) (\w+)(?:\[(\d+)\])?;", line)
            assert parts, f"not one plain declaration: {line}"
            kind, pointer, field, length = parts.groups()
            if pointer:
                fields.append((field, ctypes.c_void_p))
            elif kind == "char":
                fields.append((field, ctypes.c_char * int(length)))
            else:
                assert length is None
                fields.append((field, SCALARS[kind]))
        found[name.removeprefix("a8_")] = fields
    return found


def test_structs_have_the_fields_of_the_header() -> None:
    header = header_structs()
    assert list(structs.STRUCTS) == list(header)
    for name, struct in structs.STRUCTS.items():
        assert list(struct._fields_) == header[name], name


def test_info_has_the_size_of_every_struct() -> None:
    sizes = [name for name, _ in structs.Info._fields_ if name.startswith("sizeof_")]
    assert sizes == [f"sizeof_{name}" for name in structs.STRUCTS]


def test_layouts_are_the_compilers(compiler: str, tmp_path: Path) -> None:
    lines = ['#include "a8/abi.h"', "#include <cstddef>", "#include <cstdio>", "int main() {"]
    expected = []
    for name, struct in structs.STRUCTS.items():
        lines.append(f'  printf("{name} %zu %zu\\n", sizeof(a8_{name}), alignof(a8_{name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)} {ctypes.alignment(struct)}")
        for field, kind in struct._fields_:
            value = f"offsetof(a8_{name}, {field}), sizeof(a8_{name}::{field})"
            lines.append(f'  printf("{name}.{field} %zu %zu\\n", {value});')
            expected.append(f"{name}.{field} {getattr(struct, field).offset} {ctypes.sizeof(kind)}")
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join([*lines, "}"]), encoding="utf-8")
    program = tmp_path / "layout"
    subprocess.run([compiler, "-std=c++17", f"-I{INCLUDE}", "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == expected


def test_enums_have_the_members_of_the_header() -> None:
    header = {}
    for name, body in re.findall(r"enum a8_(\w+) \{(.*?)\}", HEADER, re.DOTALL):
        members = re.findall(r"A8_(\w+) = (\d+)", body)
        assert len(members) == body.count("=")
        header[name] = [(member, int(value)) for member, value in members]
    assert list(structs.ENUMS) == list(header)
    # The C names carry the enum's name where it is needed to tell them apart; Python's scope does that.
    prefixes = {"isa": "ISA_", "op": "OP_"}
    for name, enum in structs.ENUMS.items():
        ours = [(prefixes.get(name, "") + member, int(value)) for member, value in enum.__members__.items()]
        assert ours == header[name], name


def test_version_is_the_headers() -> None:
    assert re.findall(r"#define A8_ABI_VERSION (\d+)", HEADER) == [str(structs.ABI_VERSION)]


def test_prototypes_are_the_headers() -> None:
    ours = []
    names = {ctypes.POINTER(struct): f"a8_{name}*" for name, struct in structs.STRUCTS.items()}
    names |= {ctypes.c_int32: "int32_t", ctypes.c_uint32: "uint32_t", ctypes.c_int64: "int64_t"}
    names |= {ctypes.c_char_p: "char*", ctypes.c_void_p: "address", ctypes.py_object: "void*"}
    names |= {ctypes.POINTER(ctypes.c_int64): "int64_t*", ctypes.POINTER(ctypes.c_uint64): "uint64_t*"}
    for entry in signatures.SIGNATURES:
        arguments = ", ".join(names[kind] for kind in entry.argtypes) or "void"
        ours.append(f"{names[entry.restype]} {entry.name}({arguments})")
    header = []
    argtypes = {entry.name: entry.argtypes for entry in signatures.SIGNATURES}
    for result, name, arguments in re.findall(
        r"^A8_EXPORT ([\w *]+?) (a8_\w+)\((.*?)\);", HEADER, re.MULTILINE | re.DOTALL
    ):
        kinds = [re.sub(r" \w+$", "", argument.strip()) for argument in arguments.split(",")]
        # Of what type an address is that is passed as a number, Python does not say.
        given = zip_longest(map(str, kinds), argtypes.get(name, ()))
        kinds = ["address" if kind is ctypes.c_void_p and said.endswith("*") else said for said, kind in given]
        header.append(f"{result} {name}({', '.join(kinds)})".replace("const ", ""))
    assert ours == header


def test_every_op_has_an_entry_and_every_entry_of_work_an_op() -> None:
    assert {entry.op for entry in signatures.SIGNATURES} == {None, *structs.Op}
    assert [entry.name for entry in signatures.SIGNATURES if entry.op is None] == ["a8_get_info", "a8_last_error"]


@pytest.mark.parametrize(
    ("mask", "names"),
    [(0, ()), (1, ()), (0b1110, ("baseline", "avx2", "avx512")), (0b10000, ("neon",)), (0xFFFFFFE1, ())],
)
def test_isa_names(mask: int, names: tuple[str, ...]) -> None:
    assert structs.isa_names(mask) == names
