"""The Scorer's vLLM engine is tested without vLLM.

A stand-in answers its requests with real numbers of the embedded policy, from transformers.
"""

import copy
import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shared import pushed

from vqr1.engines import transformers
from vqr1.engines import vllm as engines
from vqr1.engines.answers import (
    ANSWERS,
    BEGINNINGS,
    COLUMNS,
    END,
    OPEN,
    OPENINGS,
    RARE,
    SPACES,
    VALUES,
)
from vqr1.engines.vllm import (
    RANKS,
    TOLERANCE,
    Vllm,
    answer_probability,
    distribution,
    estimate,
    grow,
    image_prompt,
    limits,
    llm_options,
    logprob_settings,
    open_prefixes,
    stakes,
)
from vqr1.policy import BASE, VISION, default_dtype, load_policy, lora_config, policy_path
from vqr1.prompts import messages
from vqr1.scoring import Scorer


@dataclass
class SamplingParams:
    """Hold the fields of vLLM's that are used, with its defaults; as there, others are a TypeError."""

    n: int = 1
    temperature: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    bad_words: list[str] = field(default_factory=list)
    include_stop_str_in_output: bool = False
    max_tokens: int = 16
    logprob_token_ids: list[int] | None = None
    detokenize: bool = True
    repetition_penalty: float = 1.0


class LLM:
    """Answer vLLM's requests with the embedded policy, one forward or `generate` for each length."""

    def __init__(self, policy, **options):
        (self.model, self.processor), self.options, self.calls, self.ids = (
            policy,
            options,
            [],
            [],
        )  # ids: of all completions

    def generate(self, requests, params, *, use_tqdm=True, lora_request=None):
        for one in requests:  # vLLM, too, looks at all requests before it computes anything
            if self.picture(one).width > 2000:
                raise ValueError("The decoder prompt is longer than the maximum model length")
        each = params if isinstance(params, list) else [params] * len(requests)
        self.calls.append((requests, each))
        if not each[0].logprob_token_ids:
            return [SimpleNamespace(outputs=self.completions(one, how)) for one, how in zip(requests, each)]
        said = [SimpleNamespace(token_ids=[], logprobs=[]) for _ in requests]
        going = list(range(len(requests)))
        while going := [i for i in going if len(said[i].token_ids) < each[i].max_tokens]:
            rows = [(self.extended(requests[i], said[i].token_ids), said[i]) for i in going]
            for _, same in itertools.groupby(
                rows, lambda row: (len(row[0]["prompt_token_ids"]), id(self.picture(row[0])))
            ):
                self.next_tokens(list(same), each[0].logprob_token_ids)
        return [SimpleNamespace(outputs=[one]) for one in said]

    @staticmethod
    def extended(one, said):
        return one | {"prompt_token_ids": one["prompt_token_ids"] + said}

    @staticmethod
    def picture(one):
        return one["multi_modal_data"]["image"]

    def inputs(self, *requests):
        """Return the processor's inputs for the requests' texts, after checking that their tokens match."""
        texts = [self.processor.tokenizer.decode(one["prompt_token_ids"]) for one in requests]
        inputs = self.processor(
            text=texts, images=[self.picture(one) for one in requests], return_tensors="pt"
        )
        image = self.processor.image_token_id
        for whole, one in zip(inputs["input_ids"].tolist(), requests):
            at = whole.index(image)
            assert whole[:at] + whole[at + whole.count(image) - 1 :] == one["prompt_token_ids"]
        return inputs

    @torch.no_grad()
    def next_tokens(self, some, token_ids):
        """Add the likeliest next token to each request's output, and the log-probabilities asked for."""
        logits = self.model(**self.inputs(*(row for row, _ in some)), logits_to_keep=1).logits[:, -1]
        for (_, so_far), row in zip(some, logits.log_softmax(-1)):
            so_far.token_ids.append(int(row.argmax()))
            so_far.logprobs.append({token: SimpleNamespace(logprob=float(row[token])) for token in token_ids})

    def completions(self, one, params):
        inputs, tokenizer = self.inputs(one), self.processor.tokenizer
        torch.manual_seed(params.seed or 0)
        out = self.model.generate(
            **inputs,
            max_new_tokens=params.max_tokens,
            tokenizer=tokenizer,
            stop_strings=params.stop or None,
            do_sample=params.temperature > 0,
            num_return_sequences=params.n,
            repetition_penalty=params.repetition_penalty,
            bad_words_ids=[tokenizer(word).input_ids for word in params.bad_words] or None,
        )[:, inputs["input_ids"].shape[1] :]
        self.ids += out.tolist()
        reason = "length" if out.shape[1] == params.max_tokens else "stop"
        return [
            SimpleNamespace(
                text=tokenizer.decode(row, skip_special_tokens=True),
                token_ids=row.tolist(),
                finish_reason=reason,
            )
            for row in out
        ]


