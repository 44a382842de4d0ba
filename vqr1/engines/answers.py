"""The answers that engines consider between the tags: numbers as one tree, and their values.

An answer is an opening (nothing, a space or a newline), a number (`3.50`, `3.5`, `4.`, `4`, `0.80`, `.85`,
`10`) and what follows it. Every character of an opening and a number is one token. A number ends where no
further digit, no first point, and none of `DOUBT` (which `parse_score` does not read) follows; d.dd is taken
whatever follows. Nothing after that is looked at, so the mass is too large by the probability of answers such
as `3.5 or 4`. Only the likeliest answer is followed further, and read by `parse_score` (`vqr1.scoring`). A
space or newline less likely than `RARE` is not followed: that moves a mean by at most 2e-4 of the distance
between its own mean and the others'.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

OPEN = "<answer>"
AHEAD = 12
"""Most tokens that the likeliest answer is followed for."""
NOT_NUMBERS = "the model's output holds NaN or infinity; in fp16, load the policy with dtype=torch.float32"

DIGITS = "0123456789"
FIRST = [*DIGITS, ""]
"""What may stand before the point; .85 is a number."""
SPACES = " \n"
OPENINGS = ("", *SPACES)
"""What may stand between the tag and the number."""
DOUBT = ",-–%+eE"
"""What makes the number before it doubtful (4,5, 3-4, 100%, 1e-1), as does the completion's end."""
END = "<"
"""Stands for all else that may follow a number: the closing tag, a space, a full stop, /5."""

BEGINNINGS = tuple(
    sorted(
        {"", "10", *FIRST, *(f"{d}." for d in FIRST), *(f"{d}.{n}" for d in FIRST for n in DIGITS)},
        key=lambda text: (len(text), text),
    )
)
"""The 133 beginnings of a number after which the next token is asked for, shortest first."""
ANSWERS = (
    *(f"{d}.{n}{m}" for d in FIRST for n in DIGITS for m in DIGITS),
    *(f"{d}.{n}{END}" for d in FIRST for n in DIGITS),
    *(f"{d}.{END}" for d in DIGITS),
    *(f"{d}{END}" for d in DIGITS),
    f"10{END}",
)
"""The 1,231 numbers d.dd, d.d, d., d and 10."""
RARE = 1e-4
"""A space or newline before the number is followed, and in the mass, where it is likelier than this."""
VALUES = torch.tensor([float(text.removesuffix(END)) for text in ANSWERS], dtype=torch.float64)  # (1231,)
COLUMNS = f"{DIGITS}.{SPACES}{END}"
"""What may follow a beginning."""

_DEPTH = torch.tensor([len(text) for text in BEGINNINGS])
_PARENT = torch.tensor([BEGINNINGS.index(text[:-1]) for text in BEGINNINGS])  # of the root: itself
_COLUMN = torch.tensor([COLUMNS.index(text[-1:] or END) for text in BEGINNINGS])
_ANSWER_PARENT = torch.tensor([BEGINNINGS.index(text[:-1]) for text in ANSWERS])
_ANSWER_COLUMN = torch.tensor([COLUMNS.index(text[-1]) for text in ANSWERS])
_FULL_STOP = torch.tensor([text.endswith(END) and "." in text for text in ANSWERS])
"""Whether a point after each answer is a full stop: 3.5. is a number, too."""


class Prepared(NamedTuple):
    """A picture as an engine takes it, and the bytes of memory that it holds."""

    picture: Any
    nbytes: int


class Answer(NamedTuple):
    """What an engine says of one picture.

    texts: its completions, or the one text before the answer; none where the engine cannot answer.
    probability: of each of `ANSWERS` after each of `OPENINGS`, (3, 1231); None for completions.
    likeliest: the likeliest answer after the text, up to its closing tag.
    error: why it counts for nothing.
    """

    texts: list[str]
    probability: torch.Tensor | None = None
    likeliest: str = ""
    error: str = ""


def by_halves(
    ask: Callable[[list], list[Answer]], items: list, refusal: type[Exception], explain: str
) -> list[Answer]:
    """Return ``ask(items)``; if it raises `refusal`, ask each half, and so on.

    The answer of an item at fault is an error.

    Args:
        ask: from items to as many answers.
        items: prepared pictures.
        refusal: the error that says that these items cannot be asked together.
        explain: the message for one item, in which {} stands for the error.

    >>> one_at_a_time = lambda items: [Answer([str(1 // (len(items) == 1 and items[0]))])]
    >>> [answer.error[:7] for answer in by_halves(one_at_a_time, [1, 0], ZeroDivisionError, "refused: {}")]
    ['', 'refused']
    """
    try:
        return ask(items)
    except refusal as error:
        why = str(error)  # go on outside of this clause: in it, the traceback keeps every tensor of the try
    torch.cuda.empty_cache()
    if len(items) == 1:
        return [Answer([], error=explain.format(why))]
    half = len(items) // 2
    return [
        answer for part in (items[:half], items[half:]) for answer in by_halves(ask, part, refusal, explain)
    ]


