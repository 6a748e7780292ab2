"""The page of families says what passed, and nothing that failed."""

from __future__ import annotations

import pytest

from tests.families import COLUMNS, HEAD, Matrix


def report(family: str, column: str, cell: str, failed: bool = False, said: str = "") -> pytest.TestReport:
    return pytest.TestReport(
        nodeid="test",
        location=("test.py", 1, "test"),
        keywords={},
        outcome="failed" if failed else "passed",
        longrepr=None,
        when="call",
        user_properties=[("capability", (family, column, cell)), *([("cell", said)] if said else [])],
    )


def test_cells_are_what_passed() -> None:
    matrix = Matrix()
    matrix.add(report("b", "positions", "preserve"))
    matrix.add(report("b", "positions", "preserve"))
    matrix.add(report("b", "positions", "none", said="engine"))
    matrix.add(report("b", "export", "yes"))
    matrix.add(report("b", "export", "yes", failed=True))
    matrix.add(report("a", "generation", "yes", failed=True))
    matrix.add(report("a", "packed batch", "refused"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in matrix.page().removeprefix(HEAD).splitlines()]
    assert rows[0] == ["family", *COLUMNS]
    cells = {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in rows[2:]}
    assert {column: cell for column, cell in cells["`a`"].items() if cell} == {"packed batch": "refused"}
    assert {column: cell for column, cell in cells["`b`"].items() if cell} == {"positions": "engine, preserve"}
