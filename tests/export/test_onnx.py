"""The ONNX export: onnxruntime computes what we do, and the page answers in a browser."""

from __future__ import annotations

import functools
import json
import mimetypes
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import exported
import pytest
import torch
from exported import OnnxSession, our_logits

from config import ChatConfig
from hearth.data.chat_format import render, stop_ids
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Engine
from hearth.export import onnx
from hearth.training.checkpoint import Loaded

library = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
Files = tuple[Loaded, Path]


@pytest.fixture(scope="module")
def files(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A portable checkpoint, greedy in its chat, and the folder made of it."""
    place = tmp_path_factory.mktemp("onnx")
    chat = ChatConfig(temperature=0)
    folder = exported.save(place, exported.SHAPES["portable"], tokenizer, chat=chat)
    loaded = exported.loaded_in_float32(folder)
    onnx.write(folder, loaded, place / "out")
    return loaded, place / "out"


@pytest.fixture(scope="module")
def session(files: Files) -> OnnxSession:
    return OnnxSession(files[1] / "model" / "onnx" / "model.onnx", files[0].config.model)


def some_ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 512, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# ------------------------------------------------------------------------------------ what is in it


def test_the_folder_is_laid_out_as_transformers_js_reads_it(files: Files) -> None:
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {"onnx"}
    assert {p.name for p in files[1].iterdir()} == {"README.md", "index.html", "model"}
    assert {p.name for p in (files[1] / "model").iterdir()} == names
    model = library.load(files[1] / "model" / "onnx" / "model.onnx")
    library.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}  # no runtime's own operators


# --------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("length", [1, 2, 33, 500])
def test_logits_are_ours(files: Files, session: OnnxSession, length: int) -> None:
    ids = some_ids(length)
    found, _ = session(torch.tensor([ids]), torch.ones(1, length, dtype=torch.int64))
    ours = our_logits(files[0], ids)
    assert (found[0] - ours).norm() <= 1e-4 * ours.norm()


def test_padding_on_the_left_changes_nothing(files: Files, session: OnnxSession) -> None:
    prompts = [some_ids(n, seed=n) for n in (3, 40, 17)]
    found, _ = session(*exported.padded(prompts))
    for row, prompt in zip(found, prompts, strict=True):
        ours = our_logits(files[0], prompt)
        assert (row[-len(prompt) :] - ours).norm() <= 1e-4 * ours.norm()


def test_greedy_tokens_with_the_cache_are_ours(files: Files, session: OnnxSession) -> None:
    engine = Engine(files[0].model)
    for seed in range(5):
        prompt = some_ids(20 + seed, seed)
        assert session.greedy(prompt, 64) == engine.generate([prompt], max_tokens=64)[0]


# ------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def cdn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path | None]:
    """The file behind an address of cdn.jsdelivr.net, out of the package that npm has of it."""
    if shutil.which("npm") is None:
        pytest.skip("no npm on this machine (Debian: apt-get install npm)")
    place = tmp_path_factory.mktemp("npm")

    @functools.cache
    def package(name: str) -> Path:
        packed = subprocess.run(
            ["npm", "pack", "--json", name], cwd=place, capture_output=True, text=True, timeout=120
        )
        if packed.returncode:
            pytest.skip(f"npm cannot be reached: {packed.stderr[-200:]}")
        (folder := place / re.sub(r"\W", "-", name)).mkdir()
        with tarfile.open(place / json.loads(packed.stdout)[0]["filename"]) as archive:
            archive.extractall(folder, filter="data")
        return folder / "package"

    def file(address: str) -> Path | None:
        found = re.fullmatch(r"https://cdn\.jsdelivr\.net/npm/(.+@[^/]+)/(.+)", address)
        path = package(found[1]) / found[2] if found else None
        return path if path and path.is_file() else None

    package(re.search(r"npm/(@huggingface/transformers@[\d.]+)/", onnx.PAGE.read_text())[1])
    return file


@pytest.fixture
def page(files: Files, cdn: Callable[[str], Path | None]) -> Iterator[Any]:
    """The exported page, served from this machine, in Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    handler = functools.partial(Quiet, directory=files[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"

    def answer(route: Any) -> None:
        path = cdn(route.request.url)
        if route.request.url.startswith(home):
            route.continue_()
        elif path is None:
            route.abort()
        else:
            kind = "text/javascript" if path.suffix in (".js", ".mjs") else None
            kind = kind or mimetypes.guess_type(path)[0] or "application/wasm"
            allowed = {"access-control-allow-origin": "*"}
            route.fulfill(body=path.read_bytes(), content_type=kind, headers=allowed)

    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        page = browser.new_page()
        page.route("**/*", answer)
        page.goto(home)
        yield page
        browser.close()
    server.shutdown()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_the_page_answers_as_we_do(files: Files, page: Any, tokenizer: Tokenizer) -> None:
    page.wait_for_function("!state.textContent.startsWith('Loading')", timeout=60_000)
    assert page.inner_text("#state") == "Ready."
    page.fill("#words", "ka mor")
    page.click("#send")
    page.wait_for_function("!send.disabled", timeout=60_000)
    assert page.inner_text("#state") == "Ready."
    prompt = render([{"role": "user", "content": "ka mor"}], tokenizer, answer=True).ids
    stops = stop_ids(tokenizer)
    (ids,) = Engine(files[0].model).generate([prompt], max_tokens=256, stop_ids=stops)
    assert page.text_content(".assistant") == tokenizer.decode(ids)
