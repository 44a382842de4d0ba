"""Find picture files: below a folder, by a glob, or listed on standard input."""

import glob
import os
import sys
from collections.abc import Sequence
from functools import cache

from PIL import Image

from vqr1.data.images import HEIC_ENDINGS, is_address

_NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow lists, but cannot decode, or not by itself."""


def find_pictures(paths: Sequence[str]) -> list[str]:
    """Return the pictures that the paths stand for, each once, in the order of the paths.

    A file counts whatever its name, even a missing one or an address: those get a row with an error.
    A folder gives the pictures below it (by `picture_endings`, sorted, links followed, hidden ones left
    out). A glob matches as in a shell (``**`` for any depth). ``-`` reads standard input, one file a line.
    Raises ValueError where a folder, a glob or standard input gives no picture.

    >>> find_pictures(["b.png", "a.png", "./b.png"])
    ['b.png', 'a.png']
    """
    found: dict[str, str] = {}
    for path in paths:
        if path == "-":
            names = [os.fsdecode(line) for raw in sys.stdin.buffer if (line := raw.rstrip(b"\r\n"))]
            wanted = "standard input lists no picture; give one path per line"
        elif os.path.isdir(path):
            names = pictures_below(path)
            wanted = f"{path} holds no picture that Pillow reads ({', '.join(sorted(picture_endings()))})"
        elif glob.has_magic(path) and not os.path.lexists(path) and not is_address(path):
            matches = sorted(glob.glob(path, recursive=True))
            names = [
                name
                for match in matches
                for name in (pictures_below(match) if os.path.isdir(match) else [match])
            ]
            wanted = f"{path} matches no picture"
        else:
            names = [path]
        if not names:
            raise ValueError(wanted)
        for name in names:
            found.setdefault(os.path.abspath(name), name)
    return list(found.values())


@cache
def picture_endings() -> frozenset[str]:
    """Return the endings, with dot and in lower case, of the pictures that this Pillow decodes, and of HEIC.

    Without pillow-heif, a HEIC file gets a row that says what to install.
    """
    kinds = Image.registered_extensions().items()
    decoded = {ending for ending, kind in kinds if kind in Image.OPEN and kind not in _NO_PICTURES}
    return frozenset(HEIC_ENDINGS) | decoded


def is_picture(path: str) -> bool:
    """Tell by its name whether a file counts as a picture: its ending says so, and it is not hidden.

    >>> is_picture("shoot/a.JPG"), is_picture("shoot/.a.jpg"), is_picture("shoot/a.txt")
    (True, False, False)
    """
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in picture_endings()


def pictures_below(folder: str) -> list[str]:
    """Return the paths of the pictures in a folder and all below it, sorted.

    Links are followed, each folder is read once, and hidden files and folders are left out. A folder that
    may not be read is listed itself, so that opening it says why.
    """
    found, unread, seen = [], [], set()
    for here, folders, files in os.walk(folder, onerror=unread.append, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link back up, or a second way to the same folder
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(here, name) for name in files if is_picture(name)]
    return sorted(found + [error.filename for error in unread])
