"""Where data are: what comes with the project, and the public sets."""

import os
from pathlib import Path

EMBEDDED = Path(__file__).resolve().parent.parent / "data"
"""What comes with the project, always here: photographs, simulated sets, policy, tables and runs."""


def data_root() -> Path:
    """Return the folder of the public sets: the environment's ``VQR1_DATA``, else `EMBEDDED`.

    Raises FileNotFoundError, saying what to set, when it is not there.
    """
    root = Path(os.environ.get("VQR1_DATA") or EMBEDDED)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is not a folder; set VQR1_DATA to the one that holds the public sets"
        )
    return root
