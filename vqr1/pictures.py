"""Reading any picture as upright RGB of 8 bits, in bounded memory.

What is done to a picture on the way is said in its ``info["note"]``. ICC profiles are not applied.
"""

import os
import struct
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

LARGE = 4096 * 4096
"""Pixels; a larger picture is shrunk by a whole factor as it is read. Policies look at about 2 million at most."""
THIN = 200
"""Longest to shortest side; Qwen's processors take no thinner picture."""
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, TypeError, AttributeError, ArithmeticError,
    RuntimeError, MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow raises on files that are damaged, of another kind or too large (the test flips bytes to see)."""

_TURN = Image.Transpose
_TURNS = {
    2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE, 6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90,
}  # fmt: skip
_LYING = (_TURN.TRANSPOSE, _TURN.ROTATE_270, _TURN.TRANSVERSE, _TURN.ROTATE_90)
_ONE_LARGE = threading.Lock()  # threads decode one large picture at a time, so that they need the memory of one


def open_picture(path: str | Path, where: str = "", shrink: bool = True) -> Image.Image:
    """Return the picture in a file as `as_rgb` does; of an animation the first frame.

    Above `LARGE` pixels it is shrunk unless told not to (a JPEG while it is decoded), one at a time over all threads.
    Raises ValueError naming the file (and ``where``, the row that asked for it) when it is missing, no file, empty,
    unreadable, truncated, no picture, thinner than 1:200 or above Pillow's limit of pixels against decompression bombs.
    """
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise OSError("no file")
        with Image.open(path) as image:
            size, factor = image.size, _factor(image.size)
            with _ONE_LARGE if factor > 1 else nullcontext():
                if shrink and factor > 1:
                    image.draft(None, (size[0] // factor, size[1] // factor))
                return _rgb(image, size, shrink)
    except BROKEN as error:
        raise ValueError(_unreadable(path, where, error)) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a picture upright (EXIF), in RGB, 8 bits, transparency on white, above `LARGE` pixels shrunk.

    16 bits are scaled by 1/257. Pillow's modes I and F hold any range: up to 1 (F), 255 or 65535 is taken
    for the whole scale; values outside that are stretched between their extremes.
    Raises ValueError where the picture cannot be decoded or is thinner than 1:200.

    >>> as_rgb(Image.new("I;16", (1, 1), 257 * 8)).getpixel((0, 0))
    (8, 8, 8)
    >>> as_rgb(Image.new("LA", (1, 1), (0, 204))).getpixel((0, 0))
    (51, 51, 51)
    """
    try:
        return _rgb(image, image.size, shrink=True)
    except BROKEN as error:
        raise ValueError(f"the picture cannot be decoded ({error})") from error


def upright_size(path: str | Path, where: str = "") -> tuple[int, int]:
    """Return width and height of the upright picture from the header alone; errors as `open_picture`."""
    try:
        with Image.open(path) as image:
            return image.size[::-1] if _turn(image) in _LYING else image.size
    except BROKEN as error:
        raise ValueError(_unreadable(path, where, error)) from error


def _rgb(image: Image.Image, size: tuple[int, int], shrink: bool) -> Image.Image:
    """Do what `as_rgb` says; size: the file's own, of which a JPEG decoder may give less."""
    if max(size) > THIN * min(size):
        raise ValueError(f"{size[0]}x{size[1]} pixels are thinner than 1:{THIN}; crop or pad the picture")
    notes = [f"frame {image.tell() + 1} of several"] if getattr(image, "is_animated", False) else []
    image.load()
    turn, factor = _turn(image), _factor(image.size) if shrink else 1
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            notes.append("transparency on white")
    elif image.mode in ("1", "P"):  # the mean of two palette entries is no colour
        image = image.convert("RGB")
    if factor > 1:
        image = image.reduce(factor)
    if image.width * image.height < size[0] * size[1]:
        notes.append(f"shrunk from {size[0]}x{size[1]} to {image.width}x{image.height}")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image = image if turn is None else image.transpose(turn)
    image.info = {"note": "; ".join(notes)} if notes else {}
    return image


def _factor(size: tuple[int, int]) -> int:
    """Return by what whole number both sides are divided to stay within `LARGE`."""
    factor = 1
    while size[0] * size[1] > LARGE * factor**2:
        factor += 1
    return factor


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return how the picture is turned upright; a damaged EXIF block says nothing about the pixels."""
    if image.format == "TIFF":  # Pillow turns these itself, and gives their upright size
        return None
    try:
        return _TURNS.get(image.getexif().get(0x0112))
    except BROKEN:
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a picture of one channel (modes I;16, I, F) as L."""
    pixels = np.asarray(image)
    if pixels.dtype.kind == "u":
        return Image.fromarray((pixels // 257).astype(np.uint8))
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite(high - low):
        raise ValueError("it holds values that are no numbers or infinite")
    if low >= 0 and high <= 65535:
        low, high = 0.0, 1.0 if pixels.dtype.kind == "f" and high <= 1 else 255.0 if high <= 255 else 65535.0
    return Image.fromarray(np.rint((pixels - np.float32(low)) * np.float32(255 / (high - low))).astype(np.uint8))


def _unreadable(path: str | Path, where: str, error: BaseException) -> str:
    why, remedy = f"cannot be read as a picture ({error})", "replace the file"
    if isinstance(error, PermissionError):
        why, remedy = "may not be read", "change its permissions or those of its folder"
    elif os.path.isdir(path):
        why, remedy = "is a folder", "name a picture in it"
    elif not os.path.exists(path):
        why, remedy = ("is a broken link" if os.path.islink(path) else "is missing"), "check the path"
    elif not os.path.isfile(path):
        why, remedy = "is a device or a pipe", "save it into a file first"
    elif os.path.getsize(path) == 0:
        why, remedy = "has zero bytes", "replace the file"
    return f"{where}: {path} {why}; replace the file or remove its row" if where else f"{path} {why}; {remedy}"
