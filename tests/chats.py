"""A tiny chat for tests: checkpoints of a random model, and an engine that says what it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from config import FINE_TUNING, PRESETS, ChatConfig, Config, HRMConfig, ModelConfig
from hearth.cli import to_json
from hearth.data.chat_format import render
from hearth.data.tokenizer import Tokenizer
from hearth.serving.conversation import Chat
from hearth.training.checkpoint import load_for_inference
from model import build_model

CONFIG = replace(
    PRESETS["demo"],
    model=ModelConfig(
        vocab_size=384,
        n_layer=2,
        d_model=32,
        n_head=4,
        n_kv_head=2,
        d_ff=48,
        context=128,
        window=16,
        hrm=HRMConfig(l_layer=1, h_layer=1, h_cycles=1, l_cycles=1),
    ),
    pretrain=replace(
        PRESETS["demo"].pretrain, stages=(replace(PRESETS["demo"].pretrain.stages[0], share=1.0),)
    ),
    **{name: replace(getattr(PRESETS["demo"], name), context=128) for name in FINE_TUNING},
    chat=replace(PRESETS["demo"].chat, max_tokens=12),
)


TEXT = "the cat sat on a mat: 12 + 7 = 19"


def write_checkpoint(
    folder: Path, stage: str, step: int = 1, config: Config = CONFIG, text: str = TEXT
) -> Path:
    """A checkpoint of a random model whose tokenizer knows `text`, as training leaves it."""
    place = folder / f"step-{step:08}"
    place.mkdir(parents=True)
    model = build_model(config.model, seed=0)
    rng = torch.Generator().manual_seed(1)
    weights = {
        n: p.detach() + 0.2 * torch.randn(p.shape, generator=rng)
        for n, p in model.named_parameters()
    }
    save_file(weights, place / "model.safetensors")
    (place / "config.json").write_text(to_json(config))
    (place / "state.json").write_text(
        json.dumps({"stage": stage, "step": step, "steps": step, "tokens": 10})
    )
    Tokenizer.train([text] * 9, 384).save(place / "tokenizer")
    return place


def write_run(folder: Path) -> Path:
    """A run with a checkpoint of each stage."""
    for stage in ("base", "sft1", "sft2"):
        write_checkpoint(folder / stage, stage)
    return folder


def new_chat(folder: Path, config: ChatConfig = CONFIG.chat) -> Chat:
    return Chat(load_for_inference(folder), folder, config)


class Scripted:
    """An engine that says what it is told to, and notes what it was asked."""

    def __init__(self, engine, answers: Sequence[Sequence[int]]) -> None:
        self._engine, self.answers, self.prompts = engine, list(answers), []

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def stream(self, prompt: list[int], **settings) -> Iterator[int]:
        self.prompts.append(list(prompt))

        class Said(list):
            reused, read, dropped, finish, n_cycles = 0, len(prompt), 0, "stop", 0

        return Said(self.answers.pop(0))


def script(chat: Chat, *answers: tuple[str | None, str]) -> Scripted:
    """Let the chat's engine give these answers: (thinking, content)."""
    ids = []
    for thinking, content in answers:
        turn = {"role": "assistant", "content": content, "thinking": thinking}
        ids.append(render([turn], chat.tokenizer).ids[2:])
    chat.engine = Scripted(chat.engine, ids)
    return chat.engine


def say(chat: Chat, question: str) -> str:
    return "".join(text for kind, text in chat.ask(question) if kind == "content")
