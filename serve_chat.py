"""Serve a run's checkpoints: a chat page for a person, an OpenAI-compatible API for programs.

In: a run's checkpoints, or any checkpoint folder. Out: one link. Ends with Ctrl-C or SIGTERM, after
the answers under way; prompts and answers are written nowhere.

    uv run serve_chat.py --preset demo                                   a page, and the API at /v1
    uv run serve_chat.py --preset demo --port 9000 --workers 2           two engines behind it
    uv run serve_chat.py --preset demo --host 0.0.0.0 --api_key SECRET   for other machines too
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from config import Config, UserError
from hearth import cli, hardware, run
from hearth.data.tokenizer import Tokenizer
from hearth.decoding.engine import Weights
from hearth.decoding.scheduler import QUEUE, ROWS, EngineThread
from hearth.serving.api import Safety, build_app, uvicorn_settings
from hearth.serving.conversation import chat_settings
from hearth.serving.requests import Served
from hearth.serving.workers import Loader, WorkerPool
from hearth.training import checkpoint

GRACE_SECONDS = 120  # for the answers under way, once the server is asked to end


@dataclass(frozen=True)
class Options:
    """What this script alone can be told."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 is all of this machine's
    port: int = 8000  # 0 takes a free one
    # what clients must send as a bearer token; also from HEARTH_API_KEY
    api_key: str | None = None
    no_key: bool = False  # let anybody ask who reaches a host that is not this machine
    allow_hosts: tuple[str, ...] = ()  # further names under which this server is reached
    allow_origins: tuple[str, ...] = ()  # other sites whose pages may ask, as https://name
    workers: int = 1  # engines, each on a card or a share of the cores of its own
    rows: int = ROWS  # answers that an engine makes at once
    # one checkpoint instead of all stages of the run: a stage, a run, or a folder of either
    checkpoint: str | None = None
    weights: Weights = "auto"  # how they are stored; auto: bfloat16 if many
    cycles: int | None = None  # of the reasoning head; None is as trained
    # leave the head's cycles once the prediction moves by less, in nats (KL)
    early_exit: float | None = None


SCRIPT = cli.Script(__doc__, Options(), ("device", "chat"))


def main(config: Config, options: Options) -> None:
    """Load the furthest checkpoint, print the link, answer until asked to end."""
    safety = check(options)
    folders = find_checkpoints(config, options)
    models = [describe(name, folder, config, options) for name, folder in folders.items()]
    with listen(options) as listener:
        device = hardware.pick_device(config.device).type
        engines = start_engines(folders, device, options)
        try:
            report = None if options.checkpoint else config.run_dir / "report" / "index.html"
            server = new_server(build_app(engines, models, safety=safety, report=report))
            print(f"serving {', '.join(folders)}: {link(options, listener)}", flush=True)
            server.run(sockets=[listener])
        finally:
            engines.stop()


def check(options: Options) -> Safety:
    """Who may ask; `UserError` for what would let in anybody, and for what cannot be."""
    key = options.api_key or os.environ.get("HEARTH_API_KEY") or None
    loopback = is_loopback(options.host)
    if not loopback and key is None and not options.no_key:
        raise UserError(
            f"--host {options.host} lets other machines ask, and anybody there would be answered. "
            "Give --api_key SECRET, or --no_key to let them."
        )
    for name, low, high in (("port", 0, 65535), ("workers", 1, 64), ("rows", 1, 256)):
        if not low <= getattr(options, name) <= high:
            raise UserError(f"--{name} is {getattr(options, name)}; give {low} to {high}.")
    if options.cycles is not None and not 1 <= options.cycles <= 64:
        raise UserError(f"--cycles is {options.cycles}; give 1 to 64.")
    if options.early_exit is not None and not options.early_exit >= 0:
        raise UserError(f"--early_exit is {options.early_exit:g}; give at least 0 nats.")
    names = [] if loopback else [socket.gethostname().lower()]
    names += [in_link(options.host), *options.allow_hosts]
    hosts = tuple(name.lower() for name in (*Safety.hosts, *names))
    return Safety(hosts, not loopback, options.allow_origins, key)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_checkpoints(config: Config, options: Options) -> dict[str, Path]:
    """Name → newest checkpoint of each stage of the run, the furthest first; or the one that was
    asked for.
    """
    if options.checkpoint:
        name = Path(options.checkpoint).resolve().name
        return {name: run.find_checkpoint(options.checkpoint, config)}
    run.find_checkpoint(None, config)  # says what to do where there is none
    name = config.run_dir.name
    found = {stage: run.newest(config.run_dir / stage) for stage in reversed(run.TRAINED)}
    return {f"{name}-{stage}": folder for stage, folder in found.items() if folder is not None}


def describe(name: str, folder: Path, config: Config, options: Options) -> Served:
    """What clients are told of a checkpoint, without loading its weights."""
    saved = checkpoint.read_config(folder)
    if options.cycles is not None and saved.model.hrm is None:
        raise UserError(f"{name} has no reasoning head: it has no cycles to set.")
    state = checkpoint.read_state(folder)
    chat = chat_settings(config, saved if options.checkpoint else None)
    return Served(
        name,
        state.get("stage", "base"),
        state.get("step", 0),
        Tokenizer.load(folder / "tokenizer"),
        saved.model.context,
        replace(chat, seed=None),
    )


def start_engines(
    folders: dict[str, Path], device: str, options: Options
) -> EngineThread | WorkerPool:
    """One engine in this process, or a worker each where several are asked for."""
    settings = (options.weights, options.cycles, options.early_exit, options.rows)
    if options.workers == 1:
        loader = Loader(folders, device, *settings)
        return EngineThread(
            loader,
            limit=options.rows + QUEUE,
            threads=torch.get_num_threads(),
            preload=next(iter(folders)),
        )
    n_cards = torch.cuda.device_count() if device == "cuda" else options.workers
    if options.workers > n_cards:
        raise UserError(f"--workers {options.workers}, but there are {n_cards} cards.")
    devices = [f"cuda:{n}" if device == "cuda" else device for n in range(options.workers)]
    loads = [Loader(folders, device, *settings) for device in devices]
    return WorkerPool(loads, n_rows=options.rows)


def listen(options: Options) -> socket.socket:
    """The socket, taken before anything slow is done."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(
            f"Cannot listen on {options.host}, port {options.port}: {error.strerror or error}. "
            "Give another with --port; 0 takes a free one."
        ) from None
    return listener


def link(options: Options, listener: socket.socket) -> str:
    host = "localhost" if options.host == "127.0.0.1" else options.host
    return f"http://{in_link(host)}:{listener.getsockname()[1]}/"


def in_link(host: str) -> str:
    """A host's name or address as links and a Host header write it."""
    return f"[{host}]" if ":" in host else host


def new_server(app: object) -> Any:
    """It runs until SIGTERM or Ctrl-C, and until the answers under way are at their ends; a SIGTERM
    that comes before it runs ends it too.
    """
    import uvicorn

    server = uvicorn.Server(uvicorn_settings(app, timeout_graceful_shutdown=GRACE_SECONDS))
    # uvicorn raises the signal that ended it once more: SIGTERM is an ordinary end
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    return server


if __name__ == "__main__":
    cli.run_script(lambda: main(*run.parse(SCRIPT)), "stopped.")
