"""The Scorer is exact on known models, equal to brute force on a real one, and honest about failures."""

import copy
import io
import math
import os
import shutil
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shared import pushed
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vqr1.data import ahead
from vqr1.engines import transformers as engine
from vqr1.experiments.tiny import CHAT_TEMPLATE, SPECIAL
from vqr1.policy import PictureProcessor, load_policy
from vqr1.prompts import format_ok, messages, named_distortions, parse_score
from vqr1.scoring import OFFICIAL, OPEN, Scorer
from vqr1.thurstone import comparative_probability

NAN = "nan in the logits"


class KnownCache(SimpleNamespace):
    """Hold what a model keeps of a prefilled prompt: its length and its picture."""

    def get_seq_length(self):
        return self.length

    def crop(self, length):
        assert length < 0  # of the tree's tokens, which `Known` does not keep

    def batch_repeat_interleave(self, repeats):
        self.told = [answers for answers in self.told for _ in range(repeats)]


class Known(torch.nn.Module):
    """Answer from a known distribution, {answer: probability}, chosen by the picture's width.

    It writes an answer and its closing tag in its tokenizer's tokens. NAN as an answer puts one NaN in the
    logits. Like a transformer, it sees only the text that the attention mask shows.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, processor, *answers):
        super().__init__()
        self.answers, self.tokenizer, self.modes, self.batches = answers, processor.tokenizer, [], []
        end, pad = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        self.generation_config = SimpleNamespace(eos_token_id=end, pad_token_id=pad)
        self.config = SimpleNamespace(image_token_id=processor.image_token_id)
        self.model = KnownInner(self)

    def forward(self, input_ids, attention_mask, past_key_values, **_):
        self.modes.append(self.training)
        seen = attention_mask[:, 0, :, -input_ids.shape[1] :] == 0  # (B, T, T)
        logits = torch.full((*input_ids.shape, len(self.tokenizer)), -30.0)
        for row, answers in enumerate(past_key_values.told):
            for token in range(input_ids.shape[1]):
                so_far = input_ids[row, seen[row, token]].tolist()[1:]  # after the end of the tag
                for following, share in next_tokens(self.tokenizer, answers, so_far).items():
                    logits[row, token, following] = math.log(share)
                if NAN in answers:
                    logits[row, token, 7] = math.nan
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids, past_key_values, generation_config, **_):
        self.modes.append(self.training)
        texts = []
        for answers in past_key_values.told:
            share = torch.tensor(list(answers.values()))
            drawn = torch.multinomial(share, 1) if generation_config.do_sample else share.argmax()[None]
            texts.append(f"<answer>{list(answers)[drawn]}</answer><|im_end|>")
        ids = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
        return SimpleNamespace(sequences=torch.cat([input_ids, ids], 1))


class KnownInner:
    """Stand below `Known`'s output layer: take pictures in, and remember which."""

    def __init__(self, outer):
        self.outer = outer

    def get_rope_index(self, ids, kinds, image_grid_thw, attention_mask):
        return torch.zeros(3, *ids.shape, dtype=torch.long), torch.zeros(len(ids), 1, dtype=torch.long)

    def __call__(self, input_ids, image_grid_thw=None, past_key_values=None, **_):
        self.outer.modes.append(self.outer.training)
        if image_grid_thw is None:  # the beginning that all prompts share
            return SimpleNamespace(past_key_values=KnownCache(length=input_ids.shape[1], told=[None]))
        self.outer.batches.append(image_grid_thw[:, 2].tolist())
        past_key_values.length += input_ids.shape[1]
        past_key_values.told = [
            self.outer.answers[width // 2 - 2] for width in image_grid_thw[:, 2].tolist()
        ]  # in patches of 16 px
        return SimpleNamespace(past_key_values=past_key_values)


def next_tokens(tokenizer, answers, so_far):
    """Return {token: share} of what follows the tokens `so_far` in the answers; {} if nothing does."""
    shares = {}
    for answer, share in answers.items():
        ids = tokenizer.encode(f"{answer}</answer>", add_special_tokens=False)
        if ids[: len(so_far)] == so_far and len(ids) > len(so_far):
            shares[ids[len(so_far)]] = shares.get(ids[len(so_far)], 0) + share
    return {token: share / sum(shares.values()) for token, share in shares.items()}


def picture(number):
    """Return a picture for which `Known` answers from the distribution of this number."""
    return Image.new("RGB", (64 + 32 * number, 64), "gray")


@pytest.fixture
def known(untrained):
    """Return known(*distributions, **options): a Scorer of a model with these answers."""
    processor = untrained[1]
    return lambda *answers, **options: Scorer((Known(processor, *answers), processor), **options)


# The expected score


def test_mean_and_deviation_are_those_of_the_distribution(known):
    scorer = known(
        {"3.25": 0.5, "4.75": 0.25, "1.00": 0.25}, {"2.00": 1.0}, {"5.99": 0.5, "1.00": 0.5}, batch_size=2
    )
    mixed, sure, wide = scorer.score([picture(0), picture(1), picture(2)])
    assert mixed.score == pytest.approx(3.0625, abs=1e-6)
    assert mixed.std == pytest.approx(
        math.sqrt(0.5 * 0.1875**2 + 0.25 * 1.6875**2 + 0.25 * 2.0625**2), abs=1e-6
    )
    assert (sure.score, sure.std) == (pytest.approx(2.0, abs=1e-6), pytest.approx(0.0, abs=1e-3))
    assert (wide.score, wide.std) == (pytest.approx(3.495, abs=1e-6), pytest.approx(2.495, abs=1e-6))
    assert [score.mass for score in (mixed, sure, wide)] == pytest.approx([1, 1, 1], abs=1e-6)


def test_all_500_scores_count_with_their_own_probability(known):
    rng = np.random.default_rng(0)
    values = [f"{d}.{n:02d}" for d in range(1, 6) for n in range(100)]
    share = rng.dirichlet(np.full(500, 0.3))
    score = known(dict(zip(values, share.tolist()))).score([picture(0)])[0]
    mean = share @ np.array(values, float)
    assert score.score == pytest.approx(mean, abs=1e-5)
    assert score.std == pytest.approx(math.sqrt(share @ (np.array(values, float) - mean) ** 2), abs=1e-5)


def test_other_answers_are_left_out_and_the_rest_renormalised(known):
    score = known({"3.00": 0.3, "4.00": 0.3, "good": 0.2, "4,5": 0.1, "3-4": 0.1}).score([picture(0)])[0]
    assert (
        score.mass == pytest.approx(0.6, abs=1e-6)
        and score.score == pytest.approx(3.5, abs=1e-6)
        and not score.error
    )


def test_answers_with_fewer_decimals_count_as_they_stand(known):
    score = known({"3.00": 0.25, "4.5": 0.25, "2": 0.5}).score([picture(0)])[0]
    assert score.mass == pytest.approx(1.0, abs=1e-6) and score.score == pytest.approx(
        0.25 * 3 + 0.25 * 4.5 + 0.5 * 2, abs=1e-6
    )


def test_a_distribution_mostly_of_other_answers_is_no_score(known):
    poor, good = known({"3.00": 0.4, "good": 0.6}, {"3.00": 1.0}).score([picture(0), picture(1)])
    assert math.isnan(poor.score) and math.isnan(poor.std) and poor.mass == pytest.approx(0.4, abs=1e-6)
    assert "only 0.40 of the probability" in poor.error and "'good</answer>'" in poor.error
    assert good.score == pytest.approx(3.0) and not good.error


SPELLINGS = {
    "3.50": 3.5,
    "3.5": 3.5,
    "4": 4.0,
    "0.80": 0.8,
    "10": 10.0,
    " 3.50 ": 3.5,
    "\n3.50\n": 3.5,
    "3.5 ": 3.5,
    "3.5\n": 3.5,
    "4 ": 4.0,
    "4.": 4.0,
    "3.5/5": 3.5,
    ".85": 0.85,
    "5.20": 5.2,
    "4/5": 4.0,
    "3.70 out of 5": 3.7,
    "3.5.": 3.5,
    "0": 0.0,
}


def qwen_processor(untrained):
    """Return the embedded processor with a tokenizer that cuts answers as Qwen2.5's does.

    It has Qwen2.5's pattern and those of its merges that matter.
    `<answer>` is `<`, `answer`, `>`; `>\\n`, ` </` and `.</` are one token each.
    """
    merges = [
        tuple(pair.split())
        for pair in [
            "< /",
            "Ġ </",
            ". </",
            "> Ċ",
            "a n",
            "s w",
            "an sw",
            "e r",
            "answ er",
            "o u",
            "ou t",
            "Ġ out",
            "o f",
            "Ġ of",
            "* *",
            "Ġ Ġ",
        ]
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    return PictureProcessor(untrained[1].image_processor, whole, chat_template=CHAT_TEMPLATE)


def test_the_cut_down_tokenizer_cuts_as_qwens(untrained):
    tokenizer = qwen_processor(untrained).tokenizer
    cut = {
        text: [tokenizer.decode([i]) for i in tokenizer.encode(text)]
        for text in ("<answer>\n3.50", " </answer>", "4.</answer>", "</answer>")
    }
    assert list(cut.values()) == [
        ["<", "answer", ">\n", "3", ".", "5", "0"],
        [" </", "answer", ">"],
        ["4", ".</", "answer", ">"],
        ["</", "answer", ">"],
    ]


@pytest.fixture(params=["embedded", "qwen", "qwen, whole"])
def spelled(request, untrained):
    """Return a maker of Scorers of known answers, in the embedded and in Qwen2.5's tokenizer.

    The whole of Qwen2.5's is used if QWEN_TOKENIZER names it.
    """
    processor = untrained[1] if request.param == "embedded" else qwen_processor(untrained)
    if request.param == "qwen, whole":
        if not os.environ.get("QWEN_TOKENIZER"):
            pytest.skip("QWEN_TOKENIZER names no tokenizer.json of Qwen2.5")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=os.environ["QWEN_TOKENIZER"],
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            padding_side="left",
        )
        processor = PictureProcessor(untrained[1].image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
    return lambda *answers, **options: Scorer((Known(processor, *answers), processor), **options)


@pytest.mark.parametrize("answer", SPELLINGS, ids=repr)
def test_every_spelling_that_the_parser_reads_counts(spelled, answer):
    assert parse_score(f"<answer>{answer}</answer>") == SPELLINGS[answer]
    score = spelled({answer: 1.0}).score([picture(0)])[0]
    assert not score.error and [score.score, score.mass] == pytest.approx([SPELLINGS[answer], 1], abs=1e-6)


def test_the_expected_score_is_the_mean_over_all_spellings(spelled):
    share = dict(zip(SPELLINGS, np.random.default_rng(1).dirichlet(np.ones(len(SPELLINGS))).tolist()))
    score = spelled(share).score([picture(0)])[0]
    mean = sum(share[answer] * value for answer, value in SPELLINGS.items())
    variance = sum(share[answer] * (value - mean) ** 2 for answer, value in SPELLINGS.items())
    assert [score.score, score.std, score.mass] == pytest.approx([mean, math.sqrt(variance), 1], abs=1e-6)


@pytest.mark.parametrize(
    "answer",
    ["4,5", "1e-1", "3-4", "3 or 4", "100%", "5/10", "3.50/10", "3.50-4.00", "1.2.3", "-2.5", "3½", "good"],
)
def test_what_the_parser_does_not_read_is_no_expected_score(spelled, answer):
    score = spelled({answer: 1.0}).score([picture(0)])[0]
    assert math.isnan(score.score) and answer[:5] in score.error


def test_white_space_that_clings_to_the_tag_is_taken_off(spelled):
    scorer = spelled({"3.50": 1.0}, thinking=True)
    tokenizer = scorer.engine.processor.tokenizer
    plain, newline = (
        tokenizer.encode(f"<think>sharp</think><answer>{end}", add_special_tokens=False) for end in ("", "\n")
    )
    written = newline if len(newline) == len(plain) else plain  # ">\n" is one token of Qwen's
    assert scorer.engine._thoughts(torch.tensor(written)) == "<think>sharp</think><answer>"


# NaN in the logits


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("estimate", ["expected", "greedy", "sample"])
def test_nan_in_the_logits_is_an_error_of_that_row_alone(trained, photo, estimate, thinking):
    model = trained[0]
    scorer = Scorer(trained, thinking, estimate, k=2, batch_size=2, max_new_tokens=64)
    images = [photo.crop((0, 0, 64, 64)), photo.crop((100, 60, 228, 156))]  # the smaller is the first row

    def spoil(module, inputs, logits):
        logits[: len(logits) // 2, -1, 7] = math.nan
        return logits

    hook = model.lm_head.register_forward_hook(spoil)
    try:
        bad, good = scorer.score(images)
        ranked = scorer.rank(images)
        with pytest.raises(ValueError, match="cannot compare.*NaN"):
            scorer.compare(*images)
    finally:
        hook.remove()
    assert "NaN" in bad.error and math.isnan(bad.score) and math.isnan(bad.std)
    assert not good.error and 1 <= good.score <= 5
    assert (
        ranked["image"].tolist() == [1, 0]
        and "NaN" in ranked["error"].iloc[1]
        and ranked["rank_lo"].isna().tolist() == [False, True]
    )


def test_one_nan_in_the_tree_is_an_error(known):
    bad, good = known({NAN: 1.0, "3.00": 1.0}, {"3.00": 1.0}).score([picture(0), picture(1)])
    assert (
        "NaN" in bad.error
        and math.isnan(bad.score)
        and math.isnan(bad.std)
        and good.score == pytest.approx(3.0)
    )


def crops(photo):
    """Return small pictures of one photograph: four sizes, and two that differ only in pixels."""
    boxes = [
        (0, 0, 64, 64),
        (100, 60, 228, 156),
        (200, 100, 264, 164),
        (30, 200, 190, 296),
        (0, 100, 96, 164),
        (250, 30, 314, 158),
    ]
    return [photo.crop(box) for box in boxes]


@torch.no_grad()
def brute_force(model, processor, image, thinking, text):
    """Return (mean, std, mass) of the numbers 0 to 10 after prompt and `text`, by a full forward per d.d.

    A number ends with any token except a digit, a point, a sign of doubt and the end of the completion.
    """
    prompt = (
        processor.apply_chat_template(messages(thinking), add_generation_prompt=True, tokenize=False) + text
    )
    tokenizer = processor.tokenizer
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    stop = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list("0123456789.,-%+eE"))]
    beginnings = ["10", *(f"{first}.{second}" for first in [*range(10), ""] for second in range(10))]
    share, values = [], []
    for start in beginnings:
        batch = processor(text=[prompt + start], images=[image], return_tensors="pt").to(model.device)
        n = len(start)
        p = (
            model(**batch, logits_to_keep=n + 1).logits[0].double().softmax(-1)
        )  # (n + 1, V): before each character, and after all
        ids = batch["input_ids"][0, -n:]
        reached = [1.0, *p[:n].gather(1, ids[:, None])[:, 0].cumprod(0).tolist()]
        point = tokenizer.convert_tokens_to_ids(".")
        ends = [
            float(1 - row[stop].sum() + ("." in start[:i]) * row[point]) for i, row in enumerate(p)
        ]  # a second point is a full stop
        found = {start: reached[n] * ends[n]}
        if n != 2 or start[0] == ".":
            found |= {
                f"{start}{digit}": reached[n] * float(p[n, token]) for digit, token in enumerate(digits)
            }
        if start.endswith(".0") and n == 3:
            found |= {f"{start[0]}.": reached[2] * ends[2], start[0]: reached[1] * ends[1]}
        share += found.values()
        values += map(float, found)
    p, values = torch.tensor(share, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    mean = float(p @ values / p.sum())
    return mean, float((p @ (values - mean) ** 2 / p.sum()).sqrt()), float(p.sum())


@pytest.fixture(scope="module")
def trained(tiny):
    return tiny


@pytest.mark.parametrize("thinking", [False, True])
def test_the_expected_score_is_that_of_brute_force(trained, photo, thinking):
    pictures = crops(photo)[:3]  # two sizes, so that the batch is padded
    for image, score in zip(pictures, Scorer(trained, thinking).score(pictures)):
        assert not score.error and score.answers[0].startswith("<think>") == thinking
        mean, std, mass = brute_force(*trained, image, thinking, score.answers[0])
        assert [score.score, score.std, score.mass] == pytest.approx([mean, std, mass], abs=2e-6)
        assert 0.05 < std < 2 and mass > 0.5


@pytest.fixture(scope="module")
def alone(trained, photo):
    return [Scorer(trained, batch_size=1).score([image])[0] for image in crops(photo)]


@settings(max_examples=8)
@given(order=st.lists(st.integers(0, 5), min_size=2, max_size=7), size=st.integers(1, 7))
def test_a_picture_has_one_score_in_any_company(trained, photo, alone, order, size):
    pictures = crops(photo)
    scores = Scorer(trained, batch_size=size).score([pictures[i] for i in order])
    assert [score.score for score in scores] == pytest.approx([alone[i].score for i in order], abs=1e-4)
    assert [score.std for score in scores] == pytest.approx([alone[i].std for i in order], abs=1e-4)


def test_the_trained_policy_thinks_and_answers_in_format(trained, photo):
    pictures = crops(photo)[1:3]
    greedy = Scorer(trained, thinking=True, estimate="greedy").score(pictures)
    expected = Scorer(trained, thinking=True).score(pictures)
    for one, two in zip(greedy, expected):
        assert format_ok(one.answers[0]) and 1 <= one.score <= 5 and one.score == parse_score(one.answers[0])
        assert one.answers[0].startswith(two.answers[0]) and two.answers[0].endswith(
            OPEN
        )  # the same greedy reasoning
        assert one.reasoning == two.reasoning != ""
    described = Scorer(trained).describe(pictures[0])
    assert described.text == greedy[0].reasoning and described.distortions == named_distortions(
        described.text
    )
    assert described.score.score == pytest.approx(expected[0].score, abs=1e-5)
    assert str(described).splitlines()[-1] == f"score {expected[0].score:.2f} ± {expected[0].std:.2f}"
    assert f"<em>{described.text}</em>" in described._repr_html_()


def test_a_policy_that_never_answers_gives_no_score(untrained):
    for estimate in ("expected", "greedy"):
        score = Scorer(untrained, thinking=True, estimate=estimate, max_new_tokens=3).score([picture(0)])[0]
        assert math.isnan(score.score) and math.isnan(score.std) and score.error.startswith("no ")
        with pytest.raises(ValueError, match="no <answer> in 3 tokens"):
            Scorer(untrained, max_new_tokens=3).describe(picture(0))


# Greedy and sampled scores


def test_greedy_takes_the_likeliest_answer(known):
    scorer = known({"3.25": 0.4, "4.75": 0.6}, {"The score is 2.5": 1.0}, estimate="greedy")
    one, two = scorer.score([picture(0), picture(1)])
    assert (one.score, two.score) == (4.75, 2.5) and math.isnan(one.std) and math.isnan(one.mass)
    assert one.answers == ["<answer>4.75</answer>"]


MIXED = {f"{value}.00": 0.2 for value in range(1, 6)}


def test_sampled_scores_have_the_mean_and_deviation_of_their_answers(known):
    scores = known(MIXED, MIXED, estimate="sample", k=6).score([picture(0), picture(1)])
    for score in scores:
        values = [parse_score(answer) for answer in score.answers]
        assert len(values) == 6 and len(set(values)) > 1
        assert score.score == pytest.approx(np.mean(values)) and score.std == pytest.approx(
            np.std(values, ddof=1)
        )
    assert scores[0].answers != scores[1].answers


def test_the_seed_repeats_the_samples(known):
    def answers(seed):
        return known(MIXED, estimate="sample", k=12, seed=seed).score([picture(0)])[0].answers

    assert answers(1) == answers(1) != answers(2)


def test_sampling_leaves_the_global_generator_alone(known):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    known(MIXED, estimate="sample").score([picture(0)])
    assert torch.equal(torch.rand(3), expected)


def test_a_real_policy_samples_without_truncation(untrained):
    """At temperature 1, top_k 0 and top_p 1, no two answers of an untrained policy are alike."""
    score = Scorer(untrained, estimate="sample", k=4, max_new_tokens=6).score([picture(0)])[0]
    again = Scorer(untrained, estimate="sample", k=4, max_new_tokens=6).score([picture(0)])[0]
    assert len(set(score.answers)) == 4 and score.answers == again.answers


def test_sampled_answers_off_the_scale_are_marked_and_left_out(known):
    score = known({"3.00": 0.4, "4.00": 0.3, "9000": 0.3}, estimate="sample", k=20).score([picture(0)])[0]
    values = np.array([parse_score(answer) for answer in score.answers])
    off = int((values > 5).sum())
    assert 0 < off < 18 and score.note == f"{off} of 20 answers off the scale 1 to 5" and not score.error
    assert [score.score, score.std] == pytest.approx(
        [values[values <= 5].mean(), values[values <= 5].std(ddof=1)]
    )


def test_answers_that_are_all_off_the_scale_are_no_sampled_score(known):
    score = known({"0.20": 0.5, "9000": 0.5}, estimate="sample", k=4).score([picture(0)])[0]
    assert math.isnan(score.score) and "4 of 4 answers off the scale 1 to 5" in score.error


def test_a_greedy_answer_off_the_scale_stands_and_is_marked(known):
    score, inside = known({"0.20": 1.0}, {"5.00": 1.0}, estimate="greedy").score([picture(0), picture(1)])
    assert score.score == 0.2 and score.note == "1 of 1 answers off the scale 1 to 5" and inside.note == ""


@pytest.mark.parametrize("estimate", ["greedy", "sample"])
@pytest.mark.parametrize("answer", ["good", "nan", "inf", ""])
def test_what_cannot_be_parsed_never_becomes_a_number(known, estimate, answer):
    score, fine = known({answer: 1.0}, {"2.50": 1.0}, estimate=estimate).score([picture(0), picture(1)])
    assert math.isnan(score.score) and math.isnan(score.std)
    assert f"<answer>{answer}</answer>" in score.error and fine.score == 2.5


def test_only_parseable_samples_are_averaged(known):
    score = known({"good": 0.5, "3.00": 0.25, "5.00": 0.25}, estimate="sample", k=20).score([picture(0)])[0]
    values = [value for value in map(parse_score, score.answers) if not math.isnan(value)]
    assert 2 < len(values) < 18 and len(score.answers) == 20 and not score.error
    assert (score.score, score.std) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("penalty", [1.05, 10.0])
def test_the_official_settings_answer_as_generate_does_with_them(trained, photo, thinking, penalty):
    scorer = Scorer(trained, thinking, **OFFICIAL | {"max_new_tokens": 24, "repetition_penalty": penalty})
    model, processor = trained
    text = processor.apply_chat_template(messages(thinking, numbered=True), add_generation_prompt=True)
    inputs = processor(images=[photo], text=[text], return_tensors="pt")
    length, how = inputs["input_ids"].shape[1], {"do_sample": False, "repetition_penalty": penalty}
    said = model.generate(**inputs, max_new_tokens=24, **how)[0, length:]
    [score] = scorer.score([photo])
    assert score.answers == [processor.tokenizer.decode(said, skip_special_tokens=True)]
    if penalty > 2:  # it does something
        assert score.answers != scorer.with_(repetition_penalty=1.0).score([photo])[0].answers


def test_an_expected_score_has_no_repetition_penalty(trained, photo):
    scorer = Scorer(trained, thinking=True)
    assert scorer.with_(repetition_penalty=10.0).score([photo]) == scorer.score([photo])


def test_a_policy_is_loaded_in_4_bits_and_for_few_pixels(photo):
    options = {"quantize": True, "pixels": [1024, 16_384]}
    [asked] = Scorer("tiny-policy", **options).score([photo])
    assert [asked] == Scorer(load_policy("tiny-policy", **options)).score([photo])
    for key in options:
        rest = {name: value for name, value in options.items() if name != key}
        assert asked.score != Scorer("tiny-policy", **rest).score([photo])[0].score, key


@pytest.mark.parametrize("options", [{"quantize": True}, {"pixels": [1024, 16_384]}])
def test_what_only_loading_sets_is_refused_for_a_loaded_policy(trained, options):
    with pytest.raises(ValueError, match="give them to load_policy"):
        Scorer(trained, **options)


@pytest.mark.parametrize("pixels", [[16_384, 1024], [0, 16_384], [1, 1000]])
def test_pixels_that_are_no_range_are_named(pixels):
    with pytest.raises(ValueError, match=f"pixels {pixels[0]} to {pixels[1]} are no range"):
        Scorer("tiny-policy", pixels=pixels)


# Pictures that cannot be read


@pytest.fixture
def bad_files(tmp_path, photo):
    photo.save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture", encoding="utf-8")
    (tmp_path / "a folder.png").mkdir()
    return [
        tmp_path / name for name in ("missing.png", "truncated.jpg", "empty.png", "text.png", "a folder.png")
    ]


@pytest.mark.parametrize("estimate", ["expected", "greedy", "sample"])
def test_a_file_that_cannot_be_read_is_a_row_with_an_error(known, bad_files, estimate):
    scorer = known({"3.00": 1.0}, {"4.00": 1.0}, estimate=estimate, batch_size=4)
    scores = scorer.score([bad_files[0], picture(0), *bad_files[1:], picture(1)])
    assert (
        [round(score.score) for score in scores if not score.error] == [3, 4]
        and not scores[1].error
        and not scores[-1].error
    )
    for path, score in zip(bad_files, [scores[0], *scores[2:]]):
        assert str(path) in score.error and math.isnan(score.score) and score.answers == []


def test_a_batch_without_a_readable_picture_needs_no_model(known, bad_files):
    scorer = known()
    assert all(score.error for score in scorer.score(bad_files)) and scorer.engine.model.batches == []
    assert scorer.score([]) == []


def test_what_a_file_holds_counts_and_not_its_name(known, tmp_path):
    for number, (kind, mode) in enumerate([("gif", "P"), ("png", "RGBA"), ("tiff", "L"), ("bmp", "1")]):
        picture(0).convert(mode).save(tmp_path / f"{number}.{kind}")
        shutil.move(tmp_path / f"{number}.{kind}", tmp_path / f"{number}.jpg")
    scores = known({"3.00": 1.0}).score(
        [*sorted(tmp_path.glob("*.jpg")), str(tmp_path / "0.jpg"), picture(0).convert("LA")]
    )
    assert [score.error for score in scores] == [""] * 6


def test_an_opened_picture_that_cannot_be_decoded_is_a_row_with_an_error(known, bad_files):
    with Image.open(bad_files[1]) as broken:
        error, score = known({"3.00": 1.0}).score([broken, picture(0)])
    assert "truncated" in error.error and math.isnan(error.score) and score.score == pytest.approx(3.0)


# What is handed over


WIDE = 96
"""Width of `picture(1)` in pixels; it is 64 high."""


def forms(folder):
    """Return one picture, for which `Known` answers from its second distribution, in every form."""
    image = picture(1)
    image.save(folder / "one.png")
    encoded, pixels = (folder / "one.png").read_bytes(), np.asarray(image)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    return {
        "string": str(folder / "one.png"),
        "Path": folder / "one.png",
        "image": image,
        "bytes": encoded,
        "bytearray": bytearray(encoded),
        "opened file": open(folder / "one.png", "rb"),
        "BytesIO": io.BytesIO(encoded),
        "grey array": pixels[..., 0],
        "array": pixels,
        "floats": pixels / 255,
        "float32": np.float32(pixels / 255),
        "alpha": np.dstack([pixels, np.full((64, WIDE), 255, np.uint8)]),
        "tensor": tensor,
        "float tensor": tensor / 255,
        "bfloat16": (tensor / 255).bfloat16(),
        "gradient": (tensor / 255).requires_grad_(),
    }


def test_one_picture_in_any_form_is_a_list_of_one(known, tmp_path):
    scorer = known({"3.00": 1.0}, {"4.00": 1.0})
    given = forms(tmp_path)
    for name, form in given.items():
        assert [round(score.score) for score in scorer.score(form)] == [4], name
        assert scorer(form).tolist() == pytest.approx([4.0]) and scorer.rank(form)["image"].tolist() == [0], (
            name
        )
    assert [round(score.score) for score in scorer.score(given.values())] == [4] * len(given)
    assert [round(score.score) for score in scorer.score(iter(given.values()))] == [4] * len(given)
    for name, form in given.items():
        assert scorer.compare(form, picture(0)) > 0.99 and scorer.compare(form, form) == pytest.approx(0.5), (
            name
        )
    given["opened file"].close()


def test_the_same_opened_picture_or_file_may_be_there_many_times(known, tmp_path):
    """They are decoded in threads, and an opened picture is read when first decoded."""
    Image.effect_noise((1200, 64 * 12), 90).convert("RGB").resize((1200, 768)).save(tmp_path / "noise.png")
    scorer = known(*[{"3.00": 1.0}] * 100)
    for _ in range(5):
        with Image.open(tmp_path / "noise.png") as image, open(tmp_path / "noise.png", "rb") as file:
            assert [score.error for score in scorer.score([image, file] * 4)] == [""] * 8


def test_batches_of_pixels_are_many_pictures(known):
    scorer, pixels = known({"3.00": 1.0}, {"4.00": 1.0}), np.stack([np.asarray(picture(1))] * 2)
    for batch in (
        pixels,
        pixels / 255,
        torch.tensor(pixels).permute(0, 3, 1, 2),
        torch.tensor(pixels).permute(0, 3, 1, 2) / 255,
    ):
        assert scorer(batch).tolist() == pytest.approx([4.0, 4.0])
    assert scorer(torch.zeros(0, 3, 8, 8)).tolist() == []


@pytest.mark.parametrize(
    "given", [None, 5, 2.5, object(), {"a.png": 1}, {"a.png"}, pd.DataFrame({"image": ["a.png"]}), True]
)
def test_what_is_no_picture_and_no_list_is_a_type_error_that_says_what_is_taken(known, given):
    scorer = known({"3.00": 1.0})
    for method in (
        scorer.score,
        scorer.rank,
        scorer,
        scorer.describe,
        lambda one: scorer.compare(picture(0), one),
    ):
        wanted = r"give a path, .* a PIL image, a numpy array \(H, W\).* tensor"
        with pytest.raises(TypeError, match=f"^{type(given).__name__} is .*{wanted}"):
            method(given)
    with pytest.raises(TypeError, match="list is not one picture"):
        scorer.compare([picture(0)], picture(0))


def test_a_bad_item_costs_itself_alone_its_score(known, tmp_path):
    bad = [
        None,
        5,
        tmp_path,
        [picture(0)],
        "",
        "https://example.org/a.jpg",
        b"",
        b"text",
        io.StringIO("text"),
        np.zeros((3, 8, 8)),
        np.zeros((8, 8), np.uint16),
        torch.full((3, 8, 8), math.nan),
        torch.zeros(1, 8, 8),
    ]
    scorer = known({"3.00": 1.0})
    scores = scorer.score([picture(0), *bad, picture(0)])
    assert [round(score.score) for score in scores if not score.error] == [3, 3] and len(scores) == len(
        bad
    ) + 2
    said = [score.error for score in scores[1:-1]]
    for text, wanted in zip(
        said,
        [
            "NoneType is no picture; give a path",
            "int is no picture",
            "is a folder",
            "list is no picture",
            "is missing",
            "https://example.org/a.jpg is an address; download the picture first",
            "zero bytes",
            "no format that Pillow reads",
            "mode 'rb'",
            r"(3, 8, 8) is no picture; give (H, W)",
            "uint16; give uint8",
            "NaN",
            "(1, 8, 8) is no picture; give (3, H, W)",
        ],
    ):
        assert wanted in text
    assert scorer([None, picture(0)]).isnan().tolist() == [True, False]
    assert scorer.rank([None, picture(0)])["image"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, r"from 0 to 255; give 0\.\.1: x / 255"),
        (lambda x: x * 2 - 1, r"from -1 to 1; give .*\(x \+ 1\) / 2 for -1\.\.1"),
        (lambda x: x + 0.002, r"from 0 to 1\.002"),
        (lambda x: torch.where(x == 1, math.nan, x), "hold NaN"),
        (lambda x: torch.where(x == 1, math.inf, x), "to inf"),
        (lambda x: (x * 255).long(), "int64; give uint8"),
        (lambda x: x > 0.5, "bool; give uint8"),
        (lambda x: x[:, :1], r"shape \(2, 1, 64, 96\) is no picture; give \(3, H, W\), or \(B, 3, H, W\)"),
        (lambda x: x.permute(0, 2, 3, 1), r"shape \(2, 64, 96, 3\)"),
        (lambda x: x[0, 0], r"shape \(64, 96\)"),
        (lambda x: x[None], r"shape \(1, 2, 3, 64, 96\)"),
        (lambda x: x[..., :0], r"shape \(2, 3, 64, 0\)"),
    ],
)
def test_a_tensor_of_another_range_or_shape_is_refused_with_a_remedy(known, change, message):
    tensor = torch.linspace(0, 1, 2 * 3 * 64 * WIDE).reshape(2, 3, 64, WIDE)
    with pytest.raises(ValueError, match=message):
        known({"3.00": 1.0})(change(tensor))


