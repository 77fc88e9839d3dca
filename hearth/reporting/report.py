"""The report of a run: one HTML page that needs no network, and the same as Markdown.

In: what lies in a run's folder: metrics.jsonl, manifests, the checkpoints' config and state,
report/score.json.
Out: runs/<run>/report/index.html and report.md; for two runs side by side compare-<other>.html and
.md. Reads only what is there: a figure that was never noted is left out, so a run can be looked at
from its first minute. Knows nothing of models, tokens or training.

`sections_of` and `comparison_of` say what a page shows, as blocks; `page` draws them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from config import Config, ReportConfig
from hearth import log
from hearth.reporting.page import (
    Bar,
    Bars,
    Chart,
    Code,
    Facts,
    Folded,
    Note,
    Samples,
    Section,
    Series,
    Table,
    percent,
    to_html,
    to_markdown,
)
from hearth.storage import write_text

STAGES = {"base": "Pretraining", "sft1": "Fine-tuning, stage 1", "sft2": "Fine-tuning, stage 2"}
POINTS = 300  # points of a curve at most; more are averaged, and their extremes shown as a band
BUSY_SHARE = 0.05  # of a training run's time at most goes into drawing while it goes on

Record = dict[str, Any]


# --------------------------------------------------------------------------------- making the pages


def write(config: Config) -> Path:
    """Draw the report of the run; gives the page's path."""
    run = Run(config.run_dir, config)
    return _write(run.folder / "report", "index", run.name, sections_of(run), going=run.going)


def compare(folders: Sequence[Path], config: Config) -> Path:
    """Draw several runs side by side; gives the page's path, in the first one's report."""
    runs = [Run(folder, config) for folder in folders]
    stem = "compare-" + "-".join(run.name for run in runs[1:])
    title = " and ".join(run.name for run in runs)
    return _write(
        runs[0].folder / "report",
        stem,
        title,
        comparison_of(runs),
        going=any(run.going for run in runs),
    )


