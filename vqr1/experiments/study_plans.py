"""What the studies compare, as data: variants, seeds, sets, and the baseline of each.

Study people-mixture learns from people's labels of three kinds: MOS of 0..1 (BIQ2021), scores of 0..100
(SRIJ) and comparisons without any scale (PCUID). Its rival, realigned regression, stretches each set's labels
to 1..5. Comparisons have no scale to stretch, so the rival learns from two of the sets. PCUID's MOS is the
share of wins over all others, made of the very comparisons; only "alone-pcuid, MOS" learns from it.
Batches come by rows, and PCUID has 2% of all: so the mixture has at most 440 rows of a set (PCUID has 177).
"""

from dataclasses import dataclass, field

from vqr1.data.simulated import MIXTURE
from vqr1.evaluation import EVALUATION_SETS


@dataclass(frozen=True)
class Variant:
    """A line of a study.

    seeds: how many runs.
    change: what differs from the study's configuration, as for `studies.changed`.
    method: how it scores, one of `studies.METHODS`.
    """

    seeds: int = 3
    change: dict = field(default_factory=dict)
    method: str = "rl"


@dataclass(frozen=True)
class Study:
    """A study.

    config: name of the configuration.
    sets: what is scored, and at most how many rows of each.
    baseline: the variant that all are compared with.
    also: further pairs of variants that are compared.
    minutes: about how long a run takes on one core.
    both_prompts: variants whose policies are scored with the other prompt, too.
    drawn: a rival of RL learns from rows drawn by its seed, as many as RL is shown; else from all.
    pool: how many training rows there are, evenly by set as far as the sets go, a fixed sample. None:
        `studies.POOL` for the short runs of cpu-study, else all.
    """

    config: str
    sets: dict[str, int | None]
    baseline: str
    variants: dict[str, Variant]
    minutes: float = 1.3
    also: tuple[tuple[str, str], ...] = ()
    both_prompts: tuple[str, ...] = ()
    drawn: bool = False
    pool: int | None = None


def _batch(images: int, k: int = 6, steps: int | None = None, per_step: int = 1) -> dict:
    """Return the changes for `per_step` comparisons of `images`, `k` answers each, per optimizer step."""
    keys = {
        "per_device_train_batch_size": images * k,
        "num_generations": k,
        "gradient_accumulation_steps": per_step,
        "steps_per_generation": 1,
    }
    return {"grpo": keys | ({"max_steps": steps} if steps else {})}


