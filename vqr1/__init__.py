"""vqr1: image quality assessment by reinforcement learning to rank, after VisualQuality-R1.

    from vqr1 import Scorer

    print(Scorer()(["photo.jpg"]))  # 1 (very poor) to 5 (excellent)

The names in `__all__` are imported at first use, so ``import vqr1`` loads no torch. Everything else is
imported from its module, as in ``from vqr1.evaluation import evaluate``.
"""

from contextlib import contextmanager
from importlib import import_module

__version__ = "0.1.0"


def lazy(package: str, rooms: dict[str, str]) -> tuple:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names are imported at first use.

    package: its name.
    rooms: module below it -> the names it offers there, separated by spaces.
    """
    room_of = {name: f"{package}.{room}" for room, names in rooms.items() for name in names.split()}

    def look_up(name: str):
        if name not in room_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(room_of[name]), name)

    def names() -> list[str]:
        return sorted([*vars(import_module(package)), *room_of])

    return look_up, names, list(room_of)


@contextmanager
def quiet():
    """Silence library messages that say nothing to us, as a context or a decorator.

    bitsandbytes, which peft and TRL import, logs that an optional CPU kernel is missing. Around every
    generation, TRL calls what transformers 5.23 renamed. peft looks for the vocabulary of an adapter's base
    by its name, and the embedded policy's name is neither a folder nor on the hub. TRL's trainers ping a
    server when built.
    """
    import logging
    import sys
    import warnings

    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    hub = sys.modules.get("huggingface_hub.constants")
    before = kernels.level, hub and hub.HF_HUB_DISABLE_TELEMETRY
    kernels.setLevel(logging.ERROR)
    if hub:
        hub.HF_HUB_DISABLE_TELEMETRY = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            for sought in ("Could not find a config file in", "Unable to fetch remote file .* in"):
                warnings.filterwarnings("ignore", f"(?s){sought} tiny-policy", UserWarning)
            yield
    finally:
        kernels.setLevel(before[0])
        if hub:
            hub.HF_HUB_DISABLE_TELEMETRY = before[1]


__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "scoring": "Scorer Score",
        "rewards": "RankingReward format_reward",
        "thurstone": "ranking_reward comparative_probability fidelity thurstone_scale",
        "prompts": "parse_score",
        "policy": "load_policy",
        "data": "load_ratings",
        "distortions": "distort",
        "metrics": "srcc plcc plcc_fit",
        "training": "train",
    },
)
