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
from hearth.run import STAGES as ROAD
from hearth.run import TRAINED
from hearth.storage import write_text

# the stages of training in the order of the road: folder's name → title
STAGES = {name: ROAD[name].title for name in TRAINED}
POINTS = 300  # points of a curve at most; more are averaged, and their extremes shown as a band
BUSY_SHARE = 0.05  # of the time of a run that trains, at most, goes into drawing

Record = dict[str, Any]


# --------------------------------------------------------------------------------- making the pages


def write(config: Config) -> Path:
    """Draw the report of the run; gives the page's path."""
    run = Run(config.run_dir, config)
    return _write(run.folder / "report", "index", run.name, sections_of(run), going=run.going)


def compare(folders: Sequence[Path], config: Config) -> Path:
    """Draw several runs side by side; gives the page's path, in the first one's report."""
    named = zip(folders, run_names(folders), strict=True)
    runs = [Run(folder, config, name) for folder, name in named]
    stem = "compare-" + "-".join(run.name.replace("/", "-") for run in runs[1:])
    title = " and ".join(run.name for run in runs)
    going = any(run.going for run in runs)
    return _write(runs[0].folder / "report", stem, title, comparison_of(runs), going=going)


def run_names(folders: Sequence[Path]) -> list[str]:
    """What several runs are called: as much of the end of their paths as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    for n in range(1, max(len(path.parts) for path in paths)):
        names = [Path(*path.parts[-n:]).as_posix() for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [path.as_posix() for path in paths]


def _write(folder: Path, stem: str, title: str, sections: list[Section], *, going: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{stem}.html"
    write_text(folder / f"{'report' if stem == 'index' else stem}.md", to_markdown(title, sections))
    write_text(page, to_html(title, sections, going=going))
    return page


class Reporter:
    """Draws the report of a run while it trains. A failure is printed and never stops the run."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._next = 0.0  # when drawing is due again

    def refresh(self, *, due: bool = False) -> None:
        """Draw the report, unless drawing would take more than `BUSY_SHARE` of the time; `due`
        draws it in any case.
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
    """Draw the report of the run at the end of a stage. A failure is printed, never raised."""
    Reporter(config).refresh(due=True)


# ------------------------------------------------------------------------------------- what is read
# Files may be damaged, half written or of another version: whatever is not of the kind expected
# counts as missing from here on.


def read_json(path: Path) -> Record:
    """A JSON object, empty where the file is missing, being written, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_scores(path: Path) -> list[Record]:
    """The scores in a score.json: records that name a task and hold a finite value."""
    found = records(read_json(path).get("scores"))
    return [s for s in found if isinstance(s.get("task"), str) and is_known(s.get("value"))]


