"""Notebooks are checked without running them or importing torch; notebooks/conftest.py runs them."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shared import of_each
from test_environment import CONDA_NAMES, MODULES, PROJECT, ROOT, conda_lines, distribution

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("0*.ipynb"))
SOLUTIONS = sorted(FOLDER.glob("solutions/0*.ipynb"))
REPOSITORY = PROJECT["urls"]["Repository"]
WIDGET = "application/vnd.jupyter.widget"
PUBLIC = {
    node.name
    for path in MODULES.values()
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
} - {"main"}

every_notebook = of_each(NOTEBOOKS)
every_file = of_each(NOTEBOOKS + SOLUTIONS)


def cells(path: Path, kind: str | None = None) -> list[dict]:
    """Return the cells, of one kind if asked, with "source" as one string."""
    content = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        cell | {"source": "".join(cell["source"])} for cell in content if kind in (None, cell["cell_type"])
    ]


def sources(path: Path, kind: str | None = None) -> list[str]:
    return [cell["source"] for cell in cells(path, kind)]


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def headings(path: Path, marks: str) -> list[str]:
    text = "\n".join(sources(path, "markdown"))
    return re.findall(rf"^{marks} (.*)$", text, re.MULTILINE)


def nodes(path: Path) -> list[ast.AST]:
    return [node for source in sources(path, "code") for node in ast.walk(ast.parse(source))]


def setup_cell(path: Path) -> str:
    return sources(path, "code")[0]


def exercises(path: Path) -> dict[str, str]:
    """Map each heading "### Exercise N: title" to the code cell after it."""
    content = cells(path)
    titles = [re.match(r"### (Exercise \d+: .+)", cell["source"]) for cell in content]
    return {title[1]: content[n + 1]["source"] for n, title in enumerate(titles) if title}


def test_there_are_notebooks():
    assert NOTEBOOKS and [path.name for path in SOLUTIONS] == [path.name for path in NOTEBOOKS]


# --- the file -----------------------------------------------------------------------------------


@every_file
def test_it_was_run_from_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert [o["evalue"] for o in outputs(path) if o["output_type"] == "error"] == []


@every_file
def test_it_stores_no_widget_no_stderr_and_no_machine(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    assert [
        kind for output in outputs(path) for kind in output.get("data", {}) if kind.startswith(WIDGET)
    ] == []
    assert [output["text"] for output in outputs(path) if output.get("name") == "stderr"] == []
    streams = [[output.get("name") for output in cell["outputs"]] for cell in cells(path, "code")]
    assert not any("stdout" == one == two for names in streams for one, two in zip(names, names[1:])), (
        "a print in pieces"
    )
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)


@every_file
def test_it_is_small(path):
    assert path.stat().st_size <= 300_000


@every_file
def test_code_fits_a_narrow_page(path):
    """Within 80 columns nothing scrolls on Colab; within 35 lines a cell is seen whole."""
    code = sources(path, "code")
    assert [line for source in code for line in source.split("\n") if len(line) > 80] == []
    assert [source[:60] for source in code if source.count("\n") >= 35] == []


@every_file
def test_it_names_no_folder_of_a_machine(path):
    lines = [
        line for line in path.read_text(encoding="utf-8").split("\n") if "/content/vqr1" not in line
    ]  # Colab's, in the setup cell
    assert (
        re.findall(
            r"(?<![\w.:/-])/(?:home|root|tmp|work|Users|usr|opt|mnt|content)/[\w.-]*", "\n".join(lines)
        )
        == []
    )


# --- the code -----------------------------------------------------------------------------------


@every_file
def test_it_imports_at_its_head_what_environment_yml_declares(path):
    code = sources(path, "code")
    declared = {name for name, (_, _, used) in conda_lines().items() if used}
    imported = set()
    for number, source in enumerate(code):
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not names or number < 2, (
                f"{names} is imported in code cell {number + 1}, not in the second"
            )
            imported |= {name.split(".")[0] for name in names}
    third = {distribution(name) for name in imported - sys.stdlib_module_names - {"vqr1"}}
    assert {name for name in third if CONDA_NAMES.get(name, name) not in declared} == set()


@every_file
def test_it_defines_nothing_that_vqr1_has(path):
    """It redefines no public function or class, and reassigns no name that it imported."""
    defined = {node.name for node in nodes(path) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assigned = {
        node.id for node in nodes(path) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    imported = {
        alias.asname or alias.name
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vqr1")
        for alias in node.names
    }
    assert defined & PUBLIC == set() and assigned & imported == set()


# --- the opening --------------------------------------------------------------------------------


@every_notebook
def test_it_opens_with_the_same_five_cells(path):
    opening = cells(path)[:5]
    assert [cell["cell_type"] for cell in opening] == ["markdown"] * 3 + ["code"] * 2
    title, objectives, contents, _, imports = (cell["source"] for cell in opening)
    badge = f"https://colab.research.google.com/github/{REPOSITORY.split('github.com/')[1]}/blob/main/notebooks/{path.name}"
    number = path.name[:2]
    assert re.fullmatch(
        rf"# {number} · [^\n]+\n\n\[!\[Open In Colab\]\([^)]+\)\]\({re.escape(badge)}\)\n\n\*\*[^\n]+\*\*",
        title,
    )
    assert (
        objectives.startswith("## You will\n") and 3 <= len(re.findall("^- ", objectives, re.MULTILINE)) <= 5
    )
    assert "**Know before:**" in objectives and "**Time and hardware:**" in objectives
    assert contents.startswith("## Contents\n") and "version(" in imports
    assert "nbval-ignore-output" in opening[4]["metadata"]["tags"]  # versions differ


@every_notebook
def test_its_contents_link_every_section(path):
    listed = re.findall(r"^- \[(.+)\]\(#(.+)\)$", sources(path)[2], re.MULTILINE)
    sections = [title for title in headings(path, "##") if title not in ("You will", "Contents")]
    assert listed == [(title, title.replace(" ", "-")) for title in sections]  # Jupyter's anchors


@every_notebook
def test_the_readme_lists_it(path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"](notebooks/{path.name})" in text and f"/blob/main/notebooks/{path.name})" in text


@every_file
def test_the_setup_cell_is_the_same_everywhere(path):
    assert setup_cell(path) == setup_cell(NOTEBOOKS[0])
    assert f'"{REPOSITORY}"' in setup_cell(path) and cells(path, "code")[0]["outputs"] == []


@every_file
def test_its_links_to_files_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#\s:]+)\)", "\n".join(sources(path, "markdown")))
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.slow
def test_the_setup_cell_on_colab(tmp_path):
    """As on Colab but for its folder: git takes this checkout for the address, and pip has nothing to do
    here.

    What the cell must leave: the repository on the path, notebooks/ as the working folder, torch as it was.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    code = f"""
import importlib.metadata, sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
before = importlib.metadata.version("torch")
{setup_cell(NOTEBOOKS[0]).replace("/content", str(tmp_path))}
assert importlib.metadata.version("torch") == before and "torch" not in sys.modules
import vqr1, vqr1.data.manifests
print(vqr1.__file__, vqr1.data.manifests.data_root(), os.getcwd(), len(pins), sep="\\n")
"""
    replaced = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
        "GIT_CONFIG_VALUE_0": REPOSITORY,
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | replaced
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    home = tmp_path / "vqr1"
    expected = [home / "vqr1" / "__init__.py", home / "data", home / "notebooks", 7]
    assert done.stdout.split() == [str(value) for value in expected]


