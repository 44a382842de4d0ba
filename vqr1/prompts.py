"""The paper's prompts, the answer format, and the words for distortions and severity."""

import math
import re
import unicodedata

QUESTION = (
    "You are doing the image quality assessment task. Here is the question: "
    "What is your overall rating on the quality of this picture? The rating should be a float "
    "between 1 and 5, rounded to two decimal places, with 1 representing very poor quality and 5 "
    "representing excellent quality."
)
"""Table 1 of the paper, word for word."""

THINKING = (
    "First output the thinking process in <think> </think> tags and then output the final answer "
    "with only one score in <answer> </answer> tags."
)
NON_THINKING = "Please only output the final answer with only one score in <answer> </answer> tags."
"""The official README's non-thinking instruction (inference only there)."""

SCORE_MIN, SCORE_MAX = 1.0, 5.0

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_ONE_NUMBER = re.compile(
    r"""[^0-9]*
    (?<![^\s*_`"'“‘(\[{:=~])              # the start, a space, or a mark that is no part of a number
    ([+-]?(?:[0-9]++\.?[0-9]*+|\.[0-9]++))
    (?:\s*(?:/|\(?(?:out\s+)?of)\s*5(?:\.0+)?(?![0-9]))?  # its scale, if stated: /5, of 5, (out of 5)
    (?=[\s.,;:!?)\]}*_`"'”’]|\Z)(?!\s*(?:%|percent))
    [^0-9]*""",
    re.VERBOSE | re.IGNORECASE,
)
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_FORMATS = {
    True: re.compile(
        r"<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>", re.DOTALL
    ),
    False: re.compile(r"<answer>(?:(?!</?answer>).)*</answer>", re.DOTALL),
}

SEVERITY = ("faint", "slight", "moderate", "strong", "severe")
"""Words for strength 1..5."""

CLEAN = "no visible flaw"

PHRASES = {
    "gaussian_blur": "gaussian blur",
    "lens_blur": "lens blur",
    "motion_blur": "motion blur",
    "color_diffusion": "color bleeding",
    "color_shift": "color fringes",
    "color_quantization": "palette dithering",
    "color_saturation_1": "faded colors",
    "color_saturation_2": "oversaturated colors",
    "jpeg2000": "jpeg2000 smearing",
    "jpeg": "jpeg blocking",
    "white_noise": "white noise",
    "white_noise_color_component": "chroma noise",
    "impulse_noise": "impulse noise",
    "multiplicative_noise": "multiplicative noise",
    "denoise": "denoising smear",
    "brighten": "brightening",
    "darken": "darkening",
    "mean_shift": "brightness shift",
    "jitter": "pixel jitter",
    "non_eccentricity_patch": "misplaced patches",
    "pixelate": "pixelation",
    "quantization": "tone banding",
    "color_block": "colored blocks",
    "high_sharpen": "oversharpening",
    "contrast_change": "contrast change",
    "defocus": "defocus",
    "camera_shake": "camera shake",
    "too_dark": "underexposure",
    "too_bright": "overexposure",
    "haze": "haze",
    "color_cast": "color cast",
    "sensor_noise": "sensor noise",
    "upscaling": "upscaling",
}
"""One name in words per KADID-10k distortion, then per flaw of a camera; no phrase contains another."""


def messages(thinking: bool = True, numbered: bool = False) -> list[dict]:
    """Return the chat prompt: one image placeholder and the paper's question.

    numbered: put "Picture 1: " before the image, as the official inference does (add_vision_id). The
    official training, and so the published weights, did without. Source: the paper's Table 1 (thinking) and
    the official README (non-thinking).

    >>> [part["type"] for part in messages()[0]["content"]]
    ['image', 'text']
    """
    number = [{"type": "text", "text": "Picture 1: "}] if numbered else []
    text = f"{QUESTION} {THINKING if thinking else NON_THINKING}"
    return [{"role": "user", "content": [*number, {"type": "image"}, {"type": "text", "text": text}]}]


def parse_score(text: str) -> float:
    """Return the one number in the last ``<answer>…</answer>``, or NaN where a person could doubt it.

    A number is written in the digits 0-9 with at most one point (3.50, 3., .85), maybe a sign, and stands
    alone: around it are the ends of the answer, spaces, or punctuation (``**3.50**``, ``{"rating":
    3.50}``). Its scale may follow: 3.50/5, 3.50 out of 5. Any other digit in the answer makes it doubtful:
    4,5, 3-4, "3 or 4", 5/10, 1e-1, 100%, 3½ and 1.2.3 are NaN, and so is a number too large for a float. One
    outside 1..5 is returned as it stands. The official code takes the first number in the last answer: 4,5 is
    4, .85 is 85, 1e-1 is 1. Without the tag it takes the first number anywhere, without a number a random
    score.

    >>> parse_score("<think>4 blocks</think><answer>The score is 3.7 out of 5.</answer>")
    3.7
    >>> [parse_score(f"<answer>{answer}</answer>") for answer in (".85", "4,5", "3 or 4", "good")]
    [0.85, nan, nan, nan]
    >>> parse_score("3.7")
    nan
    """
    found = _ANSWER.findall(text)
    number = _ONE_NUMBER.fullmatch(found[-1]) if found else None
    if not number or any(unicodedata.category(c).startswith("N") for c in found[-1] if not c.isascii()):
        return math.nan
    score = float(number.group(1))
    return score if math.isfinite(score) else math.nan


def parse_reasoning(text: str) -> str:
    """Return what stands between the first ``<think>`` and ``</think>``, or "".

    >>> parse_reasoning("<think>slight lens blur</think><answer>3.10</answer>")
    'slight lens blur'
    """
    found = _THINK.search(text)
    return found.group(1).strip() if found else ""


def format_ok(text: str, thinking: bool = True) -> bool:
    """Tell whether the whole completion is one think block (if thinking) and one answer block.

    >>> format_ok("<think>sharp</think> <answer>4.5</answer>")
    True
    >>> format_ok("<answer>4.5</answer>"), format_ok("<answer>4.5</answer>", thinking=False)
    (False, True)
    """
    return _FORMATS[thinking].fullmatch(text.strip()) is not None


def named_distortions(text: str) -> list[str]:
    """Return the distortions and flaws whose phrase is in the text, in any case, in order of appearance.

    >>> named_distortions("strong jpeg blocking in the flat areas, with slight color fringes")
    ['jpeg', 'color_shift']
    """
    text = text.lower()
    found = [(text.find(phrase), name) for name, phrase in PHRASES.items() if phrase in text]
    return [name for _, name in sorted(found)]


def named_severity(text: str) -> int | None:
    """Return the strength 1..5 of the first severity word, in any case; 0 for a clean one; None if unsaid.

    >>> named_severity("strong lens blur"), named_severity("no visible flaw"), named_severity("?")
    (4, 0, None)
    """
    text = text.lower()
    if CLEAN in text:
        return 0
    found = [(text.find(word), strength) for strength, word in enumerate(SEVERITY, 1) if word in text]
    return min(found)[1] if found else None