def part(value: Any, *names: str) -> Record:
    """The object at `names` inside nested JSON, empty where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def records(value: Any) -> list[Record]:
    """The objects in a JSON list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def number(value: Any) -> float:
    """`value` as a float, NaN where it is no number or larger than any figure of a run."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    return float(value) if known else math.nan


def is_known(value: Any) -> bool:
    return math.isfinite(number(value))


def shown(show: Callable[[float], str], value: Any) -> str:
    """A figure in words, a dash where it is not known."""
    return show(number(value)) if is_known(value) else "–"


class Trace:
    """What one stage of training noted of itself."""

    def __init__(self, folder: Path) -> None:
        self.name, self.title = folder.name, STAGES.get(folder.name, folder.name)
        self.kinds: dict[str, list[Record]] = {}
        for record in log.read_metrics(folder / "metrics.jsonl"):
            self.kinds.setdefault(str(record.get("kind")), []).append(record)
        self._columns: dict[tuple[str, str], np.ndarray] = {}
        self.start = self.kinds.get("start", [{}])[-1]  # what the latest start noted
        self.steps, self.tokens = self.kinds.get("step", []), self.column("tokens")
        self.step = self.steps[-1]["step"] if self.steps else 0
        n_steps = number(self.start.get("steps"))
        self.n_steps = int(n_steps) if n_steps >= 1 else None  # that it takes in all
        self.done = self.n_steps is not None and self.step >= self.n_steps
        checkpoints = sorted(folder.glob("step-*"))
        self.config = read_json(checkpoints[-1] / "config.json") if checkpoints else {}

    def column(self, name: str, kind: str = "step") -> np.ndarray:
        """A figure of every record of a kind, NaN where it was not noted."""
        if (name, kind) not in self._columns:
            values = (record.get(name) for record in self.kinds.get(kind, []))
            self._columns[name, kind] = np.array(
                # nearly all are plain floats: asking `number` for each would take twice as long
                [v if type(v) is float and -1e30 < v < 1e30 else number(v) for v in values]
            )
        return self._columns[name, kind]

    @cached_property
    def hours(self) -> np.ndarray:
        """Hours of training at each step; estimated from the speed where they were not noted."""
        if np.isfinite(noted := self.column("seconds")).all():
            return noted / 3600
        with np.errstate(divide="ignore", invalid="ignore"):
            taken = np.diff(self.tokens, prepend=0) / self.column("tokens_per_second")
        return np.cumsum(np.nan_to_num(taken, posinf=0, neginf=0)) / 3600

    def kwh(self, report: ReportConfig) -> float:
        """Energy of the stage in kilowatt-hours: as noted, or from the configured power; NaN where
        unknown.
        """
        if np.isfinite(noted := self.column("kwh")).any():
            return float(np.nanmax(noted))
        watts = self.column("watts")
        if not np.isfinite(watts).any():
            watts = np.full(len(self.steps), number(report.watts))
        spent = np.diff(self.hours, prepend=0) * watts
        return float(np.sum(spent)) / 1000 if len(watts) else math.nan


class Run:
    """What a run's folder holds, each part empty where it is missing."""

    def __init__(self, folder: Path, config: Config, name: str | None = None) -> None:
        self.folder, self.name = Path(folder), name or Path(folder).resolve().name
        stages = [self.folder / name for name in STAGES]
        self.traces = [Trace(stage) for stage in stages if (stage / "metrics.jsonl").is_file()]
        saved = [trace.config for trace in self.traces if trace.config]
        self.config = saved[-1] if saved else json.loads(json.dumps(asdict(config)))
        self.report, self.scores = config.report, read_scores(self.folder / "report" / "score.json")
        self.going = any(not trace.done for trace in self.traces)
        self.hours = float(sum(trace.hours[-1] for trace in self.traces if trace.steps))
        self.tokens = float(sum(trace.tokens[-1] for trace in self.traces if trace.steps))
        kwh = [trace.kwh(self.report) for trace in self.traces]
        self.kwh = float(sum(kwh)) if kwh else math.nan

    def manifests(self, place: str) -> list[Record]:
        """The finished manifests below one of the run's folders, each with its folder's name as
        `name`.
        """
        paths = sorted((self.folder / place).glob("*/manifest.json"))
        found = [{**read_json(path), "name": path.parent.name} for path in paths]
        return [manifest for manifest in found if len(manifest) > 1]


# ------------------------------------------------------------------------------ what the page shows


def sections_of(run: Run) -> list[Section]:
    """The page of one run, top to bottom; sections with nothing to show are left out."""
    trained = [Section(trace.title, training_blocks(trace)) for trace in run.traces]
    settings = [f"{name} = {value}" for name, value in flattened(run.config).items()]
    sections = [
        Section("At a glance", [headline(run)]),
        *trained,
        Section("What practice brought", practice_blocks(run)),
        Section("Scores", score_blocks(run.scores)),
        Section(
            "Samples by tokens seen",
            [Folded(t.title, (s,)) if i else s for i, (t, s) in enumerate(samples_of(run))],
        ),
        Section("Data", data_blocks(run)),
        Section("Tokenizer", tokenizer_blocks(run)),
        Section("Machine, time and cost", machine_blocks(run)),
        Section("Configuration", [Folded("Everything that was set", (Code("\n".join(settings)),))]),
    ]
    return [section for section in sections if section.blocks]


