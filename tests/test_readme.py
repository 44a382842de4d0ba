"""The pages' commands, code, links and files are real."""

import importlib.util
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from vqr1.cli import _parser, main
from vqr1.config import load_config

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


class Page(NamedTuple):
    """Hold a page of the repository, taken apart."""

    path: Path
    text: str
    blocks: list[tuple[str, str]]
    """Language and content of each code block, which may be indented as part of a list."""
    prose: str
    spans: list[str]


def page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    block = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    blocks = [
        (kind, re.sub(f"^{indent}", "", code, flags=re.M)) for indent, kind, code in block.findall(text)
    ]
    prose = block.sub("", text)
    return Page(path, text, blocks, prose, re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose))


PAGES = [page(path) for path in tables.PAGES]
README = PAGES[0]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


TINY = {
    "score": ["--policy", "tiny-policy"],
    "compare": ["--policy", "tiny-policy"],
    "describe": ["--policy", "tiny-policy"],
    "evaluate": ["--policy", "tiny-policy", "--estimates", "expected", "--limit", "8"],
    "data": [],
    "sheet": [],
}
"""Quick commands, with arguments that make them quicker.

Others take minutes or need data, and are only parsed.
"""
NEEDS = ("--help", "--root", "--twins", "--actors", "--rebuild", "holiday", "FOLDER")
"""Words that mark a command as only parsed here.

It shows help, needs a public set, starts Ray, writes into data/, or belongs to the recipe, tested below.
"""


def commands() -> list[list[str]]:
    """Return each command of the pages, from blocks and prose, split into words."""
    blocks = "\n".join(code for p in PAGES for kind, code in p.blocks if kind == "bash")
    lines = re.split(r"\n|&&", blocks.replace("\\\n", " "))
    lines += [span for p in PAGES for span in p.spans if re.match(r"(make|vqr1) [a-z]", span)]
    words = [shlex.split(line, comments=True) for line in lines]
    return list(dict((" ".join(part), part) for part in words if part).values())


COMMANDS = commands()
VQR1 = [words[1:] for words in COMMANDS if words[0] == "vqr1"]
VQR1 += [words[words.index("vqr1.cli") + 1 :] for words in COMMANDS if words[0] == "accelerate"]
QUICK = [
    words
    for words in VQR1
    if words[0] in TINY and len(words) > 1 and not re.search("|".join(NEEDS), " ".join(words))
]


def shown(words: list[str]) -> str:
    return " ".join(words)[:60]


def test_the_front_page_is_short():
    assert len(README.text.encode()) <= 10_240


def test_every_command_is_of_a_kind_that_is_checked():
    assert {words[0] for words in COMMANDS} <= {"make", "vqr1", "git", "cd", "source", "accelerate"}
    assert {words[0] for words in QUICK} == set(TINY) and ["make", "demo"] in COMMANDS


def test_make_commands_have_their_target_and_variables():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    words = {word for command in COMMANDS if command[0] == "make" for word in command[1:]}
    assert {word for word in words if "=" not in word} <= targets
    assert {word.partition("=")[0] for word in words if "=" in word} <= variables


def test_vqr1_commands_parse(capsys):
    wrong = []
    for words in VQR1:
        try:
            _parser().parse_args(words)
        except SystemExit as left:
            wrong += [words] if left.code else []
    assert not wrong, capsys.readouterr().err