def _write(folder: Path, stem: str, title: str, sections: list[Section], *, going: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{stem}.html"
    write_text(folder / f"{'report' if stem == 'index' else stem}.md", to_markdown(title, sections))
    write_text(page, to_html(title, sections, going=going))
    return page


class Reporter:
    """Draws the report of a run in the making; what goes wrong there is said and never stops the
    run.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._next = 0.0  # when drawing is due again

    def refresh(self, *, due: bool = False) -> None:
        """Draw the report, unless drawing would take more than `BUSY_SHARE` of the time; `due`
        draws it at any rate.
        """
        started = time.monotonic()
        if not self.config.report.draw or (started < self._next and not due):
            return
        try:
            write(self.config)
            write_losses(self.config)
        except Exception as error:
            log.say(
                f"The report could not be drawn: {type(error).__name__}: {error}. The run "
                "continues."
            )
        now = time.monotonic()
        self._next = now + (now - started) / BUSY_SHARE


def write_losses(config: Config) -> None:
    """Draw report/loss.png: pretraining's loss and held-out figures over the tokens seen."""
    metrics = config.run_dir / "base" / "metrics.jsonl"
    picture = config.run_dir / "report" / "loss.png"
    if not metrics.exists():
        return
    if picture.exists() and picture.stat().st_mtime > metrics.stat().st_mtime:
        return
    from matplotlib.figure import Figure

    trace = Trace(metrics.parent)
    charts = learning_charts(trace, x_axes(trace)[0])
    figure = Figure((6 * len(charts), 4), layout="constrained")
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        for series in chart.series:
            marker = "o" if series.style == "marked" else None
            axes.plot(series.x, series.y, label=series.name, marker=marker)
        axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def refresh(config: Config) -> None:
    """Draw the report of the run at the end of a stage; what goes wrong is said and
    raises nothing.
    """
    Reporter(config).refresh(due=True)


# ------------------------------------------------------------------------- what a run's folder says


class Trace:
    """What one stage of training noted of itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        records = log.read_metrics(folder / "metrics.jsonl")
        self.kinds: dict[str, list[Record]] = {}
        for record in records:
            self.kinds.setdefault(str(record.get("kind")), []).append(record)
        self.steps = self.kinds.get("step", [])
        checkpoints = sorted(folder.glob("step-*"))
        self.state = read_json(checkpoints[-1] / "state.json") if checkpoints else {}
        self.config = read_json(checkpoints[-1] / "config.json") if checkpoints else {}

    @property
    def title(self) -> str:
        return STAGES.get(self.name, self.name)

    @cached_property
    def start(self) -> Record:
        """What the latest start noted."""
        return self.kinds["start"][-1] if self.kinds.get("start") else {}

    def column(self, name: str, kind: str = "step") -> np.ndarray:
        """A figure of every record of a kind, NaN where it was not noted."""
        return np.array([number(record.get(name)) for record in self.kinds.get(kind, [])])

    @cached_property
    def tokens(self) -> np.ndarray:
        return self.column("tokens")

    @cached_property
    def hours(self) -> np.ndarray:
        """Hours of training at each step; estimated from the speed where they were not noted."""
        if np.isfinite(noted := self.column("seconds")).all():
            return noted / 3600
        taken = np.diff(self.tokens, prepend=0) / self.column("tokens_per_second")
        return np.cumsum(np.nan_to_num(taken)) / 3600

    @property
    def step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def n_steps(self) -> int | None:
        found = self.start.get("steps") or self.state.get("steps")
        return int(found) if found else None

    @property
    def done(self) -> bool:
        return self.n_steps is not None and self.step >= self.n_steps

    @property
    def eta(self) -> float:
        return number(self.steps[-1].get("eta_seconds")) if self.steps else math.nan

    def at(self, records: Sequence[Record], x: np.ndarray) -> np.ndarray:
        """`x`, which belongs to the steps, at the steps of other records."""
        return np.interp([r["step"] for r in records], self.column("step"), x)

    def kwh(self, report: ReportConfig) -> float:
        """Energy of the stage in kilowatt-hours: as noted, or from the configured power; NaN where
        unknown.
        """
        if np.isfinite(noted := self.column("kwh")).any():
            return float(np.nanmax(noted))
        watts = self.column("watts")
        if not np.isfinite(watts).any():
            watts = np.full(len(self.steps), number(report.watts))
        return (
            float(np.sum(np.diff(self.hours, prepend=0) * watts)) / 1000 if len(watts) else math.nan
        )


class Run:
    """What a run's folder holds, each part empty where it is missing."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.name = Path(folder), Path(folder).resolve().name
        self.traces = [
            Trace(self.folder / name)
            for name in STAGES
            if (self.folder / name / "metrics.jsonl").is_file()
        ]
        saved = [trace.config for trace in self.traces if trace.config]
        self.config = saved[-1] if saved else json.loads(json.dumps(asdict(config)))
        self.report = config.report
        self.scores: list[Record] = read_json(self.folder / "report" / "score.json").get(
            "scores", []
        )

    @property
    def going(self) -> bool:
        return any(not trace.done for trace in self.traces)

    def manifests(self, place: str) -> list[Record]:
        """The finished manifests below one of the run's folders, each with its folder's name as
        `name`.
        """
        found = sorted((self.folder / place).glob("*/manifest.json"))
        return [
            {**manifest, "name": path.parent.name}
            for path in found
            if (manifest := read_json(path))
        ]

    @property
    def hours(self) -> float:
        return float(sum(trace.hours[-1] for trace in self.traces if len(trace.hours)))

    @property
    def kwh(self) -> float:
        return (
            float(sum(trace.kwh(self.report) for trace in self.traces)) if self.traces else math.nan
        )

    @property
    def tokens(self) -> float:
        return float(sum(trace.tokens[-1] for trace in self.traces if len(trace.tokens)))


def number(value: Any) -> float:
    """`value` as a float, NaN where it is no number."""
    return (
        float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    )


def shown(show: Callable[[float], str], value: float) -> str:
    """A figure in words, a dash where it is not known."""
    return show(value) if math.isfinite(value) else "–"


def read_json(path: Path) -> Record:
    """A JSON object, empty where the file is missing, being written, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ------------------------------------------------------------------------------ what the page shows


def sections_of(run: Run) -> list[Section]:
    """The page of one run, top to bottom; sections with nothing to show are left out."""
    trained = [Section(trace.title, training_blocks(trace)) for trace in run.traces]
    sections = [
        Section("At a glance", [headline(run)]),
        *trained,
        Section("Scores", score_blocks(run.scores)),
        Section(
            "Samples by tokens seen",
            [Folded(t.title, (s,)) if i else s for i, (t, s) in enumerate(samples_of(run))],
        ),
        Section("Data", data_blocks(run)),
        Section("Tokenizer", tokenizer_blocks(run)),
        Section("Machine, time and cost", machine_blocks(run)),
        Section(
            "Configuration", [Folded("Everything that was set", (Code(config_text(run.config)),))]
        ),
    ]
    return [section for section in sections if section.blocks]


def headline(run: Run) -> Facts:
    """The figures that a person looks for first."""
    items = [
        ("Status", status(run)),
        ("Tokens", shown(log.count, run.tokens)),
        ("Time", log.duration(run.hours * 3600)),
    ]
    parameters = [
        trace.start.get("parameters") for trace in run.traces if trace.start.get("parameters")
    ]
    if parameters:
        items.insert(1, ("Parameters", log.count(parameters[-1])))
    for trace in run.traces:
        items += [(f"{name}, {trace.name}", f"{value:.3f}") for name, value in held_out_now(trace)]
    items += [
        (f"{s['task']}, {s.get('stage', '')}", percent(s["value"]))
        for s in run.scores
        if s.get("headline")
    ]
    if math.isfinite(run.kwh):
        items += [("Energy", f"{run.kwh:.3g} kWh"), ("Cost", cost(run.kwh, run.report))]
    return Facts(tuple(items))


def status(run: Run) -> str:
    """Where the run stands, in a few words."""
    if not run.traces:
        return "no training yet"
    last = run.traces[-1]
    if last.done:
        return f"{last.title}: done"
    share = f"{last.step / last.n_steps:.0%}" if last.n_steps else f"step {last.step}"
    return f"{last.title}: {share}" + (
        f", {log.duration(last.eta)} left" if math.isfinite(last.eta) else ""
    )


def held_out_now(trace: Trace) -> list[tuple[str, float]]:
    """The mean of the latest held-out figures of each unit, such as bits per byte over
    all corpora.
    """
    evals = trace.kinds.get("eval", [])
    if not evals:
        return []
    units: dict[str, list[float]] = {}
    for name, value in evals[-1].items():
        if (group := group_of(name)) in UNITS.values() and math.isfinite(number(value)):
            units.setdefault(group, []).append(number(value))
    return [(f"Held-out {unit}", float(np.mean(values))) for unit, values in units.items()]


BPB = "bits per byte"
NO_SHARES = (BPB, "tokens")  # metrics of scores that are no part of one
UNITS = {"bpb": BPB, "loss": "loss"}
CYCLES, PROBES = "loss by cycle of the reasoning head", "probes"
HEAD = "reasoning head: size of its states, change by its last cycle in nats, share of the time"


def is_figure(name: str) -> bool:
    return name not in ("kind", "step", "tokens", "seconds")


def group_of(name: str) -> str:
    """The chart that an evaluation's figure belongs to: a unit that its first word names, cycles,
    or probes.
    """
    if name.startswith("head "):
        return HEAD
    return CYCLES if "cycle" in name else UNITS.get(name.split()[0], PROBES)


def cost(kwh: float, report: ReportConfig) -> str:
    price = kwh * report.price_per_kwh
    return f"{price:.2f} {report.currency}" if price >= 0.01 else f"{price:.2g} {report.currency}"


# ---- training


def training_blocks(trace: Trace) -> list[Any]:
    """Curves of one stage of training: what it learnt in sight, how it ran folded away."""
    if not trace.steps:
        return []
    tokens, hours = x_axes(trace)
    learning = learning_charts(trace, tokens)
    over_time = [
        chart
        for chart in learning_charts(trace, hours)
        if chart.y != "share" and "cycle" not in chart.title
    ]
    # loss and bits per byte stand side by side in both views, the rest behind them
    n_main = len(over_time)
    learning = [*learning[:n_main], *over_time, *learning[n_main:]]
    running = [
        curve(
            trace, "Learning rate", "learning rate", {"learning rate": "lr"}, tokens, from_zero=True
        ),
        gradient_chart(trace, tokens),
        curve(
            trace,
            "Speed",
            "tokens per second",
            {"tokens per second": "tokens_per_second"},
            tokens,
            from_zero=True,
        ),
        curve(
            trace,
            "Model FLOPs utilisation",
            "share of the peak",
            {"MFU": "mfu"},
            tokens,
            from_zero=True,
        ),
        curve(trace, "Memory", "GB", {"memory": "memory_gb"}, tokens, from_zero=True),
        curve(trace, "Power", "watts", {"power": "watts"}, tokens, from_zero=True),
        curve(trace, "Temperature", "degrees Celsius", {"card": "temperature_c"}, tokens),
    ]
    skipped = max((number(step.get("skipped")) for step in trace.steps), default=math.nan)
    facts = [("Steps", f"{trace.step}" + (f" of {trace.n_steps}" if trace.n_steps else ""))]
    facts += [
        ("Tokens", shown(log.count, trace.tokens[-1])),
        ("Time", log.duration(trace.hours[-1] * 3600)),
    ]
    facts += [("Skipped steps", f"{skipped:.0f}")] if math.isfinite(skipped) else []
    drawn = tuple(chart for chart in running if chart)
    return [
        Facts(tuple(facts)),
        *learning,
        Folded("How it ran: learning rate, gradient, speed, memory", drawn),
    ]


@dataclass(frozen=True)
class XAxis:
    """What a stage's figures are drawn over: a value at every step."""

    unit: str
    at: np.ndarray


def x_axes(trace: Trace) -> tuple[XAxis, XAxis]:
    """Tokens seen, and the time taken, in hours or, where that is short, in minutes."""
    short = trace.hours[-1] < 2
    return XAxis("tokens", trace.tokens), XAxis(
        *(("minutes", trace.hours * 60) if short else ("hours", trace.hours))
    )


def learning_charts(trace: Trace, x: XAxis) -> list[Chart]:
    """The training loss and every held-out figure over `x`, the curriculum's stages marked."""
    training = curve(
        trace, f"Training loss over {x.unit}", "nats per token", {"training loss": "loss"}, x
    )
    charts = [training] if training else []
    for kind in ("eval", "probe"):
        names = figure_names(trace, kind)
        for group in dict.fromkeys(PROBES if kind == "probe" else group_of(name) for name in names):
            mine = [name for name in names if kind == "probe" or group_of(name) == group]
            at = trace.at(trace.kinds[kind], x.at)
            series = tuple(marked(short_name(name), at, trace.column(name, kind)) for name in mine)
            title = f"Held-out {group}" if group in UNITS.values() else group.capitalize()
            y = {BPB: group, PROBES: "share", HEAD: "value"}.get(group, "nats per token")
            charts.append(Chart(f"{title} over {x.unit}", series, x.unit, y, curriculum(trace, x)))
    return charts


def figure_names(trace: Trace, kind: str) -> list[str]:
    """The names of all numbers that records of a kind note, in the order of their first
    appearance.
    """
    names = {
        n: 0
        for r in trace.kinds.get(kind, [])
        for n, v in r.items()
        if is_figure(n) and math.isfinite(number(v))
    }
    return list(names)


def short_name(name: str) -> str:
    """An evaluation's figure without the unit that its chart names already: bpb world → world."""
    first, _, rest = name.partition(" ")
    return rest if rest and first in UNITS else name


def curriculum(trace: Trace, x: XAxis) -> tuple[tuple[float, str], ...]:
    """Where each stage of the curriculum begins, with its context in tokens."""
    stages = trace.column("stage")
    contexts = [
        stage.get("context") for stage in trace.config.get("pretrain", {}).get("stages", [])
    ]
    if trace.name != "base" or not np.isfinite(stages).all() or stages.max() < 1:
        return ()
    starts = [0, *(np.flatnonzero(np.diff(stages)) + 1).tolist()]
    names = [
        contexts[int(stages[i])] if int(stages[i]) < len(contexts) else f"stage {stages[i]:.0f}"
        for i in starts
    ]
    words = [f"context {names[0]}", *map(str, names[1:])]
    return tuple(
        (float(x.at[i]) if i else 0.0, word) for i, word in zip(starts, words, strict=True)
    )


def curve(
    trace: Trace, title: str, y: str, columns: dict[str, str], x: XAxis, **looks: Any
) -> Chart | None:
    """A chart of figures noted at every step; None where none of them was."""
    noted = {name: trace.column(column) for name, column in columns.items()}
    series = [
        thinned(name, x.at, values) for name, values in noted.items() if np.isfinite(values).any()
    ]
    return Chart(title, tuple(series), x.unit, y, curriculum(trace, x), **looks) if series else None


def gradient_chart(trace: Trace, x: XAxis) -> Chart | None:
    """The gradient norm, and the steps that were skipped."""
    chart = curve(trace, "Gradient norm", "norm", {"gradient norm": "grad_norm"}, x, log_y=True)
    norms, counts = trace.column("grad_norm"), np.nan_to_num(trace.column("skipped"))
    skipped = np.flatnonzero((np.diff(counts, prepend=0) > 0) & np.isfinite(norms))
    if chart is None or not len(skipped):
        return chart
    points = Series("skipped step", numbers(x.at[skipped]), numbers(norms[skipped]), style="points")
    return Chart(chart.title, (*chart.series, points), chart.x, chart.y, chart.marks, log_y=True)


def numbers(values: Iterable[float]) -> tuple[float, ...]:
    """Values to five digits: what a chart can show, and what makes equal charts equal."""
    return tuple(float(f"{value:.5g}") for value in values)


def marked(name: str, x: np.ndarray, y: np.ndarray) -> Series:
    known = np.isfinite(y)
    return Series(name, numbers(x[known]), numbers(y[known]), style="marked")


def thinned(name: str, x: np.ndarray, y: np.ndarray) -> Series:
    """A curve of at most `POINTS` points: means over stretches of equal length, with their extremes
    as a band.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= POINTS:
        return Series(name, numbers(x), numbers(y))
    parts = np.array_split(np.arange(len(x)), POINTS)
    x, low, mean, high = (
        numbers(f(a[p]) for p in parts)
        for f, a in ((np.mean, x), (np.min, y), (np.mean, y), (np.max, y))
    )
    return Series(name, x, mean, low, high)


# ---- scores


def score_blocks(scores: list[Record], most: int = 9) -> list[Any]:
    """Bars, `most` tasks a chart, and a table of everything that was scored, the checkpoints side
    by side.
    """
    if not scores:
        return []
    order = list(STAGES)
    scores = sorted(
        scores, key=lambda s: order.index(s["stage"]) if s.get("stage") in order else len(order)
    )
    scores = sorted(scores, key=lambda s: not s.get("headline"))
    shares = [s for s in scores if s.get("metric") not in NO_SHARES]
    tasks = list(dict.fromkeys(s["task"] for s in shares))
    groups = tuple(dict.fromkeys(checkpoint_name(s) for s in shares))
    charts = []
    for part in np.array_split(np.array(tasks), -(-len(tasks) // most)) if tasks else []:
        mine = [s for task in part for s in shares if s["task"] == task]
        bars = tuple(
            Bar(
                s["task"],
                checkpoint_name(s),
                number(s["value"]),
                number(s.get("stderr")),
                number(s.get("chance")),
            )
            for s in mine
        )
        charts.append(
            Bars(
                "Scores" if len(tasks) <= most else f"Scores: {part[0]} to {part[-1]}", bars, groups
            )
        )
    legend = "A line on a bar is the standard error, an upright tick the chance level."
    return [*charts, *([Note(legend)] if charts else []), score_table(scores)]


def checkpoint_name(score: Record) -> str:
    """A checkpoint as a column's head: its run where several are shown, its stage."""
    return " ".join(str(part) for part in (score.get("run"), score.get("stage")) if part) or str(
        score.get("checkpoint")
    )


def score_table(scores: list[Record]) -> Table:
    """One row a task, one column a checkpoint."""
    groups = list(dict.fromkeys(checkpoint_name(s) for s in scores))
    tasks: dict[str, dict[str, Record]] = {}
    for s in scores:
        tasks.setdefault(s["task"], {})[checkpoint_name(s)] = s
    rows = []
    for task, by_group in tasks.items():
        some = next(iter(by_group.values()))
        chance = percent(number(some.get("chance"))) if some.get("metric") not in NO_SHARES else "–"
        rows.append(
            (
                task,
                str(some.get("metric", "")),
                *(score_text(by_group[g]) if g in by_group else "–" for g in groups),
                chance,
                str(some.get("n", "–")),
                str(some.get("shots") if some.get("shots") is not None else "–"),
            )
        )
    return Table(("Task", "Figure", *groups, "Chance", "Items", "Shots"), tuple(rows), n_left=2)


def score_text(score: Record) -> str:
    value, error = number(score["value"]), number(score.get("stderr"))
    if score.get("metric") == BPB:
        return f"{value:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")
    if score.get("metric") == "tokens":
        return f"{value:.1f}" + (f" ± {error:.1f}" if math.isfinite(error) else "")
    return percent(value) + (f" ± {100 * error:.1f}" if math.isfinite(error) else "")


