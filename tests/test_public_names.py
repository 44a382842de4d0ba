"""Check what `from vqr1 import …` gives and what importing vqr1 must not do."""

import subprocess
import sys
from pathlib import Path

import vqr1
import vqr1.data

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = [
    "Scorer",
    "Score",
    "RankingReward",
    "ranking_reward",
    "comparative_probability",
    "fidelity",
    "thurstone_scale",
    "format_reward",
    "parse_score",
    "load_policy",
    "load_ratings",
    "distort",
    "srcc",
    "plcc",
    "plcc_fit",
    "train",
]


def python(code: str) -> str:
    """Run code in a fresh interpreter; return what it wrote to standard error."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_the_public_names_are_there():
    assert sorted(vqr1.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(vqr1)) and "__version__" in dir(vqr1)
    for package in (vqr1, vqr1.data):
        for name in package.__all__:
            assert getattr(package, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(vqr1, "Scorrer") and not hasattr(vqr1.data, "load_rating")


def test_importing_vqr1_does_nothing_but_define_names():
    code = (
        "import logging, os, sys, warnings\n"
        "before = dict(os.environ), list(warnings.filters), dict(logging.root.manager.loggerDict)\n"
        "import vqr1, vqr1.data\n"
        "after = dict(os.environ), list(warnings.filters), dict(logging.root.manager.loggerDict)\n"
        "assert before == after and vqr1.__version__\n"
        "assert not {'torch', 'numpy', 'pandas', 'PIL'} & set(sys.modules)"
    )
    python(code)


def test_metrics_distortions_and_sets_load_no_torch():
    code = (
        "import sys\n"
        "from vqr1 import distort, load_ratings, parse_score, plcc, plcc_fit, srcc\n"
        "from vqr1.data import human_cells, render_rows\n"
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    python(code)


def test_training_is_imported_without_a_word():
    """bitsandbytes, which TRL imports, prints one on some CPUs."""
    assert python("from vqr1 import train, Scorer; import vqr1.plots, vqr1.experiments.baselines") == ""
