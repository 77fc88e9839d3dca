"""The export as a command: what it writes, what it says, what it refuses."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import exported
import pytest

import export_model
from config import PRESETS, Config, UserError
from hearth import cli, run
from hearth.data.tokenizer import Tokenizer
from hearth.export import qwen3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return exported.some_tokenizer()


def run_of(tokenizer: Tokenizer, folder: Path, shape: str) -> Config:
    """A run of the demo preset that has a base and a chat checkpoint."""
    for stage in ("base", "sft2"):
        exported.save(folder, exported.SHAPES[shape], tokenizer, stage=stage)
    return replace(PRESETS["demo"], runs=str(folder))


def export(words: list[str]) -> None:
    export_model.main(*run.parse(export_model.SCRIPT, words))


def test_the_furthest_checkpoint_goes_to_transformers(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tokenizer, tmp_path / "runs", "whole")
    out = tmp_path / "out"
    export(["--preset", "demo", "--runs", str(tmp_path / "runs"), "--to", "huggingface", str(out)])
    assert (out / "modeling_hearth.py").is_file()
    assert (out / "chat_template.jinja").is_file()
    said = capsys.readouterr().out
    assert f"{tmp_path}/runs/demo/sft2/step-00000005 is now in {out}" in said
    assert "model.safetensors" in said


def test_an_empty_folder_that_a_shell_stands_in_is_filled(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(tokenizer, tmp_path / "runs", "portable")
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    export_model.main(config, export_model.Options(to=("huggingface", ".")))
    assert Path("model.safetensors").is_file()  # seen from the shell's own folder
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}
    with pytest.raises(UserError, match="out exists and is no empty folder"):
        export_model.main(config, export_model.Options(to=("huggingface", ".")))


@pytest.mark.parametrize("named", ["base", "{runs}/demo/base", "{runs}/demo/base/step-00000005"])
def test_a_stage_or_a_folder_can_be_named(tokenizer: Tokenizer, tmp_path: Path, named: str) -> None:
    config = run_of(tokenizer, tmp_path, "portable")
    options = export_model.Options(
        to=("gguf", str(tmp_path / "out")), checkpoint=named.format(runs=tmp_path)
    )
    export_model.main(config, options)
    assert "{{ .Prompt }}" in (tmp_path / "out" / "Modelfile").read_text()


def test_a_shape_that_llama_cpp_lacks_is_refused_with_a_command_that_works(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = run_of(tokenizer, tmp_path, "whole")
    with pytest.raises(UserError, match=r"HRM head.*`(.*)`") as caught:
        export_model.main(config, export_model.Options(to=("gguf", str(tmp_path / "out"))))
    assert not (tmp_path / "out").exists()
    command = str(caught.value).split("`")[1]
    words = shlex.split(command)
    assert words[:3] == ["uv", "run", "run_pipeline.py"]
    trained = cli.Script("").parse(words[3:])[0]
    assert qwen3.beyond_qwen3(trained.model) == []
    assert trained.run_dir != config.run_dir


def test_what_is_missing_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = replace(PRESETS["demo"], runs=str(tmp_path))
    to = ("huggingface", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"--to huggingface FOLDER"):
        export_model.main(config, export_model.Options())
    with pytest.raises(UserError, match=r"There is no run 'demo'.*run_pipeline.py"):
        export_model.main(config, export_model.Options(to=to))
    with pytest.raises(UserError, match=r"'nowhere' is no checkpoint"):
        export_model.main(config, export_model.Options(to=to, checkpoint="nowhere"))
