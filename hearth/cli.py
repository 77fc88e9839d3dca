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
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from config import PRESETS, Config, UserError, portable


def to_json(config: Any) -> str:
    """Any of the dataclasses of `config` as JSON text that `from_json` reads back."""
    return json.dumps(asdict(config), indent=1)


def from_json(cls: type, text: str) -> Any:
    """The inverse of `to_json`. Fields that this version does not know are refused by name."""
    return _build(cls, json.loads(text))


def _build(kind: Any, value: Any) -> Any:
    options = get_args(kind)
    if value is None or kind is Any:
        return value
    if get_origin(kind) is tuple:
        return tuple(_build(options[0], item) for item in value)
    dataclass_kinds = [k for k in (kind, *options) if dataclasses.is_dataclass(k)]
    if dataclass_kinds:
        cls = dataclass_kinds[0]
        hints = get_type_hints(cls)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise UserError(
                f"{cls.__name__} has no field {', '.join(unknown)}: the file is from another "
                "version."
            )
        return cls(**{name: _build(hints[name], item) for name, item in value.items()})
    tuples = [k for k in options if get_origin(k) is tuple]
    return tuple(value) if tuples and isinstance(value, list) else value


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
    shape = _take_option(words, "--model.shape")
    if shape not in (None, base.model.shape, "portable"):
        fail(f"--model.shape is {shape!r}, must be hearth or portable.")
    if shape == "portable":
        base = replace(base, model=portable(base.model))
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
