"""How a tool's call stands in a text: ⟦calculate 12*7 → 84⟧.

In: the parts of a content, as `chat_format` has them. Out: one text, and parts again. Where a text
is all that can be sent, such as the content of an answer, a client that sends it back means the
same call.
"""

from __future__ import annotations

import re
from typing import Any

from hearth.data.chat_format import Part, read_call

OPEN, ARROW, CLOSE = "⟦", " → ", "⟧"
# a call with its result; what has none, or has a mark inside, stays text
MARKED = re.compile(
    rf"{OPEN}([^\s{OPEN}{CLOSE}][^{OPEN}{CLOSE}]*){ARROW}([^→{OPEN}{CLOSE}]*){CLOSE}"
)


def mark(call: str, result: str | None) -> str:
    """A call as text."""
    return f"{OPEN}{call}{CLOSE}" if result is None else f"{OPEN}{call}{ARROW}{result}{CLOSE}"


def marked(content: Any) -> str:
    """A content as one text."""
    if isinstance(content, str):
        return content
    return "".join(
        part["text"]
        if "text" in part
        else mark(f"{part['tool']} {part['arguments']}".strip(), part.get("result"))
        for part in content
    )


def unmarked(text: str) -> str | list[Part]:
    """The inverse: parts where the text marks calls, else the text itself."""
    parts: list[Part] = []
    at = 0
    for found in MARKED.finditer(text):
        if found.start() > at:
            parts.append({"text": text[at : found.start()]})
        parts.append({**read_call(found[1])._asdict(), "result": found[2]})
        at = found.end()
    if parts and at < len(text):
        parts.append({"text": text[at:]})
    return parts or text
