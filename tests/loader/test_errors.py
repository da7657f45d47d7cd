"""The exceptions: what they are, what they say, and that they travel between processes."""

import pickle

import pytest

from a8multi import errors
from a8multi.loader.structs import Status

EXAMPLES = [
    errors.BackendUnavailable("no cuda"),
    errors.LibraryError(
        "p/lib.so", "cannot be read", "make it readable", [errors.Attempt("p/lib.so", "cannot be read")]
    ),
    errors.LibraryNotFound("p/lib.so", "no such file"),
    errors.LibraryIncompatible("p/lib.so", "symbol a8_elementwise is missing", "rebuild"),
    errors.NativeError(Status.ERROR_ARGUMENT, "tensor 3: codes is null", "a8_quantize"),
    errors.StateFormatError("int8 state in an nf4 optimizer"),
    errors.SettingError("A8MULTI_LOG", "loud", "INFO or DEBUG"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_pickle_keeps_type_text_and_attributes(error: errors.A8MultiError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_every_exception_has_the_base(error: errors.A8MultiError) -> None:
    assert isinstance(error, errors.A8MultiError)
    assert isinstance(error, RuntimeError)


def test_all_lists_every_exception() -> None:
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)
    assert {type(error).__name__ for error in EXAMPLES} == defined - {"A8MultiError", "Attempt"}


def test_argument_errors_are_value_errors() -> None:
    assert issubclass(errors.StateFormatError, ValueError)
    assert issubclass(errors.SettingError, ValueError)


def test_library_error_says_path_reason_attempts_and_hint() -> None:
    text = str(EXAMPLES[1])
    assert text.splitlines() == [
        "p/lib.so: cannot be read",
        "Tried, in order:",
        "  p/lib.so: cannot be read",
        "What to do: make it readable",
    ]


def test_native_error_names_entry_and_status() -> None:
    assert str(EXAMPLES[4]) == "a8_quantize failed with status 1 (ERROR_ARGUMENT): tensor 3: codes is null"
    assert str(errors.NativeError(77, "odd")) == "native call failed with status 77: odd"