def test_pixels_keep_their_values_and_rounding_outside_the_range_is_clipped(known, monkeypatch):
    """The image processor gets what was passed in."""
    scorer, seen = known({"3.00": 1.0}), []
    processor = scorer.engine.processor.image_processor
    real = type(processor).__call__
    monkeypatch.setattr(
        type(processor),
        "__call__",
        lambda self, images, **more: seen.append(np.asarray(images[0])) or real(self, images=images, **more),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    scorer([pixels, pixels / 255, tensor, tensor / 255, tensor / 255 * 1.0009, (tensor / 255).bfloat16()])
    assert all(np.array_equal(picture, pixels) for picture in seen[:4]) and len(seen) == 6
    assert np.abs(np.int16(seen[4]) - pixels).max() <= 1 and np.abs(np.int16(seen[5]) - pixels).max() <= 1


def test_describe_takes_many_and_says_which_has_no_score(trained, photo):
    scorer, image = Scorer(trained), crops(photo)[0]
    one, (same, missing) = scorer.describe(image), scorer.describe([image, "nowhere.png"])
    assert (same.text, same.distortions) == (one.text, one.distortions) and same.score.score == pytest.approx(
        one.score.score, abs=1e-4
    )
    assert (
        missing.text == ""
        and str(missing) == "nowhere.png is missing; check the path"
        and "nowhere.png" in missing._repr_html_()
    )
    assert scorer.describe([]) == []


def test_describe_and_compare_say_which_file_cannot_be_read(known, bad_files):
    scorer = known({"3.00": 1.0})
    with pytest.raises(ValueError, match="missing.png is missing"):
        scorer.describe(bad_files[0])
    with pytest.raises(ValueError, match="cannot compare.*empty.png has zero bytes"):
        scorer.compare(picture(0), bad_files[2])


# Comparing and ranking


def test_compare_is_thurstones_probability(known):
    scorer = known({"3.00": 0.5, "4.00": 0.5}, {"2.00": 0.5, "4.00": 0.5})
    better, worse = scorer.compare(picture(0), picture(1)), scorer.compare(picture(1), picture(0))
    variances = torch.tensor([0.25]), torch.tensor([1.0])
    law = comparative_probability(torch.tensor([[3.5]]), variances[0], torch.tensor([3.0]), variances[1])
    assert better == pytest.approx(law.item(), abs=1e-5) and better > 0.6
    assert better + worse == pytest.approx(1.0, abs=1e-6)
    assert scorer.compare(picture(0), picture(0)) == pytest.approx(0.5, abs=1e-6)


def test_compare_refuses_scores_without_a_deviation(known):
    with pytest.raises(ValueError, match="without a deviation.*expected"):
        known({"3.00": 1.0}, estimate="greedy").compare(picture(0), picture(0))


def test_rank_is_best_first_and_failures_last(known, bad_files):
    scorer = known({"2.00": 1.0}, {"4.50": 1.0}, {"3.00": 1.0}, {"good": 1.0})
    ranked = scorer.rank([picture(0), bad_files[0], picture(1), picture(3), picture(2)])
    assert ranked["image"].tolist() == [2, 4, 0, 1, 3]
    assert ranked["rank_lo"].tolist()[:3] == ranked["rank_hi"].tolist()[:3] == [1, 2, 3]  # all sure
    assert ranked["error"].iloc[3:].ne("").all() and ranked["score"].iloc[3:].isna().all()
    assert scorer.rank([]).empty and scorer.rank(bad_files)["image"].tolist() == [0, 1, 2, 3, 4]


def test_ranks_have_the_intervals_that_the_deviations_allow(known):
    scorer = known(
        {"2.00": 0.5, "4.00": 0.5}, {"2.10": 0.5, "4.10": 0.5}, {"4.99": 0.5, "5.01": 0.5}, {"1.00": 1.0}
    )
    ranked = scorer.rank([picture(i) for i in range(4)])
    assert ranked["image"].tolist() == [2, 1, 0, 3]
    assert ranked["lo"].tolist() == pytest.approx((ranked["score"] - 1.96 * ranked["std"]).tolist())
    assert ranked["rank_lo"].tolist() == [1, 1, 2, 3] and ranked["rank_hi"].tolist() == [2, 3, 3, 4]
    assert ranked.equals(scorer.rank([picture(i) for i in range(4)]))


# A reward, streams and memory


def test_as_a_reward_it_gives_one_number_per_picture_without_gradients(trained, photo, known, bad_files):
    pictures = crops(photo)[:3]
    scorer = Scorer(trained)
    rewards = scorer(pictures)
    assert rewards.shape == (3,) and not rewards.requires_grad
    assert rewards.tolist() == pytest.approx([score.score for score in scorer.score(pictures)])
    same = [np.asarray(pictures[0])] * 2
    tensor = torch.tensor(np.stack(same)).permute(0, 3, 1, 2).float().div(255).requires_grad_()
    assert scorer(tensor).tolist() == pytest.approx([rewards[0].item()] * 2, abs=1e-4)
    assert known({"3.00": 1.0})([picture(0), bad_files[0]]).isnan().tolist() == [False, True]


def test_a_stream_is_scored_as_it_comes_and_no_further_ahead_than_two_windows(known):
    scorer, taken = known({"3.00": 1.0}, {"4.00": 1.0}, batch_size=2), []

    def stream():
        for i in range(100):
            taken.append(i)
            yield picture(i % 2)

    windows = scorer.batches(stream())
    first = next(windows)
    assert [round(score.score) for score in first] == [3, 4] * 4  # a window: 4 batches of 2
    assert len(taken) == 16
    windows.close()
    assert len(taken) == 16


def test_batches_are_formed_by_size_and_the_order_kept(known):
    scorer = known({"3.00": 1.0}, {"4.00": 1.0}, batch_size=2)
    assert [round(score.score) for score in scorer.score([picture(i % 2) for i in range(7)])] == [
        3,
        4,
    ] * 3 + [3]
    assert scorer.engine.model.batches == [[4, 4], [4, 4], [6, 6], [6]]  # widths in patches


@torch.no_grad()
def test_the_prompt_is_the_processors_own(trained, photo):
    """Ids, mask and positions are put together from parts, yet equal those of processor and model."""
    model, processor = trained
    pictures = crops(photo)[:2]
    asked = engine.load(trained)
    opened = [asked.prepare(image).picture for image in pictures]
    ids, mask, cache = asked._prefill(opened, asked._prompt(messages(True), ""))
    text = processor.apply_chat_template(messages(True), add_generation_prompt=True, tokenize=False)
    whole = processor(text=[text] * 2, images=pictures, padding=True, return_tensors="pt")
    assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask)] == [
        row[keep.bool()].tolist() for row, keep in zip(whole["input_ids"], whole["attention_mask"])
    ]
    deltas = model.model.rope_deltas.clone()
    model(**whole)
    assert torch.equal(deltas, model.model.rope_deltas)
    assert cache.get_seq_length() == ids.shape[1] - 1


