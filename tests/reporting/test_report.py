"""The report: what it says of a run, whole or while it trains, and that it can be read anywhere."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

import config as settings
from config import Config, ReportConfig
from hearth import cli
from hearth.reporting import page, report
from hearth.reporting.report import Reporter, Run, Trace

CURSE = '<script>alert("&amp;")</script> **bold** | `code`'


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics(n_steps: int, **figures: Callable[[int], Any]) -> list[dict[str, Any]]:
    """What a stage notes: a start, every step, an evaluation every ten, a sample at the end."""
    start = {
        "steps": n_steps,
        "parameters": 1_234_567,
        "device": "a card",
        "torch": "2.11",
        "peak_flops": 4e13,
    }
    records: list[dict[str, Any]] = [
        {"kind": "start", "step": 0, "micro_batch_tokens": 512, **start}
    ]
    for step in range(1, n_steps + 1):
        known = {
            "loss": 6 / step,
            "lr": 1e-3,
            "grad_norm": 0.5,
            "tokens": 1000 * step,
            "stage": 2 * step // (n_steps + 1),
        }
        known |= {
            "skipped": int(step > 15),
            "seconds": 36.0 * step,
            "tokens_per_second": 1000 / 36,
            "mfu": 0.4,
        }
        known |= {
            "memory_gb": 9.5,
            "eta_seconds": 36.0 * (n_steps - step),
            "watts": 200.0,
            "temperature_c": 61.0,
        }
        records.append(
            {"kind": "step", "step": step, **known, **{k: f(step) for k, f in figures.items()}}
        )
        if step % 10 == 0:
            records.append(
                {
                    "kind": "eval",
                    "step": step,
                    "bpb sea": 2.0 / step,
                    "bpb land": 3.0 / step,
                    "stops": 0.5,
                }
            )
    return [
        *records,
        {
            "kind": "sample",
            "step": n_steps,
            "tokens": 1000 * n_steps,
            "prompt": "Once",
            "text": CURSE,
        },
    ]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run with something in every part of its folder."""
    config = replace(
        settings.PRESETS["demo"],
        runs=str(tmp_path),
        name="a & b",
        report=ReportConfig(price_per_kwh=0.5),
    )
    run = config.run_dir
    write_jsonl(run / "base" / "metrics.jsonl", metrics(20))
    write_jsonl(run / "sft1" / "metrics.jsonl", metrics(10))
    step = run / "base" / "step-00000020"
    step.mkdir()
    (step / "config.json").write_text(cli.to_json(config))
    (step / "state.json").write_text(json.dumps({"stage": "base", "step": 20, "steps": 20}))
    for place, kind in (
        ("text/world", "text"),
        ("text/chat/alpaca", "chat"),
        ("tokens/world", "tokens"),
    ):
        splits = {
            "train": {"documents": 90, "text_bytes": 4000, "tokens": 1000},
            "validation": {"documents": 10},
        }
        manifest = {
            "kind": kind,
            "name": "world",
            "source": {"demo": "text"},
            "splits": splits,
            "dropped": {CURSE: 2},
        }
        (run / place).mkdir(parents=True)
        (run / place / "manifest.json").write_text(json.dumps(manifest))
    (run / "tokenizer").mkdir()
    vocabulary = {
        "model": {"vocab": {"a": 0, "Ġwater": 1}},
        "added_tokens": [{"content": "<|unused_2|>"}],
    }
    (run / "tokenizer" / "tokenizer.json").write_text(json.dumps(vocabulary))
    (run / "report").mkdir()
    some = {
        "stage": "base",
        "metric": "accuracy",
        "stderr": 0.02,
        "chance": 0.25,
        "n": 50,
        "shots": 10,
    }
    scores = [
        {"task": "arc_easy", "value": 0.4, **some},
        {"task": "CORE", "value": 0.1, **some, "headline": True},
    ]
    scores.append(
        {**some, "task": "world, held out", "metric": "bits per byte", "value": 0.9, "chance": None}
    )
    (run / "report" / "score.json").write_text(json.dumps({"scores": scores}))
    (run / "rl").mkdir()
    (run / "rl" / "results.json").write_text(json.dumps(PRACTICE))
    return config


