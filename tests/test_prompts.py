"""Prompts are checked word for word, the parser and format by example, and the words for what is seen."""

import math
from itertools import permutations

import pytest

from vqr1.distortions import DISTORTIONS
from vqr1.experiments.damage import CAMERA
from vqr1.prompts import (
    CLEAN,
    NON_THINKING,
    PHRASES,
    QUESTION,
    SEVERITY,
    THINKING,
    format_ok,
    messages,
    named_distortions,
    named_severity,
    parse_reasoning,
    parse_score,
)

PAPER = (  # arXiv 2505.14460, Table 1
    "You are doing the image quality assessment task. Here is the question: What is your overall rating on "
    "the quality of this picture? The rating should be a float between 1 and 5, rounded to two decimal "
    "places, with 1 representing very poor quality and 5 representing excellent quality. First output the "
    "thinking process in <think> </think> tags and then output the final answer with only one score in "
    "<answer> </answer> tags."
)
NAN = math.nan


def test_the_prompt_is_the_papers_word_for_word():
    assert messages()[0]["content"] == [{"type": "image"}, {"type": "text", "text": PAPER}]
    assert f"{QUESTION} {THINKING}" == PAPER and [message["role"] for message in messages()] == ["user"]


def test_the_non_thinking_prompt_asks_the_same_question():
    text = messages(thinking=False)[0]["content"][1]["text"]
    assert text == f"{QUESTION} {NON_THINKING}" and "think" not in NON_THINKING
    assert (
        NON_THINKING == "Please only output the final answer with only one score in <answer> </answer> tags."
    )


SCORES = [
    ("<answer>3.70</answer>", 3.7, "the plain answer"),
    ("<think>2 blocks</think> <answer>4</answer>", 4.0, "an integer; numbers of the reasoning do not count"),
    ("<answer>The score is 3.7 of 5</answer>", 3.7, "a number in a sentence, and its scale"),
    ("<answer>1.00</answer> no, <answer>2.00</answer>", 2.0, "the last answer"),
    (
        "<think><answer>5</answer></think><answer>1.5</answer>",
        1.5,
        "the last answer, after one in the reasoning",
    ),
    ("<answer>\n3.25\n</answer>", 3.25, "line breaks inside"),
    ("<answer>-2.5</answer>", -2.5, "a negative number keeps its sign"),
    ("<answer>87.5</answer>", 87.5, "out of range is kept as it stands"),
    ("<answer>0</answer>", 0.0, "zero is a number"),
    ("<answer>3.</answer>", 3.0, "a point without decimals"),
    ("<answer>a <answer>2.5</answer>", 2.5, "after the last opening tag"),
    ("<answer>3.7</answer", NAN, "tag not closed"),
    ("3.70", NAN, "no tag: the official code would take the number"),
    ("<think>a score of 3.70</think>", NAN, "number only in the reasoning, no answer"),
    ("<think>3.70</think><answer>good</answer>", NAN, "number only in the reasoning, answer in words"),
    (
        "<answer>2.00</answer><answer>good</answer>",
        NAN,
        "the last answer has no number, an earlier one does not help",
    ),
    ("<answer></answer>", NAN, "empty answer"),
    ("<answer>nan</answer>", NAN, "the word nan"),
    ("<answer>inf</answer>", NAN, "the word inf is no number"),
    ("<ANSWER>3.70</ANSWER>", NAN, "tags are lower case"),
    ("", NAN, "nothing"),
]


WRITTEN = {
    "3.5": 3.5,
    ".85": 0.85,
    "3.": 3.0,
    "3.5.": 3.5,
    "+3.5": 3.5,
    "10": 10.0,
    "**3.70**": 3.7,
    "_3.7_": 3.7,
    "`3.7`": 3.7,
    '"3.7"': 3.7,
    "“3.7”": 3.7,
    '{"rating": 3.70}': 3.7,
    '{"rating":3.70}': 3.7,
    "Rating: 3.5": 3.5,
    "score=3.5": 3.5,
    "(3.5)": 3.5,
    "It is a 5!": 5.0,
    "3.5, good": 3.5,
    "4 stars": 4.0,
    "3.5\u00a0": 3.5,
    "4.5/5": 4.5,
    "4 / 5": 4.0,
    "4.5/5.0": 4.5,
    "4/5.": 4.0,
    "3.70 out of 5": 3.7,
    "3.7 Out of 5": 3.7,
    "3.5 (out of 5)": 3.5,
    "1" * 30: float("1" * 30),
    "4,5": NAN,
    "1,234": NAN,
    "1e-1": NAN,
    "1e3": NAN,
    "3-4": NAN,
    "3 or 4": NAN,
    "3.5 ± 0.5": NAN,
    "3.5 (range 1-5)": NAN,
    "1.2.3": NAN,
    "5/10": NAN,
    "3.5/5.5": NAN,
    "3.5/50": NAN,
    "3.5 out of 10": NAN,
    "100%": NAN,
    "70 %": NAN,
    "70 percent": NAN,
    "４": NAN,
    "٣": NAN,
    "½": NAN,
    "3½": NAN,
    "4²": NAN,
    "−2.5": NAN,
    "3k": NAN,
    "v3": NAN,
    "<3.5": NAN,
    "9" * 400: NAN,
    "three": NAN,
    "-inf": NAN,
}


