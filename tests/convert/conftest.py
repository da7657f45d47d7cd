"""peers/ needs the packages themselves: `tox run -e convert` names that folder, and nothing else collects it."""

collect_ignore = ["peers"]
