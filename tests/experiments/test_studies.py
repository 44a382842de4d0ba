"""Study grids are as stated; runs are made once, kept, and compared over photographs and seeds."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from vqr1.config import load_config
from vqr1.data.batches import one_set_batches
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


def test_permuted_mos_of_people_stay_within_their_subset():
    rows = pd.DataFrame({"subset": list("aaaabbbb"), "reference": list("abcdefgh"), "mos": np.arange(8.0)})
    dealt = studies.ROWS["permuted"](rows, 0)
    assert sorted(dealt["mos"][:4]) == [0, 1, 2, 3] and sorted(dealt["mos"][4:]) == [4, 5, 6, 7]
    assert not dealt["mos"].equals(rows["mos"])


def test_a_mistyped_control_is_named():
    with pytest.raises(
        ValueError, match="rows 'permutted' are unknown; use one of None, permuted, realigned, across"
    ):
        training_frame(config_of("controls", "permuted"), "permutted")


@pytest.mark.parametrize("method", ["tower rankr", "cn ranker", "RL"])
def test_a_mistyped_method_is_named(method, tmp_path):
    with pytest.raises(
        ValueError,
        match=f"method '{method}' is unknown; use one of before, file size, brisque, piqe, rl",
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


@pytest.mark.slow
def test_a_study_of_both_prompts_keeps_the_other_one_as_a_variant_of_its_own(tmp_path, monkeypatch):
    """On pictures of a folder, with the subsets and the sizes of their files."""
    rows = [{"image": f"{n}.jpg", "dataset": "mine", "mos": n, "split": "test", "subset": f"ss0{n % 2 + 1}"}
            for n in range(8)]  # fmt: skip
    for n in range(8):
        noise = np.random.default_rng(n).integers(0, 32 * (n + 1), (64, 64, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{n}.jpg")
    pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
    variants = {"before": Variant(1, method="before"), "file size": Variant(1, method="file size")}
    plan = Study("cpu", {str(tmp_path / "mine.csv"): None}, "before", variants, both_prompts=("before",))
    monkeypatch.setitem(STUDIES, "both", plan)
    made = study("both", output=tmp_path / "runs", csv=tmp_path / "both.csv", processes=1)
    assert made["variant"].tolist() == ["before", "before, not thinking", "file size"]
    assert made.set_index("variant").loc["file size", ["srcc", "srcc_ss01", "srcc_ss02"]].tolist() == [
        1,
        1,
        1,
    ]
    scores = read_table(tmp_path / "both-scores.csv.gz")
    assert list(scores) == [*ROW, "subset", "before/0", "before, not thinking/0", "file size/0"]
    assert not np.allclose(scores["before/0"], scores["before, not thinking/0"])
    assert len(study("both", output=tmp_path / "runs", csv=tmp_path / "both.csv")) == 3


KINDS = {
    "biq2021": ["srcc", "srcc_within_subset"],
    "srij": ["srcc", "srcc_within_level"],
    "pcuid": ["srcc", "pairs_right"],
}


def rated_pictures(folder, name, change):
    """Write a set of small pictures, of 24 train, 4 val and 6 test rows, and return its manifest's path."""
    rng, rows = np.random.default_rng(len(name)), []
    for n in range(34):
        noise = rng.integers(0, 7 * n + 8, (48, 48, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{name}-{n}.png")
        split = "test" if n % 6 == 0 else "val" if n % 9 == 1 else "train"
        rows.append({"image": f"{name}-{n}.png", "dataset": name, "split": split} | change(n))
    pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    return str(folder / f"{name}.csv")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Make study people-mixture in two steps of few answers, on sets with the same kinds of labels."""
    folder, name = tmp_path_factory.mktemp("mixture"), "people-mixture"
    labels = {
        "biq2021": lambda n: {"mos": 1 - n / 40, "subset": f"ss0{1 + n // 6 % 2}"},
        "srij": lambda n: {"mos": 100 - n, "level": 1 + n // 6 % 2, "distortion": "srgan"},
        "pcuid": lambda n: {"mos": 100 - 2 * n},
    }
    paths = {name: rated_pictures(folder, name, change) for name, change in labels.items()}
    pairs = [(f"pcuid-{a}.png", f"pcuid-{b}.png", float(a < b)) for a in range(34) for b in range(a)]
    pairs = pd.DataFrame(pairs, columns=["first", "second", "preference"])
    pairs.to_csv(folder / "pcuid-comparisons.csv", index=False)

    def here(change):
        own = {key: [paths[name] for name in change[key]] for key in ("sets", "comparisons") if key in change}
        short = {"per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": 48}
        short |= {"save_strategy": "no", "logging_steps": 1}
        return change | own | {"grpo": short, "validation": {"rows": 4, "every": 2}}

    plan = STUDIES[name]
    variants = {key: replace(line, change=here(line.change)) for key, line in plan.variants.items()}
    plan = replace(plan, sets={paths[name]: limit for name, limit in plan.sets.items()}, variants=variants)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDIES, name, plan)
        study(name, [0], folder / "runs", folder / "mixture.csv", steps=2, processes=1)
    return folder


@pytest.mark.slow
def test_every_variant_of_peoples_mixture_runs_and_is_scored(mixture):
    rows = read_study(mixture / "mixture.csv")
    rows["set"] = rows["set"].map(lambda path: Path(path).stem)
    plan = STUDIES["people-mixture"]
    assert sorted(zip(rows["variant"], rows["set"])) == sorted(
        (variant, name) for variant in plan.variants for name in plan.sets
    )
    assert (rows["rows"] == 6).all() and rows["srcc"].notna().all()
    assert (rows["pairs_right"].notna() == (rows["set"] == "pcuid")).all()
    assert rows["pairs_right"].dropna().between(0, 1).all() and rows["srcc_ss01"].notna().sum() == 7
    log = read_table(mixture / "mixture-log.csv")
    assert log.groupby("variant")["step"].max().to_dict() == dict.fromkeys({*plan.variants} - {"before"}, 2)
    for variant, line in plan.variants.items():
        if line.method == "rl":
            folder = studies._folder(mixture / "runs", "people-mixture", variant, 0)
            used = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            compared = [Path(path).stem for path in used.get("comparisons", [])]
            assert compared == line.change.get("comparisons", []), variant


@pytest.mark.slow
def test_sets_are_compared_in_what_their_labels_allow(mixture):
    gaps = read_table(mixture / "mixture-differences.csv")
    gaps["set"] = gaps["set"].map(lambda path: Path(path).stem)
    for couple, own in gaps.groupby(["variant", "baseline"]):
        found = own.groupby("set")["statistic"].agg(list).to_dict()
        assert found == KINDS | {"mean": ["srcc"]}, couple
    assert {tuple(couple) for couple in gaps[["variant", "baseline"]].to_numpy()} >= {
        ("before", "mixture"),
        *STUDIES["people-mixture"].also,
    }
    scores, pairs = (read_table(mixture / f"mixture-{end}.csv.gz") for end in ("scores", "pairs"))
    assert len(pairs) == 15, "6 test pictures"
    own = scores.dropna(subset=["name"]).set_index("name")
    share = {}
    for variant in ("before", "mixture"):
        score = own[f"{variant}/0"]
        better = np.where(pairs["preference"] == 1, pairs["first"], pairs["second"])
        worse = np.where(pairs["preference"] == 1, pairs["second"], pairs["first"])
        gap = np.sign(score[better].to_numpy() - score[worse].to_numpy())
        share[variant] = np.mean((gap + 1) / 2)
    row = gaps.set_index(["variant", "set", "statistic"]).loc["before", "pcuid", "pairs_right"]
    assert row["difference"] == pytest.approx(share["before"] - share["mixture"], abs=1e-4)
    assert row["lo"] <= row["difference"] <= row["hi"]


def test_what_variants_differ_in_follows_a_sets_labels():
    level = pd.DataFrame({"mos": [1.0, 2], "level": [1, 2], "subset": np.nan})
    subset = level.assign(level=np.nan, subset=["a", "b"])
    rated, compared = pd.DataFrame({"mos": [1.0, 2], "level": np.nan}), pd.DataFrame({"level": [1.0, 2]})
    pairs = pd.DataFrame({"first": ["a"], "second": ["b"], "preference": [1.0]})
    for scores, said, expected in (
        (level, pairs[:0], ["srcc", "srcc_within_level"]),
        (subset, pairs[:0], ["srcc", "srcc_within_subset"]),
        (rated, pairs, ["srcc", "pairs_right"]),
        (compared, pairs, ["pairs_right"]),
        (compared, pairs[:0], []),
    ):
        assert [kind[0] for kind in studies._statistics("mine", scores, said)] == expected


@pytest.mark.slow
def test_a_rival_learns_from_rows_drawn_by_its_seed_as_many_as_rl_is_shown(tmp_path, monkeypatch):
    given, ridge = [], studies.TRAINED["tower ridge"]

    def remembered(config, frame, output):
        given.append(frame)
        return ridge(config, frame, output)

    monkeypatch.setitem(studies.TRAINED, "tower ridge", remembered)
    short = {"grpo": {"max_steps": 3}}
    plan = replace(SMALL, variants={"tower ridge": Variant(2, short, "tower ridge")}, drawn=True)
    made = [studies.run(plan, "tower ridge", seed, tmp_path)["scores"]["score"] for seed in (0, 1, 0)]
    assert [len(frame) for frame in given] == [3 * 16] * 3
    assert given[0].equals(given[2]) and not given[0].equals(given[1])
    assert np.allclose(made[0], made[2]) and not np.allclose(made[0], made[1])


def test_rl_is_shown_as_many_different_rows_as_its_rivals_of_study_people():
    plan = STUDIES["people"]
    args = grpo_config(config_of("people", "ranking").grpo, Path())
    rows = pd.DataFrame({"dataset": ["biq2021"] * 9000})
    shown = one_set_batches(rows, images_per_step(args), args.seed)[: images_per_step(args) * args.max_steps]
    assert len(set(shown)) == studies._shown(config_of("people", "supervised"), Path()) == 3200
    assert plan.drawn and studies._steps(rows.head(3200), 150) * 16 == 3200


def test_a_study_says_how_many_rows_are_learned_from(tmp_path, monkeypatch):
    """The rows of a pool, or those of the short runs; the mixture of people's sets has SRIJ's 440 of each."""
    given = []

    class Given(Exception):
        pass

    def noted(config, frame, output):
        given.append(len(frame))
        raise Given

    monkeypatch.setitem(studies.TRAINED, "tower ranker", noted)
    for pool in (None, 40):
        with pytest.raises(Given):
            studies.run(replace(SMALL, pool=pool), "tower ranker", 0, tmp_path)
    assert given == [POOL, 40] and STUDIES["people-mixture"].pool == 3 * 440


def test_a_run_leaves_the_threads_of_its_caller_as_they_were(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        studies.run(SMALL, "PIQE", 0, tmp_path)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_rows_that_another_command_adds_meanwhile_are_kept(tmp_path):
    csv = tmp_path / "study.csv"
    scores = pd.DataFrame({"set": ["s"] * 2, "mos": [1.0, 2.0], "own": "x/0", "score": [1.0, 2.0]})
    for variant in ("one", "two"):  # two commands that began before either had a row
        rows = pd.DataFrame([{"variant": variant, "seed": 0, "set": "s", "srcc": 1.0}])
        found = {"rows": rows, "scores": scores, "pairs": pd.DataFrame(), "log": pd.DataFrame()}
        made = studies._keep(csv, (variant, 0), found)
    assert made["variant"].tolist() == read_study(csv)["variant"].tolist() == ["one", "two"]


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
    made = {"rows": pd.DataFrame(columns=["set", "srcc"])}
    monkeypatch.setattr(studies, "run", lambda plan, variant, seed, *rest: asked.append(seed) or made)
    monkeypatch.setattr(studies, "_keep", lambda csv, which, found: asked.append(csv) or pd.DataFrame())
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