@pytest.fixture(scope="module")
def policy(tiny):
    return tiny


@pytest.fixture
def vllm(policy):
    return Vllm(LLM(policy), policy[1], SamplingParams)


def prompt(processor, thinking, start=""):
    text = processor.apply_chat_template(messages(thinking), add_generation_prompt=True, tokenize=False)
    return processor.tokenizer(text + start).input_ids


def distributions(engine, images, thinking=False, max_tokens=64):
    prepared = [engine.prepare(image) for image in images]
    return engine.distributions(messages(thinking), prepared, thinking, max_tokens, batch_size=1)


def texts(engine, images, k, max_tokens, seed, penalty=1.0):
    prepared = [engine.prepare(image) for image in images]
    answers = engine.texts(messages(False), prepared, k, max_tokens, seed, 1, penalty)
    return [text for answer in answers for text in answer.texts]


@pytest.fixture
def pictures(photo):
    return [photo.crop((0, 0, 64, 64)), photo.crop((100, 60, 228, 156))]


# The arithmetic


def test_the_answers_are_numbers_once_each():
    assert len(BEGINNINGS) == len(set(BEGINNINGS)) == 133 and len(ANSWERS) == len(set(ANSWERS)) == 1231
    assert all(answer[:-1] in BEGINNINGS and answer[-1] in COLUMNS for answer in ANSWERS)
    assert [float(answer.removesuffix("<")) for answer in ANSWERS] == VALUES.tolist()


def tree_of(share):
    """Return the tree of {answer: probability}, answers as in `ANSWERS`, some after an opening."""
    tree = {}
    for text in [opening + text for opening in OPENINGS for text in BEGINNINGS]:
        under = {answer: p for answer, p in share.items() if answer.startswith(text) and answer != text}
        if under:
            total = sum(under.values())
            tree[text] = {
                c: sum(p for answer, p in under.items() if answer[len(text)] == c) / total for c in COLUMNS
            }
    return tree


def test_the_chain_rule_gives_back_the_distribution():
    share = {"3.25": 0.3, "3.2<": 0.1, "3<": 0.2, "4.99": 0.1, " 0.80": 0.1, "\n10<": 0.15, ".5<": 0.05}
    p = distribution(tree_of(share))
    found = {
        opening + answer: p[i, j]
        for i, opening in enumerate(OPENINGS)
        for j, answer in enumerate(ANSWERS)
        if p[i, j]
    }
    assert found == pytest.approx(share)
    assert {answer: answer_probability(tree_of(share), answer) for answer in share} == pytest.approx(share)


TOKENS = {character: token for token, character in enumerate(COLUMNS[:-1] + ",")}
"""Tokens of a dummy model that has one for each character; all others are `REST`."""
REST = len(TOKENS)


def exact(tree):
    """Return mass and mean of all answers of a tree."""
    p = distribution(tree).sum(0)
    return float(p.sum()), float(p @ VALUES / p.sum())


def request(whole, text):
    """Return the tokens that a model which knows a tree goes on with greedily, and what it lists for each."""
    said, listed = [], []
    for _ in range(logprob_settings(TOKENS, text)["max_tokens"]):
        following = whole.get(text, {END: 1.0})
        listed.append(
            {
                token: SimpleNamespace(logprob=math.log(following.get(character) or 1e-300))
                for character, token in TOKENS.items()
            }
        )
        likeliest = max(following, key=following.get)
        said.append(TOKENS.get(likeliest, REST))
        text += likeliest
    return said, listed


def rounds(whole):
    """Ask a model that knows a tree until nothing is left to ask; yield (what is known, requests so far)."""
    known, count = {}, 0
    while asked := open_prefixes(known):
        for text in asked:
            grow(known, text, *request(whole, text), TOKENS)
        count += len(asked)
        yield known, count