# ---- samples, data, tokenizer, machine


def samples_of(run: Run, n_times: int = 6) -> list[tuple[Trace, Samples]]:
    """What the model wrote in the course of each stage, the latest stage first, at up to `n_times`
    moments of it.
    """
    found = []
    for trace in reversed(run.traces):
        records = trace.kinds.get("sample", [])
        moments = sorted({r["step"] for r in records}, reverse=True)
        kept = {
            moments[round(i)] for i in np.linspace(0, len(moments) - 1, min(n_times, len(moments)))
        }
        by_prompt: dict[str, list[tuple[str, str]]] = {}
        for record in sorted(records, key=lambda r: -r["step"]):
            if record["step"] in kept:
                when = f"{shown(log.count, number(record.get('tokens')))} tokens"
                by_prompt.setdefault(str(record.get("prompt", "")), []).append(
                    (when, str(record.get("text", "")))
                )
        if by_prompt:
            found.append(
                (
                    trace,
                    Samples(tuple((prompt, tuple(texts)) for prompt, texts in by_prompt.items())),
                )
            )
    return found


def data_blocks(run: Run) -> list[Any]:
    """What was read: the corpora with their share of the training tokens, the sets of
    conversations.
    """
    blocks: list[Any] = []
    texts = [m for m in run.manifests("text") if m.get("kind") != "chat"]
    if texts:
        head = (
            "Corpus",
            "Source",
            "Share",
            "Passes",
            "Documents",
            "Text",
            "Tokens",
            "Held out",
            "Dropped",
        )
        tokens = {m["name"]: m for m in run.manifests("tokens")}
        shares = training_shares(run, [m["name"] for m in texts])
        rows = tuple(corpus_row(run, m, tokens.get(m["name"], {}), shares) for m in texts)
        note = "Share: of the training tokens. Passes: how often the whole run reads the corpus."
        blocks.append(Table(head, rows, n_left=2, bars=2, note=note))
    chats = run.manifests("text/chat")
    if chats:
        head = ("Conversations", "Source", "Share", "Kept", "Text", "Held out", "Dropped")
        total = sum(split(m, "train").get("documents", 0) for m in chats)
        blocks.append(Table(head, tuple(chat_row(m, total) for m in chats), n_left=2, bars=2))
    return blocks


