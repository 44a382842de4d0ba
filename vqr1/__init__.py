"""vqr1: image quality assessment by reinforcement learning to rank, after VisualQuality-R1.

Import the room you need, as in ``from vqr1.scoring import Scorer``. This file imports nothing, so that
``import vqr1`` is instant and needs no torch.
"""

__version__ = "0.1.0"
