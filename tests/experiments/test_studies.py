"""Study grids are as stated; runs are made once, kept, and compared over photographs and seeds."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from vqr1.config import load_config
from vqr1.data.manifests import EMBEDDED
from vqr1.experiments import studies
from vqr1.experiments.studies import (
    POOL,
    ROW,
    STUDY_COLUMNS,
    changed,
    compared,
    read_study,
    study,
    training_frame,
    write_differences,
)
from vqr1.experiments.study_plans import STUDIES, Study, Variant
from vqr1.metrics import difference, srcc
from vqr1.records import read_table
from vqr1.rewards import reward_functions
from vqr1.training import adapter_of, grpo_config, images_per_step

GRID = [
    (name, variant)
    for name, plan in STUDIES.items()
    for variant, line in plan.variants.items()
    if line.method == "rl"
]


def config_of(name, variant, seed=3):
    plan = STUDIES[name]
    return changed(load_config(plan.config), plan.variants[variant].change, seed)


def rollouts(config, folder):
    """Count the answers sampled in the run."""
    args = grpo_config(config.grpo, folder)
    passes = args.max_steps * args.gradient_accumulation_steps // args.steps_per_generation
    return images_per_step(args) * args.num_generations * passes


# --- the grids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, variant", GRID, ids=" ".join)
def test_trl_takes_every_variant(name, variant, tmp_path):
    config = config_of(name, variant)
    args = grpo_config(config.grpo, tmp_path)
    assert args.seed == 3 and images_per_step(args) >= 2
    rewards = reward_functions(config.reward, args.num_generations, config.thinking, config.reward_options)
    assert len(rewards) == (1 if config.reward == "format" else 2)


def test_every_variant_differs_from_its_study_in_what_it_says_and_nothing_else():
    for name, plan in STUDIES.items():
        before = vars(load_config(plan.config))
        for variant, line in plan.variants.items():
            after = vars(config_of(name, variant))
            said = {"grpo": {}} | {key: value for key, value in line.change.items() if key != "rows"}
            said["grpo"] = said["grpo"] | {"seed": 3}
            differing = {key for key in before if before[key] != after[key]}
            assert differing <= set(said), f"{name}, {variant}"
            for key, value in said.items():
                expected = before[key] | value if isinstance(value, dict) else value
                assert after[key] == expected, f"{name}, {variant}, {key}"
            assert adapter_of(config_of(name, variant)).r == 16, f"{name}, {variant}"


@pytest.mark.parametrize(
    "variant",
    [
        "threshold",
        "binary",
        "average",
        "variance one",
        "B = 4, 4 a step",
        "B = 8, 2 a step",
        "KL 0.04",
        "not scaled",
        "B = 32, half the steps",
        "B = 32, K = 3",
        "B = 8, K = 12",
        "learning rate x 2",
    ],
)
def test_what_is_compared_at_equal_cost_samples_equally_many_answers(variant, tmp_path):
    assert (
        rollouts(config_of("comparison", variant), tmp_path)
        == rollouts(config_of("comparison", "ranking"), tmp_path)
        == 20 * 96
    )


def test_a_change_leaves_the_rest_alone():
    before = load_config("cpu-study")
    after = changed(
        before,
        {
            "reward": "threshold",
            "rows": "realigned",
            "grpo": {"beta": 0.1},
            "reward_options": {"binary": True},
        },
        seed=7,
    )
    assert after.grpo == before.grpo | {"beta": 0.1, "seed": 7}
    assert after.reward_options == {"bounded": True, "binary": True}, (
        "else it would differ from its control in two things"
    )
    assert {key for key, value in vars(after).items() if value != getattr(before, key)} == {
        "reward",
        "grpo",
        "reward_options",
    }


# --- training rows ------------------------------------------------------------------------------


def test_all_variants_and_seeds_are_trained_on_the_same_rows():
    one, two = (
        training_frame(config_of("comparison", variant, seed))
        for variant, seed in (("ranking", 0), ("threshold", 4))
    )
    pd.testing.assert_frame_equal(one, two)
    assert len(one) == POOL and set(one["split"]) == {"train"}


def test_permuted_mos_stay_within_their_photograph():
    plain, dealt = (training_frame(config_of("controls", "permuted"), kind) for kind in (None, "permuted"))
    for name, rows in plain.groupby("reference"):
        assert sorted(rows["mos"]) == sorted(dealt.loc[rows.index, "mos"]), name
    assert abs(srcc(plain["mos"], dealt["mos"])) < 0.3
    pd.testing.assert_frame_equal(plain.drop(columns="mos"), dealt.drop(columns="mos"))


def test_a_mistyped_control_is_named():
    with pytest.raises(
        ValueError, match="rows 'permutted' are unknown; use one of None, permuted, realigned, across"
    ):
        training_frame(config_of("controls", "permuted"), "permutted")


@pytest.mark.parametrize("method", ["tower rankr", "cn ranker", "RL"])
def test_a_mistyped_method_is_named(method, tmp_path):
    with pytest.raises(
        ValueError,
        match=f"method '{method}' is unknown; use one of before, brisque, piqe, rl, supervised, cnn",
    ):
        studies.run(replace(SMALL, variants={"x": Variant(1, method=method)}), "x", 0, tmp_path)


def test_a_mistyped_change_is_named(tmp_path):
    with pytest.raises(ValueError, match="variant x: key 'rewrad' is unknown"):
        studies.run(replace(SMALL, variants={"x": Variant(1, {"rewrad": "format"})}), "x", 0, tmp_path)


def test_across_compares_raw_mos_of_all_sets_and_realigned_stretches_each():
    raw, across, stretched = (
        training_frame(config_of("mixture", "mixture"), kind) for kind in (None, "across", "realigned")
    )
    assert (
        raw["dataset"].nunique() == 3
        and set(across["dataset"]) == {"all"}
        and list(across["mos"]) == list(raw["mos"])
    )
    assert stretched.groupby("dataset")["mos"].agg(["min", "max"]).to_numpy() == pytest.approx(
        np.array([[1, 5]] * 3)
    )


# --- runs ---------------------------------------------------------------------------------------

SMALL = Study(
    "cpu-study",
    {"sim-kadid": 24},
    "PIQE",
    {
        "PIQE": Variant(1, method="piqe"),
        "tower ranker": Variant(2, method="tower ranker"),
        "format": Variant(1, {"reward": "format"}),
    },
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDIES, "small", SMALL)
        study("small", output=folder / "runs", csv=folder / "small.csv", steps=1)
    return folder


@pytest.mark.slow
def test_a_study_keeps_a_row_for_every_run_and_set(made):
    rows = read_study(made / "small.csv")
    assert list(rows) == STUDY_COLUMNS and set(rows["study"]) == {"small"}
    assert sorted(zip(rows["variant"], rows["seed"])) == [
        ("PIQE", 0),
        ("format", 0),
        ("tower ranker", 0),
        ("tower ranker", 1),
    ]
    assert (rows["rows"] == 24).all() and rows["srcc"].between(-1, 1).all()
    trained = rows.set_index("variant")
    assert (
        trained.loc["format", "family"] > 0
        and np.isnan(trained.loc["PIQE", "family"])
        and np.isnan(trained.loc["PIQE", "seconds"])
    )
    assert (made / "small.csv").read_text().startswith("# ")


@pytest.mark.slow
def test_the_scores_are_those_that_the_rows_are_made_of(made):
    rows, scores = read_study(made / "small.csv"), read_table(made / "small-scores.csv.gz")
    assert list(scores)[: len(ROW)] == ROW and len(scores) == 24
    for row in rows.itertuples():
        assert srcc(scores[f"{row.variant}/{row.seed}"], scores["mos"]) == pytest.approx(
            row.srcc, abs=0.02
        ), row.variant
    assert not np.allclose(scores["tower ranker/0"], scores["tower ranker/1"])
    log = read_table(made / "small-log.csv")
    assert set(log["variant"]) == {"format"} and log["rollouts"].max() == 96


@pytest.mark.slow
def test_runs_that_are_there_are_not_made_again(made, capsys, monkeypatch):
    monkeypatch.setitem(STUDIES, "small", SMALL)
    monkeypatch.setattr(studies, "ProcessPoolExecutor", lambda *args: pytest.fail("a run began"))
    before = (made / "small.csv").read_bytes()
    assert len(study("small", output=made / "runs", csv=made / "small.csv")) == 4
    assert "0 of 4 runs to make" in capsys.readouterr().out and (made / "small.csv").read_bytes() == before


def test_a_run_leaves_the_threads_of_its_caller_as_they_were(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        studies.run(SMALL, "PIQE", 0, tmp_path)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_study_is_made_on_one_thread_a_process_and_for_all_its_seeds(tmp_path, monkeypatch, capsys):
    """Eight seeds make eight runs; the table is the project's, whatever the current folder."""
    pools = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, context, initializer, arguments):
            pools.append((workers, initializer, arguments))
            super().__init__(1)

    asked = []
    monkeypatch.setitem(STUDIES, "eight", replace(SMALL, variants={"PIQE": Variant(8, method="piqe")}))
    monkeypatch.setattr(studies, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(studies, "run", lambda plan, variant, seed, *rest: asked.append(seed))
    monkeypatch.setattr(studies, "_keep", lambda csv, which, found, made: asked.append(csv) or made)
    monkeypatch.chdir(tmp_path)
    study("eight", output=tmp_path)
    assert {value for value in asked if isinstance(value, int)} == set(range(8))
    assert {value for value in asked if not isinstance(value, int)} == {EMBEDDED / "runs" / "eight.csv"}
    assert pools == [(2, torch.set_num_threads, (1,))] and "8 of 8 runs to make" in capsys.readouterr().out


@pytest.mark.slow
def test_differences_are_paired_with_the_one_run_of_a_variant_without_seeds(made):
    table = read_table(made / "small-differences.csv").set_index(["set", "variant", "statistic"])
    assert (table.xs("tower ranker", level="variant")["seeds"] == 2).all() and set(table["baseline"]) == {
        "PIQE"
    }
    row = table.loc["sim-kadid", "tower ranker", "srcc"]
    assert table.loc["mean", "tower ranker", "srcc"]["difference"] == row["difference"]  # there is one set
    assert (
        row["difference"] == pytest.approx(row["mean"] - row["mean_baseline"], abs=2e-4)
        and row["lo"] <= row["difference"] <= row["hi"]
    )


def test_an_unknown_study_or_variant_is_named():
    with pytest.raises(ValueError, match="study 'demos' is unknown; use one of demo, controls"):
        study("demos")
    with pytest.raises(ValueError, match="study demo has no variant 'rank'; it has before, ranking"):
        study("demo", variants=["rank"])
    with pytest.raises(ValueError, match="study demo has no seed 3; it has 0, 1, 2"):
        study("demo", seeds=[3])
    with pytest.raises(
        ValueError, match="runs of 5 steps are no rows of study demo; give them a table of their own"
    ):
        study("demo", steps=5)


@pytest.mark.slow
def test_scores_that_are_not_there_are_asked_for(made):
    with pytest.raises(ValueError, match="no scores of variant 'ranking'"):
        compared(made / "small.csv", [("PIQE", "ranking")], "sim-kadid")


# --- differences over photographs and seeds -----------------------------------------------------


def scored(seeds=3, noise=1.0, gain=0.0, photographs=8, each=12):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"reference": np.repeat(np.arange(photographs), each), "mos": rng.normal(size=photographs * each)}
    )
    for seed in range(seeds):
        frame[f"a/{seed}"] = frame["mos"] * (1 + gain) + rng.normal(size=len(frame)) * noise
        frame[f"b/{seed}"] = frame["mos"] + rng.normal(size=len(frame)) * noise
    return frame


