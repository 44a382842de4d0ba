"""Read any picture as upright 8-bit RGB, in bounded memory.

A picture's ``info["note"]`` says what was done to it on the way. ICC profiles are not applied.
"""

import io
import os
import re
import struct
import threading
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

File = str | os.PathLike | bytes | BinaryIO
Picture = File | Image.Image | np.ndarray
"""One picture, as `read_picture` takes it; a tensor (3, H, W) too, which needs no import of torch here."""
TAKEN = (
    "a path, a file opened in binary mode, its bytes, a PIL image, a numpy array (H, W), (H, W, 3) "
    "or (H, W, 4), "
    "or a tensor (3, H, W), of uint8 0..255 or floats 0..1"
)
HEIC_ENDINGS = (".heic", ".heics", ".heif", ".heifs", ".hif")
SLACK = 1e-3
"""Float pixels up to this far outside 0..1 come from rounding, and are clipped."""
FEW = 0.01
"""At most this share of a float picture's values may lie outside its scale (highlights); it is clipped."""

LARGE = 4096 * 4096
"""Pixels; a larger picture is shrunk by a whole factor when read. Policies see about 2 million at most."""
THIN = 200
"""Longest to shortest side; Qwen's processors refuse thinner pictures."""
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises on files that are damaged, of another kind or too large (a test flips bytes)."""

_ORIENTATION = 0x0112  # the EXIF tag
_LYING = (5, 6, 7, 8)  # its values for pictures that are stored on their side
_ONE_LARGE = threading.Lock()  # threads decode one large picture at a time: they need the memory of one
_ONE_READ = threading.Lock()  # the same opened file or picture may be handed over twice


def open_picture(file: File, where: str = "", shrink: bool = True, name: str = "") -> Image.Image:
    """Return the picture in a file as `as_rgb` does; an animation gives its first frame.

    file: a path, a file opened in binary mode (read from its start), or the bytes of a file.
    where: the row that asked for it, for errors.
    shrink: whether a picture above `LARGE` pixels is shrunk (a JPEG while it is decoded).
    name: what errors call the file, by default its path.

    Threads decode large pictures one at a time. Raises ValueError naming the file when it is missing, not a
    file, empty, unreadable, truncated, not a picture, thinner than 1:200, above Pillow's limit of pixels
    against decompression bombs, or HEIC without pillow-heif.
    """
    name = name or _name(file)
    try:
        with _opened(file) as image:
            size, factor = image.size, _factor(image.size)
            with _ONE_LARGE if factor > 1 else nullcontext():
                if shrink and factor > 1:
                    image.draft(None, (size[0] // factor, size[1] // factor))
                return _rgb(image, size, shrink)
    except BROKEN as error:
        raise ValueError(_unreadable(file, name, where, error)) from error


def read_picture(picture: Picture) -> Image.Image:
    """Return one picture, in whatever form it is handed over, as `as_rgb` does.

    picture: see `TAKEN`.

    Raises TypeError for anything else, and ValueError if it cannot be read or its scale is unknown.

    >>> read_picture(np.full((2, 3), 0.2)).getpixel((0, 0))
    (51, 51, 51)
    """
    if isinstance(picture, Image.Image):
        return as_rgb(picture)
    if _is_pixels(picture) and is_one(picture):
        return as_rgb(Image.fromarray(_levels(picture)))
    if isinstance(picture, (str, os.PathLike, *_BYTES)) or hasattr(picture, "read"):
        return open_picture(picture)
    raise TypeError(f"{type(picture).__name__} is no picture; give {TAKEN}")


def is_one(pictures) -> bool:
    """Tell whether this is one picture and not many.

    >>> is_one("a.png"), is_one(["a.png"]), is_one(np.zeros((8, 8, 3))), is_one(np.zeros((2, 8, 8, 3)))
    (True, False, True, False)
    """
    if _is_pixels(pictures):
        return pictures.ndim < 4
    return isinstance(pictures, (str, os.PathLike, Image.Image, *_BYTES)) or hasattr(pictures, "read")


def listed(pictures: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """Return one picture as a list of one, many as they are, and a batch of pixels as a list of PIL images.

    A batch is a numpy array (B, H, W, 3) or a tensor (B, 3, H, W).
    Raises TypeError for anything else, and ValueError for pixels of another shape or range.

    >>> listed("a.png"), len(listed(np.zeros((2, 8, 8, 3))))
    (['a.png'], 2)
    """
    if _is_pixels(pictures):
        levels = _levels(pictures)
        return [Image.fromarray(one) for one in (levels if levels.ndim == 4 else [levels])]
    if is_one(pictures):
        return [pictures]
    keyed = isinstance(pictures, (Mapping, set, frozenset)) or hasattr(
        pictures, "columns"
    )  # gives keys, or no order
    if keyed or not isinstance(pictures, Iterable):
        kind = type(pictures).__name__
        raise TypeError(
            f"{kind} is neither a picture nor a list of pictures; give {TAKEN}, or a list of them"
        )
    return pictures


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a picture as upright (EXIF) 8-bit RGB, transparency on white, shrunk above `LARGE` pixels.

    In a deep picture of one channel, the largest value tells the scale: 8, 10, 12, 14 or 16 bits. The note
    names a scale below 16. Floats are on 0..1 if at least 99% of them are; the others are clipped, and the
    note says how many. Floats on a scale of bits may leave it by a tenth. Pillow keeps the upper 8 bits of
    16-bit colours. Raises ValueError if the picture cannot be decoded, is thinner than 1:200, or its scale
    is unclear: integers below 0 or above 65535, other floats, 16-bit colours all in the darkest quarter.

    >>> as_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
    (255, 255, 255)
    >>> twelve = as_rgb(Image.new("I;16", (1, 1), 4095))
    >>> twelve.getpixel((0, 0)), twelve.info["note"]
    ((255, 255, 255), 'read as 12 bits: white is 4095')
    >>> as_rgb(Image.new("LA", (1, 1), (0, 204))).getpixel((0, 0))
    (51, 51, 51)
    """
    try:
        return _rgb(image, image.size, shrink=True, reading=_ONE_READ)
    except BROKEN as error:
        raise ValueError(f"the picture cannot be decoded ({error})") from error


