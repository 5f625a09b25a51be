"""The server's page in headless Chromium, with a tiny model behind it."""

import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image

from configs.model import GenerationConfig, MultiTokenConfig
from data.images import open_pixels, to_tiles
from data.render import Renderer
from eval.predictor import Predictor
from serving.api import Settings, create_app
from serving.engine import Engine
from serving.metrics import Metrics
from tests.conftest import TINY_MODEL, lively_model, random_tiles

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
Page = playwright.Page
expect = playwright.expect
expect.set_options(timeout=20_000)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(random_tiles(1, seed)[0].permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


IMAGE, OTHER = png(0), png(1)
QUESTION = "what color is the shape?"
TOKENS = 24  # of an answer
COMPLETIONS = "**/v1/chat/completions"


class Served:
    """A tiny model, served on a free port of this machine."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.engine = Engine(predictor, Metrics(), drafts="on")
        self.app = create_app(self.engine, Settings("tiny", max_tokens=TOKENS))
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def __enter__(self) -> "Served":
        self.thread.start()
        wait_for(lambda: self.uvicorn.started)
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}/"
        return self

    def __exit__(self, *_: object) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(30)

    def answer(self, image: bytes, question: str) -> str:
        tiles = to_tiles(open_pixels(image), self.predictor.model.config.vision)
        settings = GenerationConfig(max_new_tokens=TOKENS)
        return self.predictor.answer([([tiles], question)], settings)[0].text


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited 20 s in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served(tokenizer) -> Iterator[Served]:
    config = replace(TINY_MODEL, multi_token=MultiTokenConfig(heads=3, mlp_size=32))
    model = lively_model(tokenizer, config)
    torch.nn.init.normal_(model.heads.down.weight, std=0.3)
    with Served(Predictor(model, Renderer(tokenizer, config.tokens_per_tile))) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as starter:
        browser = starter.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served) -> Iterator[Page]:
    """The page, connected; its scripts must not fail."""
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(error.message))
    page.on("console", lambda message: errors.append(message.text) if "Policy" in message.text else None)
    page.goto(served.address)
    expect(page.locator("#model")).to_have_text("tiny")
    yield page
    context.close()
    assert not errors


def add_images(page: Page, *images: bytes) -> None:
    files = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": data} for n, data in enumerate(images)]
    page.locator("#files").set_input_files(files)


def ask(page: Page, question: str = QUESTION) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")


def answers(page: Page, count: int = 1) -> list[str]:
    """The texts of all answers, once there are so many and the last is complete."""
    expect(page.locator(".state")).to_have_count(count)
    expect(page.locator(".state").last).to_contain_text("tokens per step")
    return page.locator(".answer").evaluate_all(
        "all => all.map(a => [...a.querySelectorAll('span')].map(s => s.textContent).join(''))"
    )


def stream(*steps: dict[str, Any], done: bool = True) -> dict[str, Any]:
    """A canned answer, for `page.route`. Each step: its tokens, and the rejected draft."""
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": "".join(s["tokens"])}}], "dualtower": s} for s in steps
    ]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n" * done
    return {"body": body, "content_type": "text/event-stream"}


def test_two_images_and_three_questions(page, served):
    add_images(page, IMAGE)
    expect(page.locator("#tray")).to_contain_text("tokens, encoded")
    ask(page)
    assert answers(page) == [served.answer(IMAGE, QUESTION)]
    expect(page.locator(".state")).to_contain_text("image reused")
    assert page.locator(".answer .rejected").count(), "no draft was rejected"
    page.get_by_label("Drafts:").uncheck()
    expect(page.locator(".answer .rejected").first).to_be_hidden()

    with page.expect_request(COMPLETIONS) as sent:
        add_images(page, OTHER, IMAGE)
        page.get_by_label("Remove 1.png").click()
        ask(page, "and what is it?")
    assert len(answers(page, 2)) == 2
    roles = [message["role"] for message in sent.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "user"]
    handles = [message["content"][0]["id"] for message in sent.value.post_data_json["messages"][::2]]
    assert len(set(handles)) == 2
    ask(page, "is it?")
    answers(page, 3)

    page.locator(".answer").nth(1).locator("span").first.click()
    expect(page.locator("#maps canvas")).to_have_count(2)
    expect(page.locator("#maps")).to_contain_text("2 × 2 tokens")
    page.keyboard.press("Escape")
    expect(page.locator("#attention")).to_be_hidden()
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.get_by_text("Ask about an image")).to_be_visible()


def test_images_are_dropped_and_pasted(page):
    transfer = page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "cat.png", { type: "image/png" }));
            return transfer;
        }""",
        list(IMAGE),
    )
    page.dispatch_event("main", "dragover", {"dataTransfer": transfer})
    expect(page.locator("body.dropping")).to_be_visible()
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})
    page.evaluate(
        "data => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: data }))", transfer
    )
    expect(page.locator("#tray").get_by_text("tokens, ")).to_have_count(2)


def test_settings_are_sent(page):
    with page.expect_request(COMPLETIONS) as sent:
        page.get_by_text("Settings").click()
        page.get_by_label("System message").fill("be short")
        page.get_by_label("Max tokens").fill("3")
        page.get_by_label("Seed").fill("7")
        ask(page)
    answers(page)
    expect(page.locator(".state")).to_contain_text("ended at 3 tokens")
    body = sent.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "be short"}
    assert (body["max_tokens"], body["seed"], body["temperature"]) == (3, 7, 0)
    page.get_by_label("Max tokens").fill("0")
    ask(page)
    expect(page.locator("article")).to_have_count(1)


