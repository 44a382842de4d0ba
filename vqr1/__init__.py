"""vqr1: image quality assessment by reinforcement learning to rank, after VisualQuality-R1.

Import the room you need, as in ``from vqr1.scoring import Scorer``. This file imports none of them, so that
``import vqr1`` is instant and needs no torch; it only quiets the libraries.
"""

import logging
import os
import warnings

__version__ = "0.1.0"

# TRL's trainers ping a server when they are built.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# bitsandbytes warns at import that an optional kernel for 4-bit inference on CPUs is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# TRL calls what transformers 5.23 renamed, around every generation.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
# peft looks for the vocabulary of an adapter's base under its name, and the embedded policy's is no folder.
warnings.filterwarnings("ignore", message="Could not find a config file in tiny-policy", category=UserWarning)
