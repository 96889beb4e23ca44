"""The page in a headless Chromium: a conversation, a tool call, the heat map, a phone's width, the keyboard alone.

Screenshots of every test are left in test-artefacts/ of the checkout."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k2lite.engine import Engine
from k2lite.server.service import Service
from tests.server.conftest import served
from tests.server.test_staying_up import soon
from tests.server.tools import QUESTION, TOOL

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

ARTEFACTS = Path(__file__).parents[2] / "test-artefacts"
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
UNITS = "How many centimeters are 12 meters?"
PATIENCE_MS = 60_000  # for an answer on a busy machine; nothing waits longer than it must


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        sync_api.expect.set_options(timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """`open_page(address)`; whatever the page asks for elsewhere, or says on its console, fails the test."""
    pages = []

    def opened(address: str, viewport: dict[str, int] = DESK, on_dialog: Any = None) -> Any:
        page = browser.new_page(viewport=viewport)
        if on_dialog is not None:
            page.on("dialog", on_dialog)
        page.set_default_timeout(PATIENCE_MS)
        troubles: list[str] = []
        page.on("request", lambda made: made.url.startswith(address) or troubles.append(made.url))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(address)
        pages.append((page, troubles))
        return page

    yield opened
    ARTEFACTS.mkdir(exist_ok=True)
    for page, troubles in pages:
        page.screenshot(path=ARTEFACTS / f"{request.node.name}.png")
        page.close()
        assert not troubles


@pytest.fixture
def fresh_server(demo_engine: Engine) -> Iterator[str]:
    """The address of a server that nobody has asked anything."""
    with served(demo_engine) as (address, _):
        yield address


def test_a_conversation_lights_up_the_experts(fresh_server: str, open_page: Any) -> None:
    page = open_page(fresh_server)
    lit = page.locator("#heat[data-lit]")
    sync_api.expect(lit).to_have_attribute("data-lit", "0")
    page.fill("#say", UNITS)
    page.click("#send")
    page.get_by_text("1200 centimeters.").wait_for()
    sync_api.expect(lit).to_have_attribute("data-lit", re.compile(r"[1-9]\d"))
    assert page.locator("#heat").get_attribute("width") == "64"
    assert page.locator("#name").text_content() == "kimi"
    facts = page.locator("#facts", has_text="Written7")
    facts.wait_for()
    assert "Hits in HOST" in facts.text_content()
    assert page.locator(".turn").count() == 2


def test_a_tool_call_is_shown_and_its_result_used(demo_server: tuple[str, Service], open_page: Any) -> None:
    page = open_page(demo_server[0])
    page.locator("summary").click()
    page.fill("#tools", json.dumps([TOOL]))
    page.fill("#say", QUESTION[0]["content"])
    page.press("#say", "Enter")
    page.locator(".call", has_text='"city": "Torino"').wait_for()
    result = page.get_by_label("Result of send_letter")
    result.fill('{"total": 51}')
    result.press("Enter")
    page.get_by_text("The total is 51.").wait_for()


def test_a_phone_shows_both_halves(demo_server: tuple[str, Service], open_page: Any) -> None:
    page = open_page(demo_server[0], PHONE)
    page.fill("#say", UNITS)
    page.click("#send")
    page.get_by_text("1200 centimeters.").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for part in ("#say", "#send", "#name"):
        box = page.locator(part).bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= PHONE["height"]


def test_the_keyboard_alone_is_enough(random_engine: Engine, open_page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_engine, "stop_ids", frozenset())  # an answer that does not end by itself, nor soon
    real = Engine.step

    def slowly(self: Engine, chunks: Any) -> Any:
        time.sleep(0.05)
        return real(self, chunks)

    monkeypatch.setattr(Engine, "step", slowly)
    with served(random_engine) as (address, service):
        page = open_page(address)
        assert page.evaluate("document.activeElement.id") == "say"
        page.keyboard.type("Go on & on <b>")
        page.keyboard.press("Enter")
        page.locator(".said", has_text="Go on & on <b>").wait_for()  # text is text
        sync_api.expect(page.locator(".said")).to_have_count(2)
        page.keyboard.press("Escape")
        sync_api.expect(page.locator("#stop")).to_be_disabled()
        assert soon(lambda: service.scheduler.running == 0)
        reached = []
        for _ in range(3):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert reached == ["SUMMARY", "send", "clear"]
        assert service.scheduler.totals.cancelled == 1


def test_a_key_is_asked_for(random_engine: Engine, open_page: Any) -> None:
    with served(random_engine, key="sesame") as (address, _):
        page = open_page(address, on_dialog=lambda dialog: dialog.accept("sesame"))
        sync_api.expect(page.locator("#name")).to_have_text("kimi")
