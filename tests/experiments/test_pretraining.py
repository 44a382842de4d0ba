"""Pretraining sees only what it may and reports it; its answers know nothing of quality."""

import inspect
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers.modeling_utils import load_state_dict

from vqr1.data import observers
from vqr1.data.manifests import EMBEDDED, HELD_OUT, TRAINED
from vqr1.distortions import STRENGTH
from vqr1.experiments import pretraining
from vqr1.experiments.dead_leaves import dead_leaves, pink_textures
from vqr1.experiments.pretraining import (
    REGIONS,
    SCORES,
    Answers,
    DistortionStream,
    answer,
    corpus,
    perception_batch,
    pretrain,
    reasoning,
    where,
)
from vqr1.prompts import (
    CLEAN,
    PHRASES,
    SEVERITY,
    named_distortions,
    named_severity,
    parse_reasoning,
    parse_score,
)

NO_PIXELS = SimpleNamespace(image_processor=lambda images, return_tensors: {"pixel_values": images})


def draw(pictures, count):
    return list(itertools.islice(pictures, count))


@pytest.fixture
def quick(monkeypatch):
    """Replace slow steps by grey squares; return the calls of `distort`."""
    calls = []

    def brighter(image, name, level, seed):
        calls.append((name, level, seed))
        return Image.eval(image, lambda value: value + 50)

    monkeypatch.setattr(pretraining, "distort", brighter)
    monkeypatch.setattr(pretraining, "pink_textures", lambda rng: None)
    monkeypatch.setattr(
        DistortionStream, "clean", lambda self, rng, size: np.full((size, size, 3), 128, np.uint8)
    )
    return calls


# What is looked at


def test_held_out_types_never_occur(quick):
    rows = draw(DistortionStream(NO_PIXELS, 0, procedural=1.0), 250)
    names = {name for name, *_ in quick}
    assert names == set(TRAINED) and not names & set(HELD_OUT)
    assert [row["name"] for row in rows] == [name for name, *_ in quick]
    assert {level for _, level, _ in quick} == {1, 2, 3, 4, 5}
    assert len({seed for *_, seed in quick}) == 250  # no noise pattern is a cue


def test_only_training_photographs_and_no_ratings_are_read(monkeypatch):
    opened, tables, open_, read_csv = set(), set(), Image.open, pd.read_csv
    monkeypatch.setattr(Image, "open", lambda path: opened.add(Path(path)) or open_(path))
    monkeypatch.setattr(
        pd, "read_csv", lambda path, **options: tables.add(Path(path).name) or read_csv(path, **options)
    )
    monkeypatch.setattr(observers, "human_cells", lambda *_: pytest.fail("the table of human means was read"))
    pretraining._photographs.cache_clear()
    draw(DistortionStream(NO_PIXELS, 0, procedural=0.2), 3)
    photos = read_csv(EMBEDDED / "photos.csv")
    assert tables == {"photos.csv"} and set(photos["split"]) == {"train", "val", "test"}
    assert opened == {EMBEDDED / name for name in photos.loc[photos["split"] == "train", "image"]}


def test_no_rating_is_imported():
    tree = inspect.getsource(pretraining)
    assert "kadid10k_type_level_mos" not in tree and "observers" not in tree.split('"""', 2)[2]
    assert {name for name in vars(pretraining) if not name.startswith("_")}.isdisjoint(
        {"rate", "human_cells", "load_ratings", "read_manifest", "oracle_scores", "latent_quality"}
    )


def test_the_same_seed_gives_the_same_stream(untrained):
    def stream(seed):
        return draw(DistortionStream(untrained[1], seed), 3)

    one, two, other = stream(3), stream(3), stream(4)
    for a, b in zip(one, two):
        assert torch.equal(a["pixel_values"], b["pixel_values"]) and torch.equal(
            a["image_grid_thw"], b["image_grid_thw"]
        )
        assert [a[key] for key in ("name", "level", "strength", "place")] == [
            b[key] for key in ("name", "level", "strength", "place")
        ]
    assert not any(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(one, other))


def test_workers_see_different_pictures(quick, monkeypatch):
    for number in (0, 1):
        monkeypatch.setattr(pretraining, "get_worker_info", lambda number=number: SimpleNamespace(id=number))
        draw(DistortionStream(NO_PIXELS, 0, procedural=1.0), 5)
    assert not {seed for *_, seed in quick[:5]} & {seed for *_, seed in quick[5:]}


