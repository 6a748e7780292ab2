"""Keys of `evs-train eval`: what is read, and what is wrong with them, all at once."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from evs_train.cli import main
from evs_train.errors import RecipeError
from evs_train.evaluate.options import RATES, EvalOptions, parse_options

ROOT = Path(__file__).resolve().parents[2]


def test_defaults_and_lists() -> None:
    options = parse_options(["model=runs/tiny/export", "data=q.jsonl"])
    assert (options.model, options.data) == (["runs/tiny/export"], ["q.jsonl"])
    assert options.rates == options.all_rates == list(RATES)
    both = parse_options(["model=[a, b]", "data=[x.json, y.json]", "rates=[.9,0.5,0.9]", "tolerance=0", "fps=2"])
    assert (both.model, both.data) == (["a", "b"], ["x.json", "y.json"])
    assert (both.rates, both.all_rates) == ([0.5, 0.9], [0.0, 0.5, 0.9])
    assert both.sampled == {"fps": 2.0}
    one = parse_options(["model=http://localhost:8000/v1", "data=q.jsonl", "rates=0.75", "out=x"])
    assert (one.server, one.all_rates) == ("http://localhost:8000/v1", [0.75])


def test_results_go_into_the_run_that_was_evaluated(tmp_path: Path) -> None:
    assert EvalOptions(model=["Qwen/Qwen3-VL-8B-Instruct"], data=["q"]).folder == Path("eval/Qwen3-VL-8B-Instruct")
    (tmp_path / "record.json").write_text("{}")
    assert EvalOptions(model=[str(tmp_path / "export")], data=["q"]).folder == tmp_path / "eval"
    assert EvalOptions(model=[str(tmp_path / "export")], data=["q"], out="there").folder == Path("there")


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ([], ["model=... is missing", "data=... is missing"]),
        (["model=a", "data=b", "rate=[0.5]"], ["unknown key 'rate'; did you mean rates?"]),
        (["model=a", "data=b", "rates=[1.0]"], ["rates.0: must be less than 1, got 1.0"]),
        (["model=a", "data=b", "layout=videomm"], ["layout: must be 'rows', 'videomme'"]),
        (["model=a", "data=b", "tolerance=2", "timed=-1"], ["tolerance: must be less than", "timed: must be greater"]),
        (["model=a", "data=[b,c]", "layout=mlvu"], ["mlvu is one folder"]),
        (["model"], ["'model' is not of the form key=value"]),
    ],
)
def test_what_is_wrong_is_said(words: list[str], messages: list[str]) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_options(words)
    for message in messages:
        assert message in str(raised.value)


def test_the_command_leaves_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "model=a", "dat=b"]) == 2
    assert "did you mean data?" in capsys.readouterr().err
    assert main(["eval", "model=a", "data=nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_every_command_of_the_pages_can_be_meant() -> None:
    pages = [ROOT / "README.md", ROOT / "docs" / "eval.md"]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)]
    lines = [line for block in blocks for line in block.splitlines() if " eval model=" in line]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line)
        assert parse_options(words[words.index("eval") + 1 :]).all_rates


def test_the_page_explains_every_key() -> None:
    page = (ROOT / "docs" / "eval.md").read_text(encoding="utf-8")
    missing = [name for name in EvalOptions.model_fields if f"`{name}`" not in page]
    assert not missing
