"""`a8multi info`: what is on this machine, which backend each device gets, and a self-test."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from a8multi.cli import model_size
from a8multi.cli.console import EXIT_FAILED, EXIT_OK, format_table, positive_float
from a8multi.cli.parameter_sets import LEAST_LLAMA, MOST_LLAMA

if TYPE_CHECKING:
    from a8multi.backend import BackendReport

DESCRIPTION = """\
Show what is on this machine, which backend each device gets and why, and test a step on each device.

The self-test compares each device's backend with plain PyTorch; exit status 1 if they differ, or if one cannot run.
With --model-size, print how much memory each optimizer's state takes instead.
"""
# Version of the JSON document: raised when a key changes its meaning or goes.
DOCUMENT_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.add_argument(
        "--model-size",
        metavar="PARAMETERS",
        type=positive_float,
        help="print only the state bytes of each optimizer for a model of about that many parameters, such as 7e9: a "
        "Llama with a vocabulary of 32000, its width (a multiple of 128) and number of layers (about width / 128) "
        f"scaled to it; {LEAST_LLAMA:g} to {MOST_LLAMA:g}",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report. Returns 0 if every self-test passed or none was asked for, else 1."""
    if args.model_size is not None:
        sizes = {"document": DOCUMENT_VERSION, **model_size.collect(args.model_size)}
        print(json.dumps(sizes, indent=2) if args.json else model_size.text(sizes))
        return EXIT_OK
    report = collect()
    print(json.dumps(report, indent=2) if args.json else text(report))
    return EXIT_OK if report["passed"] else EXIT_FAILED


def collect() -> dict[str, Any]:
    """Everything `a8multi info` says, as JSON-compatible data.

    Keys: `document` (version of this layout), `passed`, `versions` (by component), `backends` (one report each),
    `explain` (the registry's own words), `devices` (name, description, backend of each operation, why, self_tests) and
    `environment` (every A8MULTI_* variable).
    """
    from a8multi import settings
    from a8multi.backend import backends, explain
    from a8multi.cli.system import devices, versions

    found = [_device(name, description, backends(name)) for name, description in devices()]
    return {
        "document": DOCUMENT_VERSION,
        "passed": all(test["passed"] for device in found for test in device["self_tests"]),
        "versions": versions(),
        "backends": [asdict(backend) for backend in backends()],
        "explain": explain(),
        "devices": found,
        "environment": [asdict(row) for row in settings.describe()],
    }


def _device(name: str, description: str, reports: list[BackendReport]) -> dict[str, Any]:
    from a8multi.cli.selftest import OPS, self_test

    tests = [self_test(name, optimizer) for optimizer in OPS]
    chosen = {OPS[test.optimizer]: test.backend for test in tests}
    return {
        "name": name,
        "description": description,
        "backends": chosen,
        "why": why(name, chosen, reports),
        "self_tests": [asdict(test) for test in tests],
    }


def why(device: str, chosen: dict[str, str | None], reports: list[BackendReport]) -> str:
    """Why a device gets its backends: the variable that forces them, or what the preferred ones lack.

    Args:
        device: as torch.device takes it.
        chosen: the backend's name by operation; None where none could be had.
        reports: of every backend on this device, in order of preference.
    """
    from a8multi import settings

    forced = settings.backend()
    if forced:
        return f"forced by {settings.BACKEND.name}={','.join(forced)}"
    kind = device.partition(":")[0]
    order = [report for report in reports if not report.devices or kind in report.devices]
    lacking = []
    for op, name in chosen.items():
        for report in order:
            if report.name == name:
                break
            lack = report.reason.partition("\n")[0] if not report.available else f"does not offer {op}"
            if (text := f"{report.name}: {lack}") not in lacking:
                lacking.append(text)
    preference = f"automatic choice, the first of {', '.join(report.name for report in order)} that can run"
    return "; ".join([preference, *lacking])


def text(report: dict[str, Any]) -> str:
    """collect() for people."""
    blocks = [
        _section("Versions", [f"{name}: {value or '-'}" for name, value in report["versions"].items()]),
        _section("Backends", report["explain"].splitlines()),
        _section("Devices", [line for device in report["devices"] for line in _device_lines(device)]),
        _section("Self-test: two steps, compared with the torch backend", _self_test_lines(report)),
        _section("Environment variables", _environment_lines(report["environment"])),
    ]
    return "\n\n".join(blocks)


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _device_lines(device: dict[str, Any]) -> list[str]:
    choice = ", ".join(f"{op}: {backend or 'none'}" for op, backend in device["backends"].items())
    return [f"{device['name']} ({device['description']})", f"  {choice}", f"  {device['why']}"]


def _self_test_lines(report: dict[str, Any]) -> list[str]:
    tests = [test for device in report["devices"] for test in device["self_tests"]]
    rows = [
        [
            test["device"],
            test["optimizer"],
            test["backend"] or "-",
            "-" if test["max_difference"] is None else f"{test['max_difference']:.2e}",
            f"{test['tolerance']:.0e}",
            "PASS" if test["passed"] else "FAIL",
        ]
        for test in tests
    ]
    table = format_table(["device", "optimizer", "backend", "max difference", "allowed", "result"], rows)
    errors = [line for test in tests if test["error"] for line in f"{test['device']}: {test['error']}".splitlines()]
    return [*table.splitlines(), *errors]


def _environment_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        value = "unset" if row["value"] is None else repr(row["value"])
        lines += [f"{row['name']}: {value} (default {row['default'] or 'none'})", f"  {row['meaning']}"]
        if row["error"]:
            lines.append(f"  {row['error']}")
    return lines
