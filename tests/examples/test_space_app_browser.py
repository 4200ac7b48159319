# SPDX-License-Identifier: Apache-2.0
"""examples/space_app.py in headless Chromium: what a person sees and does there, in light and dark.

DQ_SCREENSHOTS=FOLDER keeps a picture of each.
"""

import io
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
GALLERIES = {"full precision": "reference", "quantized": "quantized", "difference": "difference"}  # field of Shown
SECONDS = 60  # for anything to appear, on a machine that does more than this

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome is installed"),
    pytest.mark.filterwarnings("ignore::Warning:gradio.queueing"),  # of pandas, of what it calls by an old name
]


@pytest.fixture(scope="module")
def url(app, pair, tmp_path_factory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("pictures")))
        page = app.build(pair)
        _, address, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", share=False, quiet=True)
        yield address
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Visit:
    """The open page.   errors: JavaScript's, and what the console calls errors.   strangers: other hosts asked for."""

    def __init__(self, browser: Any, url: str, scheme: str) -> None:
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
        self.errors: list[str] = []
        self.strangers: set[str] = set()
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS * 1000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.route(lambda asked: urlsplit(asked).hostname not in ("127.0.0.1", None), self._refuse)
        self.page.goto(url)

    def _refuse(self, route: Any) -> None:
        self.strangers.add(urlsplit(route.request.url).hostname)
        route.abort()

    def pictures(self, label: str) -> list[np.ndarray]:
        """Of the gallery of that label: drawn, each [H, W, 3] uint8 as the server sent it, a PNG."""
        gallery = self.page.locator(
            ".block", has=self.page.get_by_test_id("block-label").get_by_text(label, exact=True)
        )
        drawn = "all => all.filter(one => one.complete && one.naturalWidth && one.width).map(one => one.src)"
        images = []
        for source in gallery.locator("button.thumbnail-item img").evaluate_all(drawn):
            image = Image.open(io.BytesIO(self.context.request.get(source).body()))
            assert (image.format, image.mode) == ("PNG", "RGB")
            images.append(np.asarray(image))
        return images

    def comes_to_show(self, shown: Any) -> None:
        """Waits for the pictures of `shown`, pixel by pixel, and for its PSNR and SSIM."""
        figures = shown.summary.partition(", difference")[0].replace("**", "")
        self.page.get_by_text(figures).wait_for()
        deadline = time.monotonic() + SECONDS
        for label, field in GALLERIES.items():
            expected = getattr(shown, field)
            while not equal(found := self.pictures(label), expected):
                assert time.monotonic() < deadline, f"{label}: {len(found)} pictures, not the {len(expected)} expected"
                self.page.wait_for_timeout(100)

    def generate(self, seed: str) -> None:
        self.page.get_by_label("seed").fill(seed)
        self.page.get_by_role("button", name="Generate").click()


def equal(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


@pytest.fixture(params=["light", "dark"])
def visit(request, browser, url) -> Iterator[Visit]:
    """Whatever is done there, no JavaScript fails, and no other machine is asked for anything."""
    visit = Visit(browser, url, request.param)
    yield visit
    if folder := os.environ.get("DQ_SCREENSHOTS"):
        visit.page.screenshot(path=Path(folder) / f"{request.node.name}.png")
    visit.context.close()
    assert not visit.errors and not visit.strangers


def test_pictures_are_there_at_once_and_follow_what_is_chosen(visit, app, pair, request):
    dark = "dark" in request.node.name
    brightness = np.asarray(Image.open(io.BytesIO(visit.page.screenshot())).convert("L"))[-5:].mean()
    assert brightness < 64 if dark else brightness > 192

    visit.comes_to_show(first := app.side_by_side(pair, "dog", seed=0, steps=20))
    visit.generate("3")
    visit.comes_to_show(second := app.side_by_side(pair, "dog", seed=3, steps=20))
    assert not equal(first.reference, second.reference) and not equal(first.quantized, second.quantized)

    slider = visit.page.get_by_label("range slider for denoising steps")
    box = slider.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] * 0.19, box["y"] + box["height"] / 2)  # the knob, at 20 of 1 to 100
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + box["width"] * 0.06, box["y"] + box["height"] / 2, steps=4)
    visit.page.mouse.up()
    steps = int(visit.page.get_by_label("number input for denoising steps").input_value())
    assert 1 <= steps < 15
    visit.comes_to_show(app.side_by_side(pair, "dog", seed=3, steps=steps))

    visit.page.get_by_label("class").click()
    visit.page.get_by_role("option", name="cat").click()
    visit.page.get_by_label("number input for pictures").fill("2")
    visit.generate("3")
    visit.comes_to_show(app.side_by_side(pair, "cat", seed=3, steps=steps, pictures=2))


def test_what_is_wrong_is_said_and_the_page_goes_on(visit, app, pair):
    visit.comes_to_show(app.side_by_side(pair, "dog", seed=0, steps=20))
    for seed, said in {"": "the seed is empty", "1" + "0" * 20: "from 0 to 2^63 - 1", "-1": "minimum"}.items():
        visit.generate(seed)
        visit.page.get_by_test_id("toast-body").get_by_text(said).wait_for()
    visit.generate("1")
    visit.comes_to_show(app.side_by_side(pair, "dog", seed=1, steps=20))
