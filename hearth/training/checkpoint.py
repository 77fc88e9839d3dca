"""Save, resume, load for inference: one self-contained folder a checkpoint.

    base/step-00001200/   model.safetensors  optimizer.pt  config.json  state.json  tokenizer/

Written to a temporary folder, synced, renamed: a folder with that name is whole. No pickled
classes. Knows nothing of data or of the training loop.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import Config, UserError
from hearth import storage
from hearth.cli import from_plain, to_json
from hearth.data.tokenizer import Tokenizer
from hearth.run import newest
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
    """What a checkpoint notes of itself: at least its stage, step, steps and tokens."""
    path = checkpoint / "state.json"
    state = storage.read_json(path)
    storage.field(state, "stage", str, path)
    for name in ("step", "steps", "tokens"):
        storage.field(state, name, int, path)
    return state


def read_config(checkpoint: Path) -> Config:
    path = checkpoint / "config.json"
    plain = storage.read_json(path)
    if isinstance(plain, dict) and isinstance(plain.get("model"), dict):
        plain["model"].setdefault("exclusive_attention", False)  # older than that setting
    return from_plain(Config, plain, path)


def read_weights(checkpoint: Path, model: Model, device: torch.device) -> dict[str, Tensor]:
    """The weights of a checkpoint, which must be those of `model`: each of its name and shape, in
    float32 and finite. The file's header is compared before anything is loaded.
    """
    path, held = checkpoint / "model.safetensors", read_header(checkpoint)
    wanted = {name: f"F32 {list(p.shape)}" for name, p in model.state_dict().items()}
    for name in sorted(wanted.keys() | held.keys()):
        if held.get(name) != wanted.get(name):
            raise UserError(
                f"{path}: {name} is {held.get(name, 'missing')}, but config.json asks for "
                f"{wanted.get(name, 'none')}."
            )
    try:
        weights = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite values. {REMEDY}")
    return weights


def read_header(checkpoint: Path) -> dict[str, str]:
    """Kind and shape of each tensor in a checkpoint's weights, such as "F32 [512, 128]"."""
    path = checkpoint / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: f"{part.get_dtype()} {part.get_shape()}" for n, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}. {REMEDY}") from error


def read_optimizers(checkpoint: Path, optimizers: Optimizers, device: torch.device) -> None:
    """Load a checkpoint's optimizer state, its size looked up before it is unpacked."""
    path = checkpoint / "optimizer.pt"
    most = 2 * optimizers.saved_bytes() + SMALL
    try:
        with zipfile.ZipFile(path) as file:
            n_bytes = sum(entry.file_size for entry in file.infolist())
        if n_bytes > most:
            raise UserError(f"{path} unpacks to {n_bytes} bytes, of which {most} are expected.")
        optimizers.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except UserError:
        raise
    except Exception as error:  # pickle, torch and zipfile raise a dozen kinds
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({said}). {REMEDY}") from error


SMALL = 2**24  # bytes of a checkpoint that are no tensors
REMEDY = "Remove its folder: training continues from the checkpoint before it, where there is one."


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
    texts = {"config.json": to_json(config), "state.json": json.dumps(state, indent=1)}
    try:
        with storage.writing(folder):
            part.mkdir(parents=True)
            with optimizers.inference_weights():
                weights = {name: p.detach().contiguous() for name, p in model.state_dict().items()}
                save_file(weights, part / "model.safetensors")
            torch.save(optimizers.state_dict(), part / "optimizer.pt")
            tokenizer.save(part / "tokenizer")
            for name, text in (texts | dict(files or {})).items():
                storage.write_text(part / name, text)
            for name in ("model.safetensors", "optimizer.pt"):
                storage.sync_file(part / name)
            storage.sync_folder(part)
            if final.exists():
                shutil.rmtree(final)
            os.replace(part, final)
            storage.sync_folder(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def n_bytes(model: Model, optimizers: Optimizers) -> int:
    """About what one checkpoint takes on disk: weights and optimizer state; the rest is small."""
    return 4 * model.n_parameters() + optimizers.saved_bytes()


def resume(folder: Path, model: Model, optimizers: Optimizers) -> dict[str, Any] | None:
    """Load the newest checkpoint below `folder` into model and optimizers; its state, or None if
    there is none.
    """
    last = newest(folder)
    if last is None:
        return None
    state = read_state(last)
    model.load_state_dict(read_weights(last, model, model.device))
    read_optimizers(last, optimizers, model.device)
    return state


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
    config, state, device = read_config(checkpoint), read_state(checkpoint), torch.device(device)
    model = empty_model(checkpoint, config)
    model.load_state_dict(read_weights(checkpoint, model, device), assign=True)
    model.dtype = compute_dtype(device, config.model.d_model)
    model.requires_grad_(False)
    return Loaded(model, config, Tokenizer.load(checkpoint / "tokenizer"), state)


def empty_model(checkpoint: Path, config: Config) -> Model:
    """The model that a checkpoint's config asks for, without memory for its weights."""
    c, path = config.model, checkpoint / "config.json"
    n_layer = c.n_layer + (c.hrm.l_layer + c.hrm.h_layer if c.hrm else 0)
    n_tensors = len(read_header(checkpoint))
    if n_layer > n_tensors:  # each layer has several
        raise UserError(
            f"{path} asks for {n_layer} layers, but model.safetensors holds {n_tensors} tensors."
        )
    try:
        with torch.device("meta"):
            return Model(c)
    except (OverflowError, RuntimeError, TypeError) as error:
        raise UserError(f"{path} asks for a model beyond all sizes: {error}") from error
