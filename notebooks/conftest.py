"""How nbval runs the notebooks: pyproject.toml says `--nbval-lax`, this file
which are strict.
"""

import pytest
from nbval.plugin import IPyNbFile

STRICT = ("01_thurstone_reward",)
"""Every output is compared. In the others the policy samples, and only cells
tagged nbval-check-output are compared.
"""


def pytest_collectstart(collector):
    if isinstance(collector, IPyNbFile):
        collector.compare_outputs = collector.path.stem in STRICT
        collector.skip_compare += (
            "stderr",
        )  # progress bars and warnings of libraries are no result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """The kernel starts in the first cell's setup; with the tests'
    MPLBACKEND=Agg it would show no plot.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)
        return (yield)
