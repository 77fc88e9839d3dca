"""The parts that the stages share. `config.py` and `model.py` lie beside this folder: they are
there to be edited.
"""

import sys
from typing import Any


def _end_in_a_line(kind: type[BaseException], *details: Any) -> None:
    """How a script ends on Ctrl-C in the seconds in which it imports torch."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, *details)


sys.excepthook = _end_in_a_line