def test_without_handles_images_travel_with_the_question(page, monkeypatch, served):
    monkeypatch.setattr("serving.api.has_handles", lambda predictor: False)
    page.reload()
    add_images(page, IMAGE)
    expect(page.locator("#tray")).to_contain_text("Ready")
    ask(page)
    assert answers(page) == [served.answer(IMAGE, QUESTION)]
    expect(page.locator(".answer.attention")).to_have_count(0)


def test_stop_and_repeat(page, served, monkeypatch):
    step = served.engine.batch.step
    monkeypatch.setattr(served.engine.batch, "step", lambda: (time.sleep(0.1), step()))
    add_images(page, IMAGE)
    ask(page)
    expect(page.locator(".answer span").nth(2)).to_be_attached()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".state")).to_contain_text("Stopped.")
    part = answers(page)[0]
    expected = served.answer(IMAGE, QUESTION)
    assert part and part != expected and expected.startswith(part)
    wait_for(lambda: not served.engine.batch.rows)
    monkeypatch.undo()
    page.get_by_role("button", name="Repeat").click()
    assert answers(page) == [expected]


def test_text_of_the_model_is_never_markup(page):
    """And a cut stream keeps its text; asked again, it is answered."""
    steps = [
        {"tokens": ["<b", ">bold</b>"], "rejected": "<i>\n"},
        {"tokens": ['<img src=x onerror="document.title=1">'], "rejected": None},
    ]
    page.route(COMPLETIONS, lambda route: route.fulfill(**stream(*steps, done=False)))
    ask(page)
    assert answers(page) == ['<b>bold</b><img src=x onerror="document.title=1">']
    expect(page.locator(".state")).to_contain_text("The connection was lost.")
    expect(page.locator(".answer .accepted")).to_have_text("<b")
    expect(page.locator(".answer .rejected")).to_have_text("<i>↵")
    assert page.locator(".answer :is(b, i, img)").count() == 0
    page.unroute(COMPLETIONS)
    page.get_by_role("button", name="Repeat").click()
    assert "<b>" not in answers(page)[0]


def test_errors_before_an_answer_give_the_question_back(page, served, monkeypatch):
    notice = page.get_by_role("alert")
    add_images(page, b"\x89PNG\r\n\x1a\nbroken")
    expect(notice).to_contain_text("0.png: the file is broken")
    page.locator("#files").set_input_files(
        {"name": "a.svg", "mimeType": "image/svg+xml", "buffer": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}
    )
    expect(notice).to_contain_text("a.svg: ")
    expect(page.locator("#tray li")).to_have_count(0)

    add_images(page, IMAGE)
    page.route(COMPLETIONS, lambda route: route.abort())
    ask(page)
    expect(notice).to_contain_text("The server does not answer.")
    expect(page.get_by_label("Question", exact=True)).to_have_value(QUESTION)
    expect(page.locator("#tray li")).to_have_count(1)
    page.unroute(COMPLETIONS)

    served.predictor.store.memory.clear()
    monkeypatch.setattr(served.engine, "max_waiting", 0)
    notice.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("The server is busy. Next try in 1 s.")).to_be_visible()
    monkeypatch.undo()
    assert answers(page) == [served.answer(IMAGE, QUESTION)]
    expect(notice).to_be_hidden()


def test_server_that_is_not_there_or_asks_for_a_key(page, served, monkeypatch):
    notice = page.get_by_role("alert")
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(notice).to_contain_text("The server does not answer.")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    page.unroute("**/v1/models")
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": []}))
    notice.get_by_role("button", name="Try again").click()
    expect(notice).to_contain_text("The server has no model yet.")
    page.unroute("**/v1/models")
    server = served.app.state.server
    monkeypatch.setattr(server, "settings", server.settings._replace(api_keys=("secret",)))
    notice.get_by_role("button", name="Try again").click()
    expect(notice).to_contain_text("The server asks for an API key.")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(notice).to_contain_text("The server does not accept this API key.")
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("tiny")
    page.reload()  # the key is kept
    ask(page)
    answers(page)


def tab_to(page: Page, selector: str, key: str = "Tab") -> None:
    for _ in range(30):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{selector} is not reached")


def test_keyboard_alone(page):
    add_images(page, IMAGE)
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="New conversation")).to_be_focused()
    tab_to(page, "#question")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    answers(page)
    tab_to(page, ".answer", "Shift+Tab")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".answer span").nth(1)).to_have_class("current")
    assert page.evaluate("getComputedStyle(document.querySelector('.current')).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#maps canvas")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".answer")).to_be_focused()


def test_phone_in_the_dark(browser, served):
    """Nothing is wider than 360 pixels; the theme is the system's, and then the chosen one."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page = context.new_page()
    page.goto(served.address)
    expect(page.locator("#model")).to_have_text("tiny")
    page.get_by_text("Settings").click()
    add_images(page, *[IMAGE] * 4)
    ask(page, "describe " + "x" * 60)
    answers(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 22, 21)"
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    context.close()