def test_a_batch_that_does_not_fit_into_memory_is_halved(known):
    scorer = known({"3.00": 1.0}, {"4.00": 1.0}, batch_size=4)
    real = scorer.engine._prefill

    def small(pictures, prompt):
        if len(pictures) > 1 or pictures[0]["image_grid_thw"][0, 2] == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pictures, prompt)

    scorer.engine._prefill = small
    one, two, three = scorer.score([picture(0), picture(1), picture(0)])
    assert (
        (one.score, three.score) == (pytest.approx(3.0), pytest.approx(3.0))
        and "does not fit" in two.error
        and math.isnan(two.score)
    )


def test_what_did_not_fit_is_freed_before_its_halves_are_tried(known):
    """In the except clause the traceback would keep the failed tensors, leaving the halves less room."""
    scorer, tensors, alive = known({"3.00": 1.0}, batch_size=8), [], []
    real = scorer.engine._prefill

    def short(pictures, prompt):
        alive.append(sum(tensor() is not None for tensor in tensors))
        activations = torch.zeros(1000)
        tensors.append(weakref.ref(activations))
        if len(pictures) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pictures, prompt)

    scorer.engine._prefill = short
    assert [score.error for score in scorer.score([picture(0)] * 4)] == [""] * 4
    assert alive == [0] * 7  # tries: 4, 2, 1, 1, 2, 1, 1


