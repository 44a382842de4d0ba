"""Pretraining's eyes and mouth say what is known of a picture; its answers know nothing of quality."""

import copy
import inspect
import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers.modeling_utils import load_state_dict

from vqr1.experiments import pretraining
from vqr1.experiments.damage import FLAWS
from vqr1.experiments.looks import DETAIL, EDGES, LIGHT, look, measure
from vqr1.experiments.pretraining import (
    NAMING,
    PLACES,
    SCORES,
    Answers,
    Perception,
    Sights,
    answer,
    corpus,
    first_score,
    naming_loss,
    pool_tokens,
    pretrain,
    prompt_text,
    reasoning,
    see_tokens,
    strengths,
    taught,
    where,
)
from vqr1.experiments.school import Flaw, Picture, PictureStream, one_flaw
from vqr1.prompts import (
    CLEAN,
    PHRASES,
    SEVERITY,
    messages,
    named_distortions,
    named_severity,
    parse_reasoning,
    parse_score,
)

LOOKS = "edges clear, detail fine, light even"


def picture(*flaws: tuple[str, int], side: int = 64, shade: int = 128) -> Picture:
    """Return a grey picture whose flaws (name, strength) are told to be all over it."""
    before = np.full((side, side, 3), 0.5, np.float32)
    told = tuple(Flaw(name, strength, before, before + 0.1) for name, strength in flaws)
    return Picture(np.full((side, side, 3), shade, np.uint8), told)


def photographs(count: int, side: int = 64) -> list[Picture]:
    """Return noise, no two pictures alike: two crops of each, authentic."""
    rng = np.random.default_rng(0)
    shots = [rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8) for _ in range(count)]
    return [Picture(shot[:, step : step + side].copy(), None) for shot in shots for step in (0, 8)]


def test_no_rating_is_imported():
    tree = inspect.getsource(pretraining)
    assert "kadid10k_type_level_mos" not in tree and "observers" not in tree.split('"""', 2)[2]
    assert {name for name in vars(pretraining) if not name.startswith("_")}.isdisjoint(
        {"rate", "human_cells", "load_ratings", "read_manifest", "oracle_scores", "latent_quality"}
    )


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
        ((0.3, 0.0, 0.0), "in the flat areas"),
        ((0.3, 0.1, 0.02), "in the flat areas"),
        ((0.0, 0.3, 0.2), "in the textures"),
        ((0.1, 0.2, 0.09), "in the textures"),
        ((0.02, 0.1, 0.3), "along the edges"),
        ((-0.1, 0.15, -0.3), "along the edges"),  # the size of the error counts
        ((0.2, 0.2, 0.3), ""),
        ((0.1, 0.1, 0.1), ""),
    ],
)
def test_where_finds_the_region_of_the_error(errors, place):
    assert where(*thirds(*errors)) == place


def test_reasoning_can_be_read_back():
    for name, strength in itertools.product(PHRASES, range(1, 6)):
        text = reasoning([(name, strength, "in the flat areas")], LOOKS)
        assert named_distortions(text) == [name] and named_severity(text) == strength
    text = reasoning([], LOOKS)
    assert text == f"{CLEAN}; {LOOKS}" and named_severity(text) == 0 and named_distortions(text) == []


def test_the_strongest_flaw_is_said_first_and_equal_ones_as_they_came():
    flaws = [("defocus", 2, ""), ("haze", 4, ""), ("jpeg", 2, "along the edges")]
    text = reasoning(flaws, LOOKS)
    assert text == f"strong haze, slight defocus, slight jpeg blocking along the edges; {LOOKS}"
    assert named_distortions(text) == ["haze", "defocus", "jpeg"] and named_severity(text) == 4


def test_the_tokenizer_learns_every_word_that_is_said(untrained):
    texts = corpus()
    words = set(re.findall(r"\w+", " ".join(texts)))
    looks = ["edges detail light", *EDGES, *DETAIL, *LIGHT]
    said = " ".join([*PHRASES.values(), *SEVERITY, CLEAN, *PLACES, *looks])
    assert set(re.findall(r"\w+", said)) <= words
    tokenizer = untrained[1].tokenizer
    for word in set(re.findall(r"[a-z]+", said)) - {"no"}:  # which begins a text
        assert len(tokenizer(f" {word}").input_ids) == 1, word