def test_a_difference_that_is_there_is_found_and_none_is_not():
    better = difference(scored(gain=3.0), ["a/0", "a/1", "a/2"], ["b/0", "b/1", "b/2"], n=200)
    same = difference(scored(), ["a/0", "a/1", "a/2"], ["b/0", "b/1", "b/2"], n=200)
    assert better["lo"] > 0.1 and same["lo"] < 0 < same["hi"]


def test_seeds_that_disagree_widen_the_interval():
    frame = scored(seeds=2, noise=0.5)
    frame["b/1"], frame["a/1"] = frame["b/0"], -frame["a/0"]  # one of two seeds went wrong
    agree = difference(frame, ["a/0", "a/0"], ["b/0", "b/1"], n=200)
    differ = difference(frame, ["a/0", "a/1"], ["b/0", "b/1"], n=200)
    assert differ["hi"] - differ["lo"] > 3 * (agree["hi"] - agree["lo"])


def test_a_run_without_scores_leaves_no_interval():
    frame = scored(seeds=2)
    frame["a/1"] = np.nan
    found = difference(frame, ["a/0", "a/1"], ["b/0", "b/1"], n=50)
    assert (
        all(np.isnan(found[key]) for key in ("mean", "difference", "lo", "hi")) and found["mean_baseline"] > 0
    )


