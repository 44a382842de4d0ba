"""One look per picture and one pass per prompt: a GRPO step's K answers share both.

TRL repeats prompt and picture K times through the vision tower, through the prefill of the rollout, and
through the forward and backward pass of the log-probabilities. Here each distinct picture and prompt is
computed once, with gradient checkpointing and without. The numbers are the same up to rounding: the samples
are the same in fp32, others after a few steps in bf16.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps

import torch
from transformers import BatchFeature, Cache, PreTrainedModel, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from vqr1.policy import base_of

SHARED = ("qwen2_5_vl", "qwen3_vl")
"""Model types that this holds for; all others use the stock code."""


def share(model: PreTrainedModel) -> None:
    """Share what K answers have in common, in rollouts and log-probabilities.

    model: as TRL prepared it (`fused_lm_head`).
    """
    look_once(model)
    prefill_once(model)
    prompt_once(model)


def process_once(processor: ProcessorMixin) -> None:
    """Let the image processor work once on a repeated picture, and remember the last batch.

    TRL asks for it again for the log-probabilities.
    """
    process, last = processor._process_images, [None, None]  # the last call, and what came of it

    def shared(images, **kwargs):
        images, kwargs = make_flat_list_of_images(images), kwargs | {"return_tensors": "pt"}
        once = list({id(image): image for image in images}.values())
        places = {id(image): i for i, image in enumerate(once)}
        order = [places[id(image)] for image in images]
        if (
            last[0] is None
            or last[0][1:] != (order, kwargs)
            or any(a is not b for a, b in zip(last[0][0], once))
        ):
            done, texts = process(once, **kwargs)
            grid, patches = (
                done["image_grid_thw"],
                done["pixel_values"].split(done["image_grid_thw"].prod(1).tolist()),
            )
            repeated = BatchFeature(
                {"pixel_values": torch.cat([patches[i] for i in order]), "image_grid_thw": grid[order]}
            )
            last[:] = (once, order, kwargs), (repeated, [texts[i] for i in order])
        return last[1]

    processor._process_images = shared


def look_once(model: PreTrainedModel) -> None:
    """Let a frozen vision tower see each distinct picture of a batch once, and remember the last batch.

    TRL repeats every picture for each of its K answers, in the rollout and again for the log-probabilities.
    The features are the same numbers; only the work is shared. A tower that is trained is left alone.
    Qwen3-VL's features of inner layers (DeepStack) are shared alike.
    """
    tower = base_of(model).model.visual
    forward, remembered = tower.forward, []  # of ((grid, picture), (features, features of inner layers …))

    def shared(hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs):
        if any(parameter.requires_grad for parameter in tower.parameters()):
            return forward(hidden_states, grid_thw, **kwargs)
        pictures = [*zip(map(tuple, grid_thw.tolist()), hidden_states.split(grid_thw.prod(1).tolist()))]
        known = len(remembered)
        first, places = distinct([picture for picture, _ in remembered] + pictures)
        new = [i - known for i in first if i >= known]
        if new:
            with torch.no_grad():
                seen = forward(torch.cat([pictures[i][1] for i in new]), grid_thw[new], **kwargs)
            sizes = (grid_thw[new].prod(1) // tower.spatial_merge_unit).tolist()
            levels = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])]
            found = zip(*(level.split(sizes) for level in levels))
            remembered.extend(
                ((pictures[i][0], pictures[i][1].clone()), features) for i, features in zip(new, found)
            )
        asked = places[known:]
        pooled, *inner = (torch.cat(level) for level in zip(*(remembered[place][1] for place in asked)))
        remembered[:] = [remembered[place] for place in dict.fromkeys(asked)]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=inner)

    tower.forward = shared


def prefill(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    pixel_values: torch.Tensor,
    grid: torch.Tensor,
    cache: Cache | None = None,
) -> Cache:
    """Run prompts with one picture each through the model, all but their last token, and return the cache.

    The model keeps `rope_deltas`, positions minus number of tokens, as it does for its own prefill. The cache
    is ready for `generate(ids, mask, past_key_values=cache)`, and for K answers after
    `cache.batch_repeat_interleave(K)`.

    Args:
        model: with or without an adapter.
        ids: (B, T), tokens.
        mask: (B, T), 1 for real tokens.
        pixel_values: of all pictures, as the image processor gives them.
        grid: (B, 3), likewise.
        cache: of the first tokens, if it exists.
    """
    inner = base_of(model).model
    kinds = (ids == model.config.image_token_id).int()
    positions, inner.rope_deltas = inner.get_rope_index(ids, kinds, image_grid_thw=grid, attention_mask=mask)
    known = cache.get_seq_length() if cache else 0
    out = inner(
        input_ids=ids[:, known:-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :, known:-1],
        pixel_values=pixel_values,
        image_grid_thw=grid,
        past_key_values=cache,
        use_cache=True,
    )
    return out.past_key_values


def prefill_once(model: PreTrainedModel) -> None:
    """Let `model.generate` run each distinct prompt of a batch once; TRL repeats it for its K answers.

    The samples are the stock ones, to rounding. Calls without pictures, with several per prompt, with a cache
    or with gradient checkpointing in train mode use the stock `generate`.
    """
    generate = model.generate

    def shared(*args, **inputs):
        ids, pixels, grid = (inputs.get(name) for name in ("input_ids", "pixel_values", "image_grid_thw"))
        if (
            args
            or ids is None
            or pixels is None
            or grid is None
            or len(grid) != len(ids)
            or inputs.get("past_key_values") is not None
            or (model.training and base_of(model).is_gradient_checkpointing)  # which keeps no cache
        ):
            return generate(*args, **inputs)
        with torch.no_grad():
            first, places, pixels = _distinct_prompts(ids, pixels, grid)
            order = torch.tensor(places, device=ids.device)
            cache = prefill(model, ids[first], inputs["attention_mask"][first], pixels, grid[first])
            cache.reorder_cache(order)
        inner = base_of(model).model
        inner.rope_deltas = inner.rope_deltas[order]
        return generate(**_without_pictures(inputs), past_key_values=cache)

    model.generate = shared


def prompt_once(model: PreTrainedModel) -> None:
    """Let TRL's forward for log-probabilities run each distinct prompt once, with gradients.

    A prompt and its K answers are one sequence, in which each answer sees the prompt and itself (`_packed`).
    So no cache is needed, and gradients can be checkpointed. It replaces the forward that TRL calls with
    ``fused_lm_head=True`` and labels that are -100 for the prompt. Calls without these arguments or with
    several pictures per prompt use the stock forward, as do attentions that take no mask of our own (flash)
    or have a sliding window.
    """
    base = base_of(model)
    forward = base.forward

    @wraps(forward)  # `generate` reads its signature
    def shared(*args, **inputs):
        labels, grid = inputs.get("labels"), inputs.get("image_grid_thw")
        answered = labels is not None and bool((labels != -100).any())
        alike = inputs.get("fused_lm_head") and answered and grid is not None and len(grid) == len(labels)
        if not alike or not _takes_mask(base):
            return forward(*args, **inputs)
        packed, unpacked = _packed(base, **inputs)
        out = forward(**packed)
        return replace(out, **{name: unpacked(value) for name, value in out.items() if name != "loss"})

    base.forward = shared


def _takes_mask(model: PreTrainedModel) -> bool:
    """Tell whether all attention is by a mask (N, 1, S, S) that the caller may give."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    return config._attn_implementation == "sdpa" and "sliding_attention" not in kinds