def test_a_window_is_full_at_so_many_bytes(known, monkeypatch):
    """Fewer large pictures are decoded at a time, whatever the batch size.

    They fill at most two windows and one per thread.
    """
    scorer, held, most = known({"3.00": 1.0}, {"4.00": 1.0}, batch_size=16), [0], [0]
    size = scorer.engine.prepare(picture(0)).nbytes
    monkeypatch.setattr(ahead, "HELD", 2 * size)
    real, window, windows, lock = scorer._open, scorer._window, [], threading.Lock()

    def opened(image):
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        return real(image)

    def scored(pictures):
        windows.append(len(pictures))
        time.sleep(0.02)  # the threads have time to decode as much as they may
        result = window(pictures)
        with lock:
            held[0] -= len(pictures)
        return result

    scorer._open, scorer._window = opened, scored
    assert [round(score.score) for score in scorer.score([picture(0)] * 40)] == [3] * 40
    assert windows == [2] * 20
    assert 2 < most[0] <= 2 * 2 + ahead.THREADS
    mixed = [picture(i % 2) for i in range(9)] + ["missing.png"]
    assert [round(score.score) for score in scorer.score(mixed)[:-1]] == [3, 4] * 4 + [3]  # the order is kept


def test_a_stream_of_large_pictures_can_be_left(known, monkeypatch):
    """Threads waiting for room do not stop the program from going on."""
    scorer = known({"3.00": 1.0})
    monkeypatch.setattr(ahead, "HELD", 1)
    windows = scorer.batches([picture(0)] * 40)
    assert len(next(windows)) == 1
    windows.close()
    scorer._window = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        scorer.score([picture(0)] * 40)


