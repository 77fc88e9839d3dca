"""The server: an OpenAI-compatible API for programs, a chat page for a person, the run's report.

In: HTTP. Out: an ASGI application; `Guard` stands before all routes. Knows of the models only what
`Served` says and what an engine's events bring. Prompts and answers are written nowhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import random
import re
import sys
import time
import traceback
import uuid
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hearth.decoding.scheduler import (
    Event,
    Failed,
    Finished,
    Full,
    PromptScores,
    Read,
    Request,
    Token,
)
from hearth.run import THINKING
from hearth.serving import answers
from hearth.serving.answers import AnswerText, Json, Piece
from hearth.serving.requests import (
    ChatRequest,
    CompletionRequest,
    Refused,
    Served,
    chat_prompt,
    chat_rules,
    completion_prompts,
    completion_rules,
    read,
)

PAGE = Path(__file__).with_name("page.html")
BODY_BYTES = 4_000_000  # of a request at most
BODY_SECONDS = 30.0  # in which it must have come
KEEP_ALIVE_SECONDS = 5.0  # a stream is silent no longer
REASONS = {"stop": "stop", "length": "length", "context": "length", "call": "tool_calls"}


class Engines(Protocol):
    """What runs the models: an `EngineThread`, or a `WorkerPool`."""

    @property
    def under_way(self) -> int: ...

    def submit(
        self, model: str, requests: Sequence[Request], emits: Sequence[Callable[[Event], None]]
    ) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Safety:
    """Who may ask."""

    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")  # names in a Host header
    any_address: bool = False  # also any numeric address: no other site's name leads here by one
    origins: tuple[str, ...] = ()  # other sites whose pages may ask
    api_key: str | None = field(default=None, repr=False)


def build_app(
    engines: Engines,
    models: Sequence[Served],
    *,
    safety: Safety | None = None,
    report: Path | None = None,
) -> ASGIApp:
    """The application for these models, the first of which answers where none is named; `report`
    is the page of the run's report.
    """
    api = Api(engines, models, report)
    routes = [
        Route("/", api.page),
        Route("/report", api.report),
        Route("/health", api.health),
        Route("/v1/models", api.list_models),
        Route("/models", api.list_models),
        Route("/v1/models/{name:path}", api.one_model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
    ]
    handlers = {Refused: _refused, HTTPException: _http_error, Exception: _crashed}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), safety or Safety())


def uvicorn_settings(app: ASGIApp, **more: Any) -> uvicorn.Config:
    """How uvicorn serves it."""
    return uvicorn.Config(
        app,
        log_level="error",
        access_log=False,  # addresses may hold what nobody else should read
        server_header=False,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        limit_concurrency=512,
        timeout_keep_alive=30,
        **more,
    )


# ------------------------------------------------------------------------------------------- errors


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None):
    """An error in OpenAI's shape."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, **details: Any) -> JSONResponse:
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(error_body(status, message, **details), status, headers)