def whole_tree(seed, sharp, numbers=False):
    """Return a random tree, as the columns have it: the end includes spaces, and a comma is in none.

    numbers: below the first character there is nothing but numbers.
    """
    draw, whole = np.random.default_rng(seed), {}
    for text in [opening + text for opening in OPENINGS for text in BEGINNINGS]:
        row = dict(zip(COLUMNS + ",", draw.dirichlet([sharp] * (len(COLUMNS) + 1)).tolist()))
        if numbers and text.strip():
            row = {c: p + 1e-9 for c, p in row.items() if text.lstrip() + c in (*BEGINNINGS, *ANSWERS)}
            row = {c: p / sum(row.values()) for c, p in row.items()}
        whole[text] = dict.fromkeys(COLUMNS, 0.0) | row
        whole[text][END] += whole[text][" "] + whole[text]["\n"]
    for space in SPACES:
        if whole[""][space] < RARE:  # no engine follows it
            whole = {text: row for text, row in whole.items() if text[:1] != space}
    return whole


@given(seed=st.integers(0, 10**6), sharp=st.sampled_from([0.02, 0.1, 0.5, 3.0]))
def test_the_bound_on_the_error_holds_for_any_distribution_after_every_round(seed, sharp):
    whole = whole_tree(seed, sharp)
    mean = exact(whole)[1]
    for known, _ in rounds(whole):
        p = estimate(known).sum(0)
        assert abs(p @ VALUES / p.sum() - mean) <= stakes(known)[1] + 1e-9


@given(seed=st.integers(0, 10**6), sharp=st.sampled_from([0.02, 0.1, 0.5, 3.0]))
def test_a_score_is_within_tolerance_of_the_exact_one_whichever_numbers_are_left_out(seed, sharp):
    whole = whole_tree(seed, sharp, numbers=True)
    mass, mean = exact(whole)
    *_, (known, _) = rounds(whole)
    p = estimate(known).sum(0)
    assert float(p.sum()) == pytest.approx(mass, abs=1e-9)
    assert abs(p @ VALUES / p.sum() - mean) <= TOLERANCE + 1e-9


def test_the_bounds_are_reached():
    """The largest number that may follow is as far off as its stake; no number at all, as the bound."""
    known = tree_of({"3.50": 0.98, "4.99": 0.02})
    del known["4.9"]
    p = estimate(known).sum(0)
    score = float(p @ VALUES / p.sum())
    stake, bound = stakes(known)
    assert exact(tree_of({"3.50": 0.98, "4.99": 0.02}))[1] - score == pytest.approx(stake["4.9"])
    assert score - exact(known)[1] == pytest.approx(bound)


def test_the_more_a_model_doubts_the_more_is_asked():
    """Else many numbers that are none would be taken for some."""
    tree = {"": {"3": 1.0}, "3": {".": 1.0}, "3.": {"5": 0.998, "9": 0.002}, "3.5": {"0": 1.0}}
    assert open_prefixes(tree) == []
    assert open_prefixes(tree | {"3.5": {"0": 0.5}}) == ["3.9"]


def test_a_first_character_may_always_go_on_to_no_number():
    """However sure a model is of what is known; numbers alone after 9 move the score by 5e-5."""
    sure = {"3": {".": 1.0}, "3.": {"5": 1.0}, "3.5": {"0": 1.0}}
    assert open_prefixes(sure | {"": {"3": 1 - 1e-4, "9": 1e-4}}) == ["9"]
    assert open_prefixes(sure | {"": {"3": 1 - 1e-5, "9": 1e-5}}) == []


def test_a_sharp_distribution_takes_few_requests_and_a_flat_one_more():
    counts = []
    for std in (0.05, 0.3, 0.6):
        p = torch.exp(-((VALUES - 3.3) ** 2) / (2 * std**2))
        p *= torch.tensor([len(answer) == 4 and answer[0].isdigit() for answer in ANSWERS])
        whole = tree_of({answer: q for answer, q in zip(ANSWERS, (p / p.sum()).tolist()) if q > 1e-12})
        *_, (known, count) = rounds(whole)
        counts.append(count)
        p = estimate(known).sum(0)
        assert float(p @ VALUES / p.sum()) == pytest.approx(exact(whole)[1], abs=TOLERANCE)
    assert counts[0] < 10 < counts[1] < 25 < counts[2] < len(BEGINNINGS) / 2, counts