def test_large_pictures_make_small_batches(known, monkeypatch):
    monkeypatch.setattr(engine, "PATCHES", 50)
    scorer = known({"3.00": 1.0}, {"4.00": 1.0}, batch_size=4)
    assert [round(score.score) for score in scorer.score([picture(i % 2) for i in range(7)])] == [
        3,
        4,
    ] * 3 + [3]
    assert scorer.engine.model.batches == [[4, 4, 4], [4, 6], [6, 6]]  # of 16 and 24 patches, padded
    monkeypatch.setattr(engine, "PATCHES", 1)
    scorer.engine.model.batches.clear()
    assert [round(score.score) for score in scorer.score([picture(1), picture(0)])] == [4, 3]
    assert scorer.engine.model.batches == [[4], [6]]  # alone, a picture may be larger


def test_twelve_megapixels_are_held_four_at_a_time():
    """At SPAQ's size each takes 288 MB in Qwen2.5-VL's patches; two windows of 64 were 34 GiB."""
    size = 61_204 * 3 * 2 * 14 * 14 * 4
    assert 3 * size < ahead.HELD < 4 * size and 2 * ahead.HELD + 5 * size < 4 * 2**30
    assert len(engine._batched([0, 1], [61_204] * 2, 16)) == 2
    assert [len(batch) for batch in engine._batched([*range(40)], [1024] * 40, 16)] == [
        16,
        16,
        8,
    ]  # the embedded policy's largest