async def _refused(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error_response(error.status, str(error), param=error.param, code=error.code)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "There is nothing at this address.", 405: "This address is not asked so."}
    response = error_response(error.status_code, message.get(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response


async def _crashed(_: HttpRequest, error: Exception) -> Response:
    _note(error)
    return error_response(500, "The server made a mistake; its own output says where.")


def _note(error: Exception) -> None:
    """Where an error of ours happened, without its words, which may quote a prompt."""
    traceback.print_tb(error.__traceback__, file=sys.stderr)
    print(type(error).__name__, file=sys.stderr)


# -------------------------------------------------------------------------------------------- guard


class Guard:
    """Stands before all routes: who asks, from where, with what; headers for a browser's safety."""

    def __init__(self, app: ASGIApp, safety: Safety) -> None:
        self.app, self.safety = app, safety

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = HttpRequest(scope)
        own_headers = self._headers(request)

        async def send_safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *own_headers]
            await send(message)

        try:
            self._check(request)
            if request.method == "OPTIONS":
                await Response(status_code=204)(scope, receive, send_safe)
                return
            body = await _body(request, receive) if request.method == "POST" else b""
        except Refused as error:
            response = await _refused(request, error)
            response.headers["Connection"] = "close"  # a body may be on its way
            if error.status == 401 and scope["path"] == "/report":
                response.headers["WWW-Authenticate"] = 'Basic realm="the API key is the password"'
            await response(scope, receive, send_safe)
            return
        await self.app(scope, _replay(body, receive), send_safe)

    def _check(self, request: HttpRequest) -> None:
        safety, headers = self.safety, request.headers
        if not self._is_our_name(headers.getlist("host")):
            raise Refused(
                421, "This server does not answer to that Host; --allow_hosts names others."
            )
        origin = headers.get("origin")
        own = f"{request.url.scheme}://{headers['host']}"
        if origin is not None and origin != own and origin not in safety.origins:
            raise Refused(403, "Pages of another origin may not ask; --allow_origins names some.")
        if request.method == "OPTIONS":
            return
        if request.scope["path"] not in ("/", "/health") and not self._has_key(headers):
            raise Refused(401, "The API key is missing or wrong.", code="invalid_api_key")
        if request.method == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(415, "The body must be sent as application/json.")

    def _is_our_name(self, hosts: list[str]) -> bool:
        if len(hosts) != 1:
            return False
        found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?", hosts[0].lower())
        if found is None:
            return False
        name = found[1].rstrip(".") if found[1][0] != "[" else found[1]
        if name in self.safety.hosts:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return self.safety.any_address

    def _has_key(self, headers: Any) -> bool:
        if self.safety.api_key is None:
            return True
        kind, _, text = headers.get("authorization", "").partition(" ")
        given = text.encode("latin-1")  # the bytes that came
        if kind.lower() == "basic":  # what a browser asks a person for, who opens the report
            with suppress(ValueError):
                given = b64decode(given, validate=True).partition(b":")[2]
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(given, self.safety.api_key.encode())

    def _headers(self, request: HttpRequest) -> list[tuple[bytes, bytes]]:
        headers = {
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-resource-policy": "same-origin",
            "x-frame-options": "DENY",
            "cache-control": "no-store",
        }
        if request.scope["path"] not in ("/", "/report"):
            headers["content-security-policy"] = "default-src 'none'; frame-ancestors 'none'"
        origin = request.headers.get("origin")
        if origin in self.safety.origins:
            asked = request.headers.get("access-control-request-headers", "")
            allowed = ["authorization", "content-type", *re.findall(r"[\w-]+", asked)]
            del headers["cross-origin-resource-policy"]
            headers |= {
                "access-control-allow-origin": origin,
                "access-control-allow-methods": "GET, POST",
                "access-control-allow-headers": ", ".join(allowed),
                "vary": "origin",
            }
        return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


async def _body(request: HttpRequest, receive: Receive) -> bytes:
    """The whole body, unless it is too long or too slow."""
    too_long = Refused(413, f"The body is longer than {BODY_BYTES} bytes.")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length[:12]) > BODY_BYTES:
        raise too_long
    parts, n_bytes = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "The body was cut off.")
                parts.append(message.get("body", b""))
                n_bytes += len(parts[-1])
                if n_bytes > BODY_BYTES:
                    raise too_long
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise Refused(408, f"The body took longer than {BODY_SECONDS:g} s.") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then whatever comes after it: that the client has gone."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed


def policy(html: str) -> str:
    """The Content-Security-Policy under which the page's own script and style run, and no other."""

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.S)
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


# ------------------------------------------------------------------------------------------- routes