def upright_size(path: str | Path, where: str = "") -> tuple[int, int]:
    """Return width and height of the upright picture from the header alone; errors as `open_picture`."""
    try:
        with _opened(path) as image:
            return image.size[::-1] if _lies(image) else image.size
    except BROKEN as error:
        raise ValueError(_unreadable(path, str(path), where, error)) from error


# Files


_BYTES = (bytes, bytearray, memoryview)
_HEIC = {
    b"heic",
    b"heix",
    b"heim",
    b"heis",
    b"hevc",
    b"hevx",
    b"hevm",
    b"hevs",
}  # brands in a file's first box
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # C:/ is a drive; Path leaves one slash of two


def is_address(path: str | os.PathLike) -> bool:
    """Tell whether this is an address like https://…, not a path.

    >>> is_address("https://example.org/a.png"), is_address("C:/a.png"), is_address("a.png")
    (True, False, False)
    """
    return bool(_ADDRESS.match(os.fspath(path))) and not os.path.lexists(path)


def _name(file: File) -> str:
    if isinstance(file, (str, os.PathLike)):
        return str(file)
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else "the file"


def _opened(file: File) -> Image.Image:
    """Return the picture in a file, opened and not decoded."""
    if isinstance(file, (str, os.PathLike)):
        if not os.path.isfile(file):  # a pipe would be waited for
            raise OSError("no file")
        with open(file, "rb") as stream:
            _prepare(stream.read(256))
        return Image.open(file)
    content = _content(file)
    if not content:
        raise OSError("it has zero bytes")
    _prepare(content[:256])
    return Image.open(io.BytesIO(content))


def _content(file: bytes | BinaryIO) -> bytes:
    if isinstance(file, _BYTES):
        return bytes(file)
    with _ONE_READ:
        if getattr(file, "seekable", lambda: False)():
            file.seek(0)
        content = file.read()
    if not isinstance(content, bytes):
        raise ValueError("it is opened as text; open it with mode 'rb'")
    return content


