"""The file of comparisons beside a manifest, and the look-up of its pairs."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vqr1.cli import main
from vqr1.data.comparisons import PairTable
from vqr1.data.manifests import load_comparisons, load_ratings, read_manifest

MANIFEST = "image,dataset,mos,split\na.png,mine,,train\nb.png,mine,,train\nc.png,mine,4.5,val\n"
PAIRS = "first,second,preference\na.png,b.png,0.75\nb.png,./c.png,0.5\n"


@pytest.fixture
def written(tmp_path):
    """Return written(manifest, comparisons or None) -> the manifest's path, beside pictures a, b and c."""
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")

    def write(manifest: str, pairs: str | None):
        (tmp_path / "ratings.csv").write_text(manifest, encoding="utf-8")
        if pairs is not None:
            (tmp_path / "ratings-comparisons.csv").write_text(pairs, encoding="utf-8")
        return tmp_path / "ratings.csv"

    return write


def test_comparisons_are_read_from_beside_a_manifest_whose_mos_may_be_empty(written):
    path = written(MANIFEST, PAIRS)
    pairs = load_comparisons(path)
    assert pairs.to_numpy().tolist() == [["a.png", "b.png", 0.75], ["b.png", "c.png", 0.5]]
    assert pairs.attrs["dataset"] == "mine"
    frame = load_ratings(path)
    assert frame["mos"].isna().tolist() == [True, True, False] and "name" not in frame
    path = written(MANIFEST, "first,second,preference,votes,who\na.png,b.png,0.75,4,all\n")
    assert load_comparisons(path)["votes"].tolist() == [4]


def test_without_the_file_an_empty_mos_names_it(written):
    path = written(MANIFEST, None)
    with pytest.raises(ValueError, match=r"ratings.csv, line 2: mos '' .* pairs in ratings-comparisons.csv"):
        read_manifest(path)
    with pytest.raises(FileNotFoundError, match=r"ratings-comparisons.csv is missing; write .*first,second"):
        load_comparisons(path)
    assert main(["data", str(path)]) == 2


