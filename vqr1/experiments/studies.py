"""Run the studies behind the claims: one row per variant, seed and set, made once, kept in data/runs/.

A study NAME, made in several processes, has up to five files:
    NAME.csv: the results.
    NAME-scores.csv.gz: every test row's score, a column per variant and seed.
    NAME-pairs.csv.gz: what people said of pairs of test rows, where they were asked. It is not committed:
        these are the set's own labels. Every new run writes it again.
    NAME-differences.csv: of variants, paired over photographs and seeds.
    NAME-log.csv: reward and validation during training.
Seeds vary the RL stage. The embedded policy is one pretraining seed; the study `pretraining` uses another.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vqr1.config import Settings, load_config, merged
from vqr1.data.batches import realigned
from vqr1.data.comparisons import PairTable, names_of
from vqr1.data.manifests import EMBEDDED, EXTRA, NAME, pictures_of
from vqr1.evaluation import Rows, agreement, evaluate, evaluation_rows, naming
from vqr1.experiments.baselines import (
    brisque,
    file_size,
    piqe,
    score_cnn,
    score_head,
    supervised,
    tower_features,
    train_cnn,
    train_head,
)
from vqr1.experiments.probes import ridge_scores
from vqr1.experiments.study_plans import STUDIES, Study
from vqr1.metrics import Statistic, difference, srcc, srcc_by
from vqr1.policy import load_policy
from vqr1.records import read_table, write_table
from vqr1.training import adapter_of, grpo_config, images_per_step, set_rows, train

STUDY_COLUMNS = [
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
"""Of a study's CSV. seconds: the process's CPU time in training; family to texts: `evaluation.naming`.

Sets with comparisons or subsets bring pairs_right, or srcc_SUBSET, on top.
"""
ROW = ["set", "reference", "distortion", "level", "mos"]
"""What names a test row in NAME-scores.csv.gz; a set's subset, and what comparisons call it, come on top."""
UNASKED = ", not thinking"
"""Ends the name of a variant whose policy learned with one prompt and is scored with the other."""
POOL = 480
"""Training rows of a short run: a fixed sample, the same for all variants and seeds."""
RESAMPLES = 300
"""Of photographs and seeds, for a difference's interval; few, as there are many differences."""


def changed(config: Settings, change: dict, seed: int, source: str = "study") -> Settings:
    """Return a configuration with a variant's changes and a seed.

    Args:
        config: the study's.
        change: settings, those of a section key by key; `rows` is no setting.
        seed: of the run.
        source: what an error's text starts with.
    """
    settings = {key: value for key, value in change.items() if key != "rows"}
    return config.changed(source, **merged(settings, {"grpo": {"seed": seed}}))


@cache
def _test_rows(sets: tuple) -> dict[str, Rows]:
    """Return the test rows with their pictures, once per process: at most so many of each (set, rows)."""
    return {name: evaluation_rows([name], limit=limit)[name] for name, limit in sets}


def training_frame(config: Settings, kind: str | None = None, pool: int | None = POOL) -> pd.DataFrame:
    """Return the rows that a variant is trained on: at most `pool`, evenly by set, a fixed sample; None: all.

    kind: of `ROWS`. Raises ValueError for another.
    """
    if kind not in ROWS:
        raise ValueError(f"rows {kind!r} are unknown; use one of {', '.join(map(str, ROWS))}")
    rows = set_rows(config.sets, config.root, "train")
    if pool:
        each = pool // len(config.sets)
        rows = pd.concat(
            [group.sample(min(len(group), each), random_state=0) for _, group in rows.groupby("dataset")],
            ignore_index=True,
        )
    return ROWS[kind](rows, config.grpo["seed"])