def practice(right: float) -> dict[str, Any]:
    """What `rl.py` notes before or after."""
    own = {"pass@1": [right, 0.04], "pass@16": [0.9, 0.02], "stops": 1.0, "length": 44.0}
    own |= {"tool calls": {"1 digit": 0.5 - right / 2}}
    own |= {"samples": [{"prompt": CURSE, "expected": "61", "said": f"(so) {right}"}]}
    return {"environments": {"new sums": own}, "elsewhere": {"loss math": 0.25, "world": 0.95}}


PRACTICE = {"before": practice(0.25), "after": practice(0.75)}


def shown(config: Config) -> tuple[str, str]:
    """The page and the Markdown of a run."""
    path = report.write(config)
    return path.read_text(encoding="utf-8"), path.with_name("report.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------- what it says


def test_every_part_of_a_run_is_shown(config: Config) -> None:
    html, markdown = shown(config)
    for text in (html, markdown):
        for section in (
            "At a glance",
            "Pretraining",
            "Fine-tuning, stage 1",
            "Scores",
            "Samples by tokens seen",
        ):
            assert section in text
        for section in (
            "Data",
            "Tokenizer",
            "Machine, time and cost",
            "Configuration",
            "a card",
            "1.2M",
            "arc",
        ):
            assert section in text
    for chart in (
        "Training loss over tokens",
        "Held-out bits per byte over minutes",
        "Learning rate",
        "Gradient norm",
    ):
        assert f"<figcaption>{chart}</figcaption>" in html
    for chart in (
        "Speed",
        "Model FLOPs utilisation",
        "Memory",
        "Power",
        "Temperature",
        "Probes over tokens",
        "Scores",
    ):
        assert f"<figcaption>{chart}</figcaption>" in html


def test_what_practice_brought_stands_side_by_side(config: Config) -> None:
    _, markdown = shown(config)
    section = markdown.split("What practice brought")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()]
    assert ["new sums", "pass@1", "25.0% ± 4.0", "75.0% ± 4.0"] in rows
    assert ["new sums", "calls, 1 digit", "0.38", "0.12"] in rows
    assert ["world", "0.950", "0.950"] in rows
    assert "(so) 0.25" in section
    assert "(so) 0.75" in section


def test_reinforcement_learning_shows_its_rollouts_in_place_of_a_loss(config: Config) -> None:
    records = metrics(20, reward=lambda step: step / 20, mismatch=lambda step: 1e-6)
    evals = [{"kind": "eval", "step": s, "pass@1 new sums": s / 20} for s in (0, 10, 20)]
    write_jsonl(config.run_dir / "rl" / "metrics.jsonl", records + evals)
    (trace,) = [t for t in Run(config.run_dir, config).traces if t.name == "rl"]
    charts = {b.title: b for b in report.training_blocks(trace) if isinstance(b, page.Chart)}
    assert "Reward of a rollout" in charts
    assert "Engine against training pass" in charts
    assert "Held-out pass@1 over minutes" in charts or "Held-out pass@1 over hours" in charts
    assert not any("Training loss" in title for title in charts)
    assert charts["Held-out pass@1 over tokens"].series[0].y == (0.0, 0.5, 1.0)


def test_hours_energy_and_cost_are_those_of_all_stages(config: Config) -> None:
    """30 steps of 36 seconds at 200 W are 0.06 kWh, 3 cents at half a coin the kilowatt-hour."""
    run = Run(config.run_dir, config)
    assert run.hours == pytest.approx(0.3)
    assert run.kwh == pytest.approx(0.06)
    assert report.cost(run.kwh, config.report) == "0.03 EUR"
    assert report.cost(0.00615, config.report) == "0.0031 EUR"  # never nothing
    assert "0.06 kWh" in shown(config)[0]


def test_power_that_was_not_measured_is_taken_from_the_config(config: Config) -> None:
    records = [{k: v for k, v in record.items() if k != "watts"} for record in metrics(20)]
    write_jsonl(config.run_dir / "base" / "metrics.jsonl", records)
    trace = Trace(config.run_dir / "base")
    assert trace.kwh(ReportConfig(watts=100.0)) == pytest.approx(0.02)
    assert math.isnan(trace.kwh(ReportConfig()))


