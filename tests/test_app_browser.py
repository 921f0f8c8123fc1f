# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: upload, train, stop, go on, draw, take away. `make test-app` installs what it needs."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page needs gradio: make test-app")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright: make test-app")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("the browser test needs Chromium: make test-app", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
DOG = ROOT / "examples" / "assets" / "subjects" / "dog" / "input"
SHOTS = os.environ.get("PEFT_KRONA_SCREENSHOTS")  # a folder to keep screenshots in


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "examples.app", "--port", str(port), "--output", str(log.parent / "adapters")],
            cwd=ROOT, stdout=out, stderr=out,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(url, timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        flags = [
            "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
            "--disable-component-update",
        ]  # fmt: skip
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1360, "height": 1000})
    page.set_default_timeout(60_000)
    outside = []
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else outside.append(r.url))
    page.goto(address)
    page.get_by_role("button", name="Train", exact=True).wait_for()
    yield page
    page.close()
    assert not outside, f"the page asked for {outside}"


def shot(page, name):
    if SHOTS:
        page.wait_for_timeout(700)
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def status(page):
    return page.locator("#status textarea").input_value()


def wait_status(page, *words, seconds=400):
    for _ in range(seconds * 4):
        if any(word in status(page) for word in words):
            return status(page)
        page.wait_for_timeout(250)
    raise AssertionError(f"waited {seconds} s for {words}; the page says {status(page)!r}")


def choose_own(page, files, noun="animal", name="pup", steps=20):
    page.locator("#subject input").click()
    page.get_by_role("option", name="my own pictures").click()
    with page.expect_file_chooser() as chooser:
        page.locator("#upload button").first.click()
    chooser.value.set_files([str(f) for f in files])
    page.get_by_label("What is it? (one word)").fill(noun)
    page.locator("#name input, #name textarea").first.fill(name)
    more = page.get_by_role("button", name="More settings")
    more.click()
    page.get_by_label("Updates", exact=True).fill(str(steps))
    page.get_by_label("A preview every so many updates (0: none)").fill("10")
    page.wait_for_timeout(1500)  # the upload


def test_from_pictures_to_a_file(page, tmp_path):
    choose_own(page, sorted(DOG.iterdir()))
    page.get_by_label("a_in", exact=True).fill("8")
    page.get_by_text("trainable parameters").wait_for()
    page.get_by_role("button", name="Train", exact=True).click()
    assert "Done: 20 updates" in wait_status(page, "Done", "error", "Failed"), status(page)
    shot(page, "trained")

    page.get_by_role("tab", name="Draw").click()
    page.locator("#prompt textarea").fill("a sks animal on a blue background")
    page.wait_for_timeout(1000)
    assert page.locator("#adapter-0 input").input_value() == "pup"
    page.get_by_label("Steps", exact=True).fill("4")
    page.get_by_role("button", name="Draw", exact=True).click()
    images = page.locator(".picture img")
    images.nth(1).wait_for()
    assert images.nth(0).get_attribute("src") != images.nth(1).get_attribute("src")
    shot(page, "drawn")

    page.get_by_role("tab", name="What was learned").click()
    page.wait_for_timeout(800)
    page.get_by_role("button", name="Look").click()
    page.locator("#learned-picture img").wait_for()
    shot(page, "learned")

    page.get_by_role("tab", name="Take it with you").click()
    page.wait_for_timeout(800)
    page.get_by_role("button", name="Make the file").click()
    with page.expect_download() as download:
        page.locator("#made a").first.click()
    download.value.save_as(tmp_path / "pup.safetensors")
    shot(page, "taken")

    from peft_krona.convert import read_adapter

    assert len(read_adapter(tmp_path / "pup.safetensors")) == 56  # the attention of the shipped UNet


def test_stop_in_the_middle_and_go_on(page):
    choose_own(page, sorted(DOG.iterdir())[:1], name="one", steps=60)
    page.get_by_role("button", name="Train", exact=True).click()
    wait_status(page, "Training: update")
    page.get_by_role("button", name="Stop", exact=True).click()
    assert "Stopped at update" in wait_status(page, "Stopped", "Done", "error")
    shot(page, "stopped")
    page.get_by_role("button", name="Go on", exact=True).click()
    assert "Done: 60 updates" in wait_status(page, "Done", "error", "Failed"), status(page)


@pytest.mark.parametrize(
    "content, words",
    [(b"not a picture", "is no picture that can be read"), (b"", "is no picture that can be read")],
)
def test_a_bad_file_is_named(page, tmp_path, content, words):
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    choose_own(page, [bad], name="bad")
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_text(words).first.wait_for()
    shot(page, "bad")


@pytest.mark.skipif(
    not SHOTS, reason="makes docs/app.png: PEFT_KRONA_SCREENSHOTS=docs pytest tests/test_app_browser.py -k readme"
)
def test_the_picture_of_the_readme(page):
    """The page as it opens: the shipped subject, its settings, and what is drawn after the training."""
    page.get_by_role("button", name="Train", exact=True).click()
    assert "Done: 400 updates" in wait_status(page, "Done", "error", "Failed", seconds=1200), status(page)
    page.get_by_role("tab", name="Draw").click()
    page.wait_for_timeout(1000)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator(".picture img").nth(1).wait_for()
    page.mouse.move(5, 5)
    page.wait_for_timeout(2500)
    page.screenshot(path=str(Path(SHOTS) / "app.png"), clip={"x": 40, "y": 0, "width": 1280, "height": 752})
