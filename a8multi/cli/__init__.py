"""The `a8multi` command: info, train, bench.

Each command is a module with `DESCRIPTION`, whose first line is its summary, `add_arguments(parser)` and `run(args)`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from a8multi.cli import bench, info, train
from a8multi.cli.console import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, CommandError, Parser, require_torch
from a8multi.errors import A8MultiError
from a8multi.loader.output import printing

COMMANDS = {"info": info, "train": train, "bench": bench}


def build_parser() -> Parser:
    import a8multi

    parser = Parser(prog="a8multi", description="Low-bit PyTorch optimizers with the same bits on CPU and GPU.")
    parser.add_argument("--version", action="version", version=f"a8multi {a8multi.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,train,bench}")
    for name, module in COMMANDS.items():
        # Not the module's docstring: `python -OO` has none.
        summary = module.DESCRIPTION.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.DESCRIPTION)
        command.set_defaults(parser=command)
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; None takes those of the process.
    Returns:
        The exit status: 0 done, 1 the work failed, 2 it was asked for wrongly or lacks a package, 130 stopped by
        Ctrl-C, 141 nobody reads what is printed.
    """
    return printing("a8multi", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        # By the command's own parser: that of the program would send the user to the wrong help.
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        require_torch()
        return COMMANDS[args.command].run(args)
    except CommandError as error:
        print(f"a8multi {args.command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except A8MultiError as error:
        print(f"a8multi {args.command}: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"a8multi {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
