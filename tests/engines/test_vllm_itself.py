"""The Scorer's vLLM engine is tested with vLLM: `make test-vllm`, on a CPU, in an environment of its own.

One engine serves all tests, for starting it takes longest: with the adapter, and without it.
"""

import dataclasses
import math

import pytest
import torch
from PIL import Image

vllm = pytest.importorskip("vllm", reason="make test-vllm runs these, in vLLM's own environment")

from vqr1.engines.vllm import TOLERANCE, VERSIONS, load, logprob_settings  # noqa: E402
from vqr1.policy import never_sampled  # noqa: E402
from vqr1.prompts import messages  # noqa: E402
from vqr1.scoring import Scorer  # noqa: E402

ADAPTER, BASE = "people-ranker", "tiny-policy"


@pytest.fixture(scope="module")
def served():
    return load(ADAPTER)


@pytest.fixture(scope="module")
def ours():
    return {name: Scorer(name) for name in (ADAPTER, BASE)}


@pytest.fixture(scope="module")
def theirs(served, ours):
    """Scorers of the same engine, which have the settings of `ours`: both are told how to ask."""
    alone = Scorer((served.llm, served.processor), engine="vllm")
    adapted = alone.with_()
    adapted.engine = served
    return {ADAPTER: adapted, BASE: alone}


@pytest.fixture(scope="module")
def pictures(photo):
    """Of several sizes, some no whole number of patches."""
    return [photo.crop((0, 0, 64, 64)), photo, photo.crop((100, 60, 230, 157)), photo.crop((9, 9, 300, 73))]


def both(ours, theirs, name, pictures, **settings):
    settings = {"numbered": False, "thinking": False, "max_new_tokens": 64} | settings
    return [scorers[name].with_(**settings).score(pictures) for scorers in (ours, theirs)]


def test_the_version_is_one_that_the_engine_names():
    assert vllm.__version__.startswith(VERSIONS)


def test_the_model_fits_its_positions_and_is_in_fp32(served):
    config = served.llm.llm_engine.vllm_config.model_config
    assert config.max_model_len == 2048 and config.dtype == torch.float32


@pytest.mark.parametrize("name", [BASE, ADAPTER])
@pytest.mark.parametrize("thinking", [False, True])
def test_expected_scores_are_those_of_transformers(ours, theirs, pictures, name, thinking):
    for one, two in zip(*both(ours, theirs, name, pictures, thinking=thinking), strict=True):
        assert not one.error and not two.error
        doubt = abs(two.mass - one.mass)  # what was taken for numbers and is none, each at most 5 off
        assert two.score == pytest.approx(one.score, abs=TOLERANCE + 5 * doubt)
        assert [two.std, two.mass] == pytest.approx([one.std, one.mass], abs=0.02)
        assert (two.answers, two.reasoning) == (one.answers, one.reasoning)


def test_an_adapter_changes_the_scores(theirs, pictures):
    adapted, alone = (theirs[name].score(pictures) for name in (ADAPTER, BASE))
    assert any(abs(one.score - two.score) > 10 * TOLERANCE for one, two in zip(adapted, alone))


@pytest.mark.parametrize("thinking", [False, True])
def test_greedy_answers_are_those_of_transformers(ours, theirs, pictures, thinking):
    one, two = both(ours, theirs, ADAPTER, pictures, thinking=thinking, estimate="greedy")
    assert [score.answers for score in one] == [score.answers for score in two]
    assert [score.score for score in one] == [score.score for score in two]


def test_samples_differ_come_again_with_their_seed_and_hold_no_picture(theirs, pictures):
    scorer = theirs[ADAPTER].with_(estimate="sample", k=4, max_new_tokens=64, seed=5)
    first, again = scorer.score(pictures[:2]), scorer.score(pictures[:2])
    assert [score.answers for score in first] == [score.answers for score in again]
    answers = [answer for score in first for answer in score.answers]
    assert len(answers) == 8 and len(set(answers)) > 1
    assert all(math.isfinite(score.score) and score.std >= 0 for score in first)
    assert not any(token in answer for answer in answers for token in never_sampled(scorer.engine.processor))


@pytest.mark.parametrize("estimate", ["expected", "greedy"])
def test_a_picture_that_vllm_refuses_costs_its_own_answer_alone(theirs, pictures, estimate):
    """Qwen's image processor takes nothing 200 times as wide as high, and nor does our reader of files."""
    engine = theirs[BASE].engine

    def ask(*images):
        prepared = [engine.prepare(image) for image in images]
        if estimate == "greedy":
            return engine.texts(messages(False), prepared, 1, 32, 0, 16)
        return engine.distributions(messages(False), prepared, False, 32, 16)

    found = ask(pictures[0], Image.new("RGB", (4096, 16)), pictures[2])
    alone = ask(pictures[0], pictures[2])
    assert found[1].error.startswith("vLLM does not take this picture: ") and not found[1].texts
    assert [one.texts for one in found[::2]] == [one.texts for one in alone]
    assert [one.likeliest for one in found[::2]] == [one.likeliest for one in alone]


def test_bounds_leave_few_requests_and_each_is_counted(theirs, pictures):
    engine = theirs[ADAPTER].engine
    before = engine.requests
    theirs[ADAPTER].with_(thinking=True).score(pictures)
    assert 3 * len(pictures) <= engine.requests - before <= 25 * len(pictures)


def test_vllm_takes_what_trl_hands_over():
    """TRL 1.16 builds its engine and its sampling settings from these, and ours adds `bad_words`."""
    from vllm.engine.arg_utils import EngineArgs

    sampling = {"n": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    vllm.SamplingParams(**sampling, max_tokens=9, logprobs=0, bad_words=["<|image_pad|>"])
    engine = (
        "model tensor_parallel_size gpu_memory_utilization max_model_len max_num_seqs enable_sleep_mode "
        "model_impl distributed_executor_backend seed max_num_batched_tokens logprobs_mode quantization "
        "trust_remote_code"
    )
    assert set(engine.split()) <= {one.name for one in dataclasses.fields(EngineArgs)}


def test_a_prompt_whose_picture_is_repeated_already_is_not_the_same_to_vllm(served, photo):
    """That is why `vqr1.training.one_token_per_picture` is there; if it fails, it is no longer needed."""
    image, prompt = served.processor.image_token_id, served._prompt(messages(False))
    at = prompt.index(image)

    def length(times):
        row = {
            "prompt_token_ids": [*prompt[:at], *[image] * times, *prompt[at + 1 :]],
            "multi_modal_data": {"image": photo},
        }
        params = vllm.SamplingParams(max_tokens=1, detokenize=False)
        return len(served.llm.generate([row], params, use_tqdm=False)[0].prompt_token_ids)

    whole = length(1)
    repeated = whole - len(prompt) + 1
    assert repeated > 1 and length(repeated) == whole + repeated - 1


def test_the_chat_endpoint_takes_the_same_settings(served):
    """As the page on serving asks it."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    settings = logprob_settings(served.tokens, "3.")
    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "<answer>3."}],
        max_tokens=settings["max_tokens"],
        temperature=0,
        logprobs=True,
        logprob_token_ids=settings["logprob_token_ids"],
        return_tokens_as_token_ids=True,
        add_generation_prompt=False,
        continue_final_message=True,
    )
    params = request.to_sampling_params(settings["max_tokens"], {})
    assert params.logprob_token_ids == settings["logprob_token_ids"] and params.logprobs is None
    assert (params.max_tokens, params.temperature) == (2, 0)