def split(manifest: Record, name: str) -> Record:
    return manifest.get("splits", {}).get(name, {})


def source_text(manifest: Record) -> str:
    """Where a corpus came from, in words."""
    source = manifest.get("source")
    if not isinstance(source, dict):
        return str(source or "–")
    where = {"demo": "the built-in world", "files": "own files"}
    named = [
        where.get(k) or str(v) for k, v in source.items() if v and k in ("hub", "files", "demo")
    ]
    revision = manifest.get("revision") or source.get("revision")
    return ", ".join(named or ["–"]) + (f" @ {str(revision)[:8]}" if revision else "")


def dropped_text(manifest: Record) -> str:
    dropped = manifest.get("dropped") or {}
    return (
        "; ".join(f"{n} {why}" for why, n in dropped.items())
        if isinstance(dropped, dict) and dropped
        else "–"
    )


def training_shares(run: Run, names: list[str]) -> dict[str, float]:
    """Each corpus' share of the training tokens, over all stages of the curriculum."""
    data = run.config.get("data", {})
    weight_of = {
        source.get("name"): number(source.get("weight")) for source in data.get("sources", [])
    }
    if data.get("text_files"):
        weight_of = {}
    in_order = [name for name in weight_of if name in names] or names
    shares = dict.fromkeys(names, 0.0)
    for stage in run.config.get("pretrain", {}).get("stages", []) or [{"share": 1.0}]:
        weights = stage.get("weights") or [weight_of.get(name, 1.0) for name in in_order]
        for name, weight in zip(in_order, weights, strict=False):
            shares[name] += number(stage.get("share", 1.0)) * weight / sum(weights)
    return shares