def test_the_interval_is_made_of_both_parts():
    """With gaps 1, 2, 3 on every photograph it is 2 -+ t sd / sqrt(3) = 2 -+ 4.3027 * 1 / sqrt(3)."""
    frame = pd.DataFrame({"reference": list("abcd"), "a/0": 1.0, "a/1": 2.0, "a/2": 3.0, "b/0": 0.0})
    found = difference(frame, ["a/0", "a/1", "a/2"], ["b/0"] * 3, np.mean, [], n=20)
    assert (found["mean"], found["mean_baseline"], found["difference"]) == (2.0, 0.0, 2.0)
    assert (found["lo"], found["hi"]) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4)
    with pytest.raises(ValueError, match="3 runs cannot be paired with 1: give one column per seed"):
        difference(frame, ["a/0", "a/1", "a/2"], ["b/0"])


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("of_seeds", "of_photographs", "why"),
    [(1.0, 0.3, "seeds dominate"), (1.0, 1.0, "alike"), (0.3, 1.0, "photographs dominate")],
)
def test_95_of_100_intervals_cover_the_truth(seeds, of_seeds, of_photographs, why):
    """Runs have mean 0 over seeds and 24 photographs; the two numbers are their standard errors.

    Of 200 intervals 10 should miss, with a standard deviation of 3.
    """
    rng, hits = np.random.default_rng(0), 0
    runs = [f"a/{seed}" for seed in range(seeds)]
    for _ in range(200):
        gaps = rng.normal(0, of_seeds * seeds**0.5, (1, seeds)) + rng.normal(
            0, of_photographs * 24**0.5, (24, 1)
        )
        frame = pd.DataFrame(gaps, columns=runs).assign(reference=range(24), zero=0.0)
        found = difference(frame, runs, ["zero"] * seeds, np.mean, [], n=200)
        hits += found["lo"] <= 0 <= found["hi"]
    assert 183 <= hits <= 198, why