def test_the_longest_answer_fits_into_what_is_sampled(untrained):
    """The cpu configuration samples 48 tokens."""
    tokenizer = untrained[1].tokenizer
    tokens = {name: len(tokenizer(f" {PHRASES[name]}").input_ids) for name in FLAWS}
    longest = sorted(FLAWS, key=tokens.get)[-3:]
    thought = reasoning([(name, 3, "in the flat areas") for name in longest], LOOKS)
    text = f"<think>{thought}</think><answer>3.50</answer><|im_end|>"
    assert len(tokenizer(text).input_ids) <= 44


# The eyes


def test_strengths_have_a_place_for_every_flaw():
    found = strengths(picture(("jpeg", 2), ("haze", 5)).flaws)
    assert found.shape == (len(FLAWS),) and found.sum() == 7
    assert found[FLAWS.index("jpeg")] == 2 and found[FLAWS.index("haze")] == 5
    assert strengths(()).eq(0).all() and strengths(None).eq(-1).all()


def flawed(*several: list[tuple[str, int]] | None) -> torch.Tensor:
    """Return the strengths, (B, F), of pictures by the flaws that each has; None where nobody knows."""
    return torch.stack([strengths(None if own is None else picture(*own).flaws) for own in several])


def guesses(rows: int) -> torch.Tensor:
    """Return logits of an observer who guesses, (rows, NAMING)."""
    return torch.randn(rows, NAMING, generator=torch.Generator().manual_seed(0))


def sure(kinds: list[int], strongest: int) -> torch.Tensor:
    """Return the logits, (1, NAMING), of an observer who thinks these names likely, and no other."""
    logits = torch.full((1, NAMING), -30.0)
    logits[0, kinds] = logits[0, NAMING - 6 + strongest] = 0
    return logits


def test_of_single_flaws_the_loss_of_naming_is_the_cross_entropy_of_kind_and_strength():
    strength, logits = flawed([("jpeg", 3)], [], [("haze", 1)], [("defocus", 5)]), guesses(4)
    kinds = torch.tensor([1 + FLAWS.index("jpeg"), 0, 1 + FLAWS.index("haze"), 1 + FLAWS.index("defocus")])
    named = cross_entropy(logits[:, :-6], kinds)
    told = cross_entropy(logits[:, -6:], torch.tensor([3, 0, 1, 5]))
    torch.testing.assert_close(naming_loss(logits, strength), named + told)


def test_several_flaws_have_equal_shares_whatever_their_strengths():
    logits = guesses(1)
    each = [naming_loss(logits, flawed([(name, 4)])) for name in ("jpeg", "haze", "defocus")]
    both = naming_loss(logits, flawed([("jpeg", 4), ("haze", 1)]))
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)
    torch.testing.assert_close(both, naming_loss(logits, flawed([("jpeg", 2), ("haze", 4)])))
    three = naming_loss(logits, flawed([("jpeg", 1), ("haze", 4), ("defocus", 4)]))
    torch.testing.assert_close(three, sum(each) / 3)


def test_the_strength_that_is_told_is_that_of_the_strongest():
    strength, logits = flawed([("jpeg", 2), ("haze", 5)]), guesses(1)
    kind = naming_loss(logits, strength) - cross_entropy(logits[:, -6:], torch.tensor([5]))
    for told in range(6):
        right = logits.clone()
        right[0, NAMING - 6 :] = 0
        right[0, NAMING - 6 + told] = 50
        expected = kind + (0 if told == 5 else 50)
        torch.testing.assert_close(naming_loss(right, strength), expected)


