"""What an answer may call while it is made, and what each call results in.

In: a call as text. Out: its result as text. Knows nothing of the model; what a call looks like
stands in `chat_format`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from config import ChatConfig
from hearth.data.chat_format import Call
from hearth.decoding.calculator import calculate

# what a text that is given to it results in; ValueError says in few words why it has no result
Function = Callable[[str], str]

FUNCTIONS: dict[str, Function] = {"calculate": calculate}  # those that our models are trained with


@dataclass(frozen=True)
class Tools:
    """The tools of an answer. It can be sent to another process."""

    functions: Mapping[str, Function] = field(default_factory=lambda: FUNCTIONS)
    most: int = 8  # calls an answer; each one after them results in an error
    # functions of those who ask: a call of one ends the answer, and they tell its result
    handed_back: frozenset[str] = frozenset()

    def result(self, call: Call, n_calls: int) -> str:
        """The result of an answer's call, the `n_calls`th; of one that fails a short error."""
        if n_calls > self.most:
            return "error: no more calls"
        if call.tool not in self.functions:
            return "error: no such tool"
        try:
            return self.functions[call.tool](call.arguments)
        except ValueError as error:
            return f"error: {error}"


def chat_tools(chat: ChatConfig, handed_back: frozenset[str] = frozenset()) -> Tools | None:
    """The tools of a chat with these settings, beside the functions of who asks."""
    if chat.tool_calls:
        return Tools(most=chat.tool_calls, handed_back=handed_back)
    return Tools({}, handed_back=handed_back) if handed_back else None
