"""The folder for transformers: what lies in it, what loading it runs, and its tokens."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import exported
import pytest
import torch
from exported import awkward_strings, load, load_tokenizer, long_text, padded

from config import PRESETS, ChatConfig, UserError
from hearth.data.chat_format import render, stop_ids
from hearth.data.tokenizer import Tokenizer
from hearth.export import huggingface
from hearth.training import checkpoint
from hearth.training.checkpoint import Loaded
from model import build_model

Export = Callable[[str], tuple[Loaded, Path]]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

COMMON = {
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
}


# ------------------------------------------------------------------------------------ what is in it


def test_the_folder_holds_these_files_and_code_only_where_it_must(export: Export) -> None:
    found = {name: {p.name for p in export(name)[1].iterdir()} for name in ("whole", "portable")}
    assert found == {"whole": COMMON | {"modeling_hearth.py"}, "portable": COMMON}


def is_pickle(data: bytes) -> bool:
    """Whether the bytes are a pickle, or a zip such as torch.save writes around one."""
    return data.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


@pytest.mark.parametrize("name", ["whole", "portable"])
def test_no_file_is_a_pickle(export: Export, name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    assert is_pickle((tmp_path / "a.pt").read_bytes())
    assert is_pickle(pickle.dumps([1]))
    for file in export(name)[1].iterdir():
        assert not is_pickle(file.read_bytes()), file.name


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str, str], object], tuple[str, str]]:
        return open, (str(self.mark), "w")


def plant(folder: Path, mark: Path) -> None:
    """Put into every folder below `folder` what a careless loader would run."""
    for place in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "adapter_model.bin"):
            torch.save({"state": Evil(mark)}, place / name)
        for name in ("sitecustomize.py", "tokenizer.py", "conftest.py", "custom_generate.py"):
            (place / name).write_text(f"open({str(mark)!r}, 'w')")


def test_the_trap_works(tmp_path: Path) -> None:
    plant(tmp_path, tmp_path / "mark")
    torch.load(tmp_path / "optimizer.pt", weights_only=False)["state"].close()
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["whole", "portable"])
def test_loading_an_export_runs_no_other_code(
    export: Export, name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = exported.save(tmp_path, exported.SHAPES[name], tokenizer)
    huggingface.write(folder, exported.loaded_in_float32(folder), tmp_path / "out")
    plant(tmp_path / "out", tmp_path / "mark")
    load(tmp_path / "out")
    load_tokenizer(tmp_path / "out")
    assert not (tmp_path / "mark").exists()


def test_an_export_with_code_of_its_own_loads_only_where_it_is_trusted(export: Export) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(export("whole")[1], trust_remote_code=False)


def test_loading_a_checkpoint_runs_no_code(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = exported.save(tmp_path, exported.SHAPE, tokenizer)
    plant(folder, tmp_path / "mark")
    loaded = checkpoint.load_for_inference(folder)
    optimizers = checkpoint.Optimizers([], loaded.config.optim, loaded.model)
    model = build_model(loaded.config.model, seed=0)
    with pytest.raises(UserError, match=r"optimizer.pt cannot be read .Weights only"):
        checkpoint.resume(folder.parent, model, optimizers)
    assert not (tmp_path / "mark").exists()


def test_a_folder_that_holds_something_is_refused_and_left_alone(
    export: Export, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = exported.save(tmp_path, exported.SHAPE, tokenizer)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="out exists and is no empty folder"):
        huggingface.write(folder, checkpoint.load_for_inference(folder), out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_an_export_that_fails_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported.save(tmp_path, exported.SHAPE, tokenizer)
    before = set(tmp_path.iterdir())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_json", fail)
    with pytest.raises(UserError, match=r"out could not be written: .*No space left"):
        huggingface.write(folder, checkpoint.load_for_inference(folder), tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


# ----------------------------------------------------------------------------------- how it answers


@pytest.mark.parametrize("name", ["whole", "portable"])
def test_generating_stops_at_every_stop_id(export: Export, name: str, tokenizer: Tokenizer) -> None:
    model = load(export(name)[1])
    assert model.generation_config.eos_token_id == stop_ids(tokenizer)
    assert model.generation_config.pad_token_id == tokenizer.pad
    ids = padded([[0, 30, 40]])[0]
    for stop in stop_ids(tokenizer):
        forced = model.generate(
            ids,
            max_new_tokens=5,
            do_sample=False,
            logits_processor=[lambda _, scores, stop=stop: only(scores, stop)],
        )
        assert forced[0, 3:].tolist() == [stop]


def only(scores: torch.Tensor, token: int) -> torch.Tensor:
    forced = torch.full_like(scores, -torch.inf)
    forced[:, token] = 0
    return forced


def test_answers_are_drawn_as_the_chat_draws_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = ChatConfig(temperature=0.7, top_p=0.9, top_k=None, repetition_penalty=1.1)
    folder = exported.save(tmp_path, exported.SHAPES["plain"], tokenizer, chat=chat)
    huggingface.write(folder, checkpoint.load_for_inference(folder), tmp_path / "out")
    drawn = load(tmp_path / "out").generation_config
    assert (drawn.do_sample, drawn.temperature, drawn.top_p) == (True, 0.7, 0.9)
    assert (drawn.top_k, drawn.repetition_penalty) == (0, 1.1)
    greedy = huggingface.generation_config(
        replace(checkpoint.load_for_inference(folder), config=PRESETS["demo"])
    )
    assert greedy == {"do_sample": False}


# ------------------------------------------------------------------------------------------- tokens


def test_tokens_are_ours(export: Export, tokenizer: Tokenizer) -> None:
    """Awkward strings, some of which spell special tokens, and long text in many scripts."""
    theirs = load_tokenizer(export("whole")[1])
    for text in [*awkward_strings(2000), long_text(100_000)]:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == tokenizer.encode(text), repr(text)[:100]
        shown = theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert shown == tokenizer.decode(ids)


def test_a_text_is_opened_by_bos(export: Export, tokenizer: Tokenizer) -> None:
    theirs = load_tokenizer(export("portable")[1])
    assert theirs("ka mor").input_ids == [tokenizer.bos, *tokenizer.encode("ka mor")]
    assert set(theirs("ka mor")) == {"input_ids", "attention_mask"}
    ids = theirs(["ka", "ka mor ka"], padding=True, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.pad  # on the left


CONVERSATIONS = [
    [{"role": "user", "content": "ka"}],
    [{"role": "system", "content": "mor"}, {"role": "user", "content": " ka\n"}],
    [
        {"role": "user", "content": "ka"},
        {"role": "assistant", "content": "mor", "thinking": "la ka"},
        {"role": "user", "content": ""},
    ],
]


def test_the_chat_template_writes_our_ids(export: Export, tokenizer: Tokenizer) -> None:
    theirs = load_tokenizer(export("whole")[1])
    for messages in CONVERSATIONS:
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == render(messages, tokenizer, answer=True).ids
        renamed = [
            {"reasoning_content" if key == "thinking" else key: text for key, text in m.items()}
            for m in messages
        ]
        again = theirs.apply_chat_template(renamed, add_generation_prompt=True, return_dict=False)
        assert again == ids


def test_the_chat_template_writes_tools_and_calls_as_we_do(
    export: Export, tokenizer: Tokenizer
) -> None:
    theirs = load_tokenizer(export("whole")[1])
    function = {"name": "mor", "description": "ö <b> 'la'", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    call = {"id": "a", "type": "function", "function": {"name": "mor", "arguments": '{"la": 1}'}}
    messages = [
        {"role": "user", "content": "ka"},
        {"role": "assistant", "content": "la", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "mor"},
        {"role": "assistant", "content": "la ka"},
        {"role": "user", "content": "ka"},
    ]
    for said in (messages[:1], messages[:3], messages):
        ids = theirs.apply_chat_template(
            said, tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert ids == render(said, tokenizer, answer=True, tools=tools).ids


def test_a_turn_without_content_is_rendered_empty(export: Export, tokenizer: Tokenizer) -> None:
    theirs = load_tokenizer(export("whole")[1])
    messages = [{"role": "user", "content": "ka"}, {"role": "assistant", "content": None}]
    ids = theirs.apply_chat_template(messages, return_dict=False)
    assert ids == render([messages[0], {"role": "assistant", "content": ""}], tokenizer).ids


def test_reasoning_is_shown_and_turns_are_hidden(export: Export, tokenizer: Tokenizer) -> None:
    theirs = load_tokenizer(export("whole")[1])
    words = tokenizer.encode("ka")
    answer = [tokenizer.think, *words, tokenizer.end_think, *words, tokenizer.end]
    assert theirs.decode(answer, skip_special_tokens=True) == "<think>ka</think>ka"


def test_a_base_model_has_no_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = exported.save(tmp_path, exported.SHAPES["plain"], tokenizer, stage="base")
    huggingface.write(folder, checkpoint.load_for_inference(folder), tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_the_saved_tokenizer_is_left_as_it_was(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = exported.save(tmp_path, exported.SHAPES["plain"], tokenizer)
    before = (folder / "tokenizer" / "tokenizer.json").read_text()
    huggingface.write(folder, checkpoint.load_for_inference(folder), tmp_path / "out")
    assert (folder / "tokenizer" / "tokenizer.json").read_text() == before
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) != json.loads(before)