def test_naming_costs_a_perfect_observer_the_least():
    jpeg, haze = 1 + FLAWS.index("jpeg"), 1 + FLAWS.index("haze")
    one, two, none = flawed([("jpeg", 3)]), flawed([("jpeg", 3), ("haze", 1)]), flawed([])
    assert naming_loss(sure([jpeg], 3), one) == pytest.approx(0, abs=1e-5)
    assert naming_loss(sure([0], 0), none) == pytest.approx(0, abs=1e-5)
    assert naming_loss(sure([jpeg, haze], 3), two) == pytest.approx(np.log(2), abs=1e-5)
    assert naming_loss(sure([jpeg], 3), two) > 10  # haze is not named
    assert naming_loss(sure([jpeg, haze], 3), one) == pytest.approx(np.log(2), abs=1e-5)  # and here invented
    assert naming_loss(sure([jpeg], 0), none) > 10
    assert naming_loss(sure([jpeg], 4), one) > 10


def test_pictures_of_unknown_flaws_take_no_part_in_the_loss_of_naming():
    strength, logits = flawed([("jpeg", 3)], None, []), guesses(3).requires_grad_()
    loss = naming_loss(logits, strength)
    torch.testing.assert_close(loss, naming_loss(logits[[0, 2]], strength[[0, 2]]))
    loss.backward()
    assert logits.grad[0].all() and not logits.grad[1].any() and logits.grad[2].all()


def test_a_step_of_unknown_pictures_alone_goes_on():
    logits = guesses(2).requires_grad_()
    loss = naming_loss(logits, flawed(None, None))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_pooled_tokens_are_of_their_own_picture(untrained):
    """Pictures of several sizes in a batch have what each has alone."""
    model, processor = untrained
    sides = [photographs(1, side)[0] for side in (64, 96)]
    with torch.no_grad():
        both = pool_tokens(see_tokens(model.model.visual, **pretraining.pixels(processor, sides)))
        alone = [
            pool_tokens(see_tokens(model.model.visual, **pretraining.pixels(processor, [one])))
            for one in sides
        ]
    assert both.shape == (2, 2 * 192)
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_sights_tell_all_flaws_and_measure_every_second_picture(untrained):
    lists = [[picture(("jpeg", 2)), picture(("jpeg", 2)), picture(), picture()], photographs(2)]
    batch = Sights(untrained[1])(lists)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]] * 8 and batch["pixel_values"].shape == (
        8 * 16,
        768,
    )
    known = [[2.0] * 2, [0.0] * 2, [-len(FLAWS)] * 4]
    assert batch["strength"].sum(1).tolist() == sum(known, [])
    expected = [measure(several[n].pixels) for several in lists for n in (0, 2)]
    np.testing.assert_array_equal(batch["looks"].numpy(), expected)


def test_perception_calls_a_picture_clean_whatever_was_done_to_it_unseen(monkeypatch):
    """A flaw below `INVISIBLE_DB` is no flaw of the picture, so nothing of it is told."""
    monkeypatch.setattr("vqr1.experiments.school.add", lambda x, *_: x + np.float32(0.5 / 255))
    [pictures] = itertools.islice(PictureStream(0, {64: 1.0}, one_flaw, sources=3), 1)
    assert len(pictures) == 6 and all(strengths(one.flaws).eq(0).all() for one in pictures)