def test_hours_are_estimated_from_the_speed_where_they_were_not_noted(config: Config) -> None:
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in metrics(20)]
    write_jsonl(config.run_dir / "base" / "metrics.jsonl", records)
    assert Trace(config.run_dir / "base").hours == pytest.approx(np.arange(1, 21) / 100)


def test_the_curriculum_is_marked_where_its_stages_begin(config: Config) -> None:
    trace = Trace(config.run_dir / "base")
    tokens, minutes = report.x_axes(trace)
    assert report.curriculum(trace, tokens) == ((0.0, "context 128"), (11000.0, "256"))
    assert [x for x, _ in report.curriculum(trace, minutes)] == [0.0, pytest.approx(6.6)]
    assert report.curriculum(Trace(config.run_dir / "sft1"), tokens) == ()


def test_evaluations_stand_at_the_tokens_and_hours_of_their_step(config: Config) -> None:
    trace = Trace(config.run_dir / "base")
    for x, last in zip(report.x_axes(trace), (20000.0, 12.0), strict=True):
        (chart,) = [c for c in report.learning_charts(trace, x) if "bits per byte" in c.title]
        assert [s.name for s in chart.series] == ["sea", "land"]
        assert chart.series[0].x == (last / 2, pytest.approx(last))
        assert chart.series[0].y == (0.2, 0.1)


def test_skipped_steps_are_marked_at_their_gradient(config: Config) -> None:
    (norm,) = [figure for figure in report.RUNNING if figure[0] == "Gradient norm"]
    tokens = report.XAxis("tokens", np.arange(1.0, 21.0))
    chart = report.curve(Trace(config.run_dir / "base"), *norm, x=tokens)
    assert [(s.name, s.x) for s in chart.series if s.style == "points"] == [
        ("skipped step", (16.0,))
    ]


def test_a_long_curve_keeps_its_extremes() -> None:
    y = np.sin(np.arange(5000) / 50)
    y[1234], y[4321] = 40.0, -40.0
    series = report.thinned("loss", np.arange(5000.0), y)
    assert len(series.x) == report.POINTS
    assert (max(series.high), min(series.low)) == (40.0, -40.0)
    assert np.mean(series.y) == pytest.approx(y.mean(), abs=0.02)


def test_corpora_share_the_tokens_by_their_weights_in_each_stage(config: Config) -> None:
    run = Run(config.run_dir, config)
    run.config["data"]["sources"] = [
        {"name": "sea", "weight": 3.0},
        {"name": "land", "weight": 1.0},
    ]
    run.config["pretrain"]["stages"] = [{"share": 0.5}, {"share": 0.5, "weights": [0, 1]}]
    assert report.training_shares(run, ["sea", "land"]) == {"sea": 0.375, "land": 0.625}


# ----------------------------------------------------------------------- runs that train, damage


