"""Command line and configuration: words after a script's name ⇄ a checked `Config` ⇄ JSON; how a
script ends.

In: words, or JSON. Out: a `Config`, words that would ask for it, JSON, an exit code.
Knows nothing of what the settings mean, nor of what lies in a run's folder besides its settings.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import os
import shutil
import signal
import sys
import textwrap
import tokenize
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from config import PORTABLE, PRESETS, Config, ModelConfig, UserError, shaped

DEFAULT_PRESET = "16gb"
WHOLE_RUN = ("preset", "name", "runs")  # fields that choose the run rather than describe it


# --------------------------------------------------------------------------- config ⇄ plain values


def plain(value: Any) -> Any:
    """A dataclass of `config`, or a field of one, as JSON holds it; `from_plain` reads it back."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def from_plain(cls: type, value: Any, where: Path | str) -> Any:
    """The inverse of `plain`; `where` is the file it came from.

    Raises UserError naming the file and the field for a value of another type, for a field that
    this version does not know, and for a config that cannot work.
    """
    try:
        return _build(cls, value, "")
    except (UserError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{where} cannot be used: {said.rstrip('.')}.") from error


def to_json(config: Any) -> str:
    """Any of the dataclasses of `config` as JSON text."""
    return json.dumps(plain(config), indent=1)


def _build(kind: Any, value: Any, path: str) -> Any:
    """`value` as an instance of the annotation `kind`; TypeError names the field `path`."""
    if kind is Any:
        return value
    origin, options = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _build(options[0], value, path)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        (only,) = [option for option in options if option is not type(None)]
        return _build(only, value, path)
    if dataclasses.is_dataclass(kind):
        _require(isinstance(value, dict), path, value, "an object")
        hints = get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise TypeError(f"{_joined(path, unknown[0])} is a field that this version lacks")
        return kind(**{n: _build(hints[n], item, _joined(path, n)) for n, item in value.items()})
    if origin is tuple:
        _require(isinstance(value, list | tuple), path, value, "a list")
        return tuple(_build(options[0], item, f"{path}.{i}") for i, item in enumerate(value))
    if origin is Literal:
        _require(value in options, path, value, "one of " + ", ".join(map(str, options)))
        return value
    if isinstance(value, int | float):  # NaN is in no order, and no setting needs more than 64 bits
        _require(-(2**63) <= value < 2**63, path, value, "a number of at most 64 bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
    _require(type(value) is kind, path, value, wanted)
    return value


def _require(holds: bool, path: str, value: Any, wanted: str) -> None:
    if not holds:
        raise TypeError(f"{path or 'it'} is {str(value)[:60]!r}, must be {wanted}")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name, as on the command line: `{"pretrain.lr": 0.002, …}`.

    A tuple is one value; so is a part that may be None where it is None.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        inside = dataclasses.is_dataclass(value)
        found |= flat(value, name + ".") if inside else {name: value}
    return found


# ---------------------------------------------------------------------------------- config → words


def without_head(model: ModelConfig) -> ModelConfig:
    """The plain model of as many blocks: the head's join the trunk."""
    return replace(model, hrm=None, n_layer=model.n_blocks)


def portable(model: ModelConfig) -> ModelConfig:
    """The same size as a Qwen3 (`config.PORTABLE`)."""
    d_ff = model.d_ff if model.gated_mlp else 64 * round(model.d_ff / 96)  # as many weights
    return replace(without_head(model), d_ff=d_ff, shape="portable", **PORTABLE)


def words_of(config: Config, base: Config | None = None) -> list[str]:
    """The words of a command line that make `config` of `base` (default: its preset); the inverse
    of `parse`, but for the run's name and folder.

    Fields that no word can set (the sources of a preset) are left out.
    """
    base = base or PRESETS.get(config.preset, PRESETS[DEFAULT_PRESET])
    words: list[str] = []
    if config.model.shape == "portable" != base.model.shape:
        words += ["--model.shape", "portable"]
        base = replace(base, model=portable(base.model))
    elif config.model.hrm is None and base.model.hrm is not None:
        words += ["--model.hrm", "None"]
        base = replace(base, model=without_head(base.model))
    before = flat(base)
    for name, value in flat(config).items():
        if name in WHOLE_RUN or before.get(name) == value:
            continue
        if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            words += _words_of_parts(name, value, before.get(name) or ())
        else:
            words += _words_of_field(name, value)
    return words


def _words_of_field(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        group, _, last = name.rpartition(".")
        return [f"--{_joined(group, last if value else f'no_{last}')}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]


def _words_of_parts(name: str, parts: tuple[Any, ...], before: tuple[Any, ...]) -> list[str]:
    """Words for a tuple of dataclasses: only parts that the base has too can be set by words."""
    words: list[str] = []
    for i, (part, old) in enumerate(zip(parts, before, strict=False)):
        for field, value in flat(part).items():
            if flat(old).get(field) != value:
                words += _words_of_field(f"{name}.{i}.{field}", value)
    return words


# ---------------------------------------------------------------------------------- words → config


@dataclasses.dataclass(frozen=True)
class Script:
    """What a script's command line is: its header, its own options, the settings that it reads."""

    doc: str
    options: Any = None  # instance of a dataclass: each field is an option
    reads: tuple[str, ...] = ()  # names or groups of fields that --help shows: "data", "sft1.files"
    keywords: tuple[str, ...] = ()  # options named like a Python keyword, without the underscore

    def parse(
        self,
        argv: Sequence[str] | None = None,
        saved: Callable[[Path], Config | None] | None = None,
    ) -> tuple[Config, Any]:
        """The settings and this script's own options that the words ask for.

        The words override what `saved` gives for the run's folder, or the preset. Exits with 2 and
        a message that names the mistake (and the nearest option) for words it cannot use.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        if "--help-all" in words or {"--help", "-h"} & set(words):
            print(help_text(self, everything="--help-all" in words))
            raise SystemExit(0)
        try:
            base = self._base(words, saved or (lambda folder: None))
            return self._parsed(words, base)
        except UserError as error:
            fail(str(error))

    def _base(self, words: list[str], saved: Callable[[Path], Config | None]) -> Config:
        """What the words override; takes the words out that choose it."""
        chosen = {name: take_option(words, f"--{name}") for name in WHOLE_RUN}
        preset, name, runs = chosen["preset"], chosen["name"], chosen["runs"] or "runs"
        if preset is not None and preset not in PRESETS:
            raise UserError(f"There is no preset {preset!r}. The presets are {', '.join(PRESETS)}.")
        if name is not None and (not name.strip(". ") or any(c in name for c in '/\\\0:*?"<>|')):
            raise UserError(f"--name {name!r} cannot name a folder: take letters, digits, - and _.")
        base = saved(Path(runs) / (name or preset or DEFAULT_PRESET))
        if base is None or preset not in (None, base.preset):
            base = PRESETS[preset or DEFAULT_PRESET]
        if (depth := take_option(words, "--depth")) is not None:
            if not depth.isdecimal() or not 4 <= int(depth) <= 100:
                raise UserError(f"--depth is {depth!r}, must be a whole number from 4 to 100.")
            base = replace(base, model=shaped(base.model, int(depth)))
        head = take_option(words, "--model.hrm")
        if head is not None:
            if head.lower() != "none":
                raise UserError(
                    "--model.hrm takes None only (the plain dense model); the head's own fields "
                    "are --model.hrm.FIELD."
                )
            base = replace(base, model=without_head(base.model))
        shape = take_option(words, "--model.shape")
        if shape not in (None, base.model.shape, "portable"):
            raise UserError(f"--model.shape is {shape!r}, must be hearth or portable.")
        if shape == "portable":
            base = replace(base, model=portable(base.model))
        return replace(base, name=name, runs=runs)

    def _parsed(self, words: list[str], base: Config) -> tuple[Config, Any]:
        import tyro

        words = [f"{w}_" if w.removeprefix("--") in self.keywords else w for w in words]
        how = {"args": words, "use_underscores": True, "config": (tyro.conf.AvoidSubcommands,)}
        how["prog"] = f"uv run {Path(sys.argv[0]).name}"
        if self.options is None:
            return tyro.cli(Config, default=base, **how), None
        alone = tyro.conf.arg(name="")
        fields = [
            ("own", Annotated[type(self.options), alone], self.options),
            ("config", Annotated[Config, alone], base),
        ]
        both = tyro.cli(dataclasses.make_dataclass("Words", fields, frozen=True), **how)
        return both.config, both.own


def take_option(words: list[str], option: str) -> str | None:
    """Remove `option VALUE` or `option=VALUE` from `words` and return VALUE."""
    for i, word in enumerate(words):
        if word == option:
            if i + 1 == len(words):
                raise UserError(f"{option} needs a value.")
            value = words[i + 1]
            del words[i : i + 2]
            return value
        if word.startswith(option + "="):
            del words[i]
            return word.split("=", 1)[1]
    return None


# -------------------------------------------------------------------------------------------- help


def help_text(script: Script, *, everything: bool = False) -> str:
    """What `--help` prints: the script's header, its own options, the settings it reads; with
    `everything` all settings there are. A line each, its end left out where it is too long.
    """
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    own = _help_rows(script.options, "", script.keywords) if script.options is not None else []
    settings = [("--preset NAME", f"{', '.join(PRESETS)}; without it {DEFAULT_PRESET}")]
    if _is_read("--model", script.reads):
        settings.append(("--depth N", "blocks of the model; width and the rest follow by the rule"))
    settings += [
        (left, said)
        for left, said in _help_rows(PRESETS[DEFAULT_PRESET], "", ())
        if everything or _is_read(left, script.reads)
    ]
    left_width = max(30, *(len(left) for left, _ in own + settings if len(left) <= 42))
    lines = [script.doc.strip()]
    for title, rows in (("this script's own options", own), ("settings of the run", settings)):
        lines += ["", f"{title}:"] if rows else []
        for left, said in rows:
            line = f"  {left.ljust(left_width)}  {said}"
            lines.append(line if len(line) <= width else line[: width - 2].rstrip() + " …")
    if not everything:
        lines += ["", "--help-all shows every setting; config.py explains them."]
    return "\n".join(line.rstrip() for line in lines)


def _is_read(left: str, reads: tuple[str, ...]) -> bool:
    name = left.split()[0].removeprefix("--")
    return any(name == read or name.startswith(read + ".") for read in ("name", "runs", *reads))


def _help_rows(config: Any, prefix: str, keywords: tuple[str, ...]) -> list[tuple[str, str]]:
    """An option with its choices or its default, and what it means, for each field."""
    rows = []
    said, hints = comments(type(config)), get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if name == "preset" or field.name == "sources":
            continue
        if dataclasses.is_dataclass(value):
            rows += _help_rows(value, name + ".", keywords)
            continue
        name = name.removesuffix("_") if name.removesuffix("_") in keywords else name
        if value is True:  # the word switches it off
            name = f"{prefix}no_{field.name}"
        rows.append((f"--{name} {_shown(value, hints[field.name])}".rstrip(), said[field.name]))
    return rows


def _shown(value: Any, kind: Any) -> str:
    """What stands behind an option: the choices, the default, or what it takes."""
    kinds = [kind, *get_args(kind)]
    if choices := next((get_args(k) for k in kinds if get_origin(k) is Literal), None):
        return "|".join(map(str, choices))
    if isinstance(value, bool):
        return ""
    if isinstance(value, tuple):
        return "…"
    return str(value) if value is not None else "…"


@cache
def comments(cls: type) -> dict[str, str]:
    """Field name → the comment behind it, or above it, in the source of a dataclass."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        if dataclasses.is_dataclass(base):
            found |= _comments_in(inspect.getsource(base))
    return found


def _comments_in(source: str) -> dict[str, str]:
    source = textwrap.dedent(source)
    comment = {
        t.start[0]: t.string.lstrip("# ")
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above, line = [], node.lineno - 1
        while line in comment and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, comment[line])
            line -= 1
        behind = [comment[n] for n in range(node.lineno, node.end_lineno + 1) if n in comment]
        found[node.target.id] = " ".join(behind or above)
    return found


# ------------------------------------------------------------------------------- how a script ends


def fail(message: str) -> Any:
    """Print `message` as an error and exit with 2: how every script ends on a user's mistake."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def tolerate_any_text() -> None:
    """Let output that the terminal's encoding lacks, or that of a pipe on Windows, become question
    marks instead of an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def run_script(
    work: Callable[[], object], stopped: str = "stopped; the same command continues from here."
) -> None:
    """Do a script's work. A user's mistake ends it in one line with exit code 2, Ctrl-C in the line
    `stopped` with 130.

    An error raised while Ctrl-C unwinds, by something it left half done, is part of being stopped.
    """
    tolerate_any_text()
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
        if isinstance(error, BrokenPipeError):  # the reader of the pipe has gone: nothing to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        raise
    finally:
        # not where it is ignored, as behind `&`
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to say or to save
