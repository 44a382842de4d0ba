"""Table 2 has the paper's rows right, and beside them what the scores say."""

import math
import re

import pandas as pd
import pytest
from test_public_sets import BUILD, METHODS, sheet, text

from vqr1.cli import main
from vqr1.distortions import distort
from vqr1.experiments import table2
from vqr1.experiments.table2 import NAMES, cost, found_sets, published, side_by_side
from vqr1.metrics import plcc, srcc, srcc_by

NAN = math.nan


# The paper's rows


def test_the_papers_rows_are_whole_and_their_mean_is_unweighted():
    """Each printed mean is that of the eight printed numbers, up to rounding."""
    rows = published(2)
    assert (
        rows.groupby("metric").size().to_dict() == {"plcc": 13, "srcc": 13}
        and tuple(rows.columns[2:-1]) == NAMES
    )
    assert (rows[list(NAMES)].mean(axis=1) - rows["mean"]).abs().max() < 0.0011
    assert rows[[*NAMES, "mean"]].stack().between(0.2, 0.95).all()


@pytest.mark.parametrize(
    ("metric", "method", "numbers"),
    [
        ("srcc", "VisualQuality-R1", [0.790, 0.750, 0.830, 0.875, 0.838, 0.756, 0.598, 0.775, 0.777]),
        ("plcc", "VisualQuality-R1\u2020", [0.820, 0.844, 0.870, 0.917, 0.879, 0.824, 0.674, 0.820, 0.831]),
        ("srcc", "Qwen2.5-VL-7B (base)", [0.711, 0.733, 0.754, 0.848, 0.820, 0.603, 0.458, 0.735, 0.708]),
    ],
)
def test_rows_that_matter_are_as_printed(metric, method, numbers):
    row = published(2).query("metric == @metric and method == @method")
    assert row[[*NAMES, "mean"]].values.tolist() == [numbers]


def test_the_papers_cost_is_as_printed():
    row = published(5).set_index("method").loc["VisualQuality-R1"]
    assert row.tolist() == ["8.29B", 2.34, 17.6, 7.74]


def test_both_tables_say_where_they_come_from():
    for number in (2, 5):
        head = (table2.EMBEDDED / f"table{number}.csv").read_text(encoding="utf-8").splitlines()[0]
        assert (
            f"Table {number} of VisualQuality-R1 (arXiv 2505.14460 v2)" in head
            and "not measured here" in head
        )


# Side by side


def rows(sets, value=0.5, thinking=True):
    numbers = {
        f"{metric}{end}": value + d
        for metric in ("srcc", "plcc")
        for end, d in (("", 0), ("_lo", -0.1), ("_hi", 0.1))
    }
    return pd.DataFrame(
        [
            {
                "set": name,
                "thinking": thinking,
                "estimate": "expected",
                "rows": 10,
                "seconds": 0.2,
                "memory": 1.5,
            }
            | numbers
            for name in sets
        ]
    )


def test_means_are_over_the_same_sets_for_the_paper_and_for_us():
    table = side_by_side(rows(["bid", "spaq"], 0.6), "srcc", "mine").set_index("method")
    assert table.loc["paper: VisualQuality-R1", "mean of 2 measured"] == f"{(0.790 + 0.875) / 2:.3f}"
    assert table.loc["paper: VisualQuality-R1", "mean of 8"] == "0.777"
    mine = table.loc["measured: mine, thinking, expected"]
    assert mine["bid"] == mine["spaq"] == "0.600 [0.500, 0.700]" and mine["mean of 2 measured"] == "0.600"
    assert mine["clive"] == mine["mean of 8"] == ""  # six were not run


def test_with_all_eight_there_is_one_mean():
    table = side_by_side(rows(NAMES, 0.6), "plcc", "mine")
    assert list(table.columns) == ["method", *NAMES, "mean of 8"]
    assert table["mean of 8"].tolist()[-1] == "0.600" and table["mean of 8"][0] == "0.519"


def test_an_undefined_set_makes_the_mean_undefined():
    measured = rows(["bid", "spaq"])
    measured.loc[0, ["srcc", "srcc_lo", "srcc_hi"]] = NAN
    mine = side_by_side(measured, "srcc", "mine").iloc[-1]
    assert mine["bid"] == mine["mean of 2 measured"] == "undefined" and mine["spaq"] == "0.500 [0.400, 0.600]"


def test_thinking_and_non_thinking_have_rows_of_their_own():
    both = pd.concat([rows(["bid"], 0.6), rows(["bid"], 0.4, thinking=False)])
    names = side_by_side(both, "srcc", "mine")["method"].tolist()[-2:]
    assert names == ["measured: mine, thinking, expected", "measured: mine, non-thinking, expected"]


def test_seconds_per_picture_weigh_sets_by_their_rows():
    measured = pd.concat([rows(["bid"]), rows(["spaq"]).assign(rows=30, seconds=1.0, memory=2.5)])
    mine = cost(measured, "mine", 3_500_000).iloc[-1]
    assert (mine["parameters"], mine["seconds"], mine["memory"]) == ("3.50M", "0.800", "2.50 GiB")


# The whole, with the embedded policy


