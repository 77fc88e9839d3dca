"""Save, resume, load for inference: one self-contained folder a checkpoint.

    base/step-00001200/   model.safetensors  optimizer.pt  config.json  state.json  tokenizer/

Written to a temporary folder, synced, renamed: a folder with that name is whole. No pickled
classes. Knows nothing of data or of the training loop.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from config import Config, UserError
from hearth.cli import from_plain, to_json
from hearth.data.tokenizer import Tokenizer
from hearth.run import newest
from hearth.storage import read_json
from hearth.training.optim import Optimizers
from model import Model, compute_dtype


@dataclass(frozen=True)
class Loaded:
    """A checkpoint ready for inference."""

    model: Model
    config: Config
    tokenizer: Tokenizer
    state: dict[str, Any]  # stage, step, steps, tokens and what the stage noted


def is_finished(folder: Path) -> bool:
    """Whether the stage that writes into `folder` has reached its last step."""
    last = newest(folder)
    if last is None:
        return False
    state = read_state(last)
    return state["step"] >= state["steps"]


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def save(
    folder: Path,
    model: Model,
    optimizers: Optimizers,
    config: Config,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    keep: int,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write the checkpoint of `state["step"]` below `folder` and remove all but the newest `keep`.

    `files` are further texts that belong to it, by their path in its folder.
    """
    final = folder / f"step-{state['step']:08}"
    part = folder / f".part-{final.name}"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        with optimizers.inference_weights():
            weights = {name: p.detach().contiguous() for name, p in model.state_dict().items()}
            save_file(weights, part / "model.safetensors")
        torch.save(optimizers.state_dict(), part / "optimizer.pt")
        tokenizer.save(part / "tokenizer")
        (part / "config.json").write_text(to_json(config), encoding="utf-8")
        (part / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for name, text in (files or {}).items():
            (part / name).write_text(text, encoding="utf-8")
        _sync(part)
        if final.exists():
            shutil.rmtree(final)
        os.replace(part, final)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(
            f"The checkpoint {final} could not be written: {error}. Make room or mend the folder, "
            "then start again: "
            f"training continues from the checkpoint before it."
        ) from error
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def n_bytes(model: Model, optimizers: Optimizers) -> int:
    """About what one checkpoint takes on disk: weights and optimizer state; the rest is small."""
    weights = 4 * model.n_parameters()
    return (
        weights * (2 if optimizers.config.name == "schedulefree" else 1) + optimizers.state_bytes()
    )


def resume(folder: Path, model: Model, optimizers: Optimizers) -> dict[str, Any] | None:
    """Load the newest checkpoint below `folder` into model and optimizers; its state, or None if
    there is none.
    """
    last = newest(folder)
    if last is None:
        return None
    model.load_state_dict(load_file(last / "model.safetensors", device=str(model.device)))
    optimizers.load_state_dict(
        torch.load(last / "optimizer.pt", map_location=model.device, weights_only=True)
    )
    return read_state(last)


def load_for_inference(checkpoint: Path, device: torch.device | str = "cpu") -> Loaded:
    """The model of a checkpoint folder, with its config, tokenizer and state.

    Raises `UserError` for a folder that holds no whole checkpoint.
    """
    if (last := newest(checkpoint)) is not None:
        checkpoint = last
    missing = [
        n
        for n in ("model.safetensors", "config.json", "state.json")
        if not (checkpoint / n).is_file()
    ]
    if missing:
        found = (
            sorted(p.name for p in checkpoint.iterdir())
            if checkpoint.is_dir()
            else "no such folder"
        )
        raise UserError(
            f"{checkpoint} holds no checkpoint: {', '.join(missing)} missing (found: "
            f"{found or 'nothing'})."
        )
    config = from_plain(Config, read_json(checkpoint / "config.json"), checkpoint / "config.json")
    device = torch.device(device)
    with torch.device("meta"):
        model = Model(config.model)
    try:
        model.load_state_dict(
            load_file(checkpoint / "model.safetensors", device=str(device)), assign=True
        )
    except Exception as error:
        raise UserError(f"{checkpoint / 'model.safetensors'} cannot be read: {error}") from error
    model.dtype = compute_dtype(device)
    model.requires_grad_(False)
    return Loaded(model, config, Tokenizer.load(checkpoint / "tokenizer"), read_state(checkpoint))


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