# --- the exercises ------------------------------------------------------------------------------


@every_notebook
def test_each_exercise_has_a_stub_that_runs_and_a_worked_solution(path):
    stubs, worked = exercises(path), exercises(path.parent / "solutions" / path.name)
    assert 3 <= len(stubs) <= 4 and list(worked) == list(stubs)
    for number, title in enumerate(stubs, 1):
        assert title.startswith(f"Exercise {number}: ") and worked[title] != stubs[title]
        checks = [ast.dump(ast.parse(source).body[-1]) for source in (stubs[title], worked[title])]
        assert checks[0] == checks[1], f"the check of {title!r} differs in the solution"


@every_notebook
def test_the_stubs_are_open_and_the_solutions_right(path):
    for file, verdict in ((path, "not answered yet"), (path.parent / "solutions" / path.name, "right")):
        printed = "".join(
            "".join(output["text"]) for output in outputs(file) if output["output_type"] == "stream"
        )
        found = re.findall(rf"Exercise (\d): {verdict}", printed)
        assert found == [str(n) for n in range(1, len(exercises(file)) + 1)]


@every_notebook
def test_a_solution_holds_only_what_changes(path):
    solution = path.parent / "solutions" / path.name
    repeated = set(sources(path, "code")) & set(sources(solution, "code"))
    assert repeated == {setup_cell(path)} and f"](../{path.name})" in sources(solution)[0]
    assert len(sources(solution, "code")) == 2 + len(exercises(solution))
