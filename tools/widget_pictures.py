"""Draw the pictures of the widgets in notebook 03: `python tools/widget_pictures.py` (needs Chromium).

They are taken from the page of `make app`, with photographs that are in the public domain.
"""

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageChops
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browsing import Page, app_page, chromium  # noqa: E402

from vqr1.data.images import open_picture  # noqa: E402
from vqr1.widgets import degrade  # noqa: E402

OUT = ROOT / "notebooks" / "pictures"
MOST = 60_000
"""Bytes of a picture."""
CHOSEN = "canyon wren"
FOLDER = {
    "canyon_wren": ("jpeg", 4),
    "red_panda": ("gaussian_blur", 3),
    "kingfisher": ("white_noise", 3),
    "mountain_lake": ("jpeg", 2),
    "river_otters": ("color_diffusion", 4),
    "tea_plantation": ("jpeg", 0),
}
"""Pictures of the folder that is rated and ranked: photograph -> distortion and level."""


def write_folder(folder: Path) -> None:
    folder.mkdir()
    for name, (distortion, level) in FOLDER.items():
        picture = degrade(open_picture(ROOT / "data" / "photos" / f"{name}.jpg"), distortion, level)
        picture.save(folder / f"{name}-{distortion}-{level}.png")


def small(image: Image.Image) -> bytes:
    """Return a picture without its white margin as JPEG, as good as `MOST` bytes allow."""
    white = Image.new("RGB", image.size, "white")
    image = image.crop(ImageChops.difference(image, white).getbbox())
    for quality in range(90, 20, -5):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= MOST:
            return buffer.getvalue()
    raise ValueError(f"{image.size} px do not fit into {MOST} bytes; make the window smaller")


def draw(page: Page, name: str, find: Callable[[], WebElement]) -> None:
    loaded = "return [...document.images].every(image => image.complete)"
    page.wait(lambda: page.browser.execute_script(loaded), "pictures do not load")
    png = find().screenshot_as_png
    OUT.mkdir(exist_ok=True)
    (OUT / f"{name}.jpg").write_bytes(small(Image.open(io.BytesIO(png)).convert("RGB")))
    print(OUT / f"{name}.jpg", flush=True)


def around(page: Page, name: str, levels: int) -> Callable[[], WebElement]:
    return lambda: page.find(name)[0].find_element(By.XPATH, "/".join([".."] * levels))


def plot(page: Page) -> str:
    """Return the address of the plot that is shown, which an application draws last."""
    return page.find("plot")[0].get_attribute("src")


def draw_all(page: Page, folder: Path) -> None:
    page.says("progress", "0 of 15")
    for count in range(1, 8):
        page.click("first" if count % 3 else "same")
        page.says("progress", f"{count} of 15")
    draw(page, "rating", around(page, "progress", 2))

    for title, name, parents in (("Explorer", "score", 3), ("Comparison", "preference", 1)):
        page.tab(title)
        page.wait(lambda name=name: page.find(name), f"no {title}")
        for place in range(len(page.find("photograph"))):
            before = plot(page)
            Select(page.find("photograph select")[place]).select_by_visible_text(CHOSEN)
            page.wait(lambda before=before: plot(page) != before, f"{title} stays as it was")
        draw(page, title.lower(), around(page, name, parents))

    page.tab("Leaderboard")
    page.wait(lambda: page.find("rank"), "no leaderboard")
    page.find("folder input")[0].send_keys(str(folder), Keys.ENTER)
    page.says("board", "canyon_wren")
    draw(page, "leaderboard", lambda: page.find("board")[0])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        own, pictures = Path(temporary), Path(temporary) / "pictures"
        write_folder(pictures)
        with app_page(pictures, own) as url, chromium(own, "1100,1600") as browser:
            browser.get(url)
            draw_all(Page(browser), pictures)