def headline(run: Run) -> Facts:
    """The figures that a person looks for first."""
    items = [("Status", status(run))]
    parameters = [n for trace in run.traces if is_known(n := trace.start.get("parameters"))]
    items += [("Parameters", log.count(n)) for n in parameters[-1:]]
    items += [("Tokens", shown(log.count, run.tokens)), ("Time", time_text(run.hours))]
    for trace in run.traces:
        items += [(f"{name}, {trace.name}", f"{value:.3f}") for name, value in held_out_now(trace)]
    items += [
        (f"{s['task']}, {s.get('stage', '')}", percent(number(s["value"])))
        for s in run.scores
        if s.get("headline")
    ]
    if is_known(run.kwh):
        items += [("Energy", f"{run.kwh:.3g} kWh"), ("Cost", cost(run.kwh, run.report))]
    return Facts(tuple(items))


def time_text(hours: float) -> str:
    return shown(log.duration, 3600 * hours)


def status(run: Run) -> str:
    """Where the run stands, in a few words."""
    if not run.traces:
        return "no training yet"
    last = run.traces[-1]
    if last.done:
        return f"{last.title}: done"
    share = f"{last.step / last.n_steps:.0%}" if last.n_steps else f"step {last.step}"
    left = number(last.steps[-1].get("eta_seconds")) if last.steps else math.nan
    return f"{last.title}: {share}" + (f", {log.duration(left)} left" if is_known(left) else "")


def held_out_now(trace: Trace) -> list[tuple[str, float]]:
    """The mean of the latest held-out figures of each unit, such as bits per byte over
    all corpora.
    """
    units: dict[str, list[float]] = {}
    for name, value in trace.kinds.get("eval", [{}])[-1].items():
        if (group := group_of(name)) in UNITS.values() and is_known(value):
            units.setdefault(group, []).append(value)
    return [(f"Held-out {unit}", float(np.mean(values))) for unit, values in units.items()]


BPB = "bits per byte"
NO_SHARES = (BPB, "tokens")  # metrics of scores that are no part of one
PASS = "pass@1"
UNITS = {"bpb": BPB, "loss": "loss", PASS: PASS}
CYCLES, PROBES = "loss by cycle of the reasoning head", "probes"
HEAD = "reasoning head: size of its states, change by its last cycle in nats, share of the time"


def group_of(name: str) -> str:
    """The chart that an evaluation's figure belongs to: a unit that its first word names, cycles,
    or probes.
    """
    if name.startswith("head "):
        return HEAD
    return CYCLES if "cycle" in name else UNITS.get(name.partition(" ")[0], PROBES)


def cost(kwh: float, report: ReportConfig) -> str:
    price = kwh * report.price_per_kwh
    return f"{price:.2f} {report.currency}" if price >= 0.01 else f"{price:.2g} {report.currency}"


# ---- training


# how training ran: title, unit if it has one, name in words, figure of a step, axis from zero
RUNNING = (
    ("Learning rate", "", "learning rate", "lr", True),
    ("Gradient norm", "", "gradient norm", "grad_norm", False),
    ("Speed", "tokens per second", "tokens per second", "tokens_per_second", True),
    ("Model FLOPs utilisation", "share of the peak", "MFU", "mfu", True),
    ("Memory", "GB", "memory", "memory_gb", True),
    ("Power", "watts", "power", "watts", True),
    ("Temperature", "degrees Celsius", "card", "temperature_c", False),
)

