"""The pages in docs/ agree with the code they speak of."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_recipe_page_is_what_the_schema_says() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "recipe_keys.py"))["page"]()
    written = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert written == page, "run: python docs/recipe_keys.py > docs/recipe.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    lost = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not lost


def test_architecture_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = [path.relative_to(ROOT / "evs_train") for path in (ROOT / "evs_train").rglob("*.py")]
    missing = [str(m) for m in modules if m.name != "__init__.py" and f"`{m}`" not in page]
    assert not missing


def test_reliability_names_tests_that_are_there() -> None:
    words = re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    named = [part for word in words if "test_" in word for part in re.split(r"::|/| ", word) if part]
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    folders = {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()} | {"tests"}
    known = texts.keys() | folders | set(re.findall(r"(?:def|class) (\w+)", "\n".join(texts.values())))
    assert len(named) > 50
    assert not set(named) - known