def _prepare(head: bytes) -> None:
    """Let Pillow read HEIC if these are the first bytes of such a file; ValueError saying what to install."""
    box = head[8 : int.from_bytes(head[:4])] if head[4:8] == b"ftyp" else b""
    if not _HEIC & {box[i : i + 4] for i in range(0, len(box), 4)}:
        return
    try:
        from pillow_heif import register_heif_opener
    except ModuleNotFoundError as error:
        raise ValueError(
            "it is HEIC, which Pillow reads with pillow-heif: pip install 'vqr1[heic]'"
        ) from error
    register_heif_opener()


def _rgb(image: Image.Image, size: tuple[int, int], shrink: bool, reading=None) -> Image.Image:
    """Do what `as_rgb` says.

    size: the file's own; a JPEG decoder may give less.
    reading: a lock to hold while decoding.
    """
    if max(size) > THIN * min(size):
        raise ValueError(f"{size[0]}x{size[1]} pixels are thinner than 1:{THIN}; crop or pad the picture")
    source = image
    notes = [f"frame {image.tell() + 1} of several"] if getattr(image, "is_animated", False) else []
    with reading or nullcontext():
        bands, tiles = image.getbands(), getattr(image, "tile", ())
        image.load()
    if len(bands) > 1 and any(";16" in str(tile) for tile in tiles):
        brightest = max(high for (_, high), band in zip(image.getextrema(), bands) if band != "A")
        if brightest < 64:
            raise ValueError(
                "16-bit colours that are all in the darkest quarter: of 12 or 14 bits Pillow loses "
                "most; save it with 8 bits"
            )
    factor = _factor(image.size) if shrink else 1
    if image.mode[0] in "IF":
        image, scale = _eight_bits(image)
        notes += [scale] if scale else []
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
    _turn(image, source)
    image.info = {"note": "; ".join(notes)} if notes else {}
    return image


def _factor(size: tuple[int, int]) -> int:
    """Return the whole number that divides both sides to stay within `LARGE`."""
    factor = 1
    while size[0] * size[1] > LARGE * factor**2:
        factor += 1
    return factor


def _lies(image: Image.Image) -> bool:
    """Tell whether a picture is stored on its side; a damaged EXIF block counts as no."""
    try:  # Pillow turns a TIFF itself, and gives its upright size
        return image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _LYING
    except BROKEN:
        return False


def _turn(image: Image.Image, source: Image.Image) -> None:
    """Turn an image upright, in place, by the EXIF block of its source."""
    if source.format == "TIFF":  # Pillow has turned it
        return
    image.info = dict(source.info)
    with suppress(*BROKEN):  # a damaged block
        ImageOps.exif_transpose(image, in_place=True)


# Scales