# what a rollout of reinforcement learning was like, as above
ROLLOUTS = (
    ("Reward of a rollout", "mean", "reward", "reward", True),
    ("Answers that stop by themselves", "share", "stops", "stops", True),
    ("Length of an answer", "tokens", "length", "length", True),
    ("Entropy of a token", "nats", "entropy", "entropy", True),
    ("Groups with nothing to learn from", "share", "dead groups", "dead_groups", True),
    ("Engine against training pass", "nats", "largest difference", "mismatch", True),
    ("Rollouts' share of a step's time", "share", "rollouts", "rollout_share", True),
)


def training_blocks(trace: Trace) -> list[Any]:
    """Curves of one stage of training: what it learned in sight, how it ran folded away."""
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
    learning += [c for figure in ROLLOUTS if (c := curve(trace, *figure, x=tokens))]
    running = [curve(trace, *figure, x=tokens) for figure in RUNNING]
    facts = [
        ("Steps", f"{trace.step}" + (f" of {trace.n_steps}" if trace.n_steps else "")),
        ("Tokens", shown(log.count, trace.tokens[-1])),
        ("Time", time_text(trace.hours[-1])),
    ]
    skipped = trace.column("skipped")
    if np.isfinite(skipped).any():
        facts.append(("Skipped steps", f"{np.nanmax(skipped):.0f}"))
    drawn = tuple(chart for chart in running if chart)
    folded = [Folded("How it ran: learning rate, gradient, speed, memory", drawn)] if drawn else []
    return [Facts(tuple(facts)), *learning, *folded]


@dataclass(frozen=True)
class XAxis:
    """What a stage's figures are drawn over: a value at every step."""

    unit: str
    at: np.ndarray


def x_axes(trace: Trace, short: bool | None = None) -> tuple[XAxis, XAxis]:
    """Tokens seen, and the time taken, in hours or, where that is `short`, in minutes."""
    short = trace.hours[-1] < 2 if short is None else short
    taken = XAxis("minutes", trace.hours * 60) if short else XAxis("hours", trace.hours)
    return XAxis("tokens", trace.tokens), taken


def learning_charts(trace: Trace, x: XAxis) -> list[Chart]:
    """The training loss and every held-out figure over `x`, the curriculum's stages marked."""
    title = f"Training loss over {x.unit}"
    training = curve(trace, title, "nats per token", "training loss", "loss", x=x)
    # of reinforcement learning it says nothing: what its rollouts earn stands in its place
    charts = [training] if training and trace.name != "rl" else []
    for kind in ("eval", "probe"):
        groups: dict[str, list[Series]] = {}
        at = np.interp(trace.column("step", kind), trace.column("step"), x.at)
        for name in figure_names(trace, kind):
            group = PROBES if kind == "probe" else group_of(name)
            series = marked(short_name(name), at, trace.column(name, kind))
            groups.setdefault(group, []).append(series)
        for group, series in groups.items():
            title = f"Held-out {group}" if group in UNITS.values() else group.capitalize()
            title, marks = f"{title} over {x.unit}", curriculum(trace, x)
            y = {BPB: group, PASS: "share right", PROBES: "share", HEAD: "value"}.get(
                group, "nats per token"
            )
            charts.append(Chart(title, tuple(series), x.unit, y, marks))
    return charts


def figure_names(trace: Trace, kind: str) -> list[str]:
    """The names of all numbers that records of a kind note, in the order of their first
    appearance.
    """
    noted = (figure for record in trace.kinds.get(kind, []) for figure in record.items())
    names = dict.fromkeys(name for name, value in noted if is_known(value))
    return [name for name in names if name not in ("step", "tokens", "seconds")]


def short_name(name: str) -> str:
    """An evaluation's figure without the unit that its chart names already: bpb world → world."""
    first, _, rest = name.partition(" ")
    return rest if rest and first in UNITS else name