class Api:
    """The routes."""

    def __init__(self, engines: Engines, models: Sequence[Served], report: Path | None) -> None:
        self.engines, self.models = engines, {model.name: model for model in models}
        self.default, self.report_page = models[0].name, report
        self.started = int(time.time())
        self.html = PAGE.read_text(encoding="utf-8")
        self.policy = policy(self.html)

    async def page(self, _: HttpRequest) -> Response:
        return HTMLResponse(self.html, headers={"Content-Security-Policy": self.policy})

    async def report(self, _: HttpRequest) -> Response:
        """The run's report as it stands; a run that trains draws it again at each evaluation."""
        if self.report_page is None or not self.report_page.is_file():
            return HTMLResponse("<p>This run has no report yet: training draws it.", 404)
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        return HTMLResponse(
            self.report_page.read_bytes(), headers={"Content-Security-Policy": policy}
        )

    async def health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "under_way": self.engines.under_way})

    async def list_models(self, _: HttpRequest) -> Response:
        found = [self._describe(model) for model in self.models.values()]
        return JSONResponse({"object": "list", "data": found})

    async def one_model(self, request: HttpRequest) -> Response:
        return JSONResponse(self._describe(self._served(request.path_params["name"])))

    def _describe(self, model: Served) -> Json:
        """A model of /v1/models; from `stage` on the fields are ours, for the page."""
        return {
            "id": model.name,
            "object": "model",
            "created": self.started,
            "owned_by": "hearth",
            "max_model_len": model.context,
            "stage": model.stage,
            "step": model.step,
            "reasons": model.stage in THINKING,
            "defaults": {
                name: getattr(model.chat, name)
                for name in ("system", "temperature", "top_p", "top_k", "min_p", "max_tokens")
            },
        }

    def _served(self, name: str | None) -> Served:
        found = self.models.get(name or self.default)
        if found is None:
            raise Refused(
                404,
                f"There is no model {name[:100]!r}; there are {', '.join(self.models)}.",
                param="model",
                code="model_not_found",
            )
        return found

    async def chat(self, http: HttpRequest) -> Response:
        request = read(ChatRequest, await _json(http))
        served = self._served(request.model)
        prompt = chat_prompt(request, served)
        rules = chat_rules(request, served, len(prompt))
        wanted = [
            Request(tuple(prompt), rules, seed, request.n_top)
            for seed in _seeds(request.seed, request.n)
        ]
        under_way = self._begin(served, wanted, request.stop, request.n, chat=not served.is_base)
        style = ChatStyle(served, f"chatcmpl-{uuid.uuid4().hex}", request)
        return await _respond(http, under_way, style, len(prompt))

    async def complete(self, http: HttpRequest) -> Response:
        request = read(CompletionRequest, await _json(http))
        served = self._served(request.model)
        prompts = completion_prompts(request, served)
        seeds = _seeds(request.seed, len(prompts) * request.n)
        score = request.echo and request.logprobs is not None
        wanted = [
            Request(
                tuple(ids),
                completion_rules(request, served, len(ids)),
                seeds.pop(0),
                request.logprobs,
                score,
            )
            for ids in prompts
            for _ in range(request.n)
        ]
        under_way = self._begin(served, wanted, request.stop, request.n, chat=False)
        style = CompletionStyle(served, f"cmpl-{uuid.uuid4().hex}", request, prompts)
        return await _respond(http, under_way, style, sum(map(len, prompts)))

    def _begin(
        self, served: Served, wanted: Sequence[Request], stops: Sequence[str], n: int, *, chat: bool
    ) -> UnderWay:
        try:
            return UnderWay(self.engines, served, wanted, stops, n, chat=chat)
        except Full as error:
            raise Refused(429, f"The server is busy: {error}.", code="queue_full") from None


async def _json(http: HttpRequest) -> Any:
    try:
        return json.loads(await http.body())
    except (ValueError, RecursionError):
        raise Refused(400, "The body is no JSON.") from None


def _seeds(seed: int | None, n: int) -> list[int]:
    """A seed each; the answers to one request differ."""
    first = random.getrandbits(62) if seed is None else seed
    return [(first + i) % 2**63 for i in range(n)]


# -------------------------------------------------------------------------------- answers under way


class Broken(Exception):
    """An answer that ended through no fault of the request."""