@pytest.mark.parametrize("name", ["controls", "demo"])
def test_stored_differences_are_those_of_the_stored_scores(name, tmp_path):
    """All lines agree byte for byte; only the line of provenance may differ."""
    runs, files = EMBEDDED / "runs", [f"{name}.csv", f"{name}-scores.csv.gz"]
    for file in files:
        (tmp_path / file).write_bytes((runs / file).read_bytes())
    write_differences(tmp_path / files[0], STUDIES[name])
    made, stored = (
        (folder / f"{name}-differences.csv").read_text(encoding="utf-8").split("\n")[1:]
        for folder in (tmp_path, runs)
    )
    assert made == stored


def test_rows_of_removed_code_are_those_of_no_variant():
    rows, gaps = (read_table(EMBEDDED / "runs" / f"removed{end}.csv") for end in ("", "-differences"))
    assert list(rows) == STUDY_COLUMNS and set(rows["variant"]) == set(gaps["variant"])
    for study_name, own in rows.groupby("study"):
        assert not set(own["variant"]) & set(STUDIES[study_name].variants)


# --- the claim's controls -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["permuted", "format"])
def test_what_must_not_learn_quality_did_not(variant):
    """In `vqr1 study controls`, shuffled MOS or the format reward alone raise no within-level SRCC.

    The demo's reward does.
    """
    runs = EMBEDDED / "runs"
    rows = read_table(runs / "controls-differences.csv").set_index(["variant", "set", "statistic"])
    assert rows.loc[variant, "sim-kadid", "srcc_within_level"]["lo"] <= 0
    demo = read_table(runs / "demo-differences.csv").set_index(["variant", "set", "statistic"])
    assert demo.loc["ranking", "sim-kadid", "srcc_within_level"]["lo"] > 0
