"""What bench/fidelity.py and bench/losses.py share as scripts: options, the device, the head of a result, the plot.

Must not know what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from fidelity_families import FAMILIES, OPERATIONS

import a8multi
from a8multi.cli import console
from a8multi.cli.candidates import PEER_PACKAGES
from a8multi.cli.console import CommandError, positive_int, require_writable, thread_count
from a8multi.cli.data import Text
from a8multi.cli.system import devices, versions
from a8multi.cli.train import make_reproducible
from a8multi.cli.trainer import TrainConfig

COMPONENTS = ("python", "cpu", "torch", "numpy", "a8multi", *PEER_PACKAGES)
# The model of both scripts and its batches, unless asked for otherwise.
MODEL_SIZES = {"width": 128, "layers": 4, "heads": 4, "context": 64, "batch_size": 8}
CUDA_COMPONENTS = ("torch built with CUDA", "cuda driver supports", "cupy")


def parser(description: str | None, sizes: Mapping[str, int]) -> argparse.ArgumentParser:
    """With the options of both scripts. sizes: names of whole numbers, as in the config, and their defaults."""
    made = console.Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--family", choices=list(FAMILIES), default="adamw", help="default adamw")
    add("--only", metavar="NAME", nargs="+", help="candidates of these names; * stands for anything")
    add("--json", type=Path, metavar="FILE", help="also write every measurement")
    add("--png", type=Path, metavar="FILE", help="also plot it by step")
    add("--data", metavar="PATH", help="text file or directory; default this Python's standard library")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...; default cpu")
    add("--threads", type=thread_count, help="CPU threads; default torch's choice")
    for name, default in sizes.items():
        add(f"--{name.replace('_', '-')}", type=positive_int, default=default, help=f"default {default}")
    return made


def prepare(args: argparse.Namespace) -> Any:
    """Makes the folders that results go to. Returns the module tqdm.

    Raises:
        CommandError: a package is missing, or a result could not be written.
    """
    modules = console.require_train_extra("tqdm", *(["matplotlib"] if args.png else []))
    for option, path in (("--json", args.json), ("--png", args.png)):
        if path:
            with console.writing(option, path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            require_writable(option, path)
    return modules[0]


def settle(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Sets device, threads and algorithms in torch. Returns the config: these options, and device and threads as set.

    Raises:
        CommandError: torch cannot use this device.
    """
    device = console.device_argument(args.device)
    config = {name: getattr(args, name) for name in names}
    config |= {"device": str(device), "threads": args.threads or torch.get_num_threads()}
    make_reproducible(TrainConfig(device=config["device"], threads=config["threads"]))
    if device.type == "cuda":
        # A peer may have no deterministic kernel. Filling every new tensor only helps to find what is read too soon.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return config


def head(config: Mapping[str, Any], text: Text, command: str) -> dict[str, Any]:
    """How a result came about: the beginning of its JSON."""
    device = torch.device(config["device"])
    components = COMPONENTS if device.type == "cpu" else COMPONENTS + CUDA_COMPONENTS
    return {
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: version for name, version in versions().items() if name in components},
        "device": dict(devices()).get(config["device"], config["device"]),
        "backend": a8multi.backend_for(device, OPERATIONS[config["family"]]).name,
        "config": dict(config),
        "text_digest": text.digest,
    }


def packages(result: Mapping[str, Any]) -> dict[str, str]:
    """Of the versions in the head of a result, those that are not the machine's."""
    return {name: result["versions"][name] for name in COMPONENTS if name != "cpu" and name in result["versions"]}


def write_json(result: dict[str, Any], path: Path) -> None:
    """An old file stays until the new one is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def table(headers: Sequence[str], cells: Sequence[Sequence[str]], rows: Sequence[dict[str, Any]], *legend: str) -> str:
    """The cells, the legend, and the notes of the rows of a result."""
    notes = [f"{row['name']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join([console.format_table(headers, cells), *legend, *notes])


def save_figure(path: Path, height: float, panels: int, draw: Callable[[Any, Any], None]) -> None:
    """Plots: draw gets the axes, one or an array of several above each other, and colours by number.

    Light and dark colours by turns: a peer's row, which follows ours, has the same hue.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = FigureCanvasAgg(Figure(figsize=(10, height), layout="constrained")).figure
    draw(figure.subplots(panels, 1, sharex=True), lambda index: colormaps["tab20"](index % 20))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("step")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def exit_status(result: dict[str, Any], interrupted: bool) -> int:
    if interrupted:
        return console.EXIT_INTERRUPTED
    ours_failed = any(row["note"] for row in result["rows"] if row["name"].startswith("a8multi "))
    return console.EXIT_FAILED if ours_failed else console.EXIT_OK


def main(
    name: str,
    options: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, str], int],
    arguments: Sequence[str],
) -> int:
    """Measures. Exit status 0 done, 1 one of a8multi's own optimizers failed, 2 asked for wrongly, 130 Ctrl-C."""
    try:
        return run(options.parse_args(arguments), shlex.join(["python", f"bench/{name}.py", *arguments]))
    except CommandError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return console.EXIT_USAGE