def remove(*path: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        target = run.joinpath(*path)
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def overwrite(text: str, *path: str) -> Callable[[Path], None]:
    return lambda run: run.joinpath(*path).write_text(text)


BARE = (
    '{"kind": "step", "step": 3}\n'
    '{"kind": "eval", "step": 3, "bpb sea": null}\n'
    '{"kind": "step", "st'
)
BROKEN = {
    "nothing": lambda run: shutil.rmtree(run),
    "only text": lambda run: [
        shutil.rmtree(run / name) for name in ("base", "sft1", "tokens", "tokenizer")
    ],
    "no checkpoint": remove("base", "step-00000020"),
    "no scores": remove("report"),
    "no tokens": remove("tokens"),
    "no tokenizer": remove("tokenizer"),
    "metrics empty": overwrite("", "base", "metrics.jsonl"),
    "metrics bare": overwrite(BARE, "base", "metrics.jsonl"),
    "metrics of other kinds": overwrite(
        '[1]\n"x"\n5\nnull\n{"kind": [], "step": "x"}\n', "base", "metrics.jsonl"
    ),
    "metrics binary": lambda run: (run / "base" / "metrics.jsonl").write_bytes(bytes(range(256))),
    "scores nested deeply": overwrite('{"scores": ' + "[" * 100_000, "report", "score.json"),
    "metrics NaN": lambda run: write_jsonl(
        run / "base" / "metrics.jsonl", metrics(5, loss=lambda step: math.nan)
    ),
    "config of another version": overwrite('{"new": [1]}', "base", "step-00000020", "config.json"),
    "manifest half written": overwrite('{"kind": "te', "text", "world", "manifest.json"),
    "manifest bare": overwrite("{}", "tokens", "world", "manifest.json"),
    "scores bare": overwrite(
        '{"scores": [{"task": "copa", "value": 0.5}]}', "report", "score.json"
    ),
    "scores of another kind": overwrite("[]", "report", "score.json"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_missing_is_left_out(what: str, config: Config) -> None:
    BROKEN[what](config.run_dir)
    html, markdown = shown(config)
    assert "At a glance" in html
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", html + markdown, flags=re.DOTALL)


KINDS = ("start", "step", "eval", "sample")
WRONG = {
    "null": None,
    "text": "x",
    "number": -3,
    "huge": 10**400,
    "infinite": math.inf,
    "truth": True,
    "list": [1, "x", {}, []],
    "object": {"a": {"b": 1}},
}


def with_one_wrong(value: Any, wrong: Any) -> Iterator[Any]:
    """Copies of nested JSON, each with another of its values replaced by `wrong`."""
    yield wrong
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, item in pairs if isinstance(value, dict | list) else ():
        for changed in with_one_wrong(item, wrong) if isinstance(item, dict | list) else (wrong,):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = changed
            yield copy


FILES = [
    ("base", "step-00000020", "config.json"),
    ("text", "world", "manifest.json"),
    ("text", "chat", "alpaca", "manifest.json"),
    ("tokens", "world", "manifest.json"),
    ("tokenizer", "tokenizer.json"),
    ("report", "score.json"),
    ("rl", "results.json"),
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path))
def test_a_field_of_the_wrong_type_ends_no_report(
    path: tuple[str, ...], wrong: str, config: Config
) -> None:
    file = config.run_dir.joinpath(*path)
    whole = json.loads(file.read_text())
    if path[-1] == "config.json":  # what the report reads of it, and not a hundred fields more
        whole = {
            "data": {"sources": whole["data"]["sources"][:1], "text_files": []},
            "pretrain": {**whole["pretrain"], "stages": whole["pretrain"]["stages"][:2]},
        }
    for changed in with_one_wrong(whole, WRONG[wrong]):
        file.write_text(json.dumps(changed))
        texts = page.to_markdown("a run", report.sections_of(Run(config.run_dir, config)))
        assert "At a glance" in texts


@pytest.mark.parametrize("wrong", WRONG)
def test_a_metric_of_the_wrong_type_ends_no_report(wrong: str, config: Config) -> None:
    """Also a whole line that is no record; each field in the first record of its kind, the last,
    and all.
    """
    records = metrics(20)
    kinds = {kind: [i for i, r in enumerate(records) if r["kind"] == kind] for kind in KINDS}
    path = config.run_dir / "base" / "metrics.jsonl"
    for places in kinds.values():
        for chosen in (places[:1], places[-1:], places):
            for name in (None, *records[places[0]]):
                changed = list(records)
                for i in chosen:
                    bad = WRONG[wrong]
                    changed[i] = {**records[i], name: bad} if name else bad
                write_jsonl(path, changed)
                texts = page.to_markdown("a run", report.sections_of(Run(config.run_dir, config)))
                assert "At a glance" in texts


@pytest.mark.parametrize("wrong", WRONG)
def test_charts_of_wrong_figures_are_drawn(wrong: str, config: Config) -> None:
    """All numbers of every figure at once, on the page itself."""
    bad = WRONG[wrong]
    records = [
        {name: bad if name not in ("kind", "step") and i % 2 else v for name, v in record.items()}
        for i, record in enumerate(metrics(20))
    ]
    write_jsonl(config.run_dir / "base" / "metrics.jsonl", records)
    file = config.run_dir / "report" / "score.json"
    scores = report.read_json(file)["scores"]
    scores[0] |= {"stderr": bad, "chance": bad, "n": bad}
    scores[1] |= {"value": bad}
    file.write_text(json.dumps({"scores": scores}))
    assert "At a glance" in shown(config)[0]


def test_the_page_of_a_run_that_trains_reloads_itself(config: Config) -> None:
    assert 'http-equiv="refresh"' not in shown(config)[0]
    write_jsonl(config.run_dir / "sft1" / "metrics.jsonl", metrics(10)[:5])
    html = shown(config)[0]
    assert 'http-equiv="refresh"' in html
    assert "Fine-tuning, stage 1: 40%" in html


def test_what_goes_wrong_in_drawing_never_stops_a_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "draw", lambda block: 1 / 0)
    Reporter(config).refresh(due=True)
    report.refresh(config)
    assert (
        capsys.readouterr().out.count("ZeroDivisionError: division by zero. The run continues.")
        == 2
    )


def test_the_losses_are_drawn_beside_the_report_and_a_fault_there_stops_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = config.run_dir / "report" / "loss.png"
    Reporter(replace(config, report=ReportConfig(draw=False))).refresh(due=True)
    assert not picture.exists()
    monkeypatch.setattr(report, "learning_charts", lambda *given: 1 / 0)
    monkeypatch.setattr(report, "write", lambda config: None)
    Reporter(config).refresh(due=True)
    assert "ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.undo()
    Reporter(config).refresh(due=True)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_written_never_stops_a_run(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(config.run_dir / "report")
    (config.run_dir / "report").write_text("a file stands here")
    report.refresh(config)
    assert "The report could not be drawn" in capsys.readouterr().out


def test_drawing_takes_a_small_share_of_the_time(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second of drawing earns twenty of silence, unless the stage has ended."""
    now, drawn = [0.0], []

    def write(config: Config) -> None:
        drawn.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(report, "write", write)
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    reporter = Reporter(config)
    for _ in range(50):
        now[0] += 2.0
        reporter.refresh()
    assert drawn == [2.0, 23.0, 44.0, 65.0, 86.0]
    reporter.refresh(due=True)
    assert len(drawn) == 6
    Reporter(replace(config, report=ReportConfig(draw=False))).refresh(due=True)
    assert len(drawn) == 6


def test_a_chart_that_did_not_change_is_drawn_once(config: Config) -> None:
    report.write(config)
    before = page.draw.cache_info().misses
    report.write(config)
    assert page.draw.cache_info().misses == before


# -------------------------------------------------------------------------------- how it is written


class Reader(HTMLParser):
    """The tags of a page, and those left open."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(html: str) -> list[tuple[str, dict[str, str | None]]]:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader.tags


def test_the_page_loads_nothing_and_runs_nothing(config: Config) -> None:
    tags = read(shown(config)[0])
    assert {"script", "img", "iframe", "object"} & {tag for tag, _ in tags} == set()
    for tag, attributes in tags:
        for name in ("src", "href", "xlink:href", "action"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:")), f"<{tag} {name}={address}>"
    assert not re.search(r"url\((?!#)|@import", shown(config)[0])


def test_text_of_a_model_or_a_file_stays_text(config: Config) -> None:
    html, markdown = shown(config)
    assert "<script>" not in html
    assert "&lt;script&gt;alert(&#34;&amp;amp;&#34;)&lt;/script&gt; **bold**" in html
    assert "\\<script\\>" in markdown
    assert "\\*\\*bold\\*\\* \\| \\`code\\`" in markdown


def test_every_picture_has_its_words_and_its_own_ids(config: Config) -> None:
    html = shown(config)[0]
    pictures = [attributes for tag, attributes in read(html) if tag == "svg"]
    assert len(pictures) > 15
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 20
        assert "width" not in attributes  # it takes the page's width
    clips = re.findall(r'<clipPath id="([^"]*)"', html)
    assert len(clips) == len(set(clips))


def test_pictures_take_the_pages_colours(config: Config) -> None:
    """So they are readable by day, by night and on paper: the style sheet names every colour in
    each scheme.
    """
    html = shown(config)[0]
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert set(re.findall(r"(?:stroke|fill): (#\w+)", pictures)) == set()
    used = set(re.findall(r"var\((--[\w-]+)\)", pictures))
    style = page.STYLE.read_text(encoding="utf-8")
    for scheme in style.split(":root")[1:]:
        assert used <= set(re.findall(r"(--[\w-]+):", scheme.split("}")[0]))


def test_markdown_tables_have_one_width(config: Config) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", shown(config)[1], flags=re.MULTILINE)
    assert tables
    for table in tables:
        assert len({len(line) for line in table.splitlines()}) == 1


# ----------------------------------------------------------------------------------------- two runs


def test_two_runs_stand_side_by_side(config: Config) -> None:
    other = replace(config, name="c", seed=5)
    shutil.copytree(config.run_dir, other.run_dir)
    (other.run_dir / "base" / "step-00000020" / "config.json").write_text(cli.to_json(other))
    path = report.compare([config.run_dir, other.run_dir], config)
    assert path == config.run_dir / "report" / "compare-c.html"
    html, markdown = path.read_text(), path.with_name("compare-c.md").read_text()
    read(html)
    assert "a &amp; b and c" in html
    assert re.search(r"\| seed +\| 0 +\| 5 +\|", markdown)
    assert "a & b: sea" in markdown
    assert re.search(
        r"\| arc\\_easy +\| accuracy +\| +40\.0% ± 2\.0 \| +40\.0% ± 2\.0 \|", markdown
    )


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart(tmp_path: Path) -> None:
    for ends, names in (
        (["a/runs/demo", "b/runs/mine"], ["demo", "mine"]),
        (["a/runs/demo", "b/runs2/demo"], ["runs/demo", "runs2/demo"]),
        (["a/runs/demo", "b/runs/demo", "mine"], ["a/runs/demo", "b/runs/demo", None]),
        (["a/runs/demo", "a/runs/../runs/demo"], ["demo", "demo"]),
    ):
        found = report.run_names([tmp_path / end for end in ends])
        wanted = zip(found, names, strict=True)
        assert all(name == want for name, want in wanted if want is not None)
        assert found[-1].endswith(Path(ends[-1]).name)
    assert report.run_names([Path("/demo"), Path("/a/demo")]) == ["/demo", "a/demo"]


def test_runs_of_one_name_keep_their_curves_and_scores_apart(config: Config) -> None:
    other = config.run_dir.parent / "second" / config.run_dir.name
    shutil.copytree(config.run_dir, other)
    path = report.compare([config.run_dir, other], config)
    assert path.name == "compare-second-a & b.html"
    markdown = path.with_suffix(".md").read_text()
    first, second = f"{config.run_dir.parent.name}/a & b", "second/a & b"
    for head in (f"{first} base", f"{second} base", f"{first}: sea", f"{second}: sea"):
        assert head in markdown.replace("\\_", "_")
    assert re.search(
        r"\| arc\\_easy +\| accuracy +\| +40\.0% ± 2\.0 \| +40\.0% ± 2\.0 \|", markdown
    )


@pytest.mark.parametrize("n_runs", [2, 3])
def test_many_figures_of_runs_with_long_names_are_all_drawn(n_runs: int) -> None:
    runs = [f"a rather long name of a run, {i}" for i in range(n_runs)]
    figures = [f"figure {i}" for i in range(7)]
    series = tuple(page.Series(name, (1.0, 2.0), (3.0, 2.0)) for name in figures)
    one = page.Chart("Loss", series, "", "")
    chart = report.merged("Loss", [(run, one) for run in runs], runs)
    names = [f"{run}: {name}" for run in runs for name in figures]
    assert [series.name for series in chart.series] == names
    assert "<g" in page.draw(chart)


# ------------------------------------------------------------------------------------- in a browser


@pytest.mark.parametrize("y", [(0.425, 0.35), (12500.0, 9000.0), (0.0625, 0.07)])
def test_words_beside_an_axis_stay_on_the_picture_and_off_its_numbers(
    y: tuple[float, float],
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    FigureCanvasAgg(figure)
    with matplotlib.rc_context({"font.size": 7.5}):
        page.paint_chart(
            figure,
            page.Chart("title", (page.Series("x", (0.0, 1.0), y),), "tokens", "bits per byte"),
        )
        figure.canvas.draw()
    (axes,) = figure.axes
    words = axes.yaxis.label.get_window_extent()
    assert words.x0 >= 0
    assert all(
        words.x1 <= tick.label1.get_window_extent().x0 for tick in axes.yaxis.get_major_ticks()
    )


def test_no_figure_of_a_step_runs_into_its_axis(config: Config) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    write_jsonl(config.run_dir / "base" / "metrics.jsonl", metrics(20, lr=lambda n: 1e-3 - n / 3e4))
    trace = Trace(config.run_dir / "base")
    for figure in report.RUNNING:
        canvas = FigureCanvasAgg(Figure())
        with matplotlib.rc_context({"font.size": 7.5}):
            page.paint_chart(canvas.figure, report.curve(trace, *figure, x=report.x_axes(trace)[0]))
            canvas.draw()
        (axes,) = canvas.figure.axes
        words, ticks = axes.yaxis.label.get_window_extent(), axes.yaxis.get_major_ticks()
        for tick in (tick.label1 for tick in ticks if tick.label1.get_text()):
            assert not axes.yaxis.label.get_text() or words.x1 <= tick.get_window_extent().x0


def test_marks_that_would_run_into_each_other_say_less() -> None:
    marks = [(0.0, "context 1024"), (20.0, "2048"), (24.0, "4096"), (100.0, "8192")]
    assert page.fitting_marks(marks, 120.0) == [
        (0.0, "1024"),
        (20.0, ""),
        (24.0, "4096"),
        (100.0, "8192"),
    ]
    assert page.fitting_marks(marks[:1], 1.0) == marks[:1]
    assert page.fitting_marks([], 1.0) == []


def test_a_chart_in_words_has_plain_numbers() -> None:
    curve = page.Series("speed", (0.0, 2e6), (8530.4, 12345.6))
    once = page.Series("loss", (3000.0,), (0.12345,), style="marked")
    skipped = page.Series("skipped step", (10.0, 1e6), (1.0, 2.0), style="points")
    assert page.describe(page.Chart("A chart", (curve, once, skipped), "tokens", "y")) == (
        "speed: 8,530 at the start, 12,346 after 2.0M tokens; loss: 0.123 after 3.0k tokens; "
        "skipped step: 2, the last after 1.0M tokens."
    )


@pytest.fixture(scope="module")
def chromium() -> str:
    found = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not found:
        pytest.skip("needs Chromium: apt-get install chromium")
    return found


MEASURE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg")
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
document.title = "overflow " + wide.length + " " + wide.slice(0, 3)
  .map(e => e.tagName + "." + e.className);
</script>"""


@pytest.mark.parametrize("width", [360, 1600])
def test_a_browser_shows_it_without_errors_at_any_width(
    width: int, chromium: str, config: Config, tmp_path: Path
) -> None:
    """Nothing but tables and code, which scroll by themselves, is wider than the screen; the
    console stays silent.
    """
    copy = tmp_path / "copy.html"
    html = shown(config)[0].replace("<details>", "<details open>")
    frame = tmp_path / "frame.html"  # a window is never narrower than 500 pixels, a frame may be
    copy.write_text(
        html.replace(
            "</body>", MEASURE + "<script>parent.postMessage(document.title, '*')</script></body>"
        )
    )
    listen = "<script>onmessage = e => document.title = e.data</script>"
    frame.write_text(
        f'<!doctype html>{listen}<iframe src="copy.html" '
        f'style="width:{width}px;height:900px"></iframe>'
    )
    looks = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=4000",
    ]
    words = [
        chromium,
        *looks,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1700,1000",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*words, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    assert "<title>overflow 0</title>" in done.stdout