def test_what_cannot_matter_is_not_asked_for_and_one_request_tells_all_places_on_its_way():
    share = {"3.25": 1 - 2e-4, "4.25": 1e-4 - 1e-10, " 3.00": 1e-4 - 1e-10, "2.00": 2e-10}
    assert [(set(known), count) for known, count in rounds(tree_of(share))] == [({"", "3", "3.", "3.2"}, 1)]


def test_a_request_lists_up_to_21_tokens_and_leaves_logprobs_out(vllm):
    """vLLM refuses more than 20 for `logprobs`, its `max_logprobs`, but takes 128 of `logprob_token_ids`."""
    settings = logprob_settings(dict.fromkeys(map(str, range(21)), 7), "3.")
    assert len(settings["logprob_token_ids"]) == 21 and "logprobs" not in settings
    assert settings["max_tokens"] == 2 and logprob_settings({}, "\n")["max_tokens"] == 4


# Against the transformers engine


@pytest.mark.parametrize("thinking", [False, True])
def test_the_distribution_is_that_of_the_transformers_engine(policy, vllm, pictures, thinking):
    for picture in pictures:
        ours = distributions(transformers.load(policy), [picture], thinking)[0]
        score = Scorer(policy, thinking, batch_size=1, max_new_tokens=64).score([picture])[0]
        found = distributions(vllm, [picture], thinking)[0]
        p = found.probability
        assert p.shape == (3, 1231) and (p - ours.probability).abs().max() < 1e-3
        doubt = abs(float(p.sum() - ours.probability.sum()))  # was taken for numbers, each at most 5 off
        assert doubt < 0.02
        assert found.likeliest == ours.likeliest and found.likeliest.endswith("</answer>")
        assert found.texts == ours.texts == score.answers and not found.error
        assert float(p.sum(0) @ VALUES / p.sum()) == pytest.approx(score.score, abs=TOLERANCE + 5 * doubt)
    assert vllm.requests == sum(len(rows) for rows, _ in vllm.llm.calls)


def test_pictures_go_down_the_tree_together_each_under_its_own_name(policy, vllm, pictures):
    ids, tokens = prompt(policy[1], False, OPEN), vllm.tokens
    together = distributions(vllm, pictures)
    named = {}
    for rows, each in vllm.llm.calls:
        for row, params in zip(rows, each, strict=True):
            assert params.temperature == 0 and params.logprob_token_ids in (list(tokens.values()), None)
            assert row["prompt_token_ids"][: len(ids)] == ids
            named.setdefault(row["multi_modal_uuids"]["image"][0], row["multi_modal_data"]["image"])
            assert named[row["multi_modal_uuids"]["image"][0]] is row["multi_modal_data"]["image"]
    assert len(named) == 2
    for one, picture in zip(together, pictures, strict=True):
        assert (one.probability - distributions(vllm, [picture])[0].probability).abs().max() < 1e-5


def test_a_reasoning_without_an_answer_has_no_distribution(vllm, pictures):
    for answer in distributions(vllm, pictures, thinking=True, max_tokens=3):
        assert not answer.probability.any() and answer.texts[0] and OPEN not in answer.texts[0]
    assert len(vllm.llm.calls) == 1


def test_completions_are_greedy_or_sampled(policy, vllm, pictures):
    greedy = texts(vllm, pictures, 1, 12, 0)
    assert greedy == [
        score.answers[0] for score in Scorer(policy, estimate="greedy", max_new_tokens=12).score(pictures)
    ]
    sampled = texts(vllm, pictures, 3, 12, 7)
    assert len(sampled) == 6 and len(set(sampled)) > 2 and all("<answer>" in text for text in sampled)
    (_, [one, _]), (_, [two, _]) = vllm.llm.calls
    official = Scorer(policy, estimate="greedy", max_new_tokens=12, repetition_penalty=30.0).score(pictures)
    assert texts(vllm, pictures, 1, 12, 0, 30.0) == [score.answers[0] for score in official] != greedy
    assert (one.temperature, one.n) == (0, 1) and (two.temperature, two.n, two.seed) == (1, 3, 7)


