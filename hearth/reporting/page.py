"""A page of figures: blocks of what it shows, and those blocks as HTML, as Markdown, and as charts.

In: sections of blocks. Out: one HTML page with nothing to load (`page.html`, `report.css`), or
Markdown with the charts put into words (`page.md`). Knows nothing of runs, models or training.
"""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from hearth import log

STYLE = Path(__file__).with_name("report.css")

# ------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Facts:
    """Figures that are read one by one: name → value."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """Rows of text. `bars` is a column of shares in percent that get a bar behind them."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    n_left: int = 1  # columns of words; the others hold numbers
    bars: int | None = None


@dataclass(frozen=True)
class Series:
    """One curve; `low` and `high` are a band around it."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    style: str = "line"  # line, marked (a line with its points) or points
    colour: int | None = None  # which of the page's colours; None takes them in turn
    dash: int = 0  # which kind of line


@dataclass(frozen=True)
class Chart:
    """Curves over tokens or time. `marks` are (x, text) where something changes, such as the
    curriculum's stage.
    """

    title: str
    series: tuple[Series, ...]
    x: str  # what lies below: tokens, hours or minutes
    y: str  # what stands at the side
    marks: tuple[tuple[float, str], ...] = ()
    log_y: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Bar:
    """One score of one checkpoint."""

    label: str
    group: str
    value: float
    stderr: float
    chance: float


@dataclass(frozen=True)
class Bars:
    """Scores as bars, one group a colour, with the standard error as a whisker and chance as a
    tick.
    """

    title: str
    bars: tuple[Bar, ...]
    groups: tuple[str, ...]  # in the order of their colours


@dataclass(frozen=True)
class Samples:
    """What the model made of each prompt: prompt → (when, text), the latest first."""

    by_prompt: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True)
class Code:
    """Text as it stands in a file."""

    text: str


@dataclass(frozen=True)
class Note:
    text: str


@dataclass(frozen=True)
class Folded:
    """Blocks behind a title to click on."""

    title: str
    blocks: tuple[Any, ...]


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Any] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


# ---------------------------------------------------------------------------------- HTML, Markdown


def to_html(title: str, sections: Sequence[Section], *, going: bool) -> str:
    """The page as one HTML file; `going` makes it reload itself every half minute."""
    facts = {
        "going": going,
        "drawn": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "style": STYLE.read_text(encoding="utf-8"),
    }
    return template("page.html").render(title=title, sections=sections, **facts)


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The page as Markdown, each chart as the sentence that describes it."""
    return template("page.md").render(title=title, sections=sections).rstrip() + "\n"


@lru_cache(maxsize=2)
def template(name: str) -> Any:
    """One of the two templates beside this file. Both escape every value unless it is marked
    `safe`: for HTML by Jinja's own rule, for Markdown by `md`.
    """
    import jinja2

    as_html = name.endswith(".html")
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(STYLE.parent),
        autoescape=as_html,
        finalize=None if as_html else lambda v: v if hasattr(v, "__html__") else md(v),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    kinds = {kind.__name__.lower(): kind for kind in (Facts, Table, Samples, Code, Folded)}
    for name_of_kind, kind in (*kinds.items(), ("drawn", Chart | Bars)):
        engine.tests[name_of_kind] = lambda block, kind=kind: isinstance(block, kind)
    engine.filters |= {"describe": describe, "draw": lambda block: draw(block), "aligned": aligned}
    engine.filters |= {"neighbours": neighbours, "unfolded": unfolded}
    return engine.get_template(name)


def neighbours(blocks: Iterable[Any]) -> Iterable[tuple[bool, Iterable[Any]]]:
    """Blocks in order, charts that follow each other together: they share a grid."""
    return groupby(blocks, key=lambda block: isinstance(block, Chart | Bars))


def unfolded(blocks: Iterable[Any]) -> Iterable[Any]:
    """Blocks in order, what is folded after its title."""
    for block in blocks:
        yield block
        if isinstance(block, Folded):
            yield from unfolded(block.blocks)


