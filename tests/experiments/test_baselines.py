"""Baselines order plain cases, learn what they should, and leave the rest alone."""

import sys
from functools import partial
from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from scipy.ndimage import gaussian_filter

from vqr1.data.manifests import EMBEDDED
from vqr1.experiments import baselines
from vqr1.experiments.baselines import (
    Opinions,
    SmallCNN,
    brisque,
    dct_filters,
    file_size,
    fit,
    flawed,
    load_cnn,
    naming_accuracy,
    piqe,
    pixels,
    pretrain_cnn,
    ranking_loss,
    rating_losses,
    score_cnn,
    score_head,
    supervised,
    tower_features,
    train_cnn,
    train_head,
)
from vqr1.experiments.damage import FLAWS
from vqr1.experiments.pretraining import NAMING
from vqr1.experiments.school import PictureStream
from vqr1.metrics import srcc
from vqr1.policy import load_policy, lora_config
from vqr1.scoring import Scorer


def photograph(name: str = "photos/red_panda.jpg", side: int = 192) -> np.ndarray:
    return np.asarray(Image.open(EMBEDDED / name).convert("RGB").crop((128, 64, 128 + side, 64 + side)))


def blurred(sigma: float, side: int = 64) -> Image.Image:
    return Image.fromarray(gaussian_filter(photograph(side=side), (sigma, sigma, 0)))


def rated(count: int = 24) -> tuple[pd.DataFrame, list[Image.Image]]:
    """Return pictures that are more blurred the worse they are rated."""
    mos = np.linspace(1, 5, count).round(2)
    return pd.DataFrame({"mos": mos, "dataset": "blur"}), [blurred(5 - m) for m in mos]


@pytest.fixture(scope="module")
def policy(tiny):
    return tiny


# Classical measures


@pytest.mark.parametrize("measure", [brisque, piqe])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sharp_photograph_is_above_a_blurred_and_a_noisy_one(measure):
    clean = photograph()
    noisy = np.clip(clean + np.random.default_rng(0).normal(0, 50, clean.shape), 0, 255).astype(np.uint8)
    blurry = gaussian_filter(clean, (4, 4, 0))
    scores = measure([Image.fromarray(picture) for picture in (clean, noisy, blurry)])
    assert scores.shape == (3,) and np.isfinite(scores).all()
    assert scores[0] > scores[1] + 5 and scores[0] > scores[2] + 5


def test_a_sharp_picture_has_a_larger_file_than_a_blurred_one(tmp_path):
    paths = [tmp_path / f"{sigma}.jpg" for sigma in (0, 1, 3)]
    for sigma, path in zip((0, 1, 3), paths):
        blurred(sigma).save(path)
    sizes = file_size(paths)
    assert sizes.tolist() == [len(path.read_bytes()) for path in paths] and sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(("measure", "package"), [(brisque, "brisque"), (piqe, "pypiqe")])
def test_without_libgl_a_classical_measure_says_what_to_install(measure, package, monkeypatch, tmp_path):
    """OpenCV's wheel fails this way on a bare machine."""
    broken = "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    (tmp_path / "cv2.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("cv2", package)]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=rf"{package} cannot be imported .*apt-get install libgl1"):
        measure([])


# A regressor, a ranker


def test_the_ranking_loss_knows_order_and_not_scale_of_mos():
    mos, scores = torch.tensor([5.0, 3.0, 1.0]), torch.tensor([0.3, 0.0, -0.3])
    right = ranking_loss(scores, mos)
    assert right < ranking_loss(torch.zeros(3), mos) < ranking_loss(-scores, mos)
    assert ranking_loss(scores, 100 * mos + 7) == right
    assert ranking_loss(scores + 40, mos) == pytest.approx(float(right), abs=1e-5)


def test_the_ranking_loss_has_gradients_that_sort():
    scores = torch.zeros(3, requires_grad=True)
    ranking_loss(scores, torch.tensor([1.0, 3.0, 5.0])).backward()
    low, middle, high = scores.grad.tolist()
    assert low > 0 > high and middle == pytest.approx(
        0, abs=1e-6
    )  # descent lowers the worst and lifts the best


def test_batches_hold_one_data_set_and_as_many_as_asked_for():
    frame = pd.DataFrame({"mos": range(10), "dataset": ["a"] * 6 + ["b"] * 4})
    batches = []
    list(rating_losses(lambda rows: batches.append(rows) or torch.zeros(len(rows), 1), frame, True, 11, 3, 0))
    assert len(batches) == 11 and {len(rows) for rows in batches} == {3}
    assert all(frame["dataset"].iloc[rows].nunique() == 1 for rows in batches)