def corpus_row(run: Run, text: Record, tokens: Record, shares: dict[str, float]) -> tuple[str, ...]:
    train, held_out, share = split(text, "train"), split(text, "validation"), shares[text["name"]]
    n_tokens = split(tokens, "train").get("tokens", 0)
    pretrain = run.config.get("pretrain", {})
    seen = share * number(pretrain.get("steps")) * number(pretrain.get("tokens_per_step"))
    return (
        text["name"],
        source_text(text),
        percent(share),
        f"{seen / n_tokens:.2f}" if n_tokens and math.isfinite(seen) else "–",
        log.count(train.get("documents", 0)),
        log.size(train.get("text_bytes", 0)),
        log.count(n_tokens) if n_tokens else "–",
        log.count(held_out.get("documents", 0)),
        dropped_text(text),
    )


def chat_row(text: Record, total: int) -> tuple[str, ...]:
    train, held_out = split(text, "train"), split(text, "validation")
    documents = train.get("documents", 0)
    share, size = percent(documents / max(1, total)), log.size(train.get("text_bytes", 0))
    counts = (
        log.count(documents),
        size,
        log.count(held_out.get("documents", 0)),
        dropped_text(text),
    )
    return (text["name"], source_text(text), share, *counts)


def tokenizer_blocks(run: Run) -> list[Any]:
    """How large the vocabulary is, and how much text a token stands for in each corpus."""
    path = run.folder / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        return []
    size, unused, longest = vocabulary(path, path.stat().st_mtime_ns)
    facts = [
        ("Vocabulary", f"{size:,}"),
        ("Entries learnt", f"{size - unused:,}"),
        ("Longest entry", longest),
    ]
    rows = []
    for manifest in run.manifests("tokens"):
        per_split = [split(manifest, name) for name in ("train", "validation")]
        ratios = [
            f"{s['text_bytes'] / s['tokens']:.2f}" if s.get("tokens") else "–" for s in per_split
        ]
        rows.append((manifest["name"], *ratios))
    head = ("Bytes of text a token", "training text", "held-out text")
    return [Facts(tuple(facts)), *([Table(head, tuple(rows))] if rows else [])]