def test_strength_follows_the_level_but_for_signed_changes_and_what_nobody_sees(quick, monkeypatch):
    rows = draw(DistortionStream(NO_PIXELS, 1, procedural=1.0), 200)
    strengths = {(row["name"], row["level"]): row["strength"] for row in rows}
    assert all(
        strength == STRENGTH.get(name, range(1, 6))[level - 1]
        for (name, level), strength in strengths.items()
    )
    assert {name for name, _ in strengths} >= {"mean_shift", "contrast_change", "jpeg"}
    assert {row["place"] for row in rows if row["strength"]} == {"all over the picture"}
    monkeypatch.setattr(pretraining, "distort", lambda image, *_: Image.eval(image, lambda value: value + 1))
    rows = draw(DistortionStream(NO_PIXELS, 1, procedural=1.0), 20)
    assert {(row["strength"], row["place"]) for row in rows} == {(0, "")}
    assert {reasoning(row["name"], row["strength"], row["place"]) for row in rows} == {CLEAN}


def test_pictures_have_whole_merged_patches_of_the_sizes_of_the_sets(quick):
    sizes = [
        row["pixel_values"][0].shape[:2] for row in draw(DistortionStream(NO_PIXELS, 2, procedural=1.0), 100)
    ]
    assert all(height == width and height % 32 == 0 for height, width in sizes)
    assert sizes.count((192, 192)) > 60 and len(set(sizes)) > 2


# Procedural pictures


def test_dead_leaves_are_pictures_and_the_same_for_a_seed():
    textures = pink_textures(np.random.default_rng(0), count=2, size=64)
    assert textures.shape == (2, 64, 64) and textures.std((1, 2)) == pytest.approx(np.ones(2), abs=1e-3)
    pictures = [dead_leaves(np.random.default_rng(seed), textures, 48) for seed in range(12)]
    for picture in pictures:
        assert picture.shape == (48, 48, 3) and picture.min() >= 0 and picture.max() <= 1
        assert picture.std() > 0.02
    np.testing.assert_array_equal(dead_leaves(np.random.default_rng(3), textures, 48), pictures[3])
    assert not np.array_equal(pictures[3], pictures[4])


# What is said


def thirds(flat, textures, edges):
    """Return (clean, distorted): flat left, texture in the middle, edges right, each with its own error."""
    clean = np.full((96, 96, 3), 0.5, np.float32)
    clean[:, 32:64] += np.random.default_rng(0).normal(0, 0.05, (96, 32, 1)).astype(np.float32)
    clean[:, 64::8] = clean[:, 65::8] = 0
    error = np.repeat([flat, textures, edges], 32).astype(np.float32)
    return clean, clean + error[None, :, None]


@pytest.mark.parametrize(
    ("errors", "place"),
    [
        ((0.3, 0.0, 0.0), "in the flat areas, textures intact"),
        ((0.3, 0.1, 0.02), "in the flat areas, edges intact"),
        ((0.0, 0.3, 0.2), "in the textures, flat areas intact"),
        ((0.1, 0.2, 0.09), "in the textures"),
        ((0.02, 0.1, 0.3), "along the edges, flat areas intact"),
        ((-0.1, 0.15, -0.3), "along the edges"),  # the size of the error counts
        ((0.2, 0.2, 0.3), "all over the picture"),
        ((0.1, 0.1, 0.1), "all over the picture"),
    ],
)
def test_where_finds_the_region_of_the_error(errors, place):
    assert where(*thirds(*errors)) == place


def test_reasoning_can_be_read_back():
    for name, strength in itertools.product(PHRASES, range(1, 6)):
        text = reasoning(name, strength, "in the flat areas, edges intact")
        assert named_distortions(text) == [name] and named_severity(text) == strength
    assert reasoning("jpeg", 0, "") == CLEAN and named_severity(CLEAN) == 0


def test_the_tokenizer_learns_every_word_that_is_said():
    words = set(re.findall(r"\w+", " ".join(corpus())))
    said = " ".join(
        [*PHRASES.values(), *SEVERITY, CLEAN, *REGIONS, *pretraining.PLACES, "all over the picture intact"]
    )
    assert set(re.findall(r"\w+", said)) <= words


# The answer's ignorance


def row(name, strength=3, side=4, place="in the textures"):
    grid = torch.tensor([[1, side, side]])
    return {
        "name": name,
        "strength": strength,
        "place": place,
        "image_grid_thw": grid,
        "pixel_values": torch.zeros(side**2, 3),
    }


def test_a_score_follows_from_the_strength_alone():
    assert list(inspect.signature(answer).parameters) == ["strength", "rng"]
    for strength in range(6):
        texts = {answer(strength, np.random.default_rng(9)) for _ in range(2)}
        assert len(texts) == 1
    means = [
        np.mean([parse_score(answer(strength, np.random.default_rng(seed))) for seed in range(300)])
        for strength in range(6)
    ]
    assert means == pytest.approx(SCORES, abs=0.1) and sorted(means, reverse=True) == means


