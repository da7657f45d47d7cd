"""docs/optimizers.md tells the state bytes that the optimizers have."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from a8multi.cli.parameter_sets import PARAMETER_SETS
from a8multi.estimate import estimate_state_bytes, optimizers

PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"


def test_state_bytes_are_those_of_the_estimate() -> None:
    rows = re.findall(r"^\| `(\w+\(.*?\))` \| ([\d.]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    shapes = PARAMETER_SETS["tinyllama-1.1b"]()
    named = set()
    for call, told in rows:
        parsed = ast.parse(call, mode="eval").body
        assert isinstance(parsed, ast.Call)
        assert isinstance(parsed.func, ast.Name)
        options = {one.arg or "": ast.literal_eval(one.value) for one in parsed.keywords}
        found = estimate_state_bytes(shapes, parsed.func.id, **options)
        assert f"{found.bytes_per_parameter:.{len(told.partition('.')[2])}f}" == told, call
        named.add(found.optimizer)
    assert named == {kind.__name__ for kind in optimizers().values()}