def curriculum(trace: Trace, x: XAxis) -> tuple[tuple[float, str], ...]:
    """Where each stage of the curriculum begins, with its context in tokens."""
    stages = trace.column("stage")
    if trace.name != "base" or not np.isfinite(stages).all() or stages.max() < 1:
        return ()
    settings = records(part(trace.config, "pretrain").get("stages"))
    contexts = {float(i): stage.get("context") for i, stage in enumerate(settings)}
    starts = [0, *(np.flatnonzero(np.diff(stages)) + 1).tolist()]
    names = [str(contexts.get(stages[i], f"stage {stages[i]:.0f}")) for i in starts]
    words = [f"context {names[0]}", *names[1:]]
    places = [0.0, *(float(x.at[i]) for i in starts[1:])]
    return tuple((at, word) for at, word in zip(places, words, strict=True) if math.isfinite(at))


def curve(
    trace: Trace, title: str, y: str, name: str, column: str, from_zero: bool = False, *, x: XAxis
) -> Chart | None:
    """A chart of a figure noted at every step, with the steps that were skipped where it is the
    gradient norm; None where it was never noted.
    """
    values = trace.column(column)
    series = [thinned(name, x.at, values)]
    if not series[0].y:
        return None
    is_norm = column == "grad_norm"
    if is_norm:
        counts = np.nan_to_num(trace.column("skipped"))
        seen = np.isfinite(values) & np.isfinite(x.at)
        skipped = np.flatnonzero((np.diff(counts, prepend=0) > 0) & seen)
        points = numbers(x.at[skipped]), numbers(values[skipped])
        series += [Series("skipped step", *points, style="points")] if len(skipped) else []
    marks = curriculum(trace, x)
    return Chart(title, tuple(series), x.unit, y, marks, log_y=is_norm, from_zero=from_zero)


def numbers(values: Iterable[float]) -> tuple[float, ...]:
    """Values to five digits: what a chart can show, and what makes equal charts equal."""
    return tuple(float(f"{value:.5g}") for value in values)


def marked(name: str, x: np.ndarray, y: np.ndarray) -> Series:
    known = np.isfinite(x) & np.isfinite(y)
    return Series(name, numbers(x[known]), numbers(y[known]), style="marked")