class UnderWay:
    """The answers to one request, `n` to each prompt: iterate over what becomes of them. `close`
    gives up the rest.
    """

    def __init__(
        self,
        engines: Engines,
        served: Served,
        wanted: Sequence[Request],
        stops: Sequence[str],
        n: int,
        *,
        chat: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.answers = [
            AnswerText(served.tokenizer, stops, chat, tools.handed_back if tools else frozenset())
            for tools in (one.rules.tools for one in wanted)
        ]
        self._n = n
        self._n_reused: dict[int, int] = {}  # of each answer's prompt
        self.scores: dict[int, PromptScores] = {}
        self._open = set(range(len(wanted)))

        def emit_of(index: int) -> Callable[[Event], None]:
            def emit(event: Event) -> None:
                with suppress(RuntimeError):  # the server has ended
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return emit

        self._jobs = engines.submit(served.name, wanted, [emit_of(i) for i in range(len(wanted))])

    @property
    def n_cached(self) -> int:
        """Tokens of the prompts, each counted once, that the cache held for one of its answers."""
        most: dict[int, int] = {}
        for index, n in self._n_reused.items():
            most[index // self._n] = max(n, most.get(index // self._n, 0))
        return sum(most.values())

    def close(self) -> None:
        for job in self._jobs:
            job.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, str, Any]]:
        """(which answer, what, its content): read (tokens), wait, scores, say (a piece), end (its
        reason).
        """
        while self._open:
            try:
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                    index, event = await self._events.get()
            except TimeoutError:
                yield 0, "wait", None
                continue
            if index not in self._open:
                continue
            if isinstance(event, Failed):
                raise Broken(event.message)
            if isinstance(event, Read):
                self._n_reused.setdefault(index, event.n_reused)
                yield index, "read", event.n_read
            elif isinstance(event, PromptScores):
                yield index, "scores", event.scores
            elif isinstance(event, Token):
                answer = self.answers[index]
                for piece in answer.add(event):
                    yield index, "say", piece
                if answer.stopped:
                    self._jobs[index].cancel()
                    self._open.remove(index)
                    yield index, "end", "stop"
            elif isinstance(event, Finished):
                for piece in self.answers[index].end():
                    yield index, "say", piece
                self._open.remove(index)
                # a stop may have been completed by what was held back
                stopped = self.answers[index].stopped
                yield index, "end", "stop" if stopped else REASONS[event.reason]


class Style(Protocol):
    """How one of the two kinds of answer looks as JSON."""

    stream: bool
    wants_usage: bool

    def envelope(self, *, chunk: bool) -> Json: ...
    def opening(self, index: int) -> Json | None: ...
    def scores(self, index: int, scores: Any) -> Json | None: ...
    def piece(self, index: int, piece: Piece) -> Json: ...
    def last(self, index: int) -> Json: ...
    def whole(self, index: int, pieces: list[Piece], scores: Any) -> Json: ...


class _Styled:
    """What both kinds share."""

    def __init__(self, served: Served, name: str, request: Any) -> None:
        self.served, self.name, self.request = served, name, request
        self.stream, self.wants_usage = request.stream, request.wants_usage
        self.created = int(time.time())


class ChatStyle(_Styled):
    def envelope(self, *, chunk: bool) -> Json:
        return {
            "id": self.name,
            "object": "chat.completion.chunk" if chunk else "chat.completion",
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": f"step-{self.served.step}",
        }

    def opening(self, index: int) -> Json:
        return {"index": index, "delta": {"role": "assistant", "content": ""}}

    def scores(self, index: int, scores: Any) -> None:
        return None

    def piece(self, index: int, piece: Piece) -> Json:
        scored = self.request.n_top is not None
        return {"index": index, **answers.delta(piece, self.served.tokenizer, scores=scored)}

    def last(self, index: int) -> Json:
        return {"index": index, "delta": {}}

    def whole(self, index: int, pieces: list[Piece], scores: Any) -> Json:
        scored = self.request.n_top is not None
        return {"index": index, **answers.message(pieces, self.served.tokenizer, scores=scored)}