def test_perception_learns_in_every_head_and_in_the_tower(untrained):
    visual = copy.deepcopy(untrained[0].model.visual).train()
    lists = [[picture(("jpeg", 2)), picture(("jpeg", 2)), picture(), picture()], photographs(2)]
    batch = Sights(untrained[1])(lists)
    torch.manual_seed(0)
    tower = Perception(visual, batch["looks"])
    assert tower.flaws.out_features == len(FLAWS) + 7 and tower.looks.out_features == 83
    loss = tower(**batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    still = [
        name for name, weight in tower.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert not still


def test_what_is_measured_is_read_off_the_crop_that_was_measured(untrained):
    visual, processor = copy.deepcopy(untrained[0].model.visual), untrained[1]
    first, other = photographs(2), photographs(4)[4:]
    batch = Sights(processor)([first])
    torch.manual_seed(0)
    tower = Perception(visual, batch["looks"])
    torch.nn.init.zeros_(tower.flaws.weight)  # it says the same of every picture

    def loss(pictures):
        with torch.no_grad():
            return float(tower(**batch | pretraining.pixels(processor, pictures))["loss"])

    seconds = [other[n] if n % 2 else first[n] for n in range(4)]
    firsts = [first[n] if n % 2 else other[n] for n in range(4)]
    assert loss(seconds) == pytest.approx(loss(first), abs=1e-4)
    assert loss(firsts) != pytest.approx(loss(first), abs=1e-2)


# The answer's ignorance


def test_a_score_follows_from_the_strengths_alone():
    assert list(inspect.signature(answer).parameters) == ["strengths", "rng"]
    assert list(inspect.signature(first_score).parameters) == ["strengths"]
    for told in ([], [3], [5, 5, 1]):
        assert len({answer(told, np.random.default_rng(9)) for _ in range(2)}) == 1
    means = [
        np.mean([parse_score(answer(told, np.random.default_rng(seed))) for seed in range(300)])
        for told in ([], [1], [2], [3], [4], [5])
    ]
    assert means == pytest.approx(SCORES, abs=0.1) and sorted(means, reverse=True) == means


def test_a_further_flaw_never_betters_a_score():
    several = [
        list(told) for n in range(4) for told in itertools.combinations_with_replacement(range(1, 6), n)
    ]
    for told in several:
        score = first_score(told)
        assert 1 < score <= SCORES[0] and score == pytest.approx(first_score(told[::-1]))
        assert all(first_score([*told, more]) < score for more in range(1, 6))
    assert [first_score([strength] if strength else []) for strength in range(6)] == pytest.approx(SCORES)


@pytest.mark.parametrize("told", [(1,), (4,), (5, 2)])
def test_every_flaw_of_a_strength_has_the_same_targets(untrained, told):
    def targets(names):
        collate, grid = Answers(untrained[1], seed=0), torch.tensor([1, 4, 4])
        one = picture(*zip(names, told))
        return [parse_score(collate.text(one, grid)[1]) for _ in range(30)]

    expected = targets(["jpeg", "haze"])
    assert len(set(expected)) > 20 and all(1 <= score <= 5 for score in expected)
    for n in range(len(FLAWS)):
        assert targets([FLAWS[n], FLAWS[n - 1]]) == expected


def test_three_in_four_answers_think_first(untrained):
    collate, one = Answers(untrained[1], seed=0), picture(("jpeg", 3))
    pairs = [collate.text(one, torch.tensor([1, 4, 4])) for _ in range(200)]
    thoughts = [parse_reasoning(text) for _, text in pairs]
    assert set(thoughts) == {"", f"moderate jpeg blocking; {look(one.pixels)}"}
    assert 130 < sum(map(bool, thoughts)) < 170
    assert all(
        ("<think> </think>" in prompt) == bool(thought) for (prompt, _), thought in zip(pairs, thoughts)
    )


def test_a_thought_says_where_each_flaw_lies_by_the_picture_before_it(untrained):
    """The second flaw's place is where it changed what the first one had left."""
    clean, first = thirds(0.3, 0.0, 0.0)
    second = first + (thirds(0.0, 0.0, 0.3)[1] - clean)
    flaws = (Flaw("haze", 4, clean, first), Flaw("jpeg", 2, first, second))
    one = Picture(np.full((96, 96, 3), 20, np.uint8), flaws)
    collate = Answers(untrained[1], seed=0, thinking=1.0)
    thought = parse_reasoning(collate.text(one, torch.tensor([1, 6, 6]))[1])
    assert thought == (
        "strong haze in the flat areas, slight jpeg blocking along the edges; "
        "edges blurred, detail lost, light dark"
    )


@pytest.mark.parametrize("thinking", [True, False])
def test_the_prompt_has_a_placeholder_for_every_token_of_the_picture(untrained, thinking):
    """It is the prompt that the processor makes of the picture itself."""
    processor, image = untrained[1], Image.new("RGB", (96, 64))
    grid = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0]
    prompt = prompt_text(processor, grid, thinking)
    chat = processor.apply_chat_template(messages(thinking), add_generation_prompt=True, tokenize=False)
    expected = processor(images=[image], text=[chat], return_tensors="pt")["input_ids"][0]
    assert processor.tokenizer(prompt).input_ids == expected.tolist()
    assert prompt.count("<|image_pad|>") == 6


def test_only_the_answer_carries_loss(untrained):
    processor = untrained[1]
    tokenizer = processor.tokenizer
    pictures = [
        picture(("jpeg", 3)),
        picture(side=128),
        picture(("white_noise", 5), ("haze", 1)),
        picture(("jitter", 2), side=96),
    ]
    batch = Answers(processor, seed=1)([pictures[:2], pictures[2:]])
    assert not batch["attention_mask"].all()  # padded
    grids = batch["image_grid_thw"]
    for grid, ids, labels, mask, kinds in zip(
        grids, *(batch[key] for key in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"))
    ):
        learned = labels != -100
        assert torch.equal(labels[learned], ids[learned])
        target, prompt = tokenizer.decode(ids[learned]), tokenizer.decode(ids[mask.bool() & ~learned])
        assert re.fullmatch(
            r"(<think>[a-z ,]+; [a-z ,]+</think>)?<answer>\d\.\d\d</answer><\|im_end\|>", target
        )  # the end, too, is taught
        assert (
            prompt.startswith("<|im_start|>system")
            and prompt.endswith("<|im_start|>assistant\n")
            and "<answer> </answer>" in prompt
        )
        assert not mask[: len(mask) - int(mask.sum())].any()  # padding is on the left
        assert kinds.sum() == grid.prod() // 4 and (ids[kinds.bool()] == processor.image_token_id).all()
    assert grids.tolist() == [[1, n, n] for n in (4, 8, 4, 6)]
    assert batch["pixel_values"].shape == (16 + 64 + 16 + 36, 3 * 16 * 16)


def test_what_is_taught_is_the_answer_token_for_token(untrained):
    tokenizer = untrained[1].tokenizer
    batch = taught(untrained[1], [("a prompt", "<answer>3.50</answer><|im_end|>"), ("more of it", "5")])
    for labels, expected in zip(batch["labels"], ("<answer>3.50</answer><|im_end|>", "5")):
        assert labels[labels != -100].tolist() == tokenizer(expected).input_ids


def test_the_batch_is_what_the_policy_takes(untrained):
    model, processor = untrained
    pictures = [picture(("jpeg", 3)), picture(), picture(("haze", 1), ("jpeg", 2)), picture(side=96)]
    with torch.no_grad():
        assert model(**Answers(processor, seed=0)([pictures])).loss.isfinite()


# The whole


@pytest.mark.slow
def test_pretraining_again_finds_the_weights_of_every_stage(tmp_path, monkeypatch):
    """The Trainer would look for the model's names in files with the hub's names, and start anew."""
    monkeypatch.setattr(pretraining, "SEE_SIZES", {96: 1.0})
    monkeypatch.setattr(pretraining, "SPEAK_SIZES", {128: 1.0})

    def weights(*steps):
        file = pretrain(tmp_path, steps, school=(), batch=2) / "model.safetensors"
        return {
            name: tensor.clone() for name, tensor in load_state_dict(file).items()
        }  # the file is written again

    first, again = weights(1, 1, 2), weights(1, 1, 2)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    half = tmp_path / "speak" / "checkpoint-3"  # a kill left it without trainer_state.json
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    further = weights(1, 1, 4)
    moved = {name: float((further[name].float() - first[name].float()).abs().max()) for name in first}
    assert 0 < max(moved.values()) < 0.02  # two more steps of at most 1e-3 in every weight, not another start
    assert not any(by for name, by in moved.items() if "visual" in name)  # the tower learned before
    card = (tmp_path / "policy" / "README.md").read_text(encoding="utf-8")
    said = "seed 0, 1 steps of the tower on one flaw at a time, 1 on up to three, 4 of the language model"
    assert said in " ".join(card.split())
    for change, said in (({"seed": 1}, "seed was 0, now 1"), ({"school": [tmp_path]}, "school was 0, now 1")):
        with pytest.raises(ValueError, match=f"was begun with other settings: {said}"):
            pretrain(tmp_path, (1, 1, 4), **{"batch": 2} | change)
