"""Any picture becomes upright 8-bit RGB or a ValueError that names the file, never anything else."""

import os
import random
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqr1.data.images import LARGE, as_rgb, open_picture, read_picture, upright_size

GREY = np.arange(0, 256, dtype=np.uint8).reshape(8, 32)


def grey(image: Image.Image) -> np.ndarray:
    """Return the grey levels of an RGB picture without colour."""
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


# Kinds


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("8 bit.png", Image.fromarray(GREY)),
        ("16 bit.png", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("16 bit.tif", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("16 bit.pgm", Image.fromarray(GREY.astype(np.int32) * 257)),
        ("32 bit.tif", Image.fromarray(GREY.astype(np.int32))),
        ("64 thousand.tif", Image.fromarray(GREY.astype(np.int32) * 257)),
        ("float to 1.tif", Image.fromarray(GREY.astype(np.float32) / 255)),
        ("float to 255.tif", Image.fromarray(GREY.astype(np.float32))),
        ("palette.png", Image.fromarray(GREY).convert("P")),
        ("alpha.png", Image.fromarray(GREY).convert("LA")),
    ],
)
def test_every_depth_gives_the_same_greys(name, image, tmp_path):
    image.save(tmp_path / name)
    assert (grey(open_picture(tmp_path / name)) == GREY).all()


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F", "PA", "RGBa"]
)
def test_every_mode_of_pillow_becomes_rgb(mode):
    image = Image.new(mode, (5, 3))
    before = image.tobytes()
    assert (as_rgb(image).mode, as_rgb(image).size) == ("RGB", (5, 3)) and image.tobytes() == before


def test_cmyk_is_read_in_colour(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = open_picture(tmp_path / "red.jpg").getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("name", ["alpha.png", "palette.png", "key.png", "alpha.webp"])
def test_transparency_is_put_on_white_and_said(name, tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    if name == "palette.png":
        image = image.quantize(4)
    if name == "key.png":  # one colour counts as transparent
        Image.fromarray(np.repeat([[255] * 4 + [0] * 4], 8, 0).astype(np.uint8)).save(
            tmp_path / name, transparency=255
        )
    else:
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    picture = open_picture(tmp_path / name)
    assert (grey(picture)[:, :4] == 255).all() and (grey(picture)[:, 4:] == 0).all()
    assert picture.info["note"] == "transparency on white"


def test_an_opaque_alpha_channel_changes_nothing(photo):
    opaque = as_rgb(photo.convert("RGBA"))
    assert opaque.tobytes() == photo.tobytes() and opaque.info == {}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(kind, orientation, tmp_path):
    """White must appear at the top left: EXIF says where that corner is stored."""
    rows, columns = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[
        orientation
    ]
    pixels = np.zeros((32, 64), np.uint8)
    pixels[16 * rows : 16 * rows + 16, 32 * columns : 32 * columns + 32] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{kind}"
    Image.fromarray(pixels).convert("RGB").save(path, exif=exif)
    picture = open_picture(path)
    assert picture.size == upright_size(path) == ((32, 64) if orientation > 4 else (64, 32))
    corners = [
        picture.convert("L").getpixel(at) > 128
        for at in ((3, 3), (-4 % picture.width, 3), (3, -4 % picture.height))
    ]
    assert corners == [True, False, False]


@pytest.mark.filterwarnings("ignore:::PIL")
def test_damaged_exif_is_no_reason_to_lose_a_picture(tmp_path, photo):
    photo.save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert open_picture(tmp_path / "a.jpg").size == upright_size(tmp_path / "a.jpg") == photo.size


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "avif", "tiff"])
def test_of_an_animation_the_first_frame_is_taken_and_said(kind, tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black", "black")]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    picture = open_picture(tmp_path / f"a.{kind}")
    assert grey(picture).min() > 250 and picture.info["note"] == "frame 1 of several"


def test_a_frame_chosen_by_the_caller_is_kept(tmp_path):
    Image.new("L", (16, 16), 255).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (16, 16), 0)]
    )
    with Image.open(tmp_path / "a.gif") as image:
        image.seek(1)
        assert grey(as_rgb(image)).max() == 0 and as_rgb(image).info["note"] == "frame 2 of several"


# Deep pictures


BRIGHT = GREY / np.float32(255)
"""GREY on 0..1, as floats."""


def with_last(*values: float) -> np.ndarray:
    """Return BRIGHT 32 times (8,192 values), ending in these values."""
    pixels = np.tile(BRIGHT, (8, 4))
    pixels[-1, -len(values) :] = values
    return pixels