@pytest.mark.parametrize("answer", WRITTEN, ids=lambda answer: ascii(answer[:20]))
def test_one_number_without_doubt_or_nan(answer):
    assert parse_score(f"<answer>{answer}</answer>") == pytest.approx(WRITTEN[answer], nan_ok=True)


@pytest.mark.parametrize(
    "text", ["1" * 30_000 + "x", "1 " * 15_000, "3" + " " * 30_000 + "x4", "<answer>" * 5_000]
)
def test_a_long_answer_is_read_at_once(text):
    assert math.isnan(parse_score(f"<answer>{text}</answer>"))  # a pattern that backtracks would take minutes


@pytest.mark.parametrize(("text", "score", "reason"), SCORES, ids=[reason for *_, reason in SCORES])
def test_parse_score(text, score, reason):
    assert parse_score(text) == pytest.approx(score, nan_ok=True), reason


FORMATS = [  # text, with thinking, without, why
    ("<think>sharp</think><answer>4.20</answer>", True, False, "the format"),
    (
        "<think>sharp</think>\n\n <answer>\n4.20</answer>",
        True,
        False,
        "white space between the blocks and in them",
    ),
    ("\n<think>sharp</think><answer>4.20</answer> \n", True, False, "white space around"),
    ("<think>sharp\nand\nclean</think><answer>good</answer>", True, False, "any content"),
    ("<think></think><answer></answer>", True, False, "empty blocks"),
    ("<answer>4.20</answer>", False, True, "no reasoning"),
    ("  <answer>4.20</answer>\n", False, True, "no reasoning, white space around"),
    ("<think>a</think><think>b</think><answer>4.20</answer>", False, False, "two think blocks"),
    ("<think>a<think>b</think></think><answer>4.20</answer>", False, False, "a think block in a think block"),
    ("<think>a</think><answer>4.20</answer><answer>4.20</answer>", False, False, "two answers"),
    ("<answer>4.20</answer><answer>4.20</answer>", False, False, "two answers without reasoning"),
    ("<answer>4.20</answer><think>sharp</think>", False, False, "answer before think"),
    ("<think>sharp</think> so <answer>4.20</answer>", False, False, "text between"),
    ("<think>sharp</think><answer>4.20</answer>.", False, False, "trailing text"),
    ("Well: <think>sharp</think><answer>4.20</answer>", False, False, "leading text"),
    ("<answer>4.20</answer>.", False, False, "trailing text without reasoning"),
    ("<think>sharp<answer>4.20</answer>", False, False, "think not closed"),
    ("sharp</think><answer>4.20</answer>", False, False, "think not opened"),
    ("<think>sharp</think><answer>4.20", False, False, "answer not closed"),
    ("<Think>sharp</Think><answer>4.20</answer>", False, False, "tags are lower case"),
    ("", False, False, "nothing"),
]


@pytest.mark.parametrize(
    ("text", "thinking", "plain", "reason"), FORMATS, ids=[reason for *_, reason in FORMATS]
)
def test_format(text, thinking, plain, reason):
    assert (format_ok(text), format_ok(text, thinking=False)) == (thinking, plain), reason


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("<think> slight\nblur </think><answer>3</answer>", "slight\nblur"),
        ("<think>a</think><think>b</think>", "a"),
        ("<answer>3</answer>", ""),
        ("<think>cut off in the middle", ""),
    ],
)
def test_parse_reasoning(text, reasoning):
    assert parse_reasoning(text) == reasoning


def test_every_distortion_and_flaw_has_words_of_its_own():
    assert list(PHRASES) == [*DISTORTIONS, *CAMERA]
    assert not [(a, b) for a, b in permutations(PHRASES.values(), 2) if a in b]  # equal ones too


def test_words_of_severity_and_of_distortions_do_not_mix():
    assert len(SEVERITY) == 5 and not [(a, b) for a, b in permutations(SEVERITY, 2) if a in b]
    assert not [
        (word, text)
        for word in (*SEVERITY, CLEAN)
        for text in PHRASES.values()
        if word in text or text in word
    ]
    assert named_distortions(CLEAN) == []


@pytest.mark.parametrize("name", PHRASES)
def test_a_phrase_names_its_distortion_alone(name):
    assert named_distortions(f"severe {PHRASES[name]} along the edges") == [name]


def test_distortions_are_named_in_order_of_appearance():
    assert named_distortions("white noise over jpeg blocking, and lens blur") == [
        "white_noise",
        "jpeg",
        "lens_blur",
    ]
    assert named_distortions("the picture is bad") == []


def test_capitals_do_not_matter():
    text = "Severe Gaussian blur and JPEG blocking"
    assert named_distortions(text) == ["gaussian_blur", "jpeg"] and named_severity(text) == 5
    assert named_severity("No visible flaw") == 0


@pytest.mark.parametrize(
    ("text", "strength"),
    [
        *((f"{word} white noise", strength) for strength, word in enumerate(SEVERITY, 1)),
        ("slight lens blur, then severe white noise", 2),  # the first one
        (CLEAN, 0),
        ("white noise", None),
        ("", None),
    ],
)
def test_severity_is_the_first_word_of_strength(text, strength):
    assert named_severity(text) == strength