def thinned(name: str, x: np.ndarray, y: np.ndarray) -> Series:
    """A curve of at most `POINTS` points: means over stretches of equal length, with their extremes
    as a band.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= POINTS:
        return Series(name, numbers(x), numbers(y))
    sizes = len(x) // POINTS + (np.arange(POINTS) < len(x) % POINTS)
    starts = np.cumsum(sizes) - sizes
    low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    means = [np.add.reduceat(values, starts) / sizes for values in (x, y)]
    return Series(name, *map(numbers, (*means, low, high)))


# ---- practice


def practice_blocks(run: Run) -> list[Any]:
    """Reinforcement learning: problems that were never practised, before and after; answers to a
    few of them side by side; what else changed.
    """
    results = read_json(run.folder / "rl" / "results.json")
    when = [name for name in ("before", "after") if part(results, name)]
    names = list(part(results, "before", "environments"))
    found = {(w, n): part(results, w, "environments", n) for w in when for n in names}
    rows = []
    for name in names:
        figures = [k for k in found["before", name] if k.startswith("pass@")]
        for figure in figures:
            rows.append((name, figure, *(interval(found[w, name].get(figure)) for w in when)))
        rows.append((name, "stops", *(shown(percent, found[w, name].get("stops")) for w in when)))
        length = (shown("{:.0f} tokens".format, found[w, name].get("length")) for w in when)
        rows.append((name, "length", *length))
        rows += call_rows(name, [found[w, name] for w in when])
    blocks: list[Any] = []
    if rows:
        blocks += [Table(("Problems", "Figure", *when), tuple(rows), n_left=2), Note(INTERVALS)]
    answers = [row for name in names for row in answer_rows([found[w, name] for w in when])]
    if answers:
        table = Table(("Problem", "Right answer", *when), tuple(answers), n_left=4)
        blocks.append(Folded("Answers before and after", (table,)))
    other = [part(results, w, "elsewhere") for w in when]
    if other and other[0]:
        rows = [(name, *(shown("{:.3f}".format, o.get(name)) for o in other)) for name in other[0]]
        blocks += [Note("What was not practised:"), Table(("Figure", *when), tuple(rows))]
    return blocks


INTERVALS = "Problems that were never practised, several sampled answers each; ± is a 95% interval."


def interval(value: Any) -> str:
    """A share and the half of its interval, in words."""
    if not (isinstance(value, list) and len(value) == 2 and is_known(value[0])):
        return "–"
    return percent(value[0]) + (f" ± {100 * value[1]:.1f}" if is_known(value[1]) else "")


def call_rows(name: str, found: list[Record]) -> list[tuple[str, ...]]:
    """Calls of tools an answer, by kind of problem; nothing where there never was one."""
    calls = [part(result, "tool calls") for result in found]
    if not any(number(value) > 0 for kinds in calls for value in kinds.values()):
        return []
    kinds = dict.fromkeys(kind for each in calls for kind in each)
    return [
        (name, f"calls, {kind}", *(shown("{:.2f}".format, each.get(kind)) for each in calls))
        for kind in kinds
    ]


def answer_rows(found: list[Record]) -> list[tuple[str, ...]]:
    """Problem, right answer, and what was said each time."""
    said = [{str(s.get("prompt")): s for s in records(result.get("samples"))} for result in found]
    return [
        (
            str(prompt),
            str(sample.get("expected")),
            *(str(s.get(prompt, {}).get("said")) for s in said),
        )
        for prompt, sample in (said[0] if said else {}).items()
    ]


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
    for first in range(0, len(tasks), most):
        names = tasks[first : first + most]
        bars = tuple(bar_of(s) for name in names for s in shares if s["task"] == name)
        title = "Scores" if len(tasks) <= most else f"Scores: {names[0]} to {names[-1]}"
        charts.append(Bars(title, bars, groups))
    legend = "A line on a bar is the standard error, an upright tick the chance level."
    return [*charts, *([Note(legend)] if charts else []), score_table(scores)]


def bar_of(score: Record) -> Bar:
    value, error, chance = (number(score.get(name)) for name in ("value", "stderr", "chance"))
    return Bar(score["task"], checkpoint_name(score), value, error, chance)


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
        metric, chance = str(some.get("metric", "")), percent(number(some.get("chance")))
        counts = (shown("{:.0f}".format, some.get(name)) for name in ("n", "shots"))
        cells = (score_text(by_group[g]) if g in by_group else "–" for g in groups)
        rows.append((task, metric, *cells, "–" if metric in NO_SHARES else chance, *counts))
    return Table(("Task", "Figure", *groups, "Chance", "Items", "Shots"), tuple(rows), n_left=2)


def score_text(score: Record, width: int = 0) -> str:
    """A score in words, with its standard error in at least `width` characters where it has one."""
    value, error = number(score["value"]), number(score.get("stderr"))
    if score.get("metric") == BPB:
        said, spread = f"{value:.4f}", f"{error:.4f}"
    elif score.get("metric") == "tokens":
        said, spread = f"{value:.1f}", f"{error:{width}.1f}"
    else:
        said, spread = percent(value), f"{100 * error:{width}.1f}"
    return f"{said} ± {spread}" if math.isfinite(error) else said


# ---- samples, data, tokenizer, machine


def samples_of(run: Run, n_times: int = 6) -> list[tuple[Trace, Samples]]:
    """What the model wrote in the course of each stage, the latest stage first, at up to `n_times`
    moments of it.
    """
    found = []
    for trace in reversed(run.traces):
        noted = sorted(trace.kinds.get("sample", []), key=lambda record: -record["step"])
        moments = list(dict.fromkeys(record["step"] for record in noted))
        last = len(moments) - 1
        kept = {moments[round(i)] for i in np.linspace(0, last, min(n_times, len(moments)))}
        by_prompt: dict[str, list[tuple[str, str]]] = {}
        for record in (record for record in noted if record["step"] in kept):
            when = f"{shown(log.count, record.get('tokens'))} tokens"
            texts = by_prompt.setdefault(str(record.get("prompt", "")), [])
            texts.append((when, str(record.get("text", ""))))
        if by_prompt:
            texts_of = ((prompt, tuple(texts)) for prompt, texts in by_prompt.items())
            found.append((trace, Samples(tuple(texts_of))))
    return found


def data_blocks(run: Run) -> list[Any]:
    """What was read: the corpora with their share of the training tokens, the sets of
    conversations.
    """
    blocks: list[Any] = []
    common = ("Documents", "Text", "Held out", "Dropped")
    if texts := [m for m in run.manifests("text") if m.get("kind") != "chat"]:
        tokens = {
            m["name"]: part(m, "splits", "train").get("tokens") for m in run.manifests("tokens")
        }
        shares = training_shares(run, [m["name"] for m in texts])
        rows = tuple(corpus_row(run, m, number(tokens.get(m["name"])), shares) for m in texts)
        note = "Share: of the training tokens. Epochs: how often the whole run reads the corpus."
        head = ("Corpus", "Source", "Share", "Epochs", "Tokens", *common)
        blocks += [Table(head, rows, n_left=2, bars=2), Note(note)]
    if chats := run.manifests("text/chat"):
        counts = [number(part(m, "splits", "train").get("documents")) for m in chats]
        total = max(1.0, float(np.nansum(counts)))
        rows = tuple(
            (m["name"], source_text(m), percent(n / total), *manifest_cells(m))
            for m, n in zip(chats, counts, strict=True)
        )
        blocks.append(Table(("Conversations", "Source", "Share", *common), rows, n_left=2, bars=2))
    return blocks


def manifest_cells(manifest: Record) -> tuple[str, ...]:
    """Documents, bytes of text, held-out documents, what was dropped."""
    train, held_out = part(manifest, "splits", "train"), part(manifest, "splits", "validation")
    return (
        shown(log.count, train.get("documents")),
        shown(log.size, train.get("text_bytes")),
        shown(log.count, held_out.get("documents")),
        "; ".join(f"{n} {why}" for why, n in part(manifest, "dropped").items()) or "–",
    )


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


def training_shares(run: Run, names: list[str]) -> dict[str, float]:
    """Each corpus' share of the training tokens, over all stages of the curriculum."""
    data = part(run.config, "data")
    sources = [] if data.get("text_files") else records(data.get("sources"))
    weight_of = {str(source.get("name")): source.get("weight") for source in sources}
    in_order = [name for name in weight_of if name in names] or names
    shares = dict.fromkeys(names, 0.0)
    for stage in records(part(run.config, "pretrain").get("stages")) or [{"share": 1.0}]:
        given = stage.get("weights") or [weight_of.get(name, 1.0) for name in in_order]
        weights = np.array([number(w) for w in given]) if isinstance(given, list) else np.ones(0)
        for name, weight in zip(in_order, weights / (weights.sum() or 1.0), strict=False):
            shares[name] += number(stage.get("share", 1.0)) * float(weight)
    return shares


