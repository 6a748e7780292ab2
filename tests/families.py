"""A pytest plugin that writes what the suite showed of every family into docs/families.md.

A test marked `capability(column, cell)` shows, when it passes, that its family has `cell` in that column; a test may
say the cell itself (`record_property("cell", ...)`). A family's cells of one column are joined. With `--write-families`
the page is written from what passed; a whole run without it fails when the page differs from what it saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
FAMILY_PARAMETERS = ("family_name", "attention_rig", "recurrent_family")
COLUMNS = (
    "rate 0 is the plain model",
    "dropping a token",
    "padded batch",
    "packed batch",
    "images beside video",
    "several videos",
    "positions",
    "LoRA reaches",
    "DDP, ZeRO-2, ZeRO-3",
    "FSDP2",
    "generation",
    "export",
)
HEAD = """\
# Families and what was shown of them

Written by `pytest -n 2 -m capability --write-families`; the test suite fails when it sees anything
else. A cell stands here because a test of this family passed, on its tiny checkpoint, in float32, on a CPU; an empty
cell was not shown. [serving.md](serving.md) says which engines prune for a family.

"""


class Matrix:
    """Cells by family and column, from the reports of all workers."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], list[str]] = {}
        self.failed: set[tuple[str, str]] = set()

    def add(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if "capability" not in properties:
            return
        family, column, cell = properties["capability"]
        key = (family, column)
        if report.failed:
            self.failed.add(key)
        elif report.when == "call" and report.passed:
            cells = self.cells.setdefault(key, [])
            text = str(properties.get("cell", cell))
            if text not in cells:
                cells.append(text)

    def page(self) -> str:
        families = sorted({family for family, _ in self.cells})
        rows = [["family", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
        for family in families:
            keys = [(family, column) for column in COLUMNS]
            rows.append(
                [
                    f"`{family}`",
                    *("" if key in self.failed else ", ".join(sorted(self.cells.get(key, []))) for key in keys),
                ]
            )
        return HEAD + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-families", action="store_true", help="write docs/families.md from what passes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "capability(column, cell): what a passing test shows of its family")
    config.stash[_MATRIX] = Matrix()
    if not hasattr(config, "workerinput"):  # reports of workers arrive here, too
        config.pluginmanager.register(_Collector(config), "families-collector")


_MATRIX = pytest.StashKey[Matrix]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        mark = item.get_closest_marker("capability")
        if mark is None:
            continue
        column, cell = mark.args
        if column not in COLUMNS:
            raise pytest.UsageError(f"{item.nodeid}: there is no column {column!r} in docs/families.md")
        parameters: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
        family = next(str(parameters[name]) for name in FAMILY_PARAMETERS if name in parameters)
        item.user_properties.append(("capability", (family, column, cell)))


class _Collector:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.config.stash[_MATRIX].add(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        page = self.config.stash[_MATRIX].page()
        if self.config.option.write_families:
            PAGE.write_text(page, encoding="utf-8")
            return
        whole = self.config.args_source is pytest.Config.ArgsSource.TESTPATHS
        narrowed = self.config.option.keyword or self.config.option.markexpr or self.config.option.collectonly
        if whole and not narrowed and page != PAGE.read_text(encoding="utf-8"):
            reporter = self.config.pluginmanager.get_plugin("terminalreporter")
            if reporter is not None:
                reporter.write_line("docs/families.md is not what this run showed; write it anew with:", red=True)
                reporter.write_line("  pytest -n 2 -m capability --write-families", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
