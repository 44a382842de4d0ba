"""The README's commands, code, links and files are real."""

import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest

from vqr1.cli import _parser, main
from vqr1.config import load_config

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
SPANS = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", PROSE)

TINY = {
    "score": ["--policy", "tiny-policy"],
    "compare": ["--policy", "tiny-policy"],
    "describe": ["--policy", "tiny-policy"],
    "evaluate": ["--policy", "tiny-policy", "--estimates", "expected", "--limit", "8"],
    "data": [],
    "sheet": [],
}
"""The quick commands, and what is added to make them quicker; the others take minutes or need data, and are
only parsed.
"""


def commands() -> list[list[str]]:
    """Every command line of the README, in blocks and in prose, split into words."""
    blocks = "\n".join(code for kind, code in BLOCKS if kind in ("bash", "sh", "shell", "console"))
    lines = re.split(r"\n|&&", blocks.replace("\\\n", " "))
    lines += [span for span in SPANS if re.match(r"(make|vqr1) [a-z]", span)]
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    words = [part for part in words if part]
    return list(dict((" ".join(part), part) for part in words).values())


COMMANDS = commands()
VQR1 = [words[1:] for words in COMMANDS if Path(words[0]).name == "vqr1"]
VQR1 += [words[words.index("vqr1.cli") + 1 :] for words in COMMANDS if words[0] == "accelerate"]


def shown(words: list[str]) -> str:
    return " ".join(words)[:60]


def test_every_command_is_of_a_kind_that_is_checked():
    known = {"make", "vqr1", ".venv/bin/vqr1", "git", "cd", "source", "pip", "python", "accelerate"}
    assert {words[0] for words in COMMANDS} <= known
    assert len(VQR1) >= 5 and COMMANDS[:2] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "make"], ids=shown)
def test_make_command_has_its_target_and_variables(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    set_here = {word.partition("=")[0] for word in words[1:] if "=" in word}
    assert {word for word in words[1:] if "=" not in word} <= targets and set_here <= variables


@pytest.mark.parametrize("words", VQR1, ids=shown)
def test_vqr1_command_parses(words):
    assert _parser().parse_args(words).command == words[0]


@pytest.mark.parametrize(
    "words",
    [words for words in VQR1 if words[0] in TINY and len(words) > 1 and "--root" not in words],
    ids=shown,
)
def test_quick_vqr1_command_runs(words, tmp_path, monkeypatch, capsys):
    """In an empty folder beside which there is only data/, so that no run of the reader's own is needed or
    changed.
    """
    os.symlink(ROOT / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert main(words + TINY[words[0]]) == 0
    assert capsys.readouterr().out.strip()


def test_every_quick_command_is_shown():
    assert {words[0] for words in VQR1} >= set(TINY)


@pytest.mark.parametrize(
    "code", [code for kind, code in BLOCKS if kind == "python"], ids=lambda code: code.splitlines()[0]
)
def test_python_code_runs(code, tmp_path, monkeypatch, capsys):
    os.symlink(ROOT / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    exec(
        compile(code.replace('"runs/demo/policy"', '"tiny-policy"'), "README.md", "exec"),
        {"__name__": "readme"},
    )
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#\s]+)", PROSE))))
def test_link_to_a_file_of_the_repository(target):
    if not re.match(r"[a-z]+:", target):
        assert (ROOT / target).exists(), f"README.md links to {target}, which is not there"


@pytest.mark.parametrize(
    "name",
    sorted(
        {
            span
            for span in SPANS
            if re.fullmatch(r"[\w./-]+\.(py|csv|md|ipynb|yaml|yml|toml|txt)|[\w./-]+/", span)
        }
    ),
)
def test_named_file_is_there(name):
    """A name without a folder is one of vqr1/ or of the top level; what make and runs write is not tracked."""
    if not name.startswith(("runs/", ".venv/")):
        assert any((ROOT / folder / name).exists() for folder in ("", "vqr1")), (
            f"README.md names {name}, which is not there"
        )


def test_numbers_say_where_they_come_from():
    """The tables of results name at least one CSV of data/runs/."""
    named = re.findall(r"data/runs/[\w.-]+\.csv", TEXT)
    assert named and all((ROOT / name).is_file() for name in named)


def test_result_tables_are_those_of_the_csvs():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.renewed(TEXT) == TEXT, "run: python tools/readme_tables.py"


def test_settings_are_those_of_the_configurations():
    """The table beside the paper: every setting named as TRL names it."""
    table = TEXT[TEXT.index("| setting |") :].split("\n\n")[0].splitlines()
    head, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in table)
    rows = [row for row in rows if re.fullmatch(r"`\w+`", row[0])]
    assert head[3:] == ["kadid-7b-qlora", "paper-7b-full"] and len(rows) >= 10
    for key, _, _, *ours in rows:
        for name, value in zip(head[3:], ours):
            assert str(load_config(name).grpo[key.strip("`")]) in (
                value,
                str(float(value)) if value[0].isdigit() else "",
            )


def test_ratings_are_called_simulated():
    assert "simulated" in TEXT and "No picture here was rated by people" in " ".join(TEXT.split())