def around_image(processor, chat: list[dict], end: str = "") -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt before its image and after it.

    Args:
        processor: of the policy, which has the chat's layout.
        chat: messages with one image.
        end: the beginning of the answer, put after the prompt.
    """
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before, after = text.split(processor.image_token)
    return processor.tokenizer(before).input_ids, processor.tokenizer(after + end).input_ids


def tag_token(tokenizer) -> int:
    """Return the last token of `OPEN`."""
    return tokenizer.encode(OPEN, add_special_tokens=False)[-1]


def tree(opening: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return depth (N,) and which sees which (N, N), of an opening's tokens and the 133 `BEGINNINGS` below.

    The root is the last token before the answer, or of the opening. A token sees itself and its own
    beginnings.
    """
    depth = torch.cat([torch.arange(opening), opening + _DEPTH])
    sees = torch.ones(len(depth), len(depth)).tril().bool()
    sees[opening:, opening:] = torch.tensor(
        [[whole.startswith(text) for text in BEGINNINGS] for whole in BEGINNINGS]
    )
    return depth, sees


def tokens_of(tokenizer) -> dict[str, int]:
    """Return the token of each character after a beginning: `COLUMNS` without the end, then those of doubt.

    Raises ValueError where a digit, the point or a space is no token of its own.
    """
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in COLUMNS[:-1] + DOUBT}
    if any(len(ids[text]) != 1 for text in COLUMNS[:-1]):
        raise ValueError(
            "this tokenizer has no token of its own for every digit: use estimate='greedy' or 'sample'"
        )
    return {text: token[0] for text, token in ids.items() if len(token) == 1} | {
        tokenizer.eos_token: tokenizer.eos_token_id
    }


def columns(listed: torch.Tensor) -> torch.Tensor:
    """Return the probabilities (…, 14) of `COLUMNS` from those of the tokens of `tokens_of`, (…, tokens).

    >>> p = torch.zeros(20)
    >>> p[3], p[10], p[11], p[13] = 0.5, 0.25, 0.125, 0.0625  # "3", ".", " " and a comma
    >>> columns(p)[[3, 10, 11, 13]].tolist()  # 0.0625 is on other tokens
    [0.5, 0.25, 0.125, 0.1875]
    """
    ends = 1 - listed[..., :11].sum(-1, keepdim=True) - listed[..., 13:].sum(-1, keepdim=True)
    return torch.cat([listed[..., :13], ends.clamp(min=0)], -1)


def probabilities(following: torch.Tensor) -> torch.Tensor:
    """Return the probability of each of `ANSWERS` after each opening, (…, 3, 1231), by the chain rule.

    following: (…, 3, 133, 14), of each opening and beginning the probability of each of `COLUMNS` after it;
    0 where it is not known.
    """
    reached = torch.ones_like(following[..., 0])  # (…, 3, 133)
    reached[..., 1:, 0] = following[..., 0, 0, 11:13]
    for depth in range(1, int(_DEPTH.max()) + 1):
        nodes = (depth == _DEPTH).nonzero()[:, 0]
        reached[..., nodes] = reached[..., _PARENT[nodes]] * following[..., _PARENT[nodes], _COLUMN[nodes]]
    last = (
        following[..., _ANSWER_PARENT, _ANSWER_COLUMN]
        + _FULL_STOP * following[..., _ANSWER_PARENT, COLUMNS.index(".")]
    )
    return reached[..., _ANSWER_PARENT] * last


def likeliest(probability: torch.Tensor) -> str:
    """Return opening and number of the likeliest answer; "" if unknown or less than half is on numbers.

    probability: (3, 1231), as `probabilities` gives it.
    """
    if not probability.sum() >= 0.5:
        return ""
    opening, answer = divmod(int(probability.argmax()), len(ANSWERS))
    return OPENINGS[opening] + ANSWERS[answer].removesuffix(END)


def closed(text: str, going: bool = False) -> str:
    """Return an answer's text up to its closing tag, and that tag unless the text ended before it.

    going: the text was cut off; the tag is added, and the answer is judged by what there is.

    >>> closed("3.50</"), closed("3.50<|im_end|>"), closed("The picture is quite", going=True)
    ('3.50</answer>', '3.50<|im_end|>', 'The picture is quite</answer>')
    """
    inside, closing, _ = text.partition("</")
    return f"{inside}</answer>" if closing or going else text
