"""Checkpoints: whole or not there, and checked before they are trusted."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loop import make_job

from config import ModelConfig, UserError
from hearth.data.tokenizer import Tokenizer
from hearth.training import checkpoint, loop


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train(["a small text to learn from"], 384)


# ---------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("optim", ["muon", "schedulefree"])
def test_on_a_full_disk_a_checkpoint_is_whole_or_not_there(
    optim: str, small_disk: Path, tiny: ModelConfig, words: Tokenizer
) -> None:
    folder = small_disk / "base"
    # its files are of the size that the steps below fill up to
    job, progress = make_job(folder, replace(tiny, gated_mlp=True), words, optim)
    state = loop.state_of(progress, 12)

    def content(step: Path) -> dict[Path, bytes]:
        files = (path for path in step.rglob("*") if path.is_file() and path.name != "state.json")
        return {path.relative_to(step): path.read_bytes() for path in files}

    before = content(whole := job.save(state))
    filler, refused = small_disk / "filler", {}
    # it ends in every file; what a disk in memory says of its room is not exact, so some succeed
    for kilobytes in range(2900, 2200, -5):
        filler.write_bytes(b"")
        with contextlib.suppress(OSError):
            filler.write_bytes(bytes(kilobytes << 10))
        try:
            other = job.save(state | {"step": 1})
        except UserError as error:
            refused[type(error.__cause__).__name__] = str(error)
        else:
            assert content(other) == before
            shutil.rmtree(other)
        assert [path.name for path in folder.iterdir()] == [whole.name]
        assert content(whole) == before
    assert {"SafetensorError", "RuntimeError"} <= refused.keys()  # torch raises the second
    for said in refused.values():
        assert re.fullmatch(r"Cannot write to .*the disk is full.*it continues.*", said)


# -------------------------------------------------------------------------------- what is read back


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, words: Tokenizer) -> Callable[[str], Path]:
    """A folder with one checkpoint of a run that has begun, by its optimizer."""
    made: dict[str, Path] = {}

    def folder_of(optim: str) -> Path:
        if optim not in made:
            made[optim] = tmp_path_factory.mktemp(optim) / "base"
            job, progress = make_job(made[optim], TINY, words, optim)
            real = loop.train_step

            def stops(*given: Any) -> Any:
                if progress.step == 5:
                    raise KeyboardInterrupt
                return real(*given)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "train_step", stops)
                with pytest.raises(KeyboardInterrupt):
                    loop.fit(job, progress)
        return made[optim]

    return folder_of


def test_a_checkpoint_older_than_exclusive_attention_still_loads(
    tmp_path: Path, tiny: ModelConfig, words: Tokenizer
) -> None:
    job, progress = make_job(tmp_path / "base", replace(tiny, exclusive_attention=False), words)
    saved = job.save(loop.state_of(progress, 12))
    edit("config.json", lambda c: c["model"].pop("exclusive_attention"))(saved)
    loaded = checkpoint.load_for_inference(saved)
    assert not loaded.config.model.exclusive_attention


TINY = ModelConfig(
    vocab_size=128, n_layer=1, d_model=32, n_head=4, n_kv_head=2, d_ff=48, context=32, window=6
)


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return spoil


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return spoil


def header(folder: Path) -> None:
    """A tensor of 8 TB in a file of a few bytes."""
    head = {"embedding": {"dtype": "F32", "shape": [2**31, 1024], "data_offsets": [0, 2**43]}}
    said = json.dumps(head).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(said)) + said)


DEEP = "[" * 100_000 + "]" * 100_000
WEIGHTS, CONFIG, STATE = "model.safetensors", "config.json", "state.json"
SPOILT = {
    "NaN": (weights(lambda w: w["output_gain"].fill_(math.nan)), WEIGHTS, "output_gain"),
    "infinite": (weights(lambda w: w["trunk.0.q"].view(-1)[3:4].fill_(math.inf)), WEIGHTS, "trunk"),
    "another shape": (
        weights(lambda w: w.update(output_gain=torch.ones(7))),
        WEIGHTS,
        r"output_gain is F32 \[7\]",
    ),
    "half precision": (
        weights(lambda w: w.update(shift=w["shift"].half())),
        WEIGHTS,
        "shift is F16",
    ),
    "a tensor missing": (weights(lambda w: w.pop("shift")), WEIGHTS, "shift is missing"),
    "one too many": (weights(lambda w: w.update(more=torch.ones(1))), WEIGHTS, "more is F32"),
    "a header of 8 TB": (header, WEIGHTS, ""),
    "no weights": (text(WEIGHTS, "nonsense"), WEIGHTS, ""),
    "config cut off": (text(CONFIG, '{"preset": "te'), CONFIG, "not JSON"),
    "config a list": (text(CONFIG, "[]"), CONFIG, "an object"),
    "config nested": (text(CONFIG, DEEP), CONFIG, "nested"),
    "config of 20 MB": (text(CONFIG, " " * 20_000_000), CONFIG, "bytes"),
    "a word for a number": (
        edit(CONFIG, lambda c: c["model"].update(n_layer="many")),
        CONFIG,
        r"model\.n_layer",
    ),
    "a list for a group": (edit(CONFIG, lambda c: c.update(model=[1])), CONFIG, "model"),
    "a group for a number": (
        edit(CONFIG, lambda c: c["optim"].update(clip={})),
        CONFIG,
        "optim.clip",
    ),
    "an infinite rate": (
        edit(CONFIG, lambda c: c["pretrain"].update(lr=math.inf)),
        CONFIG,
        r"pretrain\.lr",
    ),
    "a number beyond all": (
        edit(CONFIG, lambda c: c["model"].update(d_ff=10**40)),
        CONFIG,
        r"model\.d_ff",
    ),
    "no stage length": (
        edit(CONFIG, lambda c: c["pretrain"]["stages"][0].update(context=0)),
        CONFIG,
        "stages",
    ),
    "10^12 parameters": (
        edit(CONFIG, lambda c: c["model"].update(d_model=10**6, n_head=10**5)),
        WEIGHTS,
        "embedding",
    ),
    "10^9 layers": (
        edit(CONFIG, lambda c: c["model"].update(n_layer=10**9)),
        CONFIG,
        "1000000004 layers",
    ),
    "beyond 64 bits": (
        edit(CONFIG, lambda c: c["model"].update(d_ff=2**62)),
        CONFIG,
        "beyond all sizes",
    ),
    "state cut off": (text(STATE, '{"step": 5'), STATE, "not JSON"),
    "a step that is a word": (edit(STATE, lambda s: s.update(step="five")), STATE, "step"),
    "no steps": (edit(STATE, lambda s: s.pop("steps")), STATE, "steps"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_checkpoint_is_one_line_that_names_file_and_field(
    how: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    spoil, name, field = SPOILT[how]
    folder = tmp_path / "step-00000004"
    shutil.copytree(checkpoint.newest(trained("muon")), folder)
    spoil(folder)
    with pytest.raises(UserError, match=rf"{name}.*({field})") as caught:
        checkpoint.load_for_inference(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def of_optimizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "optimizer.pt")

    return spoil


def bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**8))


def first_of(state: dict[str, Any], part: int = 0) -> dict[str, torch.Tensor]:
    return next(iter(state["parts"][part]["state"].values()))


OPTIMIZER, GUARD = "optimizer.pt", "guard"
SPOILT_TRAINING = {
    "no zip": ("muon", text(OPTIMIZER, "nonsense"), OPTIMIZER),
    "a bomb": ("muon", bomb, OPTIMIZER),
    "a list": ("muon", lambda folder: torch.save([1, 2], folder / OPTIMIZER), OPTIMIZER),
    "a part missing": ("muon", of_optimizer(lambda s: s["parts"].pop()), OPTIMIZER),
    "NaN": (
        "muon",
        of_optimizer(lambda s: first_of(s)["momentum_buffer"].fill_(math.nan)),
        OPTIMIZER,
    ),
    "a moment of another shape": (
        "adamw",
        of_optimizer(lambda s: first_of(s).update(exp_avg=torch.ones(3))),
        OPTIMIZER,
    ),
    "a moment missing": ("adamw", of_optimizer(lambda s: first_of(s).pop("exp_avg")), OPTIMIZER),
    "a rate that is a word": (
        "muon",
        of_optimizer(lambda s: s["parts"][0]["param_groups"][0].update(lr="fast")),
        OPTIMIZER,
    ),
    "no trained weights": (
        "schedulefree",
        of_optimizer(lambda s: s.pop("training_weights")),
        OPTIMIZER,
    ),
    "a guard of another kind": (
        "muon",
        edit(STATE, lambda s: s["guard"].update(seen="some")),
        r"state\.json.*guard\.seen",
    ),
    "seconds of another kind": (
        "muon",
        edit(STATE, lambda s: s.update(seconds=None)),
        r"state\.json.*seconds",
    ),
}


@pytest.mark.parametrize("how", SPOILT_TRAINING)
def test_a_spoilt_state_of_training_is_one_line_that_names_the_file(
    how: str, trained: Callable[[str], Path], tmp_path: Path, words: Tokenizer
) -> None:
    optim, spoil, said = SPOILT_TRAINING[how]
    folder = tmp_path / "base"
    shutil.copytree(trained(optim), folder)
    make_job(folder, TINY, words, optim)
    spoil(checkpoint.newest(folder))
    with pytest.raises(UserError, match=said) as caught:
        make_job(folder, TINY, words, optim)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_not_loaded(
    trained: Callable[[str], Path], tmp_path: Path, words: Tokenizer
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(trained("muon"), folder)
    with pytest.raises(
        UserError, match=r"down is F32 \[32, 48\], but config.json asks for F32 \[32, 64\]"
    ):
        make_job(folder, replace(TINY, d_ff=64), words)