def md(text: Any) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_<>|#\[\]])", r"\\\1", " ".join(str(text).split()))


def aligned(table: Table) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    rows = [[md(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.head))]
    rule = ["-" * w if i < table.n_left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [
            f"{cell:{'<' if i < table.n_left else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ drawing


def percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "–"


def describe(block: Chart | Bars) -> str:
    """A chart in words, for those who cannot see it."""
    if isinstance(block, Bars):
        words = [
            f"{b.label} {b.group} {percent(b.value)} (chance {percent(b.chance)})"
            for b in block.bars
        ]
        return "; ".join(words) + "."
    words = []
    for s in block.series:
        if not s.y:
            continue
        first, last = plain(s.y[0]), plain(s.y[-1])
        where = f"{log.count(s.x[-1]) if block.x == 'tokens' else plain(s.x[-1])} {block.x}"
        course = (
            f"{first} at the start, {last} after {where}"
            if len(s.y) > 1
            else f"{last} after {where}"
        )
        words.append(
            f"{s.name}: {len(s.y)}, the last after {where}"
            if s.style == "points"
            else f"{s.name}: {course}"
        )
    marks = " → ".join(text for _, text in block.marks)
    return "; ".join(words) + "." + (f" In stages: {marks} tokens." if marks else "")


def plain(value: float) -> str:
    """A number to three digits, without an exponent where it is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# matplotlib draws in these stand-ins, and the page's style sheet says what they look like, by day
# and by night
INK, MUTED, GRID = "#010101", "#010102", "#010103"
COLOURS = tuple(f"#0101{n:02x}" for n in range(0x10, 0x16))
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    **{c: f"--c{i + 1}" for i, c in enumerate(COLOURS)},
}
# of every figure, in inches: the page shows it about 1.4 times as large, on a phone as on a wide
# screen
WIDTH, HEIGHT = 3.7, 2.35
LINE, FITTING_LINES = 0.153, 4  # of text above the curves: inches of one; more make it higher
DASHES = ("-", (0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1, 1.5)))


@lru_cache(maxsize=256)
def draw(block: Chart | Bars) -> str:
    """The chart as SVG behind its `<svg `, in the page's colours; equal charts are drawn once."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{block}",  # ids that no other figure of the page has
        "font.size": 7.5,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.linewidth": 0.6,
        "lines.linewidth": 1.3,
        "lines.markersize": 3.0,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        paint = paint_chart if isinstance(block, Chart) else paint_bars
        figure = Figure()
        paint(figure, block)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return in_page_colours(buffer.getvalue())


def in_page_colours(svg: str) -> str:
    """matplotlib's file as a piece of the page, from behind `<svg `: no prologue, no fixed size,
    colours and letters of the page.
    """
    svg = svg[svg.index("<svg ") + 5 :]
    for pattern, text in (
        (r"<metadata>(?s:.*?)</metadata>", ""),
        (r'^([^>]*?) width="[^"]*" height="[^"]*"', r"\1"),
        (r"font-family: [^;\"]*", "font-family: inherit"),
        (r"\s*\n\s*", " "),
    ):
        svg = re.sub(pattern, text, svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def paint_chart(figure: Any, chart: Chart) -> None:
    """Curves, the curriculum's marks, a grid, units."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    named = len(chart.series) > 1
    columns = legend_columns([series.name for series in chart.series])
    lines = -(-len(chart.series) // columns) * named + bool(chart.marks)  # of text above the curves
    height = HEIGHT + LINE * max(0, lines - FITTING_LINES)
    figure.set_size_inches(WIDTH, height)
    # the layout is fixed: one that measures its letters takes twice as long
    axes = figure.add_axes((0.155, 0.4 / height, 0.815, 1 - (0.5 + LINE * lines) / height))
    for i, series in enumerate(chart.series):
        colour = COLOURS[(i if series.colour is None else series.colour) % len(COLOURS)]
        dashes = DASHES[series.dash % len(DASHES)]
        if series.style == "points":
            axes.plot(series.x, series.y, "x", color=colour, label=series.name)
            continue
        marker = "o" if series.style == "marked" else None
        axes.plot(
            series.x, series.y, color=colour, linestyle=dashes, marker=marker, label=series.name
        )
        if series.low:
            axes.fill_between(
                series.x, series.low, series.high, color=colour, alpha=0.18, linewidth=0
            )
    if chart.log_y and all(y > 0 for series in chart.series for y in (*series.y, *series.low)):
        axes.set_yscale("log")
    elif chart.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    if not chart.log_y:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    for axis, unit in ((axes.xaxis, chart.x), (axes.yaxis, chart.y)):
        if unit.startswith("tokens"):
            axis.set_major_formatter(FuncFormatter(lambda value, _: log.count(value)))
    axes.set(xlabel=chart.x, ylabel=chart.y)
    axes.yaxis.set_label_coords(-0.14, 0.5)  # at the figure's edge, whatever stands at the ticks
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for x, text in fitting_marks(chart.marks, axes.get_xlim()[1]):
        axes.axvline(x, color=MUTED, linewidth=0.7, linestyle=(0, (2, 2)))
        axes.annotate(
            text,
            (x, 1),
            (0, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=MUTED,
        )
    if named:
        above = (0, 1.09 if chart.marks else 1.0)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=above,
            ncols=columns,
            borderaxespad=0.1,
            handlelength=1.4,
        )


def fitting_marks(marks: Sequence[tuple[float, str]], end: float) -> list[tuple[float, str]]:
    """The marks of an axis from 0 to `end`; one that would run into the next says its last word
    alone, or nothing.
    """
    letter = 0.02 * end  # the room that one takes
    found, ends = [], [*(x for x, _ in marks[1:]), math.inf]
    for (x, text), following in zip(marks, ends[: len(marks)], strict=True):
        fitting = (
            words for words in (text, text.split()[-1], "") if x + letter * len(words) <= following
        )
        found.append((x, next(fitting, "")))
    return found


def legend_columns(names: list[str]) -> int:
    """How many entries of a legend stand side by side."""
    return max(1, min(3, 48 // (max(map(len, names), default=1) + 6)))


def paint_bars(figure: Any, bars: Bars) -> None:
    """Bars, a colour a group, each task's name above its own; a tick where chance lies."""
    from matplotlib.patches import Patch

    columns, labels = (
        legend_columns(list(bars.groups)),
        list(dict.fromkeys(bar.label for bar in bars.bars)),
    )
    rows = len(bars.bars) + 2 * len(labels)  # a row a bar; a task's name and the gap before it
    above = 0.06 + 0.15 * -(-len(bars.groups) // columns)
    height = above + 0.3 + 0.1 * rows
    figure.set_size_inches(WIDTH, height)
    axes = figure.add_axes((0.03, 0.3 / height, 0.92, 1 - (0.3 + above) / height))
    y = 0.0
    for label in labels:
        y += 1.9
        axes.text(0, y - 0.35, label, color=INK)
        for bar in (bar for bar in bars.bars if bar.label == label):
            error = bar.stderr if bar.stderr >= 0 else None  # NaN where it has none
            looks = {"color": COLOURS[bars.groups.index(bar.group) % len(COLOURS)], "ecolor": INK}
            axes.barh(y + 0.45, bar.value, 0.85, xerr=error, error_kw={"elinewidth": 0.7}, **looks)
            if math.isfinite(bar.chance):
                axes.plot([bar.chance] * 2, [y - 0.05, y + 0.95], color=INK, linewidth=1.3)
            y += 1
    axes.set_ylim(rows, 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(min(0.0, *(bar.value for bar in bars.bars)), 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    handles = [
        Patch(color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(bars.groups)
    ]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.1
    )
