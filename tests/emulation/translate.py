"""From CUDA C++ to C++: the two things that no header can do, launches and inline assembly."""

from __future__ import annotations

import re

_LAUNCH = re.compile(r"(\b\w+(?:<[^<>;(){}]*>)?)\s*<<<(.*?)>>>", re.DOTALL)
_ASM = re.compile(r"\basm\b\s*(?:volatile\b\s*)?(?=\()")
_COMMENT = re.compile(r"(?<!:)//[^\n]*")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_LITERAL = re.compile(r"\s*" + _STRING.pattern)
_CONSTRAINT = re.compile(_STRING.pattern + r"\s*(?=\()")
_INSTRUCTION = re.compile(r"([a-zA-Z][\w.]*)\s*(.*)", re.DOTALL)


def translate(text: str) -> str:
    """A source with its launches as calls of ``emulator::configure`` and its assembly as calls in ``ptx``.

    The lines stay where they are, so that the compiler's messages and those of a failed launch name the original's.

    Raises:
        ValueError: for assembly that is more than one instruction.
    """
    # Comments may hold anything; nothing but their lines is needed.
    text = _launches(_COMMENT.sub("", text))
    parts, end = [], 0
    for match in _ASM.finditer(text):
        close = _closing(text, match.end())
        parts += [text[end : match.start()], _call(text[match.end() + 1 : close])]
        parts.append("\n" * text.count("\n", match.start(), close))
        end = close + 1
    return "".join([*parts, text[end:]])


def _launches(text: str) -> str:
    return _LAUNCH.sub(lambda launch: f'emulator::configure("{launch[1]}", {launch[1]}, {launch[2]})', text)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at ``opening`` is closed, strings aside."""
    depth, at = 0, opening
    while True:
        if text[at] == '"':
            string = _STRING.match(text, at)
            assert string, text[at : at + 80]
            at = string.end()
            continue
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
        at += 1


def _call(statement: str) -> str:
    """``"rcp.approx %0, %1;" : "=f"(y) : "f"(x)`` as ``ptx::rcp_approx((y), (x))``."""
    template, at = "", 0
    while literal := _LITERAL.match(statement, at):  # neighbours are one
        template, at = template + literal[1], literal.end()
    operands = []
    while constraint := _CONSTRAINT.search(statement, at):
        at = _closing(statement, constraint.end()) + 1
        operands.append(statement[constraint.end() : at])
    instructions = [one.strip() for one in template.split(";") if one.strip()]
    if not instructions:
        return "((void)0)"
    match = _INSTRUCTION.fullmatch(instructions[0])
    if len(instructions) > 1 or match is None:
        raise ValueError(f"assembly of one instruction is translated, not {template!r}")
    arguments = re.sub(r"%(\d+)", lambda number: operands[int(number[1])], re.sub(r"[\[\]]", "", match[2]))
    return f"ptx::{match[1].replace('.', '_')}({arguments})"
