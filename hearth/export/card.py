"""The model card of an exported folder, as Markdown.

In: a checkpoint and its run's report. Out: text. It states what the run's files state: data,
curves, scores and energy come from the report; nothing is measured here.
"""

from __future__ import annotations

from pathlib import Path

from config import FINE_TUNING, REASONING_PROMPT, ChatSource, Config, TextSource
from hearth import log
from hearth.training.checkpoint import Loaded


def text(checkpoint: Path, loaded: Loaded, library: str, usage: str) -> str:
    """The model card of `loaded`, which came from the folder `checkpoint`, for the library that
    loads it; `usage` says how.
    """
    run = checkpoint.resolve().parent.parent
    report = run / "report" / "report.md"
    parts = [
        HEADER.format(title=run.name, library=library),
        facts(loaded),
        f"## Use\n\n{usage}\n\n{advice(loaded)}",
        licence(loaded.config),
        LIMITS,
    ]
    if report.is_file():
        body = report.read_text(encoding="utf-8").split("\n", 1)[-1]  # without its title
        parts.append("# The run's report\n" + body)
    return "\n".join(part.strip("\n") + "\n" for part in parts)


HEADER = """---
library_name: {library}
pipeline_tag: text-generation
tags: [hearth]
---

# {title}

A small language model trained from nothing with Hearth, on one consumer GPU."""


def facts(loaded: Loaded) -> str:
    c, state = loaded.config.model, loaded.state
    head = f", HRM head of {c.hrm.h_cycles} cycles" if c.hrm else ""
    lines = [
        f"- {log.count(loaded.model.n_parameters())} parameters: {c.n_layer} blocks of width "
        f"{c.d_model}{head}; {c.vocab_size} tokens of byte-level BPE",
        f"- context: {c.context} tokens",
        f"- stage: {state['stage']}, step {state['step']} of {state['steps']}",
    ]
    if "tokens" in state:
        lines.append(f"- trained on {log.count(state['tokens'])} tokens in this stage")
    return "\n".join(lines)


def advice(loaded: Loaded) -> str:
    said = "A text that spells a special token is read as that token: filter what users say."
    if loaded.state["stage"] == "base":
        return said
    return f"With the system prompt `{REASONING_PROMPT}` it reasons in `<think>` first.\n{said}"


def licence(config: Config) -> str:
    """What it was trained on, from which its licence must follow."""
    sources: list[TextSource | ChatSource] = [*config.data.corpora()]
    sources += [source for stage in FINE_TUNING for source in config.sets(stage)]
    named = dict.fromkeys(f"- {source.name}: {origin(source)}" for source in sources)
    return (
        "## Data and licence\n\nNo licence is stated: it is yours to choose, within what the "
        "licences of the data allow.\n\n" + "\n".join(named)
    )


def origin(source: TextSource | ChatSource) -> str:
    if source.hub:
        return f"{source.hub} on the Hugging Face hub, {source.revision or 'newest revision'}"
    return "own files" if source.files else "the built-in demo world"


LIMITS = """## Limits

It is small: it states falsehoods with confidence, and repeats what its data holds. It was not
trained to refuse anything. Do not let it decide what matters."""
