"""The runs behind the claims: one row per variant, seed and set, made once, in several processes, and kept
in data/runs/.

A study NAME has NAME.csv (the results), NAME-scores.csv.gz (every test row's score, a column per variant
and seed), NAME-differences.csv (of variants, paired over photographs and seeds) and NAME-log.csv (reward
and validation as training went). Seeds vary the RL stage; the embedded policy is one pretraining seed,
another is in the studies `pretraining…`.
"""

import gzip
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vqr1.config import check_config, load_config
from vqr1.data.manifests import EMBEDDED, UNRATED, realigned, render_rows
from vqr1.data.simulated import MIXTURE
from vqr1.evaluation import SETS, Rows, agreement, evaluate, evaluation_rows, naming
from vqr1.experiments.baselines import brisque, piqe, score_cnn, score_head, supervised, train_cnn, train_head
from vqr1.metrics import Statistic, frame_srcc, frame_within_level_srcc, over_sets, seed_difference
from vqr1.policy import load_policy, lora_config
from vqr1.training import grpo_config, images_per_step, machine_line, set_rows, train

COLUMNS = [
    "study",
    "variant",
    "seed",
    "set",
    "estimate",
    "photographs",
    "rows",
    "unparseable",
    "srcc",
    "srcc_lo",
    "srcc_hi",
    "srcc_within_level",
    "plcc",
    "plcc_fit",
    "dominance",
    "seconds",
    "family",
    "exact",
    "severity",
    "texts",
]
"""Of a study's CSV. seconds: of training, CPU time of the process; family, exact, severity, texts: see
`evaluation.naming`.
"""
ROW = ["set", "reference", "distortion", "level", "mos"]
"""What names a test row in NAME-scores.csv.gz."""
RESAMPLES = 300
"""Of photographs and seeds, for the interval of a difference: there are many differences."""
POOL = 480
"""Training rows of a short run: a fixed sample, the same for all variants and seeds."""


@dataclass(frozen=True)
class Variant:
    """A line of a study: its number of seeds (0: rows that are kept and not made again), what differs from
    the study's configuration
    (`changed`), and how it comes to scores.
    """

    seeds: int = 3
    change: dict = field(default_factory=dict)
    method: str = "rl"


@dataclass(frozen=True)
class Study:
    """config: name of the configuration; sets: what is scored, and at most how many rows of each; than: the
    variant that all are compared with; minutes: of one run, about, on one core.
    """

    config: str
    sets: dict[str, int | None]
    than: str
    variants: dict[str, Variant]
    minutes: float = 1.3


def _batch(images: int, k: int = 6, steps: int | None = None, per_step: int = 1) -> dict:
    """Return the changes for `images` compared at a time with `k` answers, `per_step` such comparisons per
    optimizer step.
    """
    keys = {
        "per_device_train_batch_size": images * k,
        "num_generations": k,
        "gradient_accumulation_steps": per_step,
        "steps_per_generation": 1,
    }
    return {"grpo": keys | ({"max_steps": steps} if steps else {})}


FULL = dict.fromkeys(SETS)
ALL = {"sets": list(MIXTURE)}
AGAIN = {"policy": "runs/pretrain-1/policy"}
"""A second pretraining seed, of half the steps: vqr1 pretrain --seed 1 --steps 1200 400 --out
runs/pretrain-1
"""
# Rows of data/runs/ whose header names a commit before the configurations became bounded are by the paper's
# reward, which is
# not: a row that is made again is compared with those only after all of its study is.
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
            "binary": Variant(5, {"variant": {"binary": True}}),
            "average": Variant(3, {"variant": {"average": True}}),
            "variance one": Variant(3, {"variant": {"variance": 1.0}}),
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
            "remembered": Variant(
                0
            ),  # compared with the last 64 images as well: did not win, and was removed; its rows stay
            "undecided": Variant(0),  # the half of the rows that the untrained policy orders worst: likewise
            "learning rate x 2": Variant(5, {"grpo": {"learning_rate": 2e-3}}),
        },
    ),
    "pretraining": Study(
        "cpu-study",
        {"sim-kadid": 288, "sim-unseen": 96},
        "before",
        {
            "before": Variant(1, AGAIN, method="before"),
            "ranking": Variant(3, AGAIN),
        },
    ),
    "pretraining-long": Study(
        "cpu",
        dict.fromkeys(("sim-kadid", "sim-unseen")),
        "before",
        {
            "before": Variant(1, AGAIN, method="before"),
            "ranking": Variant(2, AGAIN | {"variant": {"bounded": False}}),
            "bounded": Variant(2, AGAIN),
        },
        minutes=9,
    ),
}


