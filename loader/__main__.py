"""``python -m a8multi.loader [--json]``: what this machine can run, without torch.

Exit status: 0 when the CPU library loads, 1 when it does not; the report says why and what to do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from . import report
from .output import printing

PROGRAM = "python -m a8multi.loader"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report. Returns the exit status."""
    return printing(PROGRAM, lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="What a8multi can run on this machine.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    found = report.collect()
    print(json.dumps(found, indent=2) if options.json else report.text(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