@pytest.fixture(scope="module")
def root(tmp_path_factory, photo):
    """Write bid (five pictures, worse and worse), sriqa-bench (three contents), min19 (a word for a number).

    The other five sets are missing.
    """
    folder = tmp_path_factory.mktemp("sets")
    small = photo.crop((0, 0, 96, 96))
    graded = {1: small} | {level: distort(small, "jpeg", level, 0) for level in range(2, 6)}
    sheet(
        folder / "BID" / "DatabaseGrades.xlsx",
        [["Image Number", "Average Subjective Grade", "std"], *([n, 5 - n * 0.9, 0.5] for n in graded)],
    )
    (folder / "BID" / "ImageDatabase").mkdir()
    for number, image in graded.items():
        image.save(folder / "BID" / "ImageDatabase" / f"DatabaseImage{number:04d}.JPG")
    for path in BUILD["sriqa-bench"](folder / "SRIQA-Bench"):
        level = 1 + 2 * METHODS.index(path.split("/")[1])
        distort(small, "white_noise" if "online" in path else "gaussian_blur", level, 0).save(
            folder / "SRIQA-Bench" / path
        )
    BUILD["min19"](folder / "min19")
    text(folder / "min19" / "Dehaze_test_all.txt", ["01.png 01_1.bmp good"])
    return folder


@pytest.fixture(scope="module")
def out(root, tmp_path_factory):
    """Return what one run of the command wrote."""
    out = tmp_path_factory.mktemp("out")
    asked = ["evaluate", "--suite", "table2", "--policy", "tiny-policy"]
    assert main([*asked, "--root", str(root), "--out", str(out)]) == 0
    return out


def test_the_report_has_the_papers_rows_ours_and_what_was_not_run(out):
    report = (out / "table2.md").read_text(encoding="utf-8")
    for metric in ("SRCC", "PLCC"):
        part = report.partition(f"## {metric}\n")[2].partition("## ")[0]
        assert part.count("| paper: ") == 13 and part.count("| measured: tiny-policy, ") == 2
        ours = re.findall(
            r"^\| measured: tiny-policy, (thinking|non-thinking), expected \| -?\d\.\d{3} \[(.+?)\]",
            part,
            re.MULTILINE,
        )
        assert [mode for mode, _ in ours] == ["thinking", "non-thinking"]
    assert "| paper: VisualQuality-R1 | 8.29B | 2.34 | 17.6 G |" in report and "arXiv 2505.14460 v2" in report
    not_run = report.partition("## Not run\n")[2]
    assert set(re.findall(r"^- ([\w-]+) ", not_run, re.MULTILINE)) == set(NAMES) - {"bid", "sriqa-bench"}
    assert (
        "Dehaze_test_all.txt, line 1: mos 'good' is not a number from 1 to 5" in not_run
        and "github.com/h4nwei/SPAQ" in not_run
    )


def test_what_is_measured_is_what_the_scores_say(out):
    measured = pd.read_csv(out / "measured.csv").set_index(["set", "thinking"])
    assert (
        len(measured) == 4
        and (
            measured["rows"] == measured.index.get_level_values("set").map({"bid": 5, "sriqa-bench": 9})
        ).all()
    )
    for thinking, mode in ((True, "thinking"), (False, "plain")):
        bid, sriqa = (pd.read_csv(out / f"{name}.expected.{mode}.csv") for name in ("bid", "sriqa-bench"))
        row = measured.loc["bid", thinking]
        assert row["srcc"] == pytest.approx(srcc(bid["score"], bid["mos"])) and row["plcc"] == pytest.approx(
            plcc(bid["score"], bid["mos"])
        )
        row = measured.loc["sriqa-bench", thinking]
        assert row["srcc"] == pytest.approx(srcc_by(sriqa["score"], sriqa["mos"], sriqa["reference"]))
        assert row["srcc_pooled"] == pytest.approx(srcc(sriqa["score"], sriqa["mos"])) and math.isnan(
            row["plcc_fit"]
        )
    for metric in ("srcc", "plcc"):
        assert (measured[f"{metric}_lo"] <= measured[metric]).all() and (
            measured[metric] <= measured[f"{metric}_hi"]
        ).all()
    assert (
        (measured["seconds"] > 0).all()
        and measured["memory"].between(0.05, 64).all()
        and (measured["unparseable"] == 0).all()
    )


def test_a_picture_that_cannot_be_read_costs_its_row_alone(root, tmp_path):
    frames, _ = found_sets(root)
    broken = root / "BID" / "ImageDatabase" / "DatabaseImage0003.JPG"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:300])
    try:
        measured = table2.measure("tiny-policy", {"bid": frames["bid"]}, modes=(False,), out=tmp_path)
    finally:
        broken.write_bytes(whole)
    assert measured["unparseable"].tolist() == measured["unread"].tolist() == [1] and measured[
        "rows"
    ].tolist() == [5]
    assert "DatabaseImage0003.JPG" in pd.read_csv(tmp_path / "bid.expected.plain.csv")["error"][2]


def test_without_any_set_the_first_is_named(tmp_path, capsys):
    assert main(["evaluate", "--suite", "table2", "--root", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "none of the sets of Table 2 can be read: bid is neither in" in said and "vqr1 data --list" in said


def test_a_suite_and_sets_exclude_each_other(capsys):
    assert main(["evaluate", "--suite", "table2", "--sets", "sim-kadid"]) == 2
    assert "give --suite or --sets" in capsys.readouterr().err