@pytest.mark.parametrize(
    "options", [{"estimate": "greedy"}, {"estimate": "sample", "k": 3}, {"estimate": "expected"}], ids=str
)
def test_an_answer_never_holds_a_picture(untrained, photo, options):
    model, processor = copy.deepcopy(untrained[0]), untrained[1]
    barred, seen = pushed(model, processor), []
    scorer = Scorer((model, processor), thinking=True, max_new_tokens=8, **options)
    generate = model.generate

    def watched(**inputs):
        out = generate(**inputs)
        seen.append(out.sequences[:, inputs["input_ids"].shape[1] :])
        return out

    model.generate = watched
    scorer.score(crops(photo)[:2])
    assert seen[0].shape == (2 * (3 if "k" in options else 1), 8) and not barred & set(
        seen[0].flatten().tolist()
    )


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_needs_a_picture(known, size):
    with pytest.raises(ValueError, match="batch_size"):
        known({"3.00": 1.0}, batch_size=size)


# Settings and state


@pytest.mark.parametrize("estimate", ["expected", "sample"])
def test_scoring_is_done_in_eval_mode_and_puts_training_back(known, estimate):
    scorer = known(MIXED, estimate=estimate)
    for training in (True, False):
        scorer.engine.model.train(training)
        scorer.score([picture(0)])
        assert scorer.engine.model.training is training
    assert set(scorer.engine.model.modes) == {False}


