"""The table of environment variables: defaults, valid values, and errors that list them."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from a8multi import settings
from a8multi.errors import SettingError
from a8multi.loader.structs import Isa

pytestmark = pytest.mark.usefixtures("clean_settings")


def test_defaults() -> None:
    assert settings.backend() is None
    assert settings.cpu_isa() == "auto"
    assert settings.library_path() == ()
    assert settings.log_level() is None
    assert settings.require_backend() == ()


@pytest.mark.parametrize("setting", settings.SETTINGS, ids=lambda setting: setting.name)
def test_empty_counts_as_unset(setting: settings.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(setting.name, "  ")
    test_defaults()
    assert all(row.error is None for row in settings.describe())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", None),
        ("AUTO", None),
        ("torch", ("torch",)),
        ("cuda,cupy", ("cuda", "cupy")),
        (" cupy , CPU,cupy ", ("cupy", "cpu")),
    ],
)
def test_backend(text: str, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A8MULTI_BACKEND", text)
    assert settings.backend() == expected


@pytest.mark.parametrize("isa", settings.ISA_NAMES)
def test_every_isa_name_is_a_variant_of_the_library(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A8MULTI_CPU_ISA", isa.upper())
    assert settings.cpu_isa() == isa
    assert {member.name.lower() for member in Isa} == set(settings.ISA_NAMES)


@pytest.mark.parametrize(
    ("name", "value", "read", "valid"),
    [
        ("A8MULTI_BACKEND", "gpu", settings.backend, settings.BACKEND_NAMES),
        ("A8MULTI_BACKEND", "cuda,,cpu", settings.backend, settings.BACKEND_NAMES),
        ("A8MULTI_BACKEND", "cuda,auto", settings.backend, settings.BACKEND_NAMES),
        ("A8MULTI_CPU_ISA", "sse2", settings.cpu_isa, settings.ISA_NAMES),
        ("A8MULTI_LOG", "loud", settings.log_level, settings.LOG_LEVELS),
        ("A8MULTI_REQUIRE_BACKEND", "auto", settings.require_backend, settings.BACKEND_NAMES),
    ],
)
def test_unknown_value_lists_the_valid_ones(
    name: str, value: str, read: Callable[[], object], valid: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError) as caught:
        read()
    assert isinstance(caught.value, ValueError)
    assert caught.value.name == name
    assert caught.value.value == value
    assert f"{name}={value!r}" in str(caught.value)
    assert set(valid) <= set(re.findall(r"\w+", str(caught.value)))
    assert [row.name for row in settings.describe() if row.error] == [name]


def test_library_path_is_a_list_with_home_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("USERPROFILE", "/somewhere")
    entries = os.pathsep.join(["first", "", " ~/second ", "~no-such-user/third"])
    monkeypatch.setenv("A8MULTI_LIBRARY_PATH", entries)
    assert settings.library_path() == ("first", "/somewhere/second", "~no-such-user/third")


def test_describe_covers_every_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A8MULTI_CPU_ISA", "avx2")
    rows = {row.name: row for row in settings.describe()}
    assert list(rows) == [setting.name for setting in settings.SETTINGS]
    assert rows["A8MULTI_CPU_ISA"].value == "avx2"
    assert rows["A8MULTI_BACKEND"].value is None
    assert all(row.meaning and row.values for row in rows.values())


@contextmanager
def bare_logger(*handlers: logging.Handler) -> Iterator[logging.Logger]:
    """The "a8multi" logger of a program that configured only ``handlers``, and afterwards as it was.

    Not a fixture: pytest puts its own handlers on the logger when the test itself begins.
    """
    found = logging.getLogger("a8multi")
    before = found.level, found.handlers[:], found.propagate
    found.setLevel(logging.NOTSET)
    found.handlers[:] = handlers
    found.propagate = False
    try:
        yield found
    finally:
        found.setLevel(before[0])
        found.handlers[:] = before[1]
        found.propagate = before[2]


def test_log_unset_leaves_the_logger_alone() -> None:
    with bare_logger() as found:
        found.setLevel(logging.CRITICAL)
        assert settings.logger() is found
        assert found.level == logging.CRITICAL
        assert found.handlers == []


def test_log_sets_the_level_and_prints_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("A8MULTI_LOG", "info")
    with bare_logger():
        settings.logger()
        settings.logger().info("chose %s", "torch")
        settings.logger().debug("not shown")
    assert capsys.readouterr().err == "a8multi INFO: chose torch\n"


def test_log_does_not_add_a_handler_to_a_configured_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A8MULTI_LOG", "DEBUG")
    mine = logging.NullHandler()
    with bare_logger(mine) as found:
        assert settings.logger().level == logging.DEBUG
        assert found.handlers == [mine]