def changed(config: dict, change: dict, seed: int) -> dict:
    """Return a configuration with a variant's changes (grpo and variant: key by key) and a seed."""
    merged = {key: config[key] | change.get(key, {}) for key in ("grpo", "variant")}
    merged["grpo"] |= {"seed": seed}
    return config | {key: value for key, value in change.items() if key != "rows"} | merged


@cache
def _test_rows(sets: tuple) -> dict[str, Rows]:
    """Return the test rows with their pictures, once per process: at most so many of each (set, rows)."""
    return {name: evaluation_rows([name], limit=limit)[name] for name, limit in sets}


def training_frame(config: dict, kind: str | None = None, pool: int | None = POOL) -> pd.DataFrame:
    """Return the rows that a variant is trained on: at most `pool` of each set, a fixed sample; None: all.

    kind: of `ROWS`. Raises ValueError for another.
    """
    if kind not in ROWS:
        raise ValueError(f"rows {kind!r} are unknown; use one of {', '.join(map(str, ROWS))}")
    rows = set_rows(config, "train")
    if pool:
        each = pool // len(config["sets"])
        rows = pd.concat(
            [group.sample(min(len(group), each), random_state=0) for _, group in rows.groupby("dataset")],
            ignore_index=True,
        )
    return ROWS[kind](rows, config["grpo"]["seed"])