FULL = dict.fromkeys(EVALUATION_SETS)
ALL = {"sets": list(MIXTURE)}
PEOPLE = {"biq2021": 300, "srij": None, "pcuid": None}
"""Sets that people rated or compared -> how many test rows are scored."""
PAIRS = {"comparisons": ["pcuid"]}
AGAIN = {"model_name_or_path": "runs/pretrain-1/policy"}
"""Another seed: vqr1 pretrain --seed 1 --out runs/pretrain-1"""
# Rows of data/runs/ whose header names a commit from before the configurations became bounded are by the
# paper's unbounded reward. Make all of a study again before comparing a new row with them.
STUDIES = {
    "demo": Study(
        "cpu", FULL, "before", {"before": Variant(1, method="before"), "ranking": Variant(3)}, minutes=20
    ),
    "controls": Study(
        "cpu-study",
        {"sim-kadid": 288},
        "before",
        {
            "before": Variant(1, method="before"),
            "permuted": Variant(3, {"rows": "permuted"}),
            "format": Variant(3, {"reward": "format"}),
        },
    ),
    "mixture": Study(
        "cpu-study",
        dict.fromkeys(MIXTURE, 104),
        "mixture",
        {
            "before": Variant(1, method="before"),
            "mixture": Variant(5, ALL),
            **{f"alone-{name}": Variant(3, {"sets": [name]}) for name in MIXTURE},
            "threshold-raw": Variant(3, ALL | {"reward": "threshold"}),
            "threshold-realigned": Variant(5, ALL | {"reward": "threshold", "rows": "realigned"}),
            "across": Variant(3, ALL | {"rows": "across"}),
        },
    ),
    "comparison": Study(
        "cpu-study",
        {"sim-kadid": 288, "sim-unseen": 96},
        "ranking",
        {
            "before": Variant(1, method="before"),
            "before, non-thinking": Variant(1, {"thinking": False}, method="before"),
            "BRISQUE": Variant(1, method="brisque"),
            "PIQE": Variant(1, method="piqe"),
            "CNN regressor": Variant(5, method="cnn regressor"),
            "CNN ranker": Variant(5, method="cnn ranker"),
            "tower regressor": Variant(5, method="tower regressor"),
            "tower ranker": Variant(5, method="tower ranker"),
            "supervised": Variant(5, method="supervised"),
            "threshold": Variant(5, {"reward": "threshold"}),
            "ranking": Variant(5),
            "binary": Variant(5, {"reward_options": {"binary": True}}),
            "average": Variant(3, {"reward_options": {"average": True}}),
            "variance one": Variant(3, {"reward_options": {"variance": 1.0}}),
            "K = 2": Variant(3, _batch(16, 2)),
            "K = 4": Variant(3, _batch(16, 4)),
            "K = 8": Variant(3, _batch(16, 8)),
            "B = 4, 4 a step": Variant(3, _batch(4, per_step=4)),
            "B = 8, 2 a step": Variant(3, _batch(8, per_step=2)),
            "non-thinking": Variant(3, {"thinking": False}),
            "KL 0.04": Variant(5, {"grpo": {"beta": 0.04}}),
            "not scaled": Variant(5, {"grpo": {"scale_rewards": "none"}}),
            "B = 32, half the steps": Variant(
                5, _batch(32, steps=10) | {"validation": {"rows": 57, "every": 2}}
            ),
            "B = 32, K = 3": Variant(5, _batch(32, 3)),
            "B = 8, K = 12": Variant(5, _batch(8, 12)),
            "learning rate x 2": Variant(5, {"grpo": {"learning_rate": 2e-3}}),
        },
    ),
    "people": Study(
        "people",
        {"biq2021": None},
        "ranking",
        {
            "before": Variant(1, method="before"),
            "file size": Variant(1, method="file size"),
            "BRISQUE": Variant(1, method="brisque"),
            "PIQE": Variant(1, method="piqe"),
            "CNN regressor": Variant(3, method="cnn regressor"),
            "CNN ranker": Variant(3, method="cnn ranker"),
            "tower ridge": Variant(5, method="tower ridge"),
            "supervised": Variant(5, {"rows": "realigned"}, method="supervised"),
            "threshold": Variant(5, {"rows": "realigned", "reward": "threshold"}),
            "ranking": Variant(5),
            "permuted": Variant(1, {"rows": "permuted"}),
            "format": Variant(1, {"reward": "format"}),
        },
        minutes=15,
        both_prompts=("before", "ranking"),
        drawn=True,
    ),
    "people-mixture": Study(
        "people-study",
        PEOPLE,
        "mixture",
        {
            "before": Variant(1, method="before"),
            "mixture": Variant(3, {"sets": list(PEOPLE)} | PAIRS),
            "alone-biq2021": Variant(3, {"sets": ["biq2021"]}),
            "alone-srij": Variant(3, {"sets": ["srij"]}),
            "alone-pcuid": Variant(3, {"sets": ["pcuid"]} | PAIRS),
            "alone-pcuid, MOS": Variant(3, {"sets": ["pcuid"]}),
            "threshold-realigned": Variant(
                3, {"sets": ["biq2021", "srij"], "rows": "realigned", "reward": "threshold"}
            ),
        },
        minutes=6,
        also=(("alone-pcuid", "before"), ("alone-pcuid", "alone-pcuid, MOS")),
        pool=1320,
    ),
    "pretraining": Study(
        "cpu",
        dict.fromkeys(("sim-kadid", "sim-unseen")),
        "before",
        {
            "before": Variant(1, AGAIN, method="before"),
            "ranking": Variant(3, AGAIN),
        },
        minutes=9,
    ),
}
