"""Presets, checks, JSON, command line."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest
import torch

from config import (
    PRESETS,
    Config,
    DataConfig,
    HRMConfig,
    ModelConfig,
    PretrainConfig,
    SFTConfig,
    TextSource,
    UserError,
)
from hearth import cli
from model import Model


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name: str) -> None:
    assert cli.from_json(Config, cli.to_json(PRESETS[name])) == PRESETS[name]


def test_json_of_a_dense_model_keeps_the_head_off() -> None:
    dense = ModelConfig(hrm=None)
    assert cli.from_json(ModelConfig, cli.to_json(dense)) == dense


def test_json_with_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="flavour"):
        cli.from_json(HRMConfig, '{"flavour": 1}')


@pytest.mark.parametrize("name", ["16gb", "12gb", "24gb", "8gb"])
def test_cards_make_the_same_model_of_about_146m_from_the_same_tokens(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        n = Model(preset.model).n_parameters()
    assert 143e6 < n < 149e6
    assert (preset.model.context, preset.model.vocab_size) == (4096, 32_768)
    assert preset.model == PRESETS["16gb"].model
    assert preset.pretrain.tokens_per_step == PRESETS["16gb"].pretrain.tokens_per_step


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Config(
            data=DataConfig(sources=(TextSource(),)),
            model=ModelConfig(vocab_size=1000, n_head=5),
            pretrain=PretrainConfig(steps=0),
            sft1=SFTConfig(files=("x",), epochs=0),
            sft2=SFTConfig(files=("x",)),
        )
    for word in (
        "data.sources",
        "vocab_size",
        "try 1024",
        "n_head 5",
        "pretrain.steps",
        "sft1.epochs",
    ):
        assert word in str(caught.value)


def test_command_line_overrides_the_preset() -> None:
    made = cli.parse_cli(
        "", ["--preset", "demo", "--pretrain.lr", "1e-3", "--data.text_files", "a", "b"]
    )
    assert made.pretrain.lr == 1e-3
    assert made.data.corpora()[0].files == ("a", "b")
    assert made.model == PRESETS["demo"].model


def test_the_head_can_be_switched_off_on_the_command_line() -> None:
    assert cli.parse_cli("", ["--preset=demo", "--model.hrm", "None"]).model.hrm is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "dmeo"], "16gb, 12gb, 24gb, 8gb, demo"),
        (["--preset"], "needs a value"),
        (["--preset", "demo", "--pretrain.lrr", "1"], "--pretrain.lr"),
        (["--preset", "demo", "--pretrain.steps", "many"], "--pretrain.steps"),
        (["--preset", "demo", "--model.window", "0"], "model.window"),
    ],
)
def test_a_mistake_exits_with_2_and_names_the_remedy(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse_cli("", words)
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert said in told.out + told.err
    assert "Traceback" not in told.out + told.err


def test_help_shows_every_field_with_its_comment(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.parse_cli("What it does.", ["--preset", "demo", "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "attention reach of a short layer" in told
    assert "peak learning rate" in told


def stopped_in(broken: Exception | None = None) -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        if broken is None:
            raise
        raise broken from None


@pytest.fixture
def handlers() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "broken", [None, ValueError("write to closed file"), UserError("half a file")]
)
def test_ctrl_c_and_what_it_breaks_end_in_one_line(
    broken: Exception | None, handlers: None, capsys
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run_script(lambda: stopped_in(broken), "stopped.")
    assert (end.value.code, capsys.readouterr().err) == (130, "stopped.\n")


def test_a_users_mistake_ends_in_one_line(handlers: None, capsys) -> None:
    def work() -> None:
        raise UserError("no such file")

    with pytest.raises(SystemExit) as end:
        cli.run_script(work)
    assert (end.value.code, capsys.readouterr().err) == (2, "error: no such file\n")


def test_a_stop_that_was_dealt_with_hides_no_later_error(handlers: None) -> None:
    def work() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run_script(work)


def test_our_own_mistake_shows_where_it_is(handlers: None) -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run_script(lambda: 1 / 0)