@pytest.mark.parametrize("words", QUICK, ids=shown)
def test_quick_vqr1_command_runs(words, tmp_path, monkeypatch, capsys):
    """The folder holds only a link to data/, so no run of the reader's is needed or changed."""
    os.symlink(ROOT / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert main(words + TINY[words[0]]) == 0
    assert capsys.readouterr().out.strip()


PYTHON = [
    pytest.param(code, id=f"{named(p.path)}: {code.splitlines()[0]}")
    for p in PAGES
    for kind, code in p.blocks
    if kind == "python"
]
PRINTS = dict(re.findall(r"```python\n([^`]*)```\n\nIt prints\n\n```text\n([^`]*)```", README.text))
"""Map code of the front page to its output as shown there."""


@pytest.mark.parametrize("code", PYTHON)
def test_python_code_runs(code, tmp_path, monkeypatch, capsys):
    os.symlink(ROOT / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    source = code.replace('"runs/demo/policy"', '"tiny-policy"')
    exec(compile(source, "page", "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    assert printed == PRINTS[code] if code in PRINTS else printed.strip()


def test_the_front_page_scores_and_trains():
    """Its Python is the score in sixty seconds, with its output, and a GRPOTrainer of one's own."""
    score, own = (code for kind, code in README.blocks if kind == "python")
    assert list(PRINTS) == [score]
    assert "GRPOTrainer(" in own and "RankingReward(" in own and "trainer.train()" in own


@pytest.mark.slow
def test_the_recipe_for_own_pictures_works(tmp_path, monkeypatch, capsys):
    """Follow the README as a newcomer does, with twelve photographs and fewer training steps."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "holiday"
    folder.mkdir()
    head = dict(README.blocks)["csv"].splitlines()[0]
    assert head == "file,rating,reference"
    photos = sorted((ROOT / "data" / "photos").glob("*.jpg"))[:12]
    rows = [
        f"{path.stem},{10 + 7 * n % 50},{photos[0].stem if n == 1 else ''}" for n, path in enumerate(photos)
    ]
    (folder / "ratings.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    for path in photos:
        os.symlink(path, folder / path.name)
    recipe = [words[1:] for words in COMMANDS if words[0] == "vqr1" and "holiday" in " ".join(words)]
    assert [words[0] for words in recipe] == ["manifest", "train", "evaluate", "score"]
    said = []
    for words in recipe:
        few = {"train": ["--config", "cpu", "--steps", "2"], "evaluate": ["--estimates", "expected"]}
        assert main(words + few.get(words[0], [])) == 0, capsys.readouterr().err
        said.append(capsys.readouterr().out)
    rows = pd.read_csv(folder / "manifest.csv")
    assert len(rows) == 12 and rows.loc[1, "reference"] == rows.loc[0, "image"]
    assert rows["split"].nunique() == 3 and rows.loc[1, "split"] == rows.loc[0, "split"]
    assert "| manifest.csv | expected | True |" in said[2].replace("holiday/", "")
    assert "| False |" not in said[2]
    scores = pd.read_csv("scores.csv")
    assert len(scores) == 12 and scores["thinking"].all() and scores["reasoning"].notna().all()
    assert scores["score"].between(1, 5).all()


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_files_and_headings_of_the_repository():
    wrong = []
    for p in PAGES:
        for target in set(re.findall(r"\]\(([^)\s]+)\)", p.prose)):
            name, _, anchor = target.partition("#")
            path = p.path.parent / name if name else p.path
            if not re.match(r"[a-z]+:", target) and not (
                path.exists() and (not anchor or anchor in anchors(path))
            ):
                wrong.append(f"{named(p.path)} links to {target}")
    assert not wrong


def test_named_files_are_there():
    """A name is found in the repository, vqr1/ or the page's folder.

    Files that make, runs and readers write are not tracked.
    """
    file = re.compile(r"[\w./-]+\.(py|csv|md|ipynb|yaml|yml|toml|txt)|[\w./-]+/")
    wrong = []
    for p in PAGES:
        for name in {span for span in p.spans if file.fullmatch(span)}:
            mine = name.startswith(("runs/", ".venv/", "holiday/"))
            if not mine and not any((f / name).exists() for f in (ROOT, ROOT / "vqr1", p.path.parent)):
                wrong.append(f"{named(p.path)} names {name}")
    assert not wrong


def test_every_page_is_reached_from_the_front_page():
    reached, left = set(), [README.path]
    while left:
        path = left.pop()
        reached.add(path)
        found = next(p for p in PAGES if p.path == path)
        targets = {(path.parent / name).resolve() for name in re.findall(r"\]\(([^)#\s]+)", found.prose)}
        left += [p.path for p in PAGES if p.path in targets - reached]
    assert reached == {p.path for p in PAGES}


def test_every_result_is_told_of():
    """Some page mentions each table of data/runs/; logs and differences belong to theirs."""
    told = " ".join(p.text for p in PAGES)
    names = {re.sub("-(log|differences)$", "", f.stem) for f in (ROOT / "data" / "runs").glob("*.csv")}
    assert {name for name in names if not re.search(rf"\b{name}(-log|-differences)?\.csv", told)} == set()


def test_result_tables_are_those_of_the_csvs():
    wrong = [named(p.path) for p in PAGES if tables.renewed(p.text) != p.text]
    assert not wrong, "run: python tools/readme_tables.py"
    assert {name for p in PAGES for name in tables.TABLE.findall(p.text)} == set(tables.TABLES)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Return a folder of results that tables are made from, instead of the project's."""
    monkeypatch.setattr(tables, "RUNS", tmp_path)
    return tmp_path


def test_a_mixtures_table_shows_pairs_where_people_compared(runs):
    rows = pd.DataFrame(
        [(name, seed, of, value + seed / 10) for of, value in (("rated", 0.5), ("pairs", 0.2))
         for name in ("mixture", "alone") for seed in (0, 1)],
        columns=["variant", "seed", "set", "srcc"],
    )  # fmt: skip
    rows["pairs_right"] = (rows["srcc"] + 0.5).where(rows["set"] == "pairs")
    rows.to_csv(runs / "small.csv", index=False)
    gaps = pd.DataFrame({"variant": "alone", "set": ["rated", "pairs", "pairs"], "lo": -0.1, "hi": 0.1})
    gaps = gaps.assign(statistic=["srcc", "srcc", "pairs_right"], difference=[0.01, 0.02, 0.03])
    gaps = pd.concat(gaps.assign(baseline=name) for name in ("mixture", "before"))
    gaps.to_csv(runs / "small-differences.csv", index=False)
    head, _, *lines = tables.mixture("small").splitlines()
    assert head.split(" | ")[2:5] == [
        "`rated` (minus mixture)",
        "`pairs` (minus mixture)",
        "`pairs` pairs right (minus mixture)",
    ]
    assert lines == [
        "| mixture | 2 | 0.550 | 0.250 | 0.750 | 0.400 |",
        "| alone | 2 | 0.550 (+0.010 [-0.100, 0.100]) | 0.250 (+0.020 [-0.100, 0.100]) "
        "| 0.750 (+0.030 [-0.100, 0.100]) | 0.400 |",
    ]


def test_the_table_of_srij_has_a_line_for_each_yardstick(runs):
    gap = {f"minus_{name}{end}": value for name in ("psnr", "ssim") for end, value in GAP.items()}
    rows = [
        {"order": order, "variant": name, "srcc": 0.8, "srcc_lo": 0.7, "srcc_hi": 0.9} | more
        for order in ("within contents", "ways")
        for name, more in (("ranker", gap), ("psnr", {}))
    ]
    pd.DataFrame(rows).to_csv(runs / "srij.csv", index=False)
    head, _, *lines = tables.srij().splitlines()
    assert head.startswith("| yardstick | SRCC, within contents | minus PSNR | minus SSIM | SRCC, ways | ")
    half, there = "0.800 [0.700, 0.900]", "+0.100 [-0.100, 0.300]"
    assert lines == [
        f"| ranker | {' | '.join([half, there, there] * 2)} |",
        f"| psnr | {' | '.join([half, '', ''] * 2)} |",
    ]


GAP = {"": 0.1, "_lo": -0.1, "_hi": 0.3}


def test_settings_are_those_of_the_configurations():
    """The table beside the paper gives each setting by TRL's name."""
    text = next(p.text for p in PAGES if p.path.parent.name == "configs")
    table = text[text.index("| setting |") :].split("\n\n")[0].splitlines()
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
    said = " ".join(README.text.split())
    assert "Its ratings are *simulated*" in said and "training on people's ratings" in said