def corpus_row(
    run: Run, text: Record, n_tokens: float, shares: dict[str, float]
) -> tuple[str, ...]:
    pretrain, share = part(run.config, "pretrain"), shares[text["name"]]
    seen = share * number(pretrain.get("steps")) * number(pretrain.get("tokens_per_step"))
    epochs = shown("{:.2f}".format, seen / n_tokens if n_tokens > 0 else None)
    counts = percent(share), epochs, shown(log.count, n_tokens)
    return (text["name"], source_text(text), *counts, *manifest_cells(text))


def tokenizer_blocks(run: Run) -> list[Any]:
    """How large the vocabulary is, and how many bytes a token stands for in each corpus."""
    path = run.folder / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        return []
    size, unused = vocabulary(path, path.stat().st_mtime_ns)
    facts = (("Vocabulary", f"{size:,}"), ("Learned entries", f"{size - unused:,}"))
    rows = []
    for manifest in run.manifests("tokens"):
        cells = []
        for part_name in ("train", "validation"):
            counts = part(manifest, "splits", part_name)
            n_bytes, n = number(counts.get("text_bytes")), number(counts.get("tokens"))
            cells.append(shown("{:.2f}".format, n_bytes / n if n > 0 else None))
        rows.append((manifest["name"], *cells))
    head = ("Bytes of text per token", "training text", "held-out text")
    return [Facts(facts), *([Table(head, tuple(rows))] if rows else [])]


