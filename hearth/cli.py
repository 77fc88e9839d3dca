"""Command line and configuration: words after a script's name ⇄ a checked `Config` ⇄ JSON; how a
script ends.

In: words, or JSON text. Out: a `Config`, JSON text, an exit code.
Knows nothing of what the settings mean.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from config import PRESETS, Config, UserError


def to_json(config: Any) -> str:
    """Any of the dataclasses of `config` as JSON text that `from_json` reads back."""
    return json.dumps(asdict(config), indent=1)


def from_json(cls: type, text: str) -> Any:
    """The inverse of `to_json`; refuses what `build` refuses."""
    return build(cls, json.loads(text))


def build(cls: type, value: Any, path: Path | None = None) -> Any:
    """An instance of the dataclass `cls` from JSON, with defaults for fields that are missing.

    Raises `UserError`, in one line that names `path` and the field, for fields that this version
    does not know, values of another kind, and values that `cls` itself refuses.
    """
    try:
        return _build(cls, value, "")
    except (UserError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path}: {said}" if path else said) from error


def _build(kind: Any, value: Any, at: str) -> Any:
    if get_origin(kind) in (Union, UnionType):
        if value is None and NoneType in get_args(kind):
            return None
        kind = next(k for k in get_args(kind) if k is not NoneType)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise UserError(
                f"{kind.__name__} has no field {', '.join(unknown)}: the file is from another "
                "version."
            )
        dot = f"{at}." if at else ""
        return kind(**{n: _build(hints[n], item, dot + n) for n, item in value.items()})
    if get_origin(kind) is tuple and isinstance(value, list):
        item_kind = get_args(kind)[0]
        return tuple(_build(item_kind, item, f"{at}.{i}") for i, item in enumerate(value))
    if get_origin(kind) is Literal:
        good = value in get_args(kind)
    else:
        good = isinstance(value, (int, float) if kind is float else kind if kind in PLAIN else ())
        good = good and (not isinstance(value, bool) or kind is bool)
    # NaN is in no order, and no setting needs more than 64 bits
    if not good or (isinstance(value, int | float) and not -(2**63) <= value < 2**63):
        raise UserError(f"{at or kind.__name__} is {json.dumps(value):.60}, of the wrong kind.")
    return value


PLAIN = (str, int, bool)


def parse_cli(description: str, argv: list[str] | None = None) -> Config:
    """The `Config` that the command line asks for: `--preset NAME`, then any field as
    `--group.field VALUE`.

    Exits with 2 and a message that names the mistake (and the nearest option) for words it cannot
    use.
    """
    return parse_cli_with(None, description, argv)[0]


def parse_cli_with(
    extra: Any, description: str, argv: list[str] | None = None
) -> tuple[Config, Any]:
    """`parse_cli` for a script with options of its own: each field of the dataclass instance
    `extra` is one.
    """
    import tyro

    words = list(sys.argv[1:] if argv is None else argv)
    # a field named like a Python keyword carries an underscore, which the user may leave out:
    # --from
    keywords = {
        f"--{f.name[:-1]}": f"--{f.name}"
        for f in dataclasses.fields(extra or Config)
        if f.name[-1] == "_"
    }
    words = [keywords.get(word, word) for word in words]
    preset = _take_option(words, "--preset") or "16gb"
    if preset not in PRESETS:
        fail(f"There is no preset {preset!r}. The presets are {', '.join(PRESETS)}.")
    base = PRESETS[preset]
    head = _take_option(words, "--model.hrm")
    if head is not None:
        if head.lower() != "none":
            fail(
                "--model.hrm takes None only (the plain dense model); the head's own fields are "
                "--model.hrm.FIELD."
            )
        base = replace(base, model=replace(base.model, hrm=None))
    settings = {"description": description, "args": words, "use_underscores": True}
    settings["config"] = (tyro.conf.AvoidSubcommands,)
    try:
        if extra is None:
            return tyro.cli(Config, default=base, **settings), None
        flat = tyro.conf.arg(name="")
        fields = [
            ("own", Annotated[type(extra), flat], extra),
            ("config", Annotated[Config, flat], base),
        ]
        both = tyro.cli(dataclasses.make_dataclass("Options", fields, frozen=True), **settings)
        return both.config, both.own
    except UserError as error:
        fail(str(error))


def _take_option(words: list[str], option: str) -> str | None:
    """Remove `option VALUE` or `option=VALUE` from `words` and return VALUE."""
    for i, word in enumerate(words):
        if word == option:
            if i + 1 == len(words):
                fail(f"{option} needs a value.")
            value = words[i + 1]
            del words[i : i + 2]
            return value
        if word.startswith(option + "="):
            del words[i]
            return word.split("=", 1)[1]
    return None


def fail(message: str) -> Any:
    """Print `message` as an error and exit with 2: how every script ends on a user's mistake."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def run_script(
    work: Callable[[], object], stopped: str = "stopped; the same command continues from here."
) -> None:
    """Do a script's work. A user's mistake ends it in one line with exit code 2, Ctrl-C in the line
    `stopped` with 130.

    An error raised while Ctrl-C unwinds, by something it left half done, is part of being stopped.
    """
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        chain: list[BaseException | None] = [error]
        while chain[-1] is not None:
            chain.append(chain[-1].__context__)
        if any(isinstance(link, KeyboardInterrupt) for link in chain):
            print(stopped, file=sys.stderr)
            raise SystemExit(130) from None
        if isinstance(error, UserError):
            fail(str(error))
        raise
    finally:
        # not where it is ignored, as behind `&`
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to say or to save
