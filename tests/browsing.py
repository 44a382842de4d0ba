"""Jupyter pages in Chromium, driven by Selenium: for the browser tests and tools/widget_pictures.py."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from shared import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
PATIENCE = 600
"""Seconds after which what hangs ends: a loaded machine needs minutes, a quiet one two seconds."""


@contextmanager
def served(arguments: list[str], port_option: str, folder: Path, **environment: str) -> Iterator[str]:
    """Run a Jupyter server, with settings outside the user's home, and yield its address.

    arguments: of Python, as ``["-m", "jupyterlab"]``.
    port_option: by which the server takes its port.
    folder: what is written goes there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        name: str(folder / name)
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    env = os.environ | own | {"PYTHONPATH": str(ROOT)} | environment
    env.pop("MPLBACKEND", None)
    command = [sys.executable, *arguments, "--no-browser", f"--{port_option}={port}"]
    url, log = f"http://127.0.0.1:{port}", folder / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=env, stdout=file, stderr=file, cwd=folder)
        try:
            WebDriverWait(server, PATIENCE).until(lambda s: s.poll() is not None or _answers(url))
            assert server.poll() is None, log.read_text()
            yield url
        finally:
            server.terminate()  # which also ends its kernels
            server.wait()


def _answers(url: str) -> bool:
    try:
        return urlopen(f"{url}/api/status", timeout=5).status == 200
    except HTTPError:
        return True  # Voila has no status
    except (URLError, OSError):
        return False


@contextmanager
def app_page(pictures: Path, folder: Path) -> Iterator[str]:
    """Serve what `make app ARGS=pictures` serves; folder: what the server writes goes there."""
    command = ["-m", "voila", str(ROOT / "tools" / "app.ipynb")]
    with served(command, "Voila.port", folder, VQR1_FOLDER=str(pictures)) as url:
        yield url


@contextmanager
def chromium(folder: Path, size: str = "1400,4000") -> Iterator[webdriver.Chrome]:
    """Start Chromium without a screen; size: of its window, px."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.page_load_strategy = "none"  # what is waited for is on the page, however long it loads
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        f"--window-size={size}",
        f"--user-data-dir={folder / 'chromium'}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.command_executor.client_config.timeout = PATIENCE
    driver.set_script_timeout(PATIENCE)
    # Without a screen the window has the focus or has it not, by chance; JupyterLab goes by it to tell the
    # current notebook.
    driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """What a test does with the applications on a page; name: the class after ``vqr1-``."""

    def __init__(self, browser: webdriver.Chrome):
        self.browser = browser

    def wait(self, condition: Callable, message: str):
        waiting = WebDriverWait(self.browser, PATIENCE, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: condition(), message)

    def find(self, name: str) -> list[WebElement]:
        """Look up a widget's visible elements anew, since Jupyter may replace them at any time."""
        found = self.browser.find_elements(By.CSS_SELECTOR, f".vqr1-{name}")
        return [element for element in found if element.is_displayed()]

    def click(self, name: str) -> None:
        self.find(name)[0].click()

    def text(self, name: str) -> str:
        return self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join(' ')",
            f".vqr1-{name}",
        )

    def says(self, name: str, text: str) -> None:
        self.wait(lambda: text in self.text(name), f"{name} does not say {text!r}")

    def changed(self, name: str, before: str) -> str:
        return self.wait(
            lambda: self.text(name) not in ("", before) and self.text(name), f"{name} stays {before!r}"
        )

    def upload(self, file: Path) -> None:
        """Choose a file: the widget's field is not on the page until a click asks the system for a file."""
        self.browser.execute_script(
            "HTMLInputElement.prototype.click = function() {document.body.append(this); this.style = ''}"
        )
        self.click("upload")
        self.browser.find_element(By.CSS_SELECTOR, "body > input[type=file]").send_keys(str(file))

    def tab(self, title: str) -> None:
        self.browser.find_element(
            By.XPATH, f"//li[contains(@class, 'TabBar-tab')][contains(., '{title}')]"
        ).click()