def _packed(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    pixel_values: torch.Tensor,
    image_grid_thw: torch.Tensor,
    mm_token_type_ids: torch.Tensor | None = None,
    **rest,
) -> tuple[dict, Callable[[torch.Tensor], torch.Tensor]]:
    """Return (inputs of a forward with one row per distinct prompt, a function that undoes it).

    A row holds the prompt without its last token; then, for each of its answers, that last token, which
    predicts the answer's first, and the answer. So of N rows with B prompts of P tokens and answers of C,
    B (P - 1) + N (1 + C) tokens are computed instead of N (P + C). Prompts with fewer answers than others are
    filled up with masked ones.

    Args:
        model: without an adapter around it.
        input_ids: (N, P + C), prompts padded on the left and answers on the right.
        attention_mask: (N, P + C), 1 for real tokens.
        labels: (N, P + C), -100 for prompts and padding.
        pixel_values: of all pictures, one per row.
        image_grid_thw: (N, 3), likewise.
        mm_token_type_ids: not needed: only prompts have pictures.
        rest: goes on as it is.

    Returns:
        The inputs, and a function from values of these rows' tokens but the last, as the fused head gives
        them, to those of the answers, (N, C).
    """
    start = int((labels != -100).any(0).int().argmax()) - 1  # of the prompt's last token
    first, places, pixels = _distinct_prompts(input_ids[:, : start + 1], pixel_values, image_grid_thw)
    slots = [places[:row].count(place) for row, place in enumerate(places)]
    prompts, branches, length = len(first), max(slots) + 1, labels.shape[1] - start

    def pack(rows: torch.Tensor, filling: int) -> torch.Tensor:
        answers = rows.new_full((prompts, branches, length), filling)
        answers[places, slots] = rows[:, start:]
        return torch.cat([rows[first, :start], answers.flatten(1)], 1)

    def unpacked(values: torch.Tensor) -> torch.Tensor:
        answers = torch.nn.functional.pad(values[:, start:], (0, 1)).view(prompts, branches, length)
        return answers[places, slots, :-1]

    ids, grid = input_ids[first, : start + 1], image_grid_thw[first]
    kinds = (ids == model.config.image_token_id).int()
    positions, _ = model.model.get_rope_index(
        ids, kinds, image_grid_thw=grid, attention_mask=attention_mask[first, : start + 1]
    )
    steps = torch.arange(length, device=ids.device).repeat(branches)
    inputs = {
        "input_ids": pack(input_ids, 0),
        "labels": pack(labels, -100),
        "attention_mask": _seen(pack(attention_mask, 0).bool(), start, length),
        "position_ids": torch.cat([positions[..., :start], positions[..., start:] + steps], -1),
        "pixel_values": pixels,
        "image_grid_thw": grid,
    }
    return rest | inputs, unpacked