def _eight_bits(image: Image.Image) -> tuple[Image.Image, str]:
    """Return a picture of one channel (modes I;16, I, F) as L, and the note on its scale."""
    pixels = np.asarray(image)
    low, high = float(pixels.min()), float(pixels.max())
    white, note = (_white_of_floats if pixels.dtype.kind == "f" else _white_of_integers)(pixels, low, high)
    parts = np.array_split(pixels, len(pixels) // 256 + 1)  # as floats, all would take four bytes a pixel
    levels = [np.rint(np.clip(part / np.float32(white), 0, 1) * 255).astype(np.uint8) for part in parts]
    return Image.fromarray(np.concatenate(levels)), note


def _white_of_integers(pixels: np.ndarray, low: float, high: float) -> tuple[int, str]:
    if low < 0 or high > 65535:
        raise ValueError(
            f"integers from {low:.0f} to {high:.0f}: which is black, and which is white? Scale it to "
            "8 or 16 bits"
        )
    bits = next(bits for bits in (8, 10, 12, 14, 16) if high < 2**bits)
    return 2**bits - 1, "" if bits == 16 else f"read as {bits} bits: white is {2**bits - 1}"


def _white_of_floats(pixels: np.ndarray, low: float, high: float) -> tuple[int, str]:
    if not np.isfinite(high - low):
        raise ValueError("it holds values that are no numbers or infinite")
    whites = [1] if low >= -0.1 else []
    if high >= 64 and np.mean(pixels > 1) > 0.5:  # else it may be scene light, in any unit
        bits = (255, 1023, 4095, 16383, 65535)
        whites += [white for white in bits if low >= -0.1 * white and high <= 1.1 * white]
    for white in whites:
        outside = np.mean((pixels < 0) | (pixels > white))
        if outside <= FEW:
            clipped = f"{max(outside, 1e-4):.2%} of the values outside 0..{white} clipped" if outside else ""
            return white, "; ".join(filter(None, [f"floats: white is {white}" if white > 1 else "", clipped]))
    raise ValueError(
        f"floats from {low:.6g} to {high:.6g}: which is black, and which is white? Scale them to 0..1"
    )


# Pixels


def _is_pixels(pictures) -> bool:
    """Tell whether this is a numpy array of numbers or a tensor."""
    tensor = hasattr(pictures, "movedim")
    return tensor or isinstance(pictures, np.ndarray) and pictures.dtype.kind not in "OUST"  # not of paths


def _levels(pixels: Picture) -> np.ndarray:
    """Return pixels as uint8 (H, W), (H, W, 3 or 4) or (B, H, W, 3 or 4).

    A tensor comes as (3, H, W) or (B, 3, H, W).
    """
    shape = tuple(pixels.shape)
    if not isinstance(pixels, np.ndarray):
        if len(shape) not in (3, 4) or shape[-3] != 3 or 0 in shape[-2:]:
            raise ValueError(
                f"a tensor of shape {shape} is no picture; give (3, H, W), or (B, 3, H, W) for many"
            )
        pixels = pixels.detach().cpu()
        pixels = (pixels.float() if pixels.is_floating_point() else pixels).movedim(-3, -1).numpy()
    elif (
        len(shape) not in (2, 3, 4)
        or len(shape) > 2
        and shape[-1] not in (3, 4)
        or 0 in shape[len(shape) == 4 :]
    ):
        raise ValueError(
            f"an array of shape {shape} is no picture; give (H, W), (H, W, 3) or (H, W, 4), or (B, H, "
            "W, 3) for many"
        )
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind != "f":
        raise ValueError(
            f"pixels are {pixels.dtype}; give uint8 0..255, or floats 0..1 (16 bits: divide by 65535)"
        )
    low, high = float(pixels.min(initial=0)), float(pixels.max(initial=0))
    if np.isnan(low):
        raise ValueError("pixels hold NaN; give floats 0..1")
    if low < -SLACK or high > 1 + SLACK:
        remedy = "x / 255 for 0..255, (x + 1) / 2 for -1..1, x.clip(0, 1) for overshoot"
        raise ValueError(f"float pixels from {low:.4g} to {high:.4g}; give 0..1: {remedy}")
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _unreadable(file: File, name: str, where: str, error: BaseException) -> str:
    reason = "no format that Pillow reads" if isinstance(error, UnidentifiedImageError) else str(error)
    why, remedy = f"cannot be read as a picture ({reason})", "replace the file"
    if not isinstance(file, (str, os.PathLike)):
        pass
    elif isinstance(error, PermissionError):
        why, remedy = "may not be read", "change its permissions or those of its folder"
    elif is_address(file):
        why, remedy = "is an address", "download the picture first, and give its file"
    elif os.path.isdir(file):
        why, remedy = "is a folder", "name a picture in it"
    elif not os.path.exists(file):
        why, remedy = ("is a broken link" if os.path.islink(file) else "is missing"), "check the path"
    elif not os.path.isfile(file):
        why, remedy = "is a device or a pipe", "save it into a file first"
    elif os.path.getsize(file) == 0:
        why, remedy = "has zero bytes", "replace the file"
    return (
        f"{where}: {name} {why}; replace the file or remove its row" if where else f"{name} {why}; {remedy}"
    )
