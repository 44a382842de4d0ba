"""The applications in a real browser, Chromium: notebook 03 in JupyterLab, and the page of `make app`.

The notebook is cut to its cells tagged "browser": the rest takes minutes, and nbval runs it.
"""

import json
from pathlib import Path

import pytest
from browsing import CHROMIUM, DRIVER, Page, app_page, chromium, served
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from shared import ROOT

from vqr1.widgets import degrade

NAME = "03_interactive_evaluation.ipynb"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="no Chromium and chromedriver here: apt-get install chromium chromium-driver",
    ),
]


def cut_notebook(folder: Path) -> None:
    """Write notebook 03 with only its cells tagged "browser", without outputs."""
    content = json.loads((ROOT / "notebooks" / NAME).read_text(encoding="utf-8"))
    kept = [cell for cell in content["cells"] if "browser" in cell["metadata"].get("tags", [])]
    content["cells"] = [cell | {"outputs": [], "execution_count": None} for cell in kept]
    folder.mkdir()
    (folder / NAME).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def lab(tmp_path):
    """Serve the cut notebook in JupyterLab; return the address."""
    cut_notebook(tmp_path / "notebooks")
    options = {
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": tmp_path,
        "IdentityProvider.token": "",
        "ServerApp.disable_check_xsrf": True,
        "LabApp.expose_app_in_browser": True,
    }
    command = ["-m", "jupyterlab", "--allow-root", *(f"--{key}={value}" for key, value in options.items())]
    with served(command, "ServerApp.port", tmp_path) as url:
        yield f"{url}/lab/tree/notebooks/{NAME}"


@pytest.fixture
def page(tmp_path):
    with chromium(tmp_path) as browser:
        yield Page(browser)


def test_a_slider_a_button_an_upload_and_votes(lab, page, tmp_path, photo):
    page.browser.get(lab)
    page.wait(
        lambda: page.browser.execute_script(
            "return window.jupyterapp?.shell?.currentWidget"
            "?.sessionContext?.session?.kernel?.status === 'idle'"
        ),
        "no kernel",
    )
    page.browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait(lambda: page.find("level") and page.find("key"), "the applications do not appear")
    score, samples = page.changed("score", ""), page.changed("answers", "")
    assert score.startswith("score ") and "6 sampled answers" in samples

    page.find("level .noUi-handle")[0].send_keys(Keys.END)
    better, score = score, page.changed("score", score)
    assert float(score.split()[1]) < float(better.split()[1])
    assert page.text("level").strip().endswith("5")

    samples = page.text("answers")
    page.click("sample")
    page.changed("answers", samples)
    assert page.text("score") == score

    photo.save(tmp_path / "mine.png")
    page.upload(tmp_path / "mine.png")
    page.changed("score", score)
    chosen = Select(page.find("photograph select")[0]).first_selected_option
    assert chosen.text == "your upload" and page.text("level").strip().endswith("0")
    top, score = page.find("photograph")[0].rect, page.find("score")[0].rect
    assert score["y"] + score["height"] - top["y"] < 450, "the score is below the fold"

    page.click("first")
    page.says("progress", "1 of 28")
    for key, count in (("x", 1), ("2", 2), ("0", 3), ("u", 2)):
        page.find("key input")[0].send_keys(key)
        page.says("progress", f"{count} of 28")
        page.wait(lambda: page.find("key input")[0].get_property("value") == "", "the key stays in the field")
    page.click("finish")
    page.says("message", "at least 7")
    assert "Traceback" not in page.browser.page_source


@pytest.fixture
def pictures(photo, tmp_path):
    """Return a folder of three pictures."""
    folder = tmp_path / "holiday"
    folder.mkdir()
    for level in (0, 3, 5):
        degrade(photo, "jpeg", level).save(folder / f"jpeg-{level}.png")
    return folder


def test_the_page_for_people_who_rate(page, pictures, tmp_path):
    with app_page(pictures, tmp_path) as url:
        page.browser.get(url)
        page.says("progress", "0 of 3")
        page.click("first")
        page.says("progress", "1 of 3")
        page.click("undo")
        page.says("progress", "0 of 3")
        for count in (1, 2, 3):
            page.click("second")
            page.says("progress", f"{count} of 3")
        page.says("scale", "You voted on 3 pairs")
        page.says("scale", "SRCC with the model")
        assert str(pictures / "my-votes.csv") in page.text("scale") and (pictures / "my-votes.csv").is_file()
        assert not page.find("second")[0].is_enabled() and page.find("undo")[0].is_enabled()

        page.tab("Leaderboard")
        field = page.wait(lambda: page.find("folder input"), "no field for a folder")[0]
        field.send_keys(str(pictures), Keys.ENTER)
        page.says("board", "jpeg-5.png")
        assert "Traceback" not in page.browser.page_source
