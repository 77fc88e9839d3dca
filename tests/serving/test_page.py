"""The page in a browser: sends, stops, branches, remembers, recovers, and believes no text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import chat_server
import pytest
from chat_server import ScriptedEngines, serve, write_checkpoint

from hearth.serving.api import PAGE, Safety, policy
from hearth.serving.requests import Served

HTML = PAGE.read_text(encoding="utf-8")


def test_the_page_is_one_file_that_loads_nothing() -> None:
    markup = HTML.split("<script>")[0]
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:)[^"'\s>{]+""", markup) == []
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", HTML)
    assert not re.search(r"<[^>]+\s(style|on\w+)=", markup)


def test_the_policy_lets_the_pages_own_script_and_style_run_alone() -> None:
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, flags=re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}';" in policy(HTML)


# ---------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield running
        running.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Served]:
    place = tmp_path_factory.mktemp("run")
    return [
        replace(
            chat_server.describe(f"demo-{stage}", write_checkpoint(place, stage)),
            context=10**6,
            chat=replace(chat_server.CONFIG.chat, max_tokens=10**6),
        )
        for stage in ("sft2", "sft1", "base")
    ]


@pytest.fixture
def says(models: list[Served]) -> ScriptedEngines:
    return ScriptedEngines(models[0].tokenizer, lambda prompt: "The cat sat on a mat.")


@pytest.fixture
def url(says: ScriptedEngines, models: list[Served]) -> Iterator[str]:
    with serve(says, models) as address:
        yield address