@pytest.mark.parametrize(
    ("pixels", "white", "note"),
    [
        (BRIGHT, 1, ""),
        (BRIGHT / 4, 1, ""),  # dark, and it stays dark
        (with_last(1.02), 1, "0.01% of the values outside 0..1 clipped"),
        (with_last(5000.0, 1.02, -0.01), 1, "0.04% of the values outside 0..1 clipped"),
        (BRIGHT * 255, 255, "floats: white is 255"),
        (with_last(1.02) * 255, 255, "floats: white is 255; 0.01% of the values outside 0..255 clipped"),
        (BRIGHT * 4095, 4095, "floats: white is 4095"),
        (BRIGHT * 65535, 65535, "floats: white is 65535"),
    ],
)
def test_floats_keep_their_tones_and_what_is_clipped_is_said(pixels, white, note, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "float.tif")
    picture = open_picture(tmp_path / "float.tif")
    assert (grey(picture) == np.rint(np.clip(pixels / white, 0, 1) * 255)).all()
    assert picture.info.get("note", "") == note


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (BRIGHT * 8, "floats from 0 to 8: which is black, and which is white"),  # light of a scene
        (BRIGHT * 2 - 1, "floats from -1 to 1: .*Scale them to 0..1"),
        (BRIGHT * 255000 - 5000, "floats from -5000 to 250000"),
        (np.where(BRIGHT > 0.5, np.nan, BRIGHT).astype(np.float32), "values that are no numbers or infinite"),
        (
            GREY.astype(np.int32) * 300,
            "integers from 0 to 76500: which is black, and which is white\\? Scale it to 8 or 16 bits",
        ),
        (GREY.astype(np.int32) * 2**23, "integers from 0 to 2139095040"),
        (GREY.astype(np.int32) - 100, "integers from -100 to 155"),
    ],
)
def test_a_scale_that_cannot_be_told_is_refused_with_a_remedy(pixels, message, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=f"deep.tif cannot be read as a picture .*{message}"):
        open_picture(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=message):
        as_rgb(Image.fromarray(pixels))


def deep_png(path: Path, white: int) -> None:
    """Write a PNG of 16-bit colours (GREY up to `white`), which Pillow reads but does not write."""
    levels = np.rint(GREY * (white / 255)).astype(">u2")
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).tobytes() for row in levels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", GREY.shape[1], GREY.shape[0], 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_deep_colours_are_read_or_refused_where_most_of_their_tones_would_be_lost(tmp_path):
    deep_png(tmp_path / "16.png", 65535)
    assert (grey(open_picture(tmp_path / "16.png")) == GREY).all()
    for white in (1023, 4095, 16383):
        deep_png(tmp_path / "12.png", white)
        with pytest.raises(
            ValueError, match="12.png cannot be read .*all in the darkest quarter.*save it with 8 bits"
        ):
            open_picture(tmp_path / "12.png")


# HEIC


HEADERS = [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafheix"]


@pytest.mark.parametrize("header", HEADERS)
def test_heic_without_its_reader_says_what_to_install(header, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # makes the import fail, installed or not
    (tmp_path / "phone.jpg").write_bytes(header + bytes(100))  # whatever it is called
    for file in (tmp_path / "phone.jpg", header + bytes(100)):
        with pytest.raises(
            ValueError, match=r"it is HEIC, which Pillow reads with pillow-heif: pip install 'vqr1\[heic\]'"
        ):
            open_picture(file)
    with pytest.raises(ValueError, match="phone.jpg .*pip install"):
        upright_size(tmp_path / "phone.jpg")


def test_heic_is_read_upright(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned to the right: the white corner at the top right
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(
        tmp_path / "a.heic", quality=100, exif=exif.tobytes()
    )
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / "b.heic", quality=100)
    plain, turned = open_picture(tmp_path / "b.heic"), open_picture(tmp_path / "a.heic")
    assert np.abs(np.int16(plain) - pixels).max() <= 8 and plain.info == {}
    assert turned.size == upright_size(tmp_path / "a.heic") == (32, 64)
    assert np.abs(np.int16(turned) - np.rot90(pixels, -1)).max() <= 8
    assert read_picture((tmp_path / "b.heic").read_bytes()).tobytes() == plain.tobytes()


def test_avif_needs_no_reader_of_heic(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.fromarray(GREY).save(tmp_path / "a.avif")
    assert open_picture(tmp_path / "a.avif").size == (32, 8)


# Sizes


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 600)])
def test_small_and_thin_pictures_are_read(size):
    assert as_rgb(Image.new("L", size)).size == size


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (201, 1)])
def test_a_picture_that_no_processor_takes_is_refused(size, tmp_path):
    Image.new("L", size).save(tmp_path / "thin.png")
    with pytest.raises(
        ValueError, match=rf"thin.png .*{size[0]}x{size[1]} pixels are thinner than 1:200; crop or pad"
    ):
        open_picture(tmp_path / "thin.png")