# Requests and loading


def test_a_request_holds_one_image_token_and_what_was_said_since(photo):
    assert image_prompt([1, 9, 2], photo, "a", [5, 6]) == {
        "prompt_token_ids": [1, 9, 2, 5, 6],
        "multi_modal_data": {"image": photo},
        "multi_modal_uuids": {"image": ["a"]},
    }


@pytest.mark.parametrize(("rank", "largest"), [(4, 8), (16, 16), (33, 64)])
def test_an_adapter_is_served_on_its_base(tmp_path, rank, largest):
    lora_config(rank).save_pretrained(tmp_path)
    text = (
        (tmp_path / "adapter_config.json")
        .read_text()
        .replace('"base_model_name_or_path": null', '"base_model_name_or_path": "Qwen/Q"')
    )
    (tmp_path / "adapter_config.json").write_text(text)
    options, adapter = llm_options(tmp_path)
    assert (options["model"], options["max_lora_rank"], options["enable_lora"], adapter) == (
        "Qwen/Q",
        largest,
        True,
        str(tmp_path),
    )


def test_the_shipped_ranker_is_served_on_the_embedded_policys_folder():
    options, adapter = llm_options("people-ranker")
    assert options["model"] == str(policy_path("tiny-policy"))
    assert adapter == str(policy_path("people-ranker"))


def test_pixels_are_handed_to_the_processor_and_4_bits_refused():
    assert llm_options("Qwen/Q", pixels=[3136, 65_536])[0]["mm_processor_kwargs"] == {
        "min_pixels": 3136,
        "max_pixels": 65_536,
    }
    with pytest.raises(ValueError, match="serves in bf16.*engine='transformers'"):
        llm_options("Qwen/Q", quantize=True)


def test_an_adapter_of_too_high_a_rank_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        f'{{"base_model_name_or_path": "Qwen/Q", "r": {RANKS[-1] + 1}}}'
    )
    with pytest.raises(ValueError, match="up to rank 256"):
        llm_options(tmp_path)


def test_without_vllm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install vllm==.*transformers"):
        engines.load("tiny-policy")


@pytest.fixture
def stand_in(monkeypatch):
    """Replace the imported parts of `vllm` and `vllm.lora.request`."""
    whole, lora, of_request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    whole.LLM, whole.SamplingParams = (
        lambda model, **options: LLM(load_policy(model), **options),
        SamplingParams,
    )
    of_request.LoRARequest = lambda name, number, path: (name, number, path)
    for module in (whole, lora, of_request):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_policy_is_loaded_with_its_own_processor(stand_in, policy):
    vllm = engines.load("tiny-policy")
    assert type(vllm.processor) is type(policy[1]) and vllm.lora is None
    assert vllm.llm.options == limits(policy[0].config.get_text_config()) | {
        "dtype": str(default_dtype()).removeprefix("torch."),
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "enable_prefix_caching": True,
    }
    assert vllm.llm.options["max_model_len"] == 2048
    own = LLM(policy)
    assert engines.load((own, vllm.processor)).llm is own