class Visit:
    """A page that is open, and what its console said."""

    def __init__(self, browser, url: str, **settings) -> None:
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.complaints: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.until("models.length > 0")

    def until(self, expression: str) -> None:
        """Wait for it; playwright's own way needs an `eval` that the page's policy forbids."""
        end = time.monotonic() + 60
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.01)

    def has_said(self, n: int) -> None:
        """Wait until the answer is longer than n characters."""
        length = "document.querySelector('.answer > .body')?.innerText.length"
        self.until(f"{length} > {n}")

    def send(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def ask(self, text: str) -> str:
        """The answer, once it is whole."""
        self.send(text)
        self.settle()
        return self.answers()[-1]

    def settle(self) -> None:
        self.until("!running && document.querySelector('.answer')")

    def answers(self) -> list[str]:
        return self.page.locator("article.answer > .body").all_inner_texts()

    def click(self, name: str, n: int = -1) -> None:
        self.page.get_by_role("button", name=name, exact=True).nth(n).click()


@pytest.fixture
def visit(browser, url: str) -> Iterator[Visit]:
    made = Visit(browser, url)
    yield made
    assert made.complaints == []
    made.context.close()


def test_a_message_is_answered_and_remembered(visit: Visit, says: ScriptedEngines) -> None:
    assert visit.ask("Where is the cat?") == "The cat sat on a mat."
    assert visit.page.locator(".user .body").inner_text() == "Where is the cat?"
    status = visit.page.locator(".status").last.inner_text()
    assert "tokens/s" in status or "tokens" in status
    assert "2.00 cycles per token" in status
    visit.ask("And then?")
    visit.page.reload()
    visit.page.wait_for_selector("article.answer")
    assert visit.answers() == ["The cat sat on a mat."] * 2
    prompt = says.tokenizer.decode(says.jobs[-1].request.prompt)
    assert "Where is the cat?" in prompt
    assert "The cat sat on a mat." in prompt


def test_an_answer_is_stopped_and_continued(visit: Visit, says: ScriptedEngines) -> None:
    says.pause = 0.2
    visit.send("Tell me")
    visit.has_said(4)
    visit.click("Stop")
    visit.settle()
    part = visit.answers()[0]
    assert 4 < len(part) < len("The cat sat on a mat.")
    assert "stopped" in visit.page.locator(".status").last.inner_text()
    says.pause, says.answer = 0.0, lambda prompt: " and more"
    visit.click("Continue this answer")
    visit.settle()
    assert visit.answers() == [(part + " and more").strip()]
    assert says.jobs[0].cancelled


def test_of_an_answer_continued_after_a_reload_no_token_is_shown_at_another_ones_place(
    visit: Visit, says: ScriptedEngines
) -> None:
    says.pause = 0.2
    visit.send("Tell me")
    visit.has_said(4)
    visit.click("Stop")
    visit.settle()
    before = int(visit.page.locator(".status").last.inner_text().split()[0])
    visit.page.reload()
    visit.page.wait_for_selector("article.answer")
    says.pause, says.answer = 0.0, lambda prompt: " and more"
    visit.click("Continue this answer")
    visit.settle()
    n_tokens = len(says.tokenizer.encode(" and more"))
    assert visit.page.locator(".status").last.inner_text().startswith(f"{before + n_tokens} tokens")
    visit.page.locator("article.answer .body").last.hover(position={"x": 4, "y": 8})
    assert not visit.page.locator("#tip").is_visible()


def test_escape_stops_an_answer(visit: Visit, says: ScriptedEngines) -> None:
    says.pause = 0.05
    visit.send("Tell me")
    visit.has_said(2)
    visit.page.keyboard.press("Escape")
    visit.settle()
    assert len(visit.answers()[0]) < len("The cat sat on a mat.")


def test_branches_of_edited_and_repeated_turns_are_kept(
    visit: Visit, says: ScriptedEngines
) -> None:
    visit.ask("one")
    says.answer = lambda prompt: "Another answer."
    visit.click("Answer again")
    visit.settle()
    assert visit.answers() == ["Another answer."]
    says.answer = lambda prompt: "To two."
    visit.page.press("#text", "ArrowUp")  # edits the last message
    visit.page.fill(".edit textarea", "two")
    visit.page.press(".edit textarea", "Enter")
    visit.settle()
    assert visit.answers() == ["To two."]
    assert visit.page.locator(".user .tools").inner_text().split()[:3] == ["‹", "2/2", "›"]
    visit.click("Earlier version", 0)
    assert visit.answers() == ["Another answer."]
    visit.click("Earlier version")
    assert visit.answers() == ["The cat sat on a mat."]
    assert visit.page.locator(".user .body").inner_text() == "one"
    assert says.tokenizer.decode(says.jobs[-1].request.prompt).count("one") == 0


def test_thinking_is_folded_with_its_time(visit: Visit, says: ScriptedEngines) -> None:
    says.answer = lambda prompt: "<think>12 + 7 is 19</think>It is **19**."
    assert visit.ask("12 + 7?") == "It is 19."
    assert re.fullmatch(r"Thought for \d+\.\d s", visit.page.locator("summary").inner_text())
    assert not visit.page.locator("details.thinking").evaluate("e => e.open")
    visit.page.click("summary")
    assert visit.page.locator(".thinking .body").inner_text() == "12 + 7 is 19"
    visit.ask("and?")
    prompt = says.tokenizer.decode(says.jobs[-1].request.prompt)
    assert "<think>12 + 7 is 19</think>It is **19**." in prompt


def test_a_call_stands_dim_in_the_answer_and_is_no_html(
    visit: Visit, says: ScriptedEngines
) -> None:
    text = "It is ⟦calculate 12*7*<b>2</b> → 168⟧ cats*."
    says.answer = lambda prompt: text
    assert visit.ask("12*7*2?") == text
    call = visit.page.locator(".answer .body .call")
    assert call.inner_text() == "⟦calculate 12*7*<b>2</b> → 168⟧"
    colours = [
        visit.page.locator(where).first.evaluate("e => getComputedStyle(e).color")
        for where in (".answer .body .call", ".answer .body p")
    ]
    assert colours[0] != colours[1]


def test_settings_reach_the_model(visit: Visit, says: ScriptedEngines) -> None:
    visit.page.click("#settings")
    visit.page.fill("#system", "Be brief.")
    visit.page.fill("[name=temperature]", "0.3")
    visit.page.fill("[name=max_tokens]", "3")
    visit.page.select_option("#effort", "low")
    visit.page.click("text=Done")
    visit.ask("Hello")
    request = says.jobs[-1].request
    assert request.rules.sampling.temperature == 0.3
    assert request.rules.max_tokens == 3
    assert request.rules.budget.tokens == 256
    assert "<|system|>Be brief.<|end|>" in says.tokenizer.decode(request.prompt)
    assert "cut at the longest answer" in visit.page.locator(".status").last.inner_text()


def test_two_models_answer_side_by_side(visit: Visit, says: ScriptedEngines) -> None:
    visit.page.select_option("#beside", "demo-base")
    visit.send("Who?")
    visit.settle()
    assert len(visit.answers()) == 2
    assert visit.page.locator(".name").all_inner_texts() == ["demo-sft2", "demo-base"]
    first, second = (says.tokenizer.decode(job.request.prompt) for job in says.jobs)
    assert {first, second} == {"<|bos|><|user|>Who?<|end|><|assistant|>", "<|bos|>Who?"}


def test_a_tokens_probability_and_alternatives_are_shown(visit: Visit) -> None:
    visit.ask("Who?")
    box = visit.page.locator(".answer > .body p").bounding_box()
    visit.page.mouse.move(box["x"] + 8, box["y"] + box["height"] / 2)
    visit.page.wait_for_selector("#tip:not([hidden])")
    tip = visit.page.locator("#tip").inner_text()
    assert "90%" in tip
    assert "8.21%" in tip
    assert "2 cycles" in tip
    visit.click("Show each token and its probability")
    shown = visit.page.locator(".tokens span")
    assert "".join(shown.all_text_contents()) == "The cat sat on a mat."
    shown.first.focus()
    visit.page.keyboard.press("ArrowRight")
    second = "document.activeElement === document.querySelectorAll('.tokens span')[1]"
    assert visit.page.evaluate(second)
    assert visit.page.locator("#live").inner_text().endswith("90%")


def test_conversations_are_searched_exported_imported_and_deleted(
    visit: Visit, tmp_path: Path
) -> None:
    for text in ("about hammers", "about nails"):
        visit.ask(text)
        visit.click("New conversation")
    rows = visit.page.locator("#list li button:first-child")
    assert rows.all_inner_texts() == ["about nails", "about hammers"]
    visit.page.fill("#search", "HAMMERS")
    assert rows.all_inner_texts() == ["about hammers"]
    visit.page.fill("#search", "")
    with visit.page.expect_download() as download:
        visit.click("Export")
    path = tmp_path / "conversations.json"
    download.value.save_as(path)
    assert len(json.loads(path.read_text())["talks"]) == 2
    visit.page.on("dialog", lambda dialog: dialog.accept())
    for _ in range(2):
        visit.click("Delete about nails" if rows.count() == 2 else "Delete about hammers")
    assert visit.page.locator("#list").inner_text() == "No conversations yet."
    visit.page.set_input_files("#file", path)
    visit.until("talks.length === 2")
    rows.first.click()
    assert visit.answers() == ["The cat sat on a mat."]
    bad = tmp_path / "bad.json"
    for text in ("{", "[]", '{"talks": [{"id": 1}]}', '{"talks": 5}'):
        bad.write_text(text)
        with visit.page.expect_event("dialog"):
            visit.page.set_input_files("#file", bad)
    assert rows.count() == 2


def test_markdown_becomes_nodes(visit: Visit, says: ScriptedEngines) -> None:
    says.answer = lambda prompt: (
        "# Title\n\nA *b* **c** `d*e*` [link](https://a.example/x) and http://b.example.\nline\n\n"
        "- one\n- two\n  1. deep\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "```c\nint *x;\n\n<b>\n```\n\n"
        "> quoted\n\n---\nsnake_case_name and 2 * 3 * 4"
    )
    visit.ask("Show")
    body = visit.page.locator(".answer > .body")
    for selector, text in (
        ("h1", "Title"),
        ("em", "b"),
        ("strong", "c"),
        ("p code", "d*e*"),
        ("ul > li > ol > li", "deep"),
        ("td:last-child", "2"),
        ("pre code", "int *x;\n\n<b>"),
        ("blockquote", "quoted"),
    ):
        assert body.locator(selector).first.inner_text() == text
    assert body.locator("hr").count() == 1
    assert body.locator("p").last.inner_text() == "snake_case_name and 2 * 3 * 4"
    links = body.locator("a").evaluate_all("all => all.map(a => [a.href, a.rel, a.target])")
    assert [href for href, _, _ in links] == ["https://a.example/x", "http://b.example/"]
    assert all("noopener" in rel and target == "_blank" for _, rel, target in links)


def test_a_text_that_grows_is_drawn_like_one_that_came_whole(visit: Visit) -> None:
    text = "# T\n\npara *x*\n\n- a\n\n- b\n\nthen\n\n```\ncode\n\nmore\n```\n\n1. x\n\n"
    text += "| a |\n|---|\n| 1 |\n\nend"
    same = visit.page.evaluate(
        """text => {
        const whole = el("div"); blocks(whole, linesOf(text, 0));
        const box = el("div"), growing = new Growing(box);
        for (let n = 1; n <= text.length; n++) growing.set(text.slice(0, n), true);
        return [whole.isEqualNode(box), box.textContent];
        }""",
        text,
    )
    assert same[0], same[1]


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "[click](javascript:window.hacked=1) [x](data:text/html,<script>hacked=1</script>)",
    "[a](https://ok.example/\"onmouseover=\"window.hacked=1)",
    "</div></article><iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "<svg onload=window.hacked=1> <a href=javascript:window.hacked=1>x</a>",
    "`</code><script>window.hacked=1</script>`\n\n```\n</pre><script>window.hacked=1</script>\n```",
    "user\u202egnp.exe \u2066\u0007\u0000 \u200f right",
    "| <b>a</b> | <script>window.hacked=1</script> |\n|--|--|\n| <img src=x onerror=hacked=1> | |",
    "*" * 999 + "[" * 999 + "`" * 999 + "_a" * 999 + "> " * 999 + "- " * 999,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_that_is_said_is_ever_html(visit: Visit, says: ScriptedEngines, text: str) -> None:
    says.answer = lambda prompt: f"<think>{text}</think>{text}"
    visit.ask(text)
    visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    visit.click("Show each token and its probability")
    for link in visit.page.locator("article a").all():
        assert link.get_attribute("href").startswith("https://")
    for tag in ("script", "img", "iframe", "svg", "b"):
        assert visit.page.locator(f"#turns {tag}, #list {tag}, #live {tag}").count() == 0
    assert visit.page.evaluate("window.hacked") is None
    shown = visit.page.locator("main").text_content() + visit.page.locator("#side").text_content()
    assert not set("\u202e\u2066\u0007\u0000") & set(shown)
    visit.page.reload()
    visit.page.wait_for_selector("article.answer")
    assert visit.page.evaluate("window.hacked") is None


def test_a_very_long_answer_is_drawn(visit: Visit, says: ScriptedEngines) -> None:
    text = ("the cat sat on a mat " * 25 + "\n\n") * 300 + " the cat" * 6000
    says.answer = lambda prompt: text
    visit.page.set_default_timeout(120_000)
    visit.ask("Tell me everything")
    drawn = visit.page.locator(".answer > .body").text_content()
    assert len(text) > 200_000
    assert drawn.replace(" ", "").replace("\n", "") == text.replace(" ", "").replace("\n", "")
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_page_says_when_the_server_is_gone_and_recovers(
    browser, models: list[Served], says: ScriptedEngines
) -> None:
    says.pause = 0.3
    with serve(says, models) as address:
        visit = Visit(browser, address)
        visit.send("Tell me")
        visit.has_said(2)
    visit.page.wait_for_selector("#gone:not([hidden])")
    visit.settle()
    part = visit.answers()[0]
    assert part.startswith("Th")
    assert visit.page.locator(".error").count() == 1
    says.pause = 0.0
    with serve(says, models, port=int(address.rsplit(":", 1)[1])):
        visit.page.wait_for_selector("#gone", state="hidden")
        visit.click("Answer again")
        visit.settle()
        assert visit.answers() == ["The cat sat on a mat."]
        visit.context.close()


def test_an_error_of_the_server_is_told_in_its_words(visit: Visit, says: ScriptedEngines) -> None:
    says.fail_after = 4
    visit.ask("Who?")
    assert visit.page.locator(".error").inner_text() == "The process that made this answer died."


def test_a_key_is_asked_for_and_then_used(
    browser, models: list[Served], says: ScriptedEngines
) -> None:
    with serve(says, models, safety=Safety(api_key="k")) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.fill("#key", "k")
        page.click("text=Done")
        page.wait_for_selector("#model option", state="attached")
        page.fill("#text", "Who?")
        page.press("#text", "Enter")
        page.get_by_role("button", name="Answer again").wait_for()
        assert page.locator("article.answer > .body").inner_text() == "The cat sat on a mat."
        context.close()


def test_everything_is_reached_by_keyboard_and_has_a_name(visit: Visit) -> None:
    visit.ask("Who?")
    nameless = visit.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")].filter((e) =>
        e.checkVisibility() && !(e.getAttribute("aria-label") || e.labels?.length ||
        e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    reached = set()
    visit.page.focus("#menu")
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        reached.add(
            visit.page.evaluate("document.activeElement.title || document.activeElement.id")
        )
    assert {"model", "text", "search", "Answer again", "Copy this answer"} <= reached
    assert {"System prompt and sampling", "send", "export"} <= reached
    assert visit.page.locator("#live").get_attribute("aria-live") == "polite"


def test_sentences_are_read_out_whole(visit: Visit, says: ScriptedEngines) -> None:
    says.answer = lambda prompt: "One cat. Two mats! The end"
    visit.page.evaluate(
        """() => { window.heard = []; new MutationObserver((all) => all.forEach((m) =>
        m.addedNodes.forEach((n) => heard.push(n.textContent)))).observe(
        document.getElementById("live"), {childList: true}); }"""
    )
    visit.ask("Who?")
    assert visit.page.evaluate("heard") == ["One cat.", " Two mats!", " The end"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 1280])
def test_nothing_overflows_and_text_has_contrast(
    browser, url: str, says: ScriptedEngines, width: int, scheme: str
) -> None:
    says.answer = lambda prompt: (
        "```\n" + "wide " * 60 + "\n```\n\n" + "| a | b |\n|-|-|\n|" + "c " * 90
    )
    visit = Visit(browser, url, viewport={"width": width, "height": 700}, color_scheme=scheme)
    visit.ask("long" * 100)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    back, ink = visit.page.evaluate(
        """() => ["background-color", "color"].map((name) =>
        getComputedStyle(document.body).getPropertyValue(name).match(/[\\d.]+/g).map(Number))"""
    )
    light, dark = sorted((sum(back), sum(ink)), reverse=True)
    assert light - dark > 500
    assert (sum(back) > sum(ink)) == (scheme == "light")
    visit.page.click("#settings")
    box = visit.page.locator("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert visit.complaints == []
    visit.context.close()


def test_reduced_motion_is_respected(browser, url: str, says: ScriptedEngines) -> None:
    says.pause = 0.05
    visit = Visit(browser, url, reduced_motion="reduce")
    visit.send("Who?")
    visit.page.wait_for_selector(".waiting")
    name = "getComputedStyle(document.querySelector('.waiting'), '::after').animationName"
    assert visit.page.evaluate(name) == "none"
    visit.settle()
    visit.context.close()
