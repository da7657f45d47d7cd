"""Reading the geometry and flattening device sources."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from a8multi.errors import LibraryIncompatible, LibraryNotFound
from a8multi.loader import search, sources

NATIVE = Path(__file__).parents[2] / "native"
Tree = Callable[[dict[str, str]], Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """tree(files) makes a source directory of them the one that is read."""

    def write(files: dict[str, str]) -> Path:
        for name, text in {sources.GEOMETRY: "#pragma once\n#define A8_CHUNK 1\n", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(search, "source_directories", lambda: (tmp_path,))
        return tmp_path

    return write


def preprocess(compiler: str, text: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [compiler, "-std=c++17", "-fsyntax-only", *options, "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True)


def test_geometry_has_the_numbers_of_the_header() -> None:
    text = (NATIVE / "include" / "a8" / "geometry.h").read_text(encoding="utf-8")
    words = [line.split() for line in text.splitlines() if line.startswith("#define")]
    assert sources.geometry() == {word[1]: int(word[2]) for word in words}
    assert sources.geometry() == sources.WITHOUT_HEADER
    assert sources.geometry()["A8_CHUNK"] > 0


def test_geometry_reads_comments_and_hexadecimal_but_not_expressions(tree: Tree) -> None:
    text = (
        "#define A8_A 12 // twelve\n  #  define A8_B 0x10u\n#define A8_C (A8_A * 2)\n// #define A8_D 4\n#define A8_E\n"
    )
    tree({sources.GEOMETRY: text})
    assert sources.geometry() == {"A8_A": 12, "A8_B": 16}


def test_empty_geometry_is_refused(tree: Tree) -> None:
    tree({sources.GEOMETRY: "#pragma once\n"})
    with pytest.raises(LibraryIncompatible, match="defines no integer"):
        sources.geometry()


def test_geometry_is_known_without_the_header(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(search, "source_directories", lambda: (tmp_path,))
    assert sources.geometry() == sources.WITHOUT_HEADER


def test_the_installed_package_is_the_last_place(package: Callable[..., None], tmp_path: Path) -> None:
    package(tmp_path)
    assert search.source_directories()[-1] == tmp_path / "lib" / "src"


def test_missing_sources_name_every_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(search, "source_directories", lambda: (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(LibraryNotFound) as caught:
        sources.root()
    assert str(tmp_path / "a") in str(caught.value)
    assert str(tmp_path / "b") in str(caught.value)


def test_each_file_is_inlined_once_in_order_of_need(tree: Tree, compiler: str) -> None:
    tree(
        {
            "include/a8/base.h": "#pragma once\nstruct base {};\n",
            "include/a8/left.h": '#pragma once\n#include "base.h"\nstruct left : base {};\n',
            "cuda/right.cuh": '#pragma once\n  #  include "a8/base.h" // include path\nstruct right : base {};\n',
            "cuda/kernels/all.cuh": '#include "a8/left.h"\n#include "../right.cuh"\nstruct all : left { right r; };\n',
        }
    )
    text = sources.flatten("cuda/kernels/all.cuh")
    assert re.findall(r"^struct (\w+)", text, re.MULTILINE) == ["base", "left", "right", "all"]
    assert "#include" not in text.replace("# ", "#")
    assert "#pragma" not in text
    done = preprocess(compiler, text, "-Werror")
    assert done.returncode == 0, done.stderr


def test_messages_of_the_compiler_name_the_original_lines(tree: Tree, compiler: str) -> None:
    tree(
        {
            "cuda/first.cuh": "#pragma once\nint fine;\n\n#error in first\n",
            "cuda/main.cuh": '\n#include "first.cuh"\n#error after first\n#include "first.cuh"\n#error after second\n',
        }
    )
    said = preprocess(compiler, sources.flatten("cuda/main.cuh")).stderr
    places = re.findall(r"^(\S+?:\d+):\S* (?:fatal )?error:.*?(\w+ \w+)$", said, re.MULTILINE)
    expected = [
        ("cuda/first.cuh:4", "in first"),
        ("cuda/main.cuh:3", "after first"),
        ("cuda/main.cuh:5", "after second"),
    ]
    assert places == expected


def test_include_that_the_preprocessor_skips_is_found_by_the_next_one(tree: Tree, compiler: str) -> None:
    tree(
        {
            "include/a8/base.h": "#pragma once\nstruct base {};\n",
            "include/a8/host.h": '#pragma once\n#include "base.h"\n#include <stdint.h>\n',
            "cuda/main.cuh": '#if defined(HOST)\n#include "a8/host.h"\n#endif\n#include "a8/base.h"\nbase b;\n',
        }
    )
    text = sources.flatten("cuda/main.cuh")
    assert "#include <stdint.h>\n" in text
    for options in ([], ["-DHOST"]):
        done = preprocess(compiler, text, *options)
        assert done.returncode == 0, done.stderr


def test_files_that_include_each_other_end(tree: Tree) -> None:
    tree({"cuda/a.cuh": '#include "b.cuh"\nint a;\n', "cuda/b.cuh": '#include "a.cuh"\nint b;\n'})
    assert re.findall(r"^int (\w)", sources.flatten("cuda/a.cuh"), re.MULTILINE) == ["b", "a"]


def test_conditional_files_that_include_each_other_end(tree: Tree, compiler: str) -> None:
    branch = '#pragma once\n#if 1\n#include "{}"\n#endif\nint {};\n'
    tree({"cuda/a.cuh": branch.format("b.cuh", "a"), "cuda/b.cuh": branch.format("c.cuh", "b")})
    tree({"cuda/c.cuh": branch.format("b.cuh", "c")})
    done = preprocess(compiler, sources.flatten("cuda/a.cuh"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["absent.h", "../../outside.h"])
def test_missing_include_names_who_asks_and_where_it_was_sought(name: str, tree: Tree) -> None:
    root = tree({"cuda/main.cuh": f'int a;\n#include "{name}"\n'})
    (root.parent / "outside.h").touch()
    with pytest.raises(LibraryNotFound, match=r"asked for by cuda/main\.cuh:2") as caught:
        sources.flatten("cuda/main.cuh")
    assert str(root / "include" / name) in str(caught.value)


def test_missing_entry(tree: Tree) -> None:
    tree({})
    with pytest.raises(LibraryNotFound, match="no such device source"):
        sources.flatten("cuda/absent.cuh")


def entries() -> list[str]:
    files = [*NATIVE.glob("include/a8/*.h"), *NATIVE.glob("cuda/**/*.cuh")]
    return sorted(path.relative_to(NATIVE).as_posix() for path in files)


@pytest.mark.parametrize("entry", entries())
def test_the_device_sources_flatten_as_a_compiler_reads_them(entry: str) -> None:
    text = sources.flatten(entry)
    assert re.search(r'^[ \t]*#[ \t]*include[ \t]*"', text, re.MULTILINE) is None
    code = (NATIVE / entry).read_text(encoding="utf-8").rstrip().splitlines()[-1]
    assert code in text


@pytest.mark.parametrize("entry", ["include/a8/format.h", "include/a8/abi.h"])
def test_the_shared_headers_compile_when_flat(entry: str, compiler: str) -> None:
    done = preprocess(compiler, sources.flatten(entry))
    assert done.returncode == 0, done.stderr