class CompletionStyle(_Styled):
    def __init__(
        self, served: Served, name: str, request: CompletionRequest, prompts: list[list[int]]
    ) -> None:
        super().__init__(served, name, request)
        self.prompts = prompts
        self.offsets: dict[int, int] = {}  # characters of each text so far

    def envelope(self, *, chunk: bool) -> Json:
        return {
            "id": self.name,
            "object": "text_completion",
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": f"step-{self.served.step}",
        }

    def opening(self, index: int) -> Json | None:
        """The echo, unless it comes with its scores."""
        if not self.request.echo or self.request.n_top is not None:
            return None
        return self._choice(index, self._echo(index, None))

    def scores(self, index: int, scores: Any) -> Json:
        return self._choice(index, self._echo(index, scores))

    def piece(self, index: int, piece: Piece) -> Json:
        return self._choice(index, piece.parts)

    def last(self, index: int) -> Json:
        return self._choice(index, [])

    def whole(self, index: int, pieces: list[Piece], scores: Any) -> Json:
        parts = self._echo(index, scores) if self.request.echo else []
        return self._choice(index, parts + [part for piece in pieces for part in piece.parts])

    def _echo(self, index: int, scores: Any) -> list[answers.Part]:
        which = index // self.request.n
        parts = answers.prompt_parts(self.prompts[which], self.served.tokenizer, scores)
        opened = isinstance(self.request.prompt[which], str)
        return parts[1:] if opened else parts  # a text's own <|bos|> is not part of it

    def _choice(self, index: int, parts: list[answers.Part]) -> Json:
        offset = self.offsets.get(index, 0)
        text = "".join(part.text for part in parts)
        self.offsets[index] = offset + len(text)
        logprobs = None
        if self.request.n_top is not None:
            logprobs = answers.completion_scores(parts, self.served.tokenizer, offset)
        return {"index": index, "text": text, "logprobs": logprobs}


async def _respond(http: HttpRequest, under_way: UnderWay, style: Style, n_prompt: int) -> Response:
    if style.stream:
        return EventStream(_stream(under_way, style, n_prompt), under_way.close)
    try:
        body = await _unless_gone(http.receive, _collect(under_way, style, n_prompt))
    except Broken as error:
        return error_response(503, str(error), code="engine_failed")
    finally:
        under_way.close()
    return Response(status_code=499) if body is None else JSONResponse(body)


class EventStream(Response):
    """Server-sent events; `close` is called at their end, or once the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_all() -> None:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            async for event in self.events:
                body = {"body": event.encode(), "more_body": True}
                await send({"type": "http.response.body", **body})
            await send({"type": "http.response.body", "body": b""})

        try:
            await _unless_gone(receive, send_all())
        finally:
            self.close()


async def _unless_gone(receive: Receive, work: Awaitable[Any]) -> Any:
    """The work's result, or None as soon as the client has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _collect(under_way: UnderWay, style: Style, n_prompt: int) -> Json:
    """The whole answer."""
    n = len(under_way.answers)
    pieces: list[list[Piece]] = [[] for _ in range(n)]
    reasons, scores = [""] * n, [None] * n
    async for index, what, content in under_way:
        if what == "say":
            pieces[index].append(content)
        elif what == "scores":
            scores[index] = content
        elif what == "end":
            reasons[index] = content
    choices = [
        style.whole(i, pieces[i], scores[i]) | {"finish_reason": reasons[i]} for i in range(n)
    ]
    used = answers.usage(n_prompt, under_way.n_cached, under_way.answers)
    return style.envelope(chunk=False) | {"choices": choices, "usage": used}


async def _stream(under_way: UnderWay, style: Style, n_prompt: int) -> AsyncIterator[str]:
    """Server-sent events; comment lines where there is nothing to say yet."""
    envelope = style.envelope(chunk=True)
    nothing = {"usage": None} if style.wants_usage else {}

    def chunk(choice: Json, reason: str | None = None) -> str:
        choice.setdefault("logprobs", None)
        return _event(envelope | {"choices": [choice | {"finish_reason": reason}]} | nothing)

    try:
        for index in range(len(under_way.answers)):
            if (choice := style.opening(index)) is not None:
                yield chunk(choice)
        async for index, what, content in under_way:
            if what == "say":
                yield chunk(style.piece(index, content))
            elif what == "end":
                yield chunk(style.last(index), content)
            elif what == "scores":
                yield chunk(style.scores(index, content))
            elif what == "read":
                yield f": {content} tokens read\n\n"
            else:
                yield ": waiting\n\n"
        if style.wants_usage:
            used = answers.usage(n_prompt, under_way.n_cached, under_way.answers)
            yield _event(envelope | {"choices": [], "usage": used})
        yield "data: [DONE]\n\n"
    except Broken as error:
        yield _event(error_body(503, str(error), code="engine_failed"))
    except Exception as error:
        _note(error)
        yield _event(error_body(500, "The server made a mistake; its own output says where."))


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