def test_too_few_rows_for_a_batch_say_so():
    frame, images = rated(5)
    with pytest.raises(ValueError, match="'blur' has 5 rows, fewer than the 16 images"):
        train_cnn(frame, images, ranker=True, steps=1)


def test_fit_descends():
    torch.manual_seed(0)
    line, x = torch.nn.Linear(1, 1), torch.linspace(-1, 1, 32)[:, None]
    fit(line, (((line(x) - 3 * x - 1) ** 2).mean() for _ in range(200)), 200, 0.1)
    assert line.weight.item() == pytest.approx(3, abs=0.05) and line.bias.item() == pytest.approx(1, abs=0.05)


# The small CNN


def test_the_cnn_is_small_and_starts_from_orthogonal_filters():
    assert sum(weight.numel() for weight in SmallCNN().parameters()) < 100_000
    luma = dct_filters()[:16, 1].flatten(1) / 0.587
    assert torch.allclose(luma @ luma.T, torch.eye(16), atol=1e-5)


def test_the_stored_cnn_is_small_and_has_seen_something():
    assert baselines.CNN.stat().st_size < 300_000
    log = pd.read_csv(EMBEDDED / "runs" / "pretrain-cnn.csv", comment="#")
    assert log["type_accuracy"].iloc[-1] > 3 / 19  # of 19 distortions and none
    assert not torch.equal(load_cnn().maps[0].weight, dct_filters())


@pytest.mark.parametrize("ranker", [False, True])
def test_the_cnn_learns_an_order_and_scores_any_size(ranker):
    frame, images = rated()
    model = train_cnn(frame, images, ranker=ranker, steps=15, batch=8)
    scores = score_cnn(model, images)
    assert scores.shape == (24,) and srcc(scores, frame["mos"]) > 0.9
    assert score_cnn(model, [blurred(1, side=192)]).shape == (1,)
    again = score_cnn(train_cnn(frame, images, ranker=ranker, steps=15, batch=8), images)
    assert np.array_equal(scores, again)
    if not ranker:
        assert abs(scores.mean() - 3) < 1  # in the MOS' own scale


def test_the_cnn_learns_from_photographs_of_several_sizes():
    """As BIQ2021's are: nearly all of one size, and a few not."""
    frame, images = rated()
    images[3] = images[3].crop((5, 5, 69, 85))
    assert np.isfinite(score_cnn(train_cnn(frame, images, ranker=True, steps=3, batch=24), images)).all()


def test_pictures_of_several_sizes_are_cut_around_their_middles():
    wide = Image.new("RGB", (9, 4))
    wide.putpixel((4, 1), (255, 255, 255))
    found = pixels([wide, Image.new("RGB", (5, 6))])
    assert found.shape == (2, 3, 4, 5) and (found[0, :, 1, 2] == 1).all() and found.sum() == 3 - (120 - 3)


def test_pixels_are_centred_and_channels_come_first():
    white, red = Image.new("RGB", (4, 2), "white"), Image.new("RGB", (4, 2), "red")
    stack = pixels([white, red])
    assert stack.shape == (2, 3, 2, 4) and stack[0].eq(1).all() and stack[1, :, 0, 0].tolist() == [1, -1, -1]


def test_pretraining_writes_half_precision_weights_and_a_log(tmp_path, monkeypatch):
    """It learns on the stream that taught the tower, and is tested on validation photographs alone."""
    streams = []

    class Small(PictureStream):
        def __init__(self, seed, sizes, *, school=(), sources, splits=("train",)):
            streams.append((seed, sizes, school, sources, splits))
            super().__init__(seed, {64: 1.0}, sources=min(sources, 4), splits=splits)

    monkeypatch.setattr(baselines, "PictureStream", Small)
    monkeypatch.setattr(baselines, "CNN", tmp_path / "cnn" / "model.safetensors")
    school = [tmp_path / "photograph.jpg"]
    pretrain_cnn(school, baselines.CNN, tmp_path / "log.csv", steps=4, batch=2, every=2, seed=5)
    assert streams == [(6, {192: 1.0}, school, 2, ("train",)), (7, {192: 1.0}, (), 128, ("val",))]
    log = pd.read_csv(tmp_path / "log.csv", comment="#")
    assert log["step"].tolist() == [2, 4] and log["pictures"].tolist() == [8, 16]
    assert log[["type_accuracy", "strength_accuracy"]].stack().between(0, 1).all()
    stored = baselines.load_file(baselines.CNN)
    assert stored["maps.0.weight"].dtype == torch.float16 and len(stored["head.bias"]) == NAMING
    assert load_cnn().maps[0].weight.dtype == torch.float32


