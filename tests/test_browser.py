"""The applications of notebook 03 in a real browser: JupyterLab in Chromium, driven by Selenium.

The notebook is cut to its cells tagged "browser": the rest takes minutes, and nbval runs it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parents[1]
NAME = "03_interactive_evaluation.ipynb"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
PATIENCE = 1500
"""Seconds after which a hanging test ends: a loaded machine needs minutes, a quiet one two seconds."""

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


def answers(url: str) -> bool:
    try:
        return urlopen(url, timeout=5).status == 200
    except (URLError, OSError):
        return False


@pytest.fixture
def lab(tmp_path):
    """Serve the cut notebook in JupyterLab, with settings outside the user's home; return the address."""
    cut_notebook(tmp_path / "notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        name: str(tmp_path / name)
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    environment = os.environ | own | {"PYTHONPATH": str(ROOT)}
    environment.pop("MPLBACKEND", None)
    options = {
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": tmp_path,
        "IdentityProvider.token": "",
        "ServerApp.disable_check_xsrf": True,
        "LabApp.expose_app_in_browser": True,
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        *(f"--{key}={value}" for key, value in options.items()),
    ]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
        try:
            WebDriverWait(server, PATIENCE).until(
                lambda s: s.poll() is not None or answers(f"http://127.0.0.1:{port}/api/status")
            )
            assert server.poll() is None, (tmp_path / "lab.log").read_text()
            yield f"http://127.0.0.1:{port}/lab/tree/notebooks/{NAME}"
        finally:
            server.terminate()  # which also ends its kernels
            server.wait()


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1400,4000",
        f"--user-data-dir={tmp_path / 'chromium'}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_a_slider_a_button_and_votes(lab, browser, tmp_path):
    browser.get(lab)

    def wait(condition, message):
        return WebDriverWait(browser, PATIENCE).until(lambda _: condition(), message)

    def find(name):
        """Look up a widget's elements anew, since JupyterLab may replace them at any time."""
        return browser.find_elements(By.CSS_SELECTOR, f".vqr1-{name}")

    def text(name):
        return browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join(' ')",
            f".vqr1-{name}",
        )

    def changed(name, before):
        return wait(lambda: text(name) not in ("", before) and text(name), f"{name} stays {before!r}")

    wait(
        lambda: browser.execute_script(
            "return window.jupyterapp?.shell?.currentWidget"
            "?.sessionContext?.session?.kernel?.status === 'idle'"
        ),
        "no kernel",
    )
    browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    wait(lambda: find("level") and find("key"), "the applications do not appear")
    score, samples = changed("score", ""), changed("answers", "")
    assert score.startswith("score ") and "6 sampled answers" in samples

    find("level .noUi-handle")[0].send_keys(Keys.END)
    better, score = score, changed("score", score)
    assert float(score.split()[1]) < float(better.split()[1])
    assert text("level").strip().endswith("5")

    samples = text("answers")
    find("sample")[0].click()
    changed("answers", samples)
    assert text("score") == score

    find("first")[0].click()
    wait(lambda: "1 of 28" in text("progress"), "a click is no vote")
    for key, count in (("x", 1), ("2", 2), ("0", 3)):
        find("key input")[0].send_keys(key)
        wait(lambda: f"{count} of 28" in text("progress"), f"key {key}")  # noqa: B023
        wait(lambda: find("key input")[0].get_property("value") == "", "the key stays in the field")
    find("finish")[0].click()
    wait(lambda: "at least 7" in text("message"), "too few votes go unsaid")
    assert "Traceback" not in browser.page_source