@lru_cache(maxsize=4)
def vocabulary(path: Path, changed: int) -> tuple[int, int]:
    """Entries of a tokenizer.json, and how many of them are unused."""
    tokenizer = read_json(path)
    words = {str(entry.get("content")) for entry in records(tokenizer.get("added_tokens"))}
    words |= set(part(tokenizer, "model", "vocab"))
    return len(words), sum(word.startswith("<|unused_") for word in words)


def machine_blocks(run: Run) -> list[Any]:
    """On what it ran, and what each stage took: hours, energy and its price."""
    rows = []
    for trace in (trace for trace in run.traces if trace.steps):
        kwh, hours, n_tokens = trace.kwh(run.report), trace.hours[-1], trace.tokens[-1]
        speed = shown(log.count, n_tokens / max(1e-9, hours * 3600))
        energy = (f"{kwh:.3g}", cost(kwh, run.report)) if math.isfinite(kwh) else ("–", "–")
        rows.append((trace.title, shown(log.count, n_tokens), time_text(hours), speed, *energy))
    if not rows:
        return []
    start = run.traces[-1].start
    names = {
        "device": "Device",
        "dtype": "Compute dtype",
        "torch": "torch",
        "micro_batch_tokens": "Micro-batch, tokens",
    }
    facts = [(names[key], str(start[key])) for key in names if start.get(key) is not None]
    if is_known(peak := start.get("peak_flops")):
        facts.append(("Peak", f"{peak / 1e12:.3g} TFLOP/s"))
    note = "Time is the time spent in steps, over all starts." + (
        f" Energy at {run.report.price_per_kwh:g} {run.report.currency} per kilowatt-hour."
        if math.isfinite(run.kwh)
        else " The power was not measured: give it as --report.watts to see energy and cost."
    )
    head = ("Stage", "Tokens", "Time", "Tokens per second", "kWh", "Cost")
    return [*([Facts(tuple(facts))] if facts else []), Table(head, tuple(rows)), Note(note)]


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
    traces = [(run.name, t) for run in runs for t in run.traces if t.name == stage and t.steps]
    short = max((trace.hours[-1] for _, trace in traces), default=0) < 2
    speed = next(figure for figure in RUNNING if figure[0] == "Speed")
    charts: dict[str, list[tuple[str, Chart]]] = {}
    for name, trace in traces:
        tokens, taken = x_axes(trace, short)
        drawn = [*learning_charts(trace, tokens), *learning_charts(trace, taken)]
        for chart in (*drawn, curve(trace, *speed, x=tokens)):
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


def flattened(value: Any, name: str = "") -> dict[str, str]:
    """Nested dictionaries as one: a.b.c → text."""
    if not isinstance(value, dict) or name.count(".") > 9:  # deeper than any config
        return {name: json.dumps(value, ensure_ascii=False)}
    return {
        k: v
        for key, item in value.items()
        for k, v in flattened(item, f"{name}.{key}".lstrip(".")).items()
    }