@lru_cache(maxsize=4)
def vocabulary(path: Path, changed: int) -> tuple[int, int, str]:
    """Entries of a tokenizer.json, how many of them are unused, and the longest as it is spelt
    there.
    """
    tokenizer = read_json(path)
    added = [entry.get("content", "") for entry in tokenizer.get("added_tokens", [])]
    words = set(tokenizer.get("model", {}).get("vocab", {})) | set(added)
    longest = max((w for w in words if w not in added), key=lambda w: (len(w), w), default="–")
    return (
        len(words),
        sum(word.startswith("<|unused_") for word in words),
        longest.replace("Ġ", " ").strip(),
    )


def machine_blocks(run: Run) -> list[Any]:
    """On what it ran, and what each stage took: hours, energy and its price."""
    rows = []
    for trace in run.traces:
        if not trace.steps:
            continue
        kwh, speed = trace.kwh(run.report), trace.tokens[-1] / max(1e-9, trace.hours[-1] * 3600)
        energy = (f"{kwh:.3g}", cost(kwh, run.report)) if math.isfinite(kwh) else ("–", "–")
        when = log.duration(trace.hours[-1] * 3600)
        counts = shown(log.count, trace.tokens[-1]), when, shown(log.count, speed)
        rows.append((trace.title, *counts, *energy))
    if not rows:
        return []
    start = run.traces[-1].start
    names = {
        "device": "Device",
        "dtype": "Computing in",
        "torch": "torch",
        "micro_batch_tokens": "Micro-batch, tokens",
    }
    facts = [(names[key], str(start[key])) for key in names if start.get(key) is not None]
    if math.isfinite(peak := number(start.get("peak_flops"))):
        facts.append(("Peak", f"{peak / 1e12:.3g} TFLOP/s"))
    note = "Time is the time spent in steps, over all starts." + (
        f" Energy at {run.report.price_per_kwh:g} {run.report.currency} a kilowatt-hour."
        if math.isfinite(run.kwh)
        else " The power was not measured: give it as --report.watts to see energy and cost."
    )
    head = ("Stage", "Tokens", "Time", "Tokens a second", "kWh", "Cost")
    return [*([Facts(tuple(facts))] if facts else []), Table(head, tuple(rows), note=note)]