def _seen(real: torch.Tensor, prompt: int, answer: int) -> torch.Tensor:
    """Return (B, 1, S, S): whether a token, by row, sees another, by column.

    It sees what stands before it in the prompt and in its own answer, padding excepted; padding sees itself
    alone, as attention to nothing is not a number.

    Args:
        real: (B, S), False for padding; S is the prompt's tokens and some answers'.
        prompt: tokens of the prompt.
        answer: tokens of each answer.

    >>> _seen(torch.tensor([[True, True, True, True, False]]), 1, 2)[0, 0].int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 0, 0, 1, 0],
            [1, 0, 0, 1, 1]], dtype=torch.int32)
    """
    place = torch.arange(real.shape[1], device=real.device)
    whose = (place - prompt).div(answer, rounding_mode="floor").clamp(min=-1)  # -1: the prompt's
    seen = (place[:, None] >= place) & ((whose == -1) | (whose[:, None] == whose))
    return (seen & real[:, None] | (place[:, None] == place))[:, None]


def _without_pictures(inputs: dict) -> dict:
    """Return the inputs of a call whose pictures are in the cache already."""
    gone = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    return {key: value for key, value in inputs.items() if key not in gone}


def _distinct_prompts(
    ids: torch.Tensor, pixels: torch.Tensor, grid: torch.Tensor
) -> tuple[list[int], list[int], torch.Tensor]:
    """Return (rows of the distinct prompts, which of these each row has, their pixels)."""
    pictures = pixels.split(grid.prod(1).tolist())
    first, places = distinct([*zip(zip(map(tuple, grid.tolist()), map(tuple, ids.tolist())), pictures)])
    return first, places, torch.cat([pictures[i] for i in first])


def distinct(items: list[tuple[tuple, torch.Tensor]]) -> tuple[list[int], list[int]]:
    """Return (positions of the distinct items, which of these each item equals).

    items: (key, tensor); two are the same if both are exactly equal.

    >>> a, b = torch.ones(2, 3), torch.zeros(2, 3)
    >>> distinct([((), a), ((), b), ((), a.clone()), ((1,), a)])
    ([0, 1, 3], [0, 1, 0, 2])
    """
    first, places = [], []
    groups = {}  # key and a few of the numbers -> places of the distinct items with these
    for i, (key, tensor) in enumerate(items):
        group = groups.setdefault((key, *tensor[len(tensor) // 2].flatten()[:4].tolist()), [])
        place = next((place for place in group if torch.equal(items[first[place]][1], tensor)), len(first))
        if place == len(first):
            first.append(i)
            group.append(place)
        places.append(place)
    return first, places
