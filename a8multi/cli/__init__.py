"""The `a8multi` command: info, train, bench. Each command is a module with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from a8multi.cli import bench, info, train
from a8multi.cli.console import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, CommandError, Parser
from a8multi.errors import A8MultiError

COMMANDS = {"info": info, "train": train, "bench": bench}


def build_parser() -> Parser:
    import a8multi

    parser = Parser(prog="a8multi", description="Low-bit PyTorch optimizers with the same bits on CPU and GPU.")
    parser.add_argument("--version", action="version", version=f"a8multi {a8multi.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,train,bench}")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or name).splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        command.set_defaults(parser=command)
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; None takes those of the process.
    Returns:
        The exit status: 0 done, 1 the work failed, 2 it was asked for wrongly, 130 stopped by Ctrl-C.
    """
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        # By the command's own parser: that of the program would send the user to the wrong help.
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
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
