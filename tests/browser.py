"""A headless Chromium that looks at the web pages as a person would; Debian: ``apt-get install chromium-driver``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SECONDS = 120
SIZE = (1500, 1100)


class Browser:
    """One tab."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    def open(self, url: str, *texts: str) -> None:
        """Go to a page and wait until it shows all of ``texts``. Raises TimeoutException with what it lacks."""
        self._driver.get("about:blank")  # so that only the part after # may differ
        self._driver.get(url)
        self.wait(*texts)

    def wait(self, *texts: str) -> None:
        """Wait until the page shows all of ``texts``."""
        for text in texts:
            WebDriverWait(self._driver, SECONDS).until(lambda _, text=text: text in self.text, f"no {text!r} to see")

    def wait_for_pictures(self, least: int) -> None:
        """Wait until that many pictures are on the page, loaded."""
        script = "return [...document.images].filter(i => i.complete && i.naturalWidth > 32).length"
        WebDriverWait(self._driver, SECONDS).until(
            lambda driver: driver.execute_script(script) >= least, f"fewer than {least} pictures"
        )

    def log_in_to_prefect(self, url: str, login: str) -> None:
        """As a person does: paste the line into its only field."""
        self.open(url, "Login")
        self._driver.find_element(By.CSS_SELECTOR, "input[type=password]").send_keys(login)
        self._driver.find_element(By.XPATH, "//button[normalize-space(.)='Login']").click()
        self.wait("Dashboard")

    def log_in_to_mlflow(self, url: str, login: str) -> None:
        """What the browser's own dialogue does, which no script can fill in: from here on it sends ``login`` along."""
        self._driver.get(url.replace("://", f"://{login}@"))
        self.open(url, "Welcome to MLflow")  # a page with a password in its address may fetch nothing

    def run(self, script: str, *arguments: object) -> Any:
        """What an async JavaScript function with this body returns, called in the page."""
        code = f"const done = arguments[arguments.length - 1]; (async (...given) => {{{script}}})(...arguments)"
        return self._driver.execute_async_script(f"{code}.then(done, error => done(String(error)))", *arguments)

    def click(self, text: str) -> None:
        """Click on what says just ``text``."""
        self._driver.find_element(By.XPATH, f"(//*[normalize-space(.)='{text}'])[last()]").click()

    def look_as(self, width: int, height: int, dark: bool = False) -> None:
        """From now on as a screen of that size (a phone's below 600 px), in a light or a dark colour scheme."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def press(self, key: str) -> None:
        """Press one key of the keyboard."""
        ActionChains(self._driver).send_keys(key).perform()

    def click_at(self, x: int, y: int) -> None:
        """Click on a place in the window."""
        mouse = ActionBuilder(self._driver)
        mouse.pointer_action.move_to_location(x, y).click()
        mouse.perform()

    @property
    def text(self) -> str:
        """What the page says."""
        return self._driver.find_element(By.TAG_NAME, "body").text

    def shoot(self, path: Path) -> None:
        """Take a picture of what is in the window."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._driver.get_screenshot_as_png())


class _Empty(BaseHTTPRequestHandler):
    """One page for every address, and no log."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><body>a foreign page")

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def foreign_page() -> Iterator[str]:
    """The address of a page of somebody else on this machine: of another port, so of another origin."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Empty)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that ends with the block."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size={},{}".format(*SIZE)):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(SECONDS)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