@pytest.mark.parametrize(("kind", "megabytes"), [("jpeg", 250), ("png", 500)])
def test_a_large_picture_needs_bounded_memory(kind, megabytes, tmp_path):
    """A JPEG is decoded at half size; a PNG of 108 million pixels takes 324 MB, without a second copy."""
    Image.new("RGB", (12000, 9000), (10, 20, 30)).save(
        tmp_path / "large", kind, **({"compress_level": 1} if kind == "png" else {})
    )
    code = (
        "import resource, sys\n"
        "from vqr1.data.images import open_picture\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "image = open_picture(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *image.size, "
        "*image.getpixel((9, 9)), image.info['note'])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "large")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(maxsplit=6)
    kilobytes, width, height = map(int, said[:3])
    assert kilobytes < 1024 * megabytes and LARGE / 4 < width * height <= LARGE and width * 3 == height * 4
    assert np.abs(np.array(said[3:6], int) - (10, 20, 30)).max() <= 2
    assert said[6].strip() == f"shrunk from 12000x9000 to {width}x{height}"


def test_shrinking_keeps_what_a_palette_and_a_corner_show(monkeypatch):
    monkeypatch.setattr("vqr1.data.images.LARGE", 64)
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16, :16] = (200, 0, 0)
    small = as_rgb(Image.fromarray(pixels).quantize(2))
    assert (
        small.size == (8, 8) and small.getpixel((0, 0)) == (200, 0, 0) and small.getpixel((7, 7)) == (0, 0, 0)
    )


def test_rows_of_manifests_keep_their_native_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr("vqr1.data.images.LARGE", 64)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    assert open_picture(tmp_path / "a.jpg", shrink=False).size == (32, 32) and open_picture(
        tmp_path / "a.jpg"
    ).size == (8, 8)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(
        ValueError, match="bomb.png cannot be read as a picture .*decompression bomb.*replace the file"
    ):
        open_picture(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)  # Pillow warns from there to twice the limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="bomb.png"):
            open_picture(tmp_path / "bomb.png")


# Files


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere.png", "is missing; check the path"),
        ("link.png", "is a broken link"),
        ("loop.png", "is a broken link"),
        ("folder.png", "is a folder; name a picture in it"),
        ("pipe.png", "is a device or a pipe"),
        ("zero.png", "has zero bytes"),
        ("text.png", "cannot be read as a picture"),
        ("half.jpg", "truncated"),
        ("nul\0.png", "is missing"),
        ("text.png", "(no format that Pillow reads); replace the file"),
        ("x" * 300, "is missing"),
        ("snow\N{SNOWMAN} \udce9.png", "zero bytes"),
    ],
)
def test_what_is_no_picture_is_named_with_a_remedy(name, why, tmp_path, photo):
    (tmp_path / "link.png").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").touch()
    (tmp_path / "snow\N{SNOWMAN} \udce9.png").touch()
    (tmp_path / "text.png").write_text("a cat on a mat", encoding="utf-8")
    photo.save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:5000])
    with pytest.raises(ValueError) as refused:
        open_picture(tmp_path / name)
    assert (
        str(tmp_path / name) in str(refused.value) and why in str(refused.value) and ";" in str(refused.value)
    )


@pytest.mark.parametrize(
    "address",
    ["https://example.org/a.jpg", "http://example.org/a.jpg?size=1", "s3://bucket/a.jpg", "file:///a.jpg"],
)
def test_an_address_must_be_downloaded_first(address):
    for path in (address, Path(address)):
        with pytest.raises(
            ValueError,
            match=r"a\.jpg(\?size=1)? is an address; download the picture first, and give its file",
        ):
            open_picture(path)


def test_a_file_is_read_from_its_start_whoever_has_read_in_it(tmp_path, photo):
    photo.save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        file.read(1000)
        assert open_picture(file).tobytes() == open_picture(file).tobytes() == photo.tobytes()
    with (
        open(tmp_path / "a.png", encoding="latin-1") as file,
        pytest.raises(ValueError, match="a.png cannot be read .*open it with mode 'rb'"),
    ):
        open_picture(file)


def test_a_file_without_permission_is_named():
    """Root may read everything, so it becomes nobody for a moment, who cannot enter pytest's folders."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "secret.png"
        Image.new("L", (8, 8)).save(path)
        path.chmod(0)
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(ValueError, match="secret.png may not be read; change its permissions"):
                open_picture(path)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.filterwarnings("ignore:::PIL")  # it says much about damaged tags
@pytest.mark.parametrize(
    "kind", ["jpeg", "png", "gif", "webp", "avif", "tiff", "bmp", "ppm", "jpeg2000", "ico", "tga", "pcx"]
)
def test_damage_gives_a_picture_or_a_value_error(kind, tmp_path, photo):
    """Files are cut short or get bytes replaced: 60 of each kind, the same in every run."""
    whole, path, random_ = tmp_path / "whole", tmp_path / "damaged", random.Random(kind)
    photo.resize((96, 64)).save(whole, kind)
    data, refused = whole.read_bytes(), 0
    for number in range(60):
        damaged = bytearray(data[: random_.randrange(len(data))] if number % 3 == 0 else data)
        for _ in range(number % 3 * 5 if damaged else 0):
            damaged[random_.randrange(min(len(damaged), 600))] = random_.randrange(256)
        path.write_bytes(damaged)
        try:
            assert open_picture(path).mode == "RGB"
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 5