@pytest.mark.parametrize("strength", [1, 4])
def test_every_distortion_of_a_strength_has_the_same_targets(untrained, strength):
    def targets(name, place):
        collate = Answers(untrained[1], seed=0)
        return [parse_score(collate.text(row(name, strength, place=place))[1]) for _ in range(30)]

    expected = targets("jpeg", "in the textures")
    assert len(set(expected)) > 20 and all(1 <= score <= 5 for score in expected)
    for name, place in zip(
        TRAINED, itertools.cycle(["in the flat areas", "along the edges", "all over the picture"])
    ):
        assert targets(name, place) == expected


def test_three_in_four_answers_think_first(untrained):
    collate = Answers(untrained[1], seed=0)
    pairs = [collate.text(row("jpeg")) for _ in range(200)]
    thoughts = [parse_reasoning(text) for _, text in pairs]
    assert (
        set(thoughts) == {"", "moderate jpeg blocking in the textures"}
        and 130 < sum(map(bool, thoughts)) < 170
    )
    assert all(
        ("<think> </think>" in prompt) == bool(thought) for (prompt, _), thought in zip(pairs, thoughts)
    )


def test_only_the_answer_carries_loss(untrained):
    tokenizer = untrained[1].tokenizer
    rows = [
        row("jpeg"),
        row("lens_blur", 0, side=8, place=""),
        row("white_noise", 5),
        row("jitter", 2, side=6),
    ]
    batch = Answers(untrained[1], seed=1)(rows)
    assert not batch["attention_mask"][0].all()  # padded
    for picture, ids, labels, mask, kinds in zip(
        rows, *(batch[key] for key in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"))
    ):
        taught = labels != -100
        assert torch.equal(labels[taught], ids[taught])
        target, prompt = tokenizer.decode(ids[taught]), tokenizer.decode(ids[mask.bool() & ~taught])
        assert re.fullmatch(
            r"(<think>[a-z ,]+</think>)?<answer>\d\.\d\d</answer><\|im_end\|>", target
        )  # the end, too, is taught
        assert (
            prompt.startswith("<|im_start|>system")
            and prompt.endswith("<|im_start|>assistant\n")
            and "<answer> </answer>" in prompt
        )
        assert not mask[: len(mask) - int(mask.sum())].any()  # padding is on the left
        assert (
            kinds.sum() == picture["image_grid_thw"].prod() // 4
            and (ids[kinds.bool()] == untrained[1].image_token_id).all()
        )
    assert batch["pixel_values"].shape == (16 + 64 + 16 + 36, 3) and batch["image_grid_thw"].tolist() == [
        [1, n, n] for n in (4, 8, 4, 6)
    ]


def test_the_batch_is_what_the_policy_takes(untrained):
    model, processor = untrained
    pixels = processor.image_processor(images=[Image.new("RGB", (64, 64))] * 2, return_tensors="pt")[
        "pixel_values"
    ].split(16)
    rows = [row("jpeg") | {"pixel_values": pixels[0]}, row("jitter", 0) | {"pixel_values": pixels[1]}]
    with torch.no_grad():
        assert model(**Answers(processor, seed=0)(rows)).loss.isfinite()


def test_perception_calls_a_picture_clean_whatever_was_done_to_it_unseen():
    batch = perception_batch([row("jpeg", 2), row("jpeg", 0), row("jitter", 5)])
    assert batch["kind"].tolist() == [TRAINED.index("jpeg") + 1, 0, TRAINED.index("jitter") + 1]
    assert batch["strength"].tolist() == [2, 0, 5]


@pytest.mark.slow
def test_pretraining_again_finds_the_weights_of_every_stage(tmp_path):
    """The Trainer would look for the model's names in files with the hub's names, and start anew."""

    def weights(*steps):
        file = pretrain(tmp_path, steps, batch=2) / "model.safetensors"
        return {
            name: tensor.clone() for name, tensor in load_state_dict(file).items()
        }  # the file is written again

    first, again = weights(1, 2), weights(1, 2)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    half = tmp_path / "speak" / "checkpoint-3"  # a kill left it without trainer_state.json
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    further = weights(1, 4)
    moved = [float((further[name].float() - first[name].float()).abs().max()) for name in first]
    assert 0 < max(moved) < 0.02  # two more steps of at most 1e-3 in every weight, not another start
    with pytest.raises(ValueError, match="was begun with other settings: seed was 0, now 1"):
        pretrain(tmp_path, (1, 4), batch=2, seed=1)