def _permuted(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Deal the MOS of each subset, or of each photograph's rows, anew: only their means are left to learn."""
    deal, by = np.random.default_rng(seed).permutation, "subset" if "subset" in rows else "reference"
    return rows.assign(mos=rows.groupby(by)["mos"].transform(deal))


ROWS = {
    None: lambda rows, seed: rows,
    "permuted": _permuted,
    "realigned": lambda rows, seed: realigned(rows),
    "across": lambda rows, seed: rows.assign(dataset="all"),
}
"""What a variant may do to its training rows. realigned: each set stretched to 1..5; across: all sets get
one name, so that their raw MOS are compared."""


def _rl(config: Settings, frame: pd.DataFrame, output: Path) -> tuple:
    return load_policy(train(config, output, resume=True, frame=frame))


def _steps(frame: pd.DataFrame, least: int, batch: int = 16) -> int:
    """Return how many batches show every row at least once, and no fewer than `least`."""
    return max(least, math.ceil(len(frame) / batch))


def _supervised(config: Settings, frame: pd.DataFrame, output: Path) -> tuple:
    policy, images = load_policy(config.model_name_or_path), pictures_of(frame)
    steps, adapter = _steps(frame, 150), adapter_of(config)
    return supervised(policy, frame, images, steps=steps, seed=config.grpo["seed"], adapter=adapter)


def _cnn(config: Settings, frame: pd.DataFrame, output: Path, ranker: bool) -> Callable:
    steps, seed = _steps(frame, 120), config.grpo["seed"]
    return partial(score_cnn, train_cnn(frame, pictures_of(frame), ranker=ranker, steps=steps, seed=seed))


def _tower(config: Settings, frame: pd.DataFrame, output: Path, ranker: bool) -> Callable:
    policy, images = load_policy(config.model_name_or_path), pictures_of(frame)
    head = train_head(policy, frame, images, ranker=ranker, steps=300, seed=config.grpo["seed"])
    return partial(score_head, policy, head)


def _ridge(config: Settings, frame: pd.DataFrame, output: Path) -> Callable:
    """Return what scores by a ridge on the policy's frozen vision tower; the rows are in random order."""
    policy, mos = load_policy(config.model_name_or_path), frame["mos"].to_numpy()
    seen = tower_features(policy, pictures_of(frame)).numpy()
    return lambda images: ridge_scores(seen, mos, tower_features(policy, images).numpy())


UNTRAINED = {
    "before": lambda config: load_policy(config.model_name_or_path),
    "file size": lambda config: file_size,
    "brisque": lambda config: brisque,
    "piqe": lambda config: piqe,
}
"""Method -> function from configuration to what scores untrained: a policy, or pictures -> scores."""
TRAINED = {
    "rl": _rl,
    "supervised": _supervised,
    "cnn regressor": partial(_cnn, ranker=False),
    "cnn ranker": partial(_cnn, ranker=True),
    "tower regressor": partial(_tower, ranker=False),
    "tower ranker": partial(_tower, ranker=True),
    "tower ridge": _ridge,
}
"""Method -> function from configuration, rows and folder to what scores after training: the same kinds."""
METHODS = (*UNTRAINED, *TRAINED)


def run(
    plan: Study, variant: str, seed: int, output: Path, steps: int | None = None
) -> dict[str, pd.DataFrame]:
    """Make one row of a study: train, and score the test rows.

    Args:
        plan: the study.
        variant: name of its line.
        seed: of the run.
        output: folder of the training run.
        steps: fewer than the configuration's, for a quick look.

    Returns:
        rows, one for each set; scores of every test row; pairs that people compared, empty where they did
        not; log of the training, empty without RL.

    Raises:
        ValueError: the variant's method, or a key of its changes, is unknown.
    """
    line = plan.variants[variant]
    if line.method not in METHODS:
        raise ValueError(f"method {line.method!r} is unknown; use one of {', '.join(METHODS)}")
    config = changed(load_config(plan.config), line.change, seed, f"variant {variant}")
    if steps:
        config = config.changed(grpo={"max_steps": steps})
    start, seconds = time.process_time(), np.nan
    if line.method in UNTRAINED:
        learned = UNTRAINED[line.method](config)
    else:
        pool = plan.pool or (POOL if plan.config == "cpu-study" else None)
        frame = training_frame(config, line.change.get("rows"), pool)
        if plan.drawn and line.method != "rl":
            frame = frame.sample(_shown(config, output), random_state=seed, ignore_index=True)
        learned = TRAINED[line.method](config, frame, output)
        seconds = time.process_time() - start
    sets = _test_rows(tuple(plan.sets.items()))
    if not callable(learned):
        modes = (True, False) if variant in plan.both_prompts else (config.thinking,)
        tables = evaluate(learned, sets, modes=modes)[1]
    else:
        tables = {
            (name, "score", False): own.frame.assign(score=learned(own.images), reasoning="")
            for name, own in sets.items()
        }
    rows, scores = [], []
    for (name, estimate, thinking), table in tables.items():
        own = variant if thinking == config.thinking or callable(learned) else f"{variant}{UNASKED}"
        row = {"variant": own, "seed": seed, "set": name, "estimate": estimate, "seconds": seconds}
        rows.append(row | agreement(table, sets[name].pairs) | _words(table))
        named = table.assign(set=name, own=f"{own}/{seed}")
        extra = [column for column in EXTRA if column in table]
        if sets[name].pairs is not None:
            named, extra = named.assign(**{NAME: names_of(table)}), [*extra, NAME]
        scores.append(named[[*ROW, *extra, "own", "score"]])
    pairs = [own.pairs.assign(set=name) for name, own in sets.items() if own.pairs is not None]
    return {
        "rows": pd.DataFrame(rows),
        "scores": pd.concat(scores, ignore_index=True),
        "pairs": pd.concat(pairs, ignore_index=True) if pairs else pd.DataFrame(),
        "log": _log(config, output / "log.csv", {"variant": variant, "seed": seed}),
    }


def _shown(config: Settings, output: Path) -> int:
    """Return how many rows RL is shown."""
    args = grpo_config(config.grpo, output)
    return images_per_step(args) * args.max_steps


def _words(table: pd.DataFrame) -> dict:
    return naming(table) if table["reasoning"].ne("").any() else {}


def _log(config: Settings, path: Path, name: dict) -> pd.DataFrame:
    """Return a run's log with the number of answers sampled so far, or nothing without RL."""
    if not path.is_file():
        return pd.DataFrame()
    args = grpo_config(config.grpo, path.parent)
    per_step = (
        images_per_step(args)
        * args.num_generations
        * args.gradient_accumulation_steps
        // args.steps_per_generation
    )
    return read_table(path).assign(**name, rollouts=lambda log: log["step"] * per_step)


def study(
    name: str,
    seeds: list[int] | None = None,
    output: str | Path = "runs/study",
    csv: str | Path | None = None,
    variants: list[str] | None = None,
    steps: int | None = None,
    processes: int = 2,
) -> pd.DataFrame:
    """Make a study's missing rows, and return all rows.

    A row is written as soon as it is made; after a stop, the same command goes on.

    Args:
        name: of the study.
        seeds: only these, default all of the study's.
        output: folder of the training runs.
        csv: where the rows are kept, default data/runs/NAME.csv of the project.
        variants: only these, default all of the study's.
        steps: fewer than the configuration's; needs a `csv`, because short runs are no rows of the study.
        processes: runs at a time.

    Raises:
        ValueError: there is no such study, variant or seed, or `steps` has no `csv`.
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
    runs, hours = (
        sum(line.seeds for line in plan.variants.values()),
        len(todo) * plan.minutes / processes / 60,
    )
    print(f"{len(todo)} of {runs} runs to make, about {hours:.1f} hours", flush=True)
    if not todo:
        return made
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(todo)), spawn, torch.set_num_threads, (1,)) as pool:
        jobs = {}
        for variant, seed in todo:
            folder = _folder(Path(output), name, variant, seed)
            jobs[pool.submit(run, plan, variant, seed, folder, steps)] = variant, seed
        for job in as_completed(jobs):
            variant, seed = jobs[job]
            made = _keep(csv, jobs[job], job.result())
            last = job.result()["rows"]
            found = ", ".join(f"{row.set} {row.srcc:.3f}" for row in last.itertuples())
            print(f"{variant}, seed {seed}: {found}", flush=True)
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
    return read_table(csv, columns=STUDY_COLUMNS)


def _keep(csv: Path, which: tuple[str, int], found: dict) -> pd.DataFrame:
    """Add a run to the study's files, and return all rows; these come last, when the rest is there.

    The files are read again, as another command may have added to them meanwhile.
    """
    variant, seed = which
    path = _beside(csv, "scores.csv.gz")
    columns = dict(list(found["scores"].groupby("own", sort=False)))
    first = next(iter(columns.values()))
    scores = read_table(path) if path.is_file() else first.drop(columns=["own", "score"])
    scores = scores.assign(**{own: table["score"].round(5).to_numpy() for own, table in columns.items()})
    write_table(path, scores, seed, "%.10g")
    if len(found["pairs"]):
        write_table(_beside(csv, "pairs.csv.gz"), found["pairs"], seed, "%.10g")
    if len(found["log"]):
        path = _beside(csv, "log.csv")
        logs = [read_table(path)] if path.is_file() else []
        write_table(path, pd.concat([*logs, found["log"]], ignore_index=True), seed, "%.5g")
    rows, made = found["rows"].assign(study=csv.stem), read_study(csv)
    made = pd.concat([made, rows], ignore_index=True) if len(made) else rows
    some = [name for name in made if name == "pairs_right" or name.startswith("srcc_ss")]
    made = made.reindex(columns=[*STUDY_COLUMNS, *some])
    write_table(csv, made, ", ".join(map(str, sorted(set(made["seed"])))))
    return made


def write_differences(csv: Path, plan: Study) -> None:
    """Write NAME-differences.csv: every variant minus the baseline, and the study's further pairs.

    Differences on each set, in what it allows, and of the rated sets' mean SRCC.
    """
    made = set(read_study(csv)["variant"])
    both = [name for own in plan.variants for name in (own, f"{own}{UNASKED}")]
    variants = [name for name in both if name in made and name != plan.baseline]
    if not variants or plan.baseline not in made:
        return
    pairs = [(name, plan.baseline) for name in variants]
    pairs += [couple for couple in plan.also if made.issuperset(couple)]
    scores, said = _scores(csv), read_table(_beside(csv, "pairs.csv.gz"), columns=["set"])
    wanted = [
        (name, *kind)
        for name in plan.sets
        for kind in _statistics(name, *(table[table["set"] == name] for table in (scores, said)))
    ]
    tables = [
        compared(csv, pairs, name, statistic, columns).assign(set=name, statistic=label)
        for name, label, statistic, columns in [*wanted, ("mean", "srcc", srcc_by, ["mos", "set"])]
    ]
    write_table(_beside(csv, "differences.csv"), pd.concat(tables), "see the column seeds")


def _statistics(name: str, scores: pd.DataFrame, pairs: pd.DataFrame) -> list[tuple]:
    """Return what variants differ in on a set: (label, statistic, what it takes after the scores).

    SRCC with people's or simulated ratings, its mean within subsets, or else within levels, and the share
    of people's pairs that are in order; each where the set's scores and pairs allow it.
    """
    there = scores.columns[scores.notna().any()]
    kinds = []
    if "mos" in there:
        within = [column for column in ("subset", "level") if column in there][:1]
        kinds = [("srcc", srcc, ["mos"])]
        kinds += [(f"srcc_within_{column}", srcc_by, ["mos", column]) for column in within]
    if len(pairs):
        kinds.append(("pairs_right", PairTable(pairs, name).right, [NAME]))
    return kinds


def compared(
    csv: str | Path,
    pairs: list[tuple[str, str]],
    set_name: str,
    statistic: Statistic = srcc,
    columns: Sequence[str] = ("mos",),
) -> pd.DataFrame:
    """Return how far variants are above their baselines, with 95% intervals over photographs and seeds.

    A variant of one run (before, BRISQUE) is paired with every seed of the other.

    Args:
        csv: of the study, with NAME-scores.csv.gz beside it.
        pairs: (variant, baseline).
        set_name: "mean" for the rows of all sets, with `srcc_by` and the columns mos and set.
        statistic: as for `metrics.difference`.
        columns: what the statistic takes after the scores.

    Returns:
        One row per pair: variant, baseline, seeds (how many), and what `metrics.difference` gives.

    Raises:
        ValueError: there are no scores of a variant.
    """
    table = _scores(csv)
    table = table[(table["set"] == set_name) | (set_name == "mean")].reset_index(drop=True)
    rows = []
    for one, two in pairs:
        a, b = (_columns(table, variant) for variant in (one, two))
        seeds = sorted(set(a) & set(b)) if len(a) > 1 and len(b) > 1 else sorted(a if len(a) > 1 else b)
        runs = [[side.get(seed, next(iter(side.values()))) for seed in seeds] for side in (a, b)]
        found = difference(table, *runs, statistic, columns, n=RESAMPLES)
        rows.append({"variant": one, "baseline": two, "seeds": len(seeds)} | found)
    return pd.DataFrame(rows)


def _scores(csv: str | Path) -> pd.DataFrame:
    return read_table(_beside(csv, "scores.csv.gz"))


def _beside(csv: str | Path, end: str) -> Path:
    """Return another file of the study whose rows are in ``csv``."""
    return Path(csv).with_name(f"{Path(csv).stem}-{end}")


def _columns(table: pd.DataFrame, variant: str) -> dict[int, str]:
    """Return the columns of a variant's scores by seed; ValueError where there are none."""
    found = {int(name.rsplit("/", 1)[1]): name for name in table if name.startswith(f"{variant}/")}
    if not found:
        raise ValueError(
            f"no scores of variant {variant!r}; make them: vqr1 study NAME --variants {variant!r}"
        )
    return found