def test_training_is_put_back_after_an_error(known):
    scorer = known()  # no distribution: the model's forward raises
    scorer.engine.model.train()
    with pytest.raises(IndexError):
        scorer.score([picture(0)])
    assert scorer.engine.model.training


def test_scores_leave_no_gradient_behind(untrained):
    model, _ = untrained
    Scorer(untrained).score([picture(0)])
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimate": "best"}, "'best' is unknown.*expected, greedy, sample"),
        ({"estimate": "sample", "k": 1}, "k is 1.*at least 2"),
        ({"estimate": "sample", "k": 0}, "k is 0"),
    ],
)
def test_wrong_settings_are_named(known, options, message):
    with pytest.raises(ValueError, match=message):
        known(MIXED, **options)


def test_other_settings_ask_the_same_loaded_policy(known):
    scorer = known(MIXED, thinking=True, seed=3)
    sampler = scorer.with_(thinking=False, estimate="sample", k=4)
    assert sampler.engine is scorer.engine
    assert (sampler.estimate, sampler.k, sampler.seed, sampler.thinking) == ("sample", 4, 3, False)
    assert (scorer.estimate, scorer.k, scorer.thinking) == ("expected", 6, True)
    assert len(sampler.score([picture(0)])[0].answers) == 4
    with pytest.raises(ValueError, match="k is 1"):
        scorer.with_(estimate="sample", k=1)
    with pytest.raises(TypeError, match="temperature is no setting.*thinking, estimate"):
        scorer.with_(temperature=2.0)


def test_direction_and_range_are_said_as_pyiqa_says_them(known):
    assert known(MIXED).lower_better is False and Scorer.score_range == (1, 5)


def test_only_the_expected_score_needs_a_token_per_digit(untrained):
    real = untrained[1]

    class Bytes:
        def encode(self, text, **_):
            return list(text.encode() * 2)

        def __call__(self, text):
            return real.tokenizer(text)

    processor = SimpleNamespace(
        tokenizer=Bytes(), apply_chat_template=real.apply_chat_template, image_token=real.image_token
    )
    with pytest.raises(ValueError, match="every digit.*greedy"):
        Scorer((SimpleNamespace(), processor))
    assert Scorer((SimpleNamespace(), processor), estimate="greedy").estimate == "greedy"