def test_flawed_pictures_have_pixels_and_the_strength_of_every_flaw():
    [four] = islice(PictureStream(3, {64: 1.0}, sources=2), 1)
    seen, strength = flawed(four)
    assert seen.shape == (4, 3, 64, 64) and strength.shape == (4, len(FLAWS))
    assert torch.equal(seen, pixels([Image.fromarray(picture.pixels) for picture in four]))
    for row, picture in zip(strength, four):
        assert {FLAWS[n]: int(row[n]) for n in row.nonzero()} == {
            flaw.name: flaw.strength for flaw in picture.flaws
        }


def test_naming_accuracy_counts_the_likeliest_name_and_the_likeliest_strength_of_the_strongest():
    strength = torch.zeros(5, len(FLAWS))
    strength[0, 2], strength[1, 5], strength[1, 7], strength[2, 9] = 3, 1, 5, 2  # the last two have none
    said = [(1 + 2, 3), (1 + 5, 1), (1 + 8, 2), (0, 0), (1 + 0, 0)]  # what, how strong
    logits = torch.zeros(5, NAMING)
    for row, (name, told) in zip(logits, said):
        row[name] = row[NAMING - 6 + told] = 1
    model = torch.nn.Module()
    model.forward = lambda seen: logits
    found = naming_accuracy(model, torch.zeros(5, 3, 8, 8), strength)
    assert found == pytest.approx({"type_accuracy": 3 / 5, "strength_accuracy": 4 / 5})
    assert model.training


# The policy's own vision tower, and the policy


def test_the_head_learns_on_frozen_eyes(policy):
    frame, images = rated()
    before = [weight.clone() for weight in policy[0].parameters()]
    head = train_head(policy, frame, images, ranker=True, steps=60, batch=8)
    assert srcc(score_head(policy, head, images), frame["mos"]) > 0.9
    assert tower_features(policy, images[:2]).shape == (2, 384)
    assert all(torch.equal(old, new) for old, new in zip(before, policy[0].parameters()))


def test_pictures_may_be_given_by_their_paths(policy, tmp_path):
    blurred(1).save(tmp_path / "one.png")
    for measure in (piqe, partial(score_cnn, load_cnn()), partial(tower_features, policy)):
        assert np.array_equal(measure([tmp_path / "one.png"]), measure([blurred(1)]))


def test_the_reasoning_is_learned_with_the_opinion(policy):
    processor = policy[1]
    row = {"place": 0, "reasoning": "<think>slight lens blur</think><answer>", "mos": 3.5}
    batch = Opinions(processor, [blurred(1)])([row])
    learned = batch["labels"][0][batch["labels"][0] != -100]
    taught = "<think>slight lens blur</think><answer>3.50</answer><|im_end|>"
    assert processor.tokenizer.decode(learned) == taught
    assert processor.tokenizer.decode(batch["input_ids"][0]).endswith(f"assistant\n{taught}")


@pytest.mark.parametrize("adapter", [None, lora_config()], ids=["weights", "adapter"])
def test_supervised_fine_tuning_moves_scores_and_not_the_eyes(adapter: LoraConfig | None):
    frame, images = rated(8)
    frame["mos"] = 1.25
    policy = load_policy("tiny-policy")
    eyes = [weight.clone() for weight in policy[0].model.visual.parameters()]
    before = [score.score for score in Scorer(policy, thinking=True).score(images)]
    tuned = supervised(policy, frame, images, steps=30, batch=8, lr=1e-3, adapter=adapter)
    inner = tuned[0].get_base_model() if adapter else tuned[0]
    assert all(torch.equal(old, new) for old, new in zip(eyes, inner.model.visual.parameters()))
    learned = [weight for name, weight in tuned[0].named_parameters() if "lora_B" in name]
    assert bool(learned) == bool(adapter) and all(weight.abs().max() > 0 for weight in learned)
    after = Scorer(tuned, thinking=True).score(images)
    assert not any(score.error for score in after)
    assert np.mean([abs(score.score - 1.25) for score in after]) < 0.5 * np.mean(
        np.abs(np.array(before) - 1.25)
    )