def test_a_request_has_as_many_tokens_as_the_model_has_positions(monkeypatch):
    """With Qwen2.5-VL-7B's numbers: 28,672 keys and values a token, of 4 bytes each in fp32."""
    config = SimpleNamespace(
        max_position_embeddings=128_000,
        num_hidden_layers=28,
        num_key_value_heads=4,
        hidden_size=3584,
        num_attention_heads=28,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert limits(config) == {
        "max_model_len": engines.MAX_TOKENS,
        "enforce_eager": True,
        "kv_cache_memory_bytes": engines.TOGETHER * engines.MAX_TOKENS * 28_672 * 4,
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config.max_position_embeddings = 2048
    assert limits(config) == {"max_model_len": 2048}


def test_the_embedded_policys_folder_has_what_vllm_reads_of_a_video_processor(policy, tmp_path):
    policy[1].save_pretrained(tmp_path)
    written, kept = (
        json.loads((folder / "video_preprocessor_config.json").read_text(encoding="utf-8"))
        for folder in (tmp_path, policy_path("tiny-policy"))
    )
    assert written == kept and written["patch_size"] == policy[1].image_processor.patch_size


def test_an_adapter_on_a_base_in_4_bits_is_not_served_on_the_one_in_bf16(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Q", "r": 16}')
    (tmp_path / BASE).write_text('{"quantize": false}')
    assert llm_options(tmp_path)[0]["model"] == "Qwen/Q"
    (tmp_path / BASE).write_text('{"quantize": true}')
    with pytest.raises(ValueError, match="trained on a base in 4 bits.*merge_adapter"):
        llm_options(tmp_path)


# The Scorer


@pytest.mark.parametrize(
    "options", [{}, {"thinking": True}, {"estimate": "greedy"}, {"estimate": "sample", "k": 3}], ids=str
)
def test_a_picture_that_vllm_refuses_costs_its_own_score_alone(stand_in, policy, pictures, options):
    large = Image.new("RGB", (2001, 20))
    scorer = Scorer("tiny-policy", engine="vllm", **options)
    found = scorer.score([pictures[0], large, pictures[1], pictures[0]])
    alone = [scorer.score([picture])[0] for picture in (*pictures, pictures[0])]
    assert (
        found[1].error
        == "vLLM does not take this picture: The decoder prompt is longer than the maximum model length"
    )
    assert [score.answers for score in found[::2] + found[3:]] == [
        alone[0].answers,
        alone[1].answers,
        alone[2].answers,
    ]
    assert all(math.isfinite(score.score) for score in (found[0], found[2], found[3])) and math.isnan(
        found[1].score
    )


def test_an_answer_from_vllm_never_holds_a_picture(stand_in, policy, pictures):
    model, processor = copy.deepcopy(policy[0]), policy[1]
    barred = pushed(model, processor)
    vllm = Vllm(LLM((model, processor)), processor, SamplingParams)
    prepared = [vllm.prepare(picture) for picture in pictures]

    def write(k):
        vllm.texts(messages(True), prepared, k, 6, 0, batch_size=2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "barred", [])
        write(2)
        assert set(vllm.llm.ids[-1]) <= barred  # it would
    write(2)
    write(1)
    distributions(vllm, pictures, thinking=True, max_tokens=6)
    rows = vllm.llm.ids[-8:]
    assert len(rows) == 2 * 2 + 2 + 2 and not barred & {token for row in rows for token in row}
    own = engines.load((vllm.llm, processor))
    assert set(own.barred) == set(engines.load("tiny-policy").barred) == set(VISION)


@pytest.mark.parametrize(
    "options", [{}, {"thinking": True}, {"estimate": "greedy", "thinking": True}], ids=str
)
def test_the_scorer_gives_what_it_gives_with_transformers(stand_in, policy, pictures, tmp_path, options):
    images = [*pictures, tmp_path / "missing.png"]
    ours, theirs = (
        scorer.score(images)
        for scorer in (Scorer("tiny-policy", engine="vllm", **options), Scorer(policy, **options))
    )
    for one, two in zip(ours, theirs):
        assert (one.answers, one.reasoning, one.error) == (two.answers, two.reasoning, two.error)
        off = TOLERANCE + 5 * abs(one.mass - two.mass) if one.mass == one.mass else TOLERANCE
        assert one.score == pytest.approx(two.score, abs=off, nan_ok=True)
        assert [one.std, one.mass] == pytest.approx([two.std, two.mass], abs=0.02, nan_ok=True)
    assert "missing" in ours[-1].error


def test_the_scorer_samples_compares_and_describes(stand_in, policy, pictures, tmp_path):
    sampled = Scorer("tiny-policy", engine="vllm", estimate="sample", k=3).score(pictures)
    assert all(len(score.answers) == 3 and score.std >= 0 for score in sampled)
    scorer = Scorer("tiny-policy", engine="vllm")
    assert scorer.compare(*pictures) == pytest.approx(Scorer(policy).compare(*pictures), abs=0.01)
    assert scorer.describe(pictures[0]).text == Scorer(policy).describe(pictures[0]).text
    assert all(score.error for score in scorer.score([tmp_path / "missing.png"]))


def test_an_engine_has_a_known_name(policy):
    with pytest.raises(ValueError, match="'tgi' is unknown.*transformers, vllm"):
        Scorer(policy, engine="tgi")