# ---- two runs


def comparison_of(runs: list[Run]) -> list[Section]:
    """The page of several runs side by side."""
    scores = [{**score, "run": run.name} for run in runs for score in run.scores]
    stages = [
        name for name in STAGES if any(trace.name == name for run in runs for trace in run.traces)
    ]
    sections = [
        Section("At a glance", [glance_table(runs)]),
        *(Section(STAGES[name], stage_comparison(runs, name)) for name in stages),
        Section("Scores", score_blocks(scores)),
        Section("What was set differently", [difference_table(runs)]),
    ]
    return [section for section in sections if section.blocks]


def glance_table(runs: list[Run]) -> Table:
    """The headline figures, a column a run."""
    columns = [dict(headline(run).items) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = tuple((name, *(column.get(name, "–") for column in columns)) for name in names)
    return Table(("", *(run.name for run in runs)), rows)


def stage_comparison(runs: list[Run], stage: str) -> list[Chart]:
    """Each chart of a stage with the curves of all runs in it."""
    traces = [
        (run.name, trace)
        for run in runs
        for trace in run.traces
        if trace.name == stage and trace.steps
    ]
    short = max((trace.hours[-1] for _, trace in traces), default=0) < 2
    charts: dict[str, list[tuple[str, Chart]]] = {}
    for name, trace in traces:
        time_axis = XAxis("minutes", trace.hours * 60) if short else XAxis("hours", trace.hours)
        tokens = XAxis("tokens", trace.tokens)
        drawn = [*learning_charts(trace, tokens), *learning_charts(trace, time_axis)]
        drawn.append(
            curve(
                trace,
                "Speed",
                "tokens per second",
                {"tokens per second": "tokens_per_second"},
                tokens,
            )
        )
        for chart in drawn:
            if chart:
                charts.setdefault(chart.title, []).append((name, chart))
    return [merged(title, found, [run.name for run in runs]) for title, found in charts.items()]


def merged(title: str, charts: list[tuple[str, Chart]], runs: list[str]) -> Chart:
    """One chart with the curves of several: a colour a run, a kind of line a figure."""
    names = list(dict.fromkeys(s.name for _, chart in charts for s in chart.series))
    series = [
        Series(
            f"{run}: {s.name}" if len(names) > 1 else run,
            s.x,
            s.y,
            style=s.style,
            colour=runs.index(run),
            dash=names.index(s.name),
        )
        for run, chart in charts
        for s in chart.series
    ]
    return Chart(title, tuple(series), charts[0][1].x, charts[0][1].y)


def difference_table(runs: list[Run]) -> Table | Note:
    """Every field of the configuration in which the runs differ."""
    flat = [flattened(run.config) for run in runs]
    names = sorted({name for fields in flat for name in fields})
    rows = [(name, *(fields.get(name, "–") for fields in flat)) for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return Note("Nothing: the configurations are the same.")
    return Table(("Field", *(run.name for run in runs)), tuple(rows), n_left=len(runs) + 1)


def config_text(config: Record) -> str:
    """The configuration, a field a line."""
    return "\n".join(f"{name} = {value}" for name, value in flattened(config).items())


def flattened(value: Any, name: str = "") -> dict[str, str]:
    """Nested dictionaries as one: a.b.c → text."""
    if not isinstance(value, dict):
        return {name: json.dumps(value, ensure_ascii=False)}
    return {
        k: v
        for key, item in value.items()
        for k, v in flattened(item, f"{name}.{key}".lstrip(".")).items()
    }