def _permuted(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Deal each photograph's MOS anew to its pairs of distortion and level, which leaves nothing to learn."""
    deal = np.random.default_rng(seed).permutation
    return rows.assign(mos=rows.groupby("reference")["mos"].transform(deal))


ROWS = {
    None: lambda rows, seed: rows,
    "permuted": _permuted,
    "realigned": lambda rows, seed: realigned(rows),
    "across": lambda rows, seed: rows.assign(dataset="all"),
}
"""What a variant may do to its training rows. realigned: each set stretched to 1..5; across: all sets get
one name, so that their raw MOS are compared."""


def _cnn(policy, frame, images, ranker: bool, seed: int) -> Callable:
    model = train_cnn(frame, images, ranker=ranker, steps=120, seed=seed)
    return lambda pictures: score_cnn(model, pictures)


def _tower(policy, frame, images, ranker: bool, seed: int) -> Callable:
    head = train_head(policy, frame, images, ranker=ranker, steps=300, seed=seed)
    return lambda pictures: score_head(policy, head, pictures)


SCORERS = {"brisque": brisque, "piqe": piqe}
NETWORKS = {
    f"{name} {how}": partial(make, ranker=how == "ranker")
    for name, make in (("cnn", _cnn), ("tower", _tower))
    for how in ("regressor", "ranker")
}
METHODS = ("rl", "before", "supervised", *SCORERS, *NETWORKS)
"""How a variant comes to scores."""


def _learned(method: str, config: dict, rows: str | None, output: Path, pool: int | None) -> tuple | Callable:
    """Return what a variant's training leaves: a policy (model, processor), or a function from pictures to
    scores.

    Raises ValueError for a method that is none of `METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")
    if method == "before":
        return load_policy(config["policy"])
    if method in SCORERS:
        return SCORERS[method]
    frame, seed = training_frame(config, rows, pool), config["grpo"]["seed"]
    if method == "rl":
        return load_policy(train(config, output, resume=True, frame=frame))
    policy, images = load_policy(config["policy"]), render_rows(frame, workers=1)
    if method == "supervised":
        return supervised(policy, frame, images, steps=150, seed=seed, adapter=lora_config(**config["lora"]))
    return NETWORKS[method](policy, frame, images, seed=seed)


def run(
    plan: Study, variant: str, seed: int, output: Path, steps: int | None = None
) -> dict[str, pd.DataFrame]:
    """Make one row of a study: train, score the test rows, and return {"rows", "scores", "log"}.

    steps: fewer than the configuration's, for a quick look.
    """
    line = plan.variants[variant]
    config = changed(load_config(plan.config), line.change, seed)
    if steps:
        config["grpo"] |= {"max_steps": steps}
    check_config(config, f"variant {variant}")
    start = time.process_time()
    learned = _learned(
        line.method, config, line.change.get("rows"), output, POOL if plan.config == "cpu-study" else None
    )
    seconds = time.process_time() - start if line.method not in ("before", *SCORERS) else np.nan
    sets = _test_rows(tuple(plan.sets.items()))
    if isinstance(learned, tuple):
        tables = evaluate(learned, sets, modes=(config["thinking"],))[1]
    else:
        tables = {
            (name, "score", False): own.frame.assign(score=learned(own.images), reasoning="")
            for name, own in sets.items()
        }
    name = {"variant": variant, "seed": seed}
    rows = [
        name | {"set": key[0], "estimate": key[1], "seconds": seconds} | agreement(table) | _words(table)
        for key, table in tables.items()
    ]
    scores = pd.concat(
        [table.assign(set=key[0])[[*ROW, "score"]] for key, table in tables.items()], ignore_index=True
    )
    return {"rows": pd.DataFrame(rows), "scores": scores, "log": _log(config, output / "log.csv", name)}


def _words(table: pd.DataFrame) -> dict:
    return naming(table) if table["reasoning"].ne("").any() else {}


def _log(config: dict, path: Path, name: dict) -> pd.DataFrame:
    """Return a run's log with the number of answers sampled so far, or nothing for what is no RL."""
    if not path.is_file():
        return pd.DataFrame()
    args = grpo_config(config, path.parent)
    per_step = (
        images_per_step(args)
        * args.num_generations
        * args.gradient_accumulation_steps
        // args.steps_per_generation
    )
    return pd.read_csv(path, comment="#").assign(**name, rollouts=lambda log: log["step"] * per_step)


def study(
    name: str,
    seeds: list[int] | None = None,
    output: str | Path = "runs/study",
    csv: str | Path | None = None,
    variants: list[str] | None = None,
    steps: int | None = None,
    processes: int = 2,
) -> pd.DataFrame:
    """Make what is missing of a study's rows, `processes` runs at a time, and return all of them.

    seeds, variants: only these, default all of the study's. csv: where the rows are kept, default
    data/runs/NAME.csv of the project. A row is written as soon as it is made; stopped, the same command
    goes on. Raises ValueError for a study, variant or seed that there is not, and for `steps` without a
    `csv`: short runs are no rows of the study.
    """
    plan = _plan(name)
    _check_wanted(name, plan, variants, seeds)
    if steps and not csv:
        raise ValueError(
            f"runs of {steps} steps are no rows of study {name}; give them a table of their own, by --csv"
        )
    csv = Path(csv or EMBEDDED / "runs" / f"{name}.csv")
    made = read_study(csv)
    done = set(zip(made["variant"], made["seed"]))
    todo = [
        (variant, seed)
        for seed in _seeds(plan)
        for variant, line in plan.variants.items()
        if seed < line.seeds
        and (not variants or variant in variants)
        and (seeds is None or seed in seeds)
        and (variant, seed) not in done
    ]
    print(
        f"{len(todo)} of {sum(line.seeds for line in plan.variants.values())} runs to make, about {len(todo) * plan.minutes / processes / 60:.1f} hours",
        flush=True,
    )
    if not todo:
        return made
    with ProcessPoolExecutor(
        min(processes, len(todo)), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:  # a process for every core
        jobs = {
            pool.submit(run, plan, variant, seed, _folder(Path(output), name, variant, seed), steps): (
                variant,
                seed,
            )
            for variant, seed in todo
        }
        for job in as_completed(jobs):
            made = _keep(csv, jobs[job], job.result(), made)
            last = made[(made["variant"] == jobs[job][0]) & (made["seed"] == jobs[job][1])]
            print(
                f"{jobs[job][0]}, seed {jobs[job][1]}: "
                + ", ".join(f"{row.set} {row.srcc:.3f}" for row in last.itertuples()),
                flush=True,
            )
    write_differences(csv, plan)
    return made


def _plan(name: str) -> Study:
    if name not in STUDIES:
        raise ValueError(f"study {name!r} is unknown; use one of {', '.join(STUDIES)}")
    return STUDIES[name]


def _seeds(plan: Study) -> range:
    return range(max(line.seeds for line in plan.variants.values()))


def _check_wanted(name: str, plan: Study, variants: list[str] | None, seeds: list[int] | None) -> None:
    for what, given, there in (
        ("variant", variants, list(plan.variants)),
        ("seed", seeds, list(_seeds(plan))),
    ):
        for value in given or ():
            if value not in there:
                raise ValueError(f"study {name} has no {what} {value!r}; it has {', '.join(map(str, there))}")


def _folder(output: Path, study: str, variant: str, seed: int) -> Path:
    return output / study / f"{variant.replace(' ', '_').replace(',', '')}-{seed}"


def read_study(csv: str | Path) -> pd.DataFrame:
    """Return a study's rows, or none."""
    return pd.read_csv(csv, comment="#") if Path(csv).is_file() else pd.DataFrame(columns=COLUMNS)


def _keep(csv: Path, which: tuple[str, int], found: dict, made: pd.DataFrame) -> pd.DataFrame:
    """Add a run to the study's three files; the rows come last, so that what they say is there."""
    csv.parent.mkdir(parents=True, exist_ok=True)
    scores, column = csv.with_name(f"{csv.stem}-scores.csv.gz"), "{}/{}".format(*which)
    known = pd.read_csv(scores, comment="#") if scores.is_file() else found["scores"][ROW]
    _write(scores, known.assign(**{column: found["scores"]["score"].round(3)}), "%.10g", which[1])
    if len(found["log"]):
        log = csv.with_name(f"{csv.stem}-log.csv")
        known = pd.read_csv(log, comment="#") if log.is_file() else pd.DataFrame()
        _write(log, pd.concat([known, found["log"]], ignore_index=True), "%.5g", which[1])
    rows = found["rows"].assign(study=csv.stem)
    made = (pd.concat([made, rows], ignore_index=True) if len(made) else rows).reindex(columns=COLUMNS)
    _write(csv, made, "%.4f", ", ".join(map(str, sorted(set(made["seed"])))))
    return made


def _write(csv: Path, table: pd.DataFrame, numbers: str, seeds: int | str) -> None:
    partial = csv.with_suffix(".tmp")
    content = f"# {machine_line(seeds)}\n{table.to_csv(index=False, float_format=numbers)}".encode()
    partial.write_bytes(gzip.compress(content, mtime=0) if csv.suffix == ".gz" else content)
    partial.replace(csv)


def write_differences(csv: Path, plan: Study) -> None:
    """Write NAME-differences.csv: of every variant and the one that all are compared with, in SRCC and
    within-level SRCC, for each rated set and their mean SRCC.
    """
    made = set(read_study(csv)["variant"])
    variants = [name for name in plan.variants if name in made and name != plan.than]
    if not variants or plan.than not in made:
        return
    wanted = [
        (name, *kind)
        for name in plan.sets
        if name not in UNRATED
        for kind in (("srcc", frame_srcc), ("srcc_within_level", frame_within_level_srcc))
    ]
    tables = [
        compared(csv, [(name, plan.than) for name in variants], name_of_set, statistic).assign(
            set=name_of_set, statistic=label
        )
        for name_of_set, label, statistic in [*wanted, ("mean", "srcc", over_sets)]
    ]
    _write(csv.with_name(f"{csv.stem}-differences.csv"), pd.concat(tables), "%.4f", "see the column seeds")


def compared(
    csv: str | Path, pairs: list[tuple[str, str]], set_name: str, statistic: Statistic = frame_srcc
) -> pd.DataFrame:
    """Return for each pair of variants the mean of both over their seeds, and their difference with its 95%
    interval.

    set_name: "mean" for the rows of all sets and a statistic that keeps them apart (`metrics.over_sets`).
    Columns: variant, than, seeds, and those of `seed_difference`: over the same photographs, and over the
    seeds that both have. A variant of one run (before, BRISQUE) is paired with every seed of the other.
    """
    table = pd.read_csv(Path(csv).with_name(f"{Path(csv).stem}-scores.csv.gz"), comment="#")
    table = table[(table["set"] == set_name) | (set_name == "mean")].reset_index(drop=True)
    rows = []
    for one, two in pairs:
        a, b = (_columns(table, variant) for variant in (one, two))
        seeds = sorted(set(a) & set(b)) if len(a) > 1 and len(b) > 1 else sorted(a if len(a) > 1 else b)
        columns = [[side.get(seed, next(iter(side.values()))) for seed in seeds] for side in (a, b)]
        needed = table[list(dict.fromkeys([*ROW, *columns[0], *columns[1]]))]
        rows.append(
            {"variant": one, "than": two, "seeds": len(seeds)}
            | seed_difference(needed, *columns, statistic, n=RESAMPLES)
        )
    return pd.DataFrame(rows)


def _columns(table: pd.DataFrame, variant: str) -> dict[int, str]:
    """Return the columns of a variant's scores by seed; ValueError where there are none."""
    found = {int(name.rsplit("/", 1)[1]): name for name in table if name.startswith(f"{variant}/")}
    if not found:
        raise ValueError(
            f"no scores of variant {variant!r}; make them: vqr1 study NAME --variants {variant!r}"
        )
    return found