def test_a_manifests_own_names_tell_rows_of_one_picture_apart(written):
    head = "image,dataset,mos,distortion,level,seed,split,name\n"
    rows = "a.png,mine,,jpeg,1,0,train,mild\na.png,mine,,jpeg,5,0,train,strong\nb.png,mine,,,,,train,\n"
    path = written(head + rows, "first,second,preference\nmild,strong,1\nb.png,strong,1\n")
    assert load_ratings(path)["name"].tolist() == ["mild", "strong", "b.png"]
    assert load_comparisons(path)["first"].tolist() == ["mild", "b.png"]
    path = written(head.replace(",name", "") + rows.replace("mild", "").replace("strong", ""), PAIRS)
    with pytest.raises(ValueError, match="two rows are called 'a.png'.* in a column name"):
        load_comparisons(path)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            PAIRS.replace("b.png,0.75", "d.png,0.75"),
            "line 2: second 'd.png' is no picture of the manifest; corr",
        ),
        (PAIRS.replace("0.5", "1.5"), "line 3: preference '1.5' is not a number from 0 to 1; give the share"),
        (PAIRS.replace("0.5", "-1"), "line 3: preference '-1' is not a number from 0 to 1"),
        (PAIRS.replace("0.5", "nan"), "line 3: preference 'nan' is not a number from 0 to 1"),
        (PAIRS.replace("0.5", ""), "line 3: preference '' is not a number from 0 to 1"),
        (PAIRS.replace("./c.png", "b.png"), "line 3: second 'b.png' is compared with itself; take"),
        (PAIRS.replace("./c.png", "./b.png"), "line 3: second 'b.png' is compared with itself"),
        (
            PAIRS.replace("second", "Second"),
            "line 1: column 'second' is missing .*rename 'Second' to 'second'",
        ),
        (PAIRS.replace("preference", "label"), "line 1: column 'preference' is missing from the header"),
        ("first,second,preference,Votes\na.png,b.png,1,2\n", "line 1: .*rename 'Votes' to 'votes'"),
        ("first,second,preference,votes\na.png,b.png,1,0\n", "line 2: votes '0' is not a number above 0"),
        ("first,second,preference,votes\na.png,b.png,1,\n", "line 2: votes '' is not a number above 0"),
        (PAIRS.replace(",", ";"), "line 1: fields are separated by semicolons"),
        ("first,second,preference\n", "no comparisons after the header"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_value(written, pairs, message):
    with pytest.raises(ValueError, match=f"ratings-comparisons.csv(, |: ){message}"):
        load_comparisons(written(MANIFEST, pairs))


def test_comparisons_are_of_one_data_set(written):
    with pytest.raises(ValueError, match="ratings.csv: .* one data set, and this one has mine, yours; split"):
        load_comparisons(written(MANIFEST.replace("c.png,mine", "c.png,yours"), PAIRS))


def test_vqr1_data_describes_the_comparisons(written, capsys):
    again = "b.png,a.png,0.25\n"  # the first pair, turned
    assert main(["data", str(written(MANIFEST, PAIRS + again))]) == 0
    assert "compared    2 of 3 pairs (67%), 1 of them ties (50%)" in capsys.readouterr().out
    assert main(["data", str(written(MANIFEST.replace("4.5", ""), PAIRS))]) == 0
    assert "mos         none\n" in capsys.readouterr().out


# The table


votes = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 4), st.integers(1, 9)).filter(
        lambda vote: vote[0] != vote[1]
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=60)
@given(votes, st.permutations(range(6)))
def test_a_pair_has_its_mean_preference_by_votes_whichever_way_it_was_written(drawn, asked):
    pairs = pd.DataFrame(drawn, columns=["first", "second", "preference", "votes"])
    pairs["preference"] /= 4
    mentioned = {*pairs["first"], *pairs["second"]}
    asked = [name for name in asked if name in mentioned]
    table = PairTable(pairs, "mine")
    found = table.preference(table.codes(asked))
    for (i, a), (j, b) in itertools.product(enumerate(asked), repeat=2):
        won = [(p / 4, n) for x, y, p, n in drawn if (x, y) == (a, b)]
        won += [(1 - p / 4, n) for x, y, p, n in drawn if (x, y) == (b, a)]
        expected = sum(p * n for p, n in won) / sum(n for _, n in won) if won else np.nan
        np.testing.assert_allclose(found[i, j], expected, atol=1e-12)
    near = {name: set(table.names[table.compared_with(code)]) for code, name in enumerate(table.names)}
    assert all(
        (b in near[a]) == ((a, b) in {(x, y) for x, y, *_ in drawn} | {(y, x) for x, y, *_ in drawn})
        for a, b in itertools.product(mentioned, repeat=2)
    )


def test_votes_that_are_not_known_weigh_the_same():
    pairs = pd.DataFrame({"first": ["a", "b"], "second": ["b", "a"], "preference": [1, 1]})
    table = PairTable(pairs, "mine")
    assert table.preference(table.codes(["a", "b"]))[0, 1] == 0.5
    table = PairTable(pairs.assign(votes=[3, 1]), "mine")
    assert table.preference(table.codes(["a", "b"]))[0, 1] == 0.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": [1.0, 1.2]}, r"the comparisons of 'mine', row 1 .*: preference 1.2 is not a number"),
        ({"second": ["b", "c"]}, r"row 1 .*: second 'c' is compared with itself"),
        ({"votes": [1, -1]}, "row 1 .*: votes -1 is not a number above 0"),
    ],
)
def test_pairs_given_in_python_are_checked_as_well(change, message):
    pairs = pd.DataFrame({"first": ["a", "c"], "second": ["b", "a"], "preference": [1.0, 0.5]})
    with pytest.raises(ValueError, match=message):
        PairTable(pairs.assign(**change), "mine")
    with pytest.raises(ValueError, match="the comparisons of 'mine': column 'second' is missing"):
        PairTable(pairs.drop(columns="second"), "mine")
    with pytest.raises(ValueError, match="the comparisons of 'mine' are empty"):
        PairTable(pairs.iloc[:0], "mine")
