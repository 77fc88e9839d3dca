"""A run's folder: its settings, its stages and what they used, its lock; what is stale.

    runs/<run>/config.json    the settings of the run, what its preset said then, and for each stage
                              that was begun the settings and inputs that decide its result
    runs/<run>/lock           held by the one process that works on the run; dies with it

In: the settings that a command line asks for. Out: the settings in force, or one line that says
what they contradict. Knows nothing of what the stages do.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import FINE_TUNING, PRESETS, ChatSource, Config, UserError, settled
from hearth import cli, log, storage

SETTINGS, LOCK = "config.json", "lock"
VERSION = 1  # of config.json


@dataclass(frozen=True)
class Stage:
    """One stage of the road: who makes it, where it lies, which settings decide its result."""

    title: str
    script: str  # that makes it
    folders: tuple[str, ...]  # of the run that hold it, removed by --redo
    reads: tuple[str, ...]  # settings, or groups of them


STAGES = {
    "text": Stage("Text shards", "create_shard.py", ("text",), ("data",)),
    "tokenizer": Stage(
        "Tokenizer and token shards",
        "train_tokenizer.py",
        ("tokenizer", "tokens"),
        ("seed", "tokenizer", "model.vocab_size"),
    ),
    "base": Stage(
        "Pretraining", "pretrain.py", ("base",), ("seed", "eight_bit", "model", "optim", "pretrain")
    ),
    **{
        name: Stage(title, "sft.py", (name, f"chat_tokens/{name}"), ("seed", "optim", name))
        for name, title in FINE_TUNING.items()
    },
    "rl": Stage("Reinforcement learning", "rl.py", ("rl",), ("seed", "optim", "rl")),
}
TRAINED = ("base", *FINE_TUNING, "rl")  # stages that hold checkpoints, in the order of the road
THINKING = TRAINED[TRAINED.index("sft2") :]  # that were taught to think where they are asked to
# settings that change no result, whatever stage reads them; by their last name
FREE = {
    *("micro_batch_tokens", "save_every_minutes", "keep_checkpoints", "max_skipped_steps"),
    *("log_every_steps", "log_to", "sample_every_steps", "prompts", "probe_prompts"),
    *("probe_tokens", "eval_every_steps", "eval_tokens", "retry_minutes"),
}


# -------------------------------------------------------------------------- which run, which words


def words_for(config: Config) -> list[str]:
    """The words that ask a script for this run with these settings.

    A run that remembers its settings needs its name and what differs from them; for another one
    all that was asked for is spelt out.
    """
    saved = load_settings(config.run_dir)
    words = ["--name", config.name] if config.name else ["--preset", config.preset]
    if saved is None and config.name:
        words += ["--preset", config.preset]
    words += ["--runs", config.runs] if config.runs != "runs" else []
    return [*words, *cli.words_of(config, saved)]


def command(config: Config, script: str, *words: str) -> str:
    """The command that runs `script` for this run; it works when pasted into a shell."""
    return "uv run " + shlex.join([script, *words_for(config), *words])


def parse(script: cli.Script, argv: Sequence[str] | None = None) -> tuple[Config, Any]:
    """The settings and the script's own options that a command line asks for: words override what
    the run remembers, or its preset. A new run that starts --from another one, and names no preset,
    takes over the settings of that one.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def saved(folder: Path) -> Config | None:
        found = load_settings(folder)
        if found is not None or "from" not in script.keywords:
            return found
        names = ("from", "name", "preset")
        start, name, preset = (cli.take_option([*words], f"--{option}") for option in names)
        return _settings_behind(start, folder.parent) if start and name and not preset else None

    return script.parse(words, saved)


def _settings_behind(checkpoint: str, runs: Path) -> Config | None:
    """The settings of the run that a checkpoint belongs to, given as `find_checkpoint` takes it."""
    there = (f for f in (Path(checkpoint).expanduser(), runs / checkpoint) if f.is_dir())
    for folder in there:
        for place in (folder, *folder.parents[:2]):  # of a run, a stage, a checkpoint
            if any((place / stage).is_dir() for stage in TRAINED):
                return load_settings(place)
    return None


def existing(runs: Path | str) -> list[str]:
    """The names of the runs in a folder."""
    return sorted(path.parent.name for path in Path(runs).glob(f"*/{SETTINGS}"))


def no_such_run(config: Config) -> UserError:
    """What to say where the run that was asked for does not exist."""
    runs = Path(config.runs)
    there = ", ".join(existing(runs)) or "no run"
    return UserError(
        f"There is no run {config.run_dir.name!r}: {runs.absolute()} holds {there}. "
        f"Begin it with `{command(config, 'run_pipeline.py')}`."
    )


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint below a stage's folder, or None."""
    found = sorted(folder.glob("step-*/state.json")) if folder.is_dir() else []
    return found[-1].parent if found else None


def find_checkpoint(name: str | None, config: Config) -> Path:
    """The checkpoint folder that `name` means: a stage of this run (`sft1`), the name of a run, or
    the folder of a run, a stage or a checkpoint; None is the furthest stage of this run.

    Raises UserError that says what there is instead.
    """
    if name is None:
        if not config.run_dir.is_dir():
            raise no_such_run(config)
        return _furthest(config.run_dir, config)
    if name in TRAINED:
        if (found := newest(config.run_dir / name)) is None:
            there = [stage for stage in TRAINED if newest(config.run_dir / stage)]
            raise UserError(
                f"The run {config.run_dir} has no checkpoint of {name}; it has "
                f"{', '.join(there) or 'none at all'}. "
                f"Make it with `{command(config, STAGES[name].script)}`."
            )
        return found
    for folder in (Path(name).expanduser(), Path(config.runs) / name):
        if (folder / "state.json").is_file():
            return folder
        if (found := newest(folder)) is not None:
            return found
        if (folder / SETTINGS).is_file() or any((folder / stage).is_dir() for stage in TRAINED):
            place = folder.resolve()  # "." has no name
            return _furthest(folder, replace(config, runs=str(place.parent), name=place.name))
    raise UserError(
        f"{name!r} is no checkpoint: give a stage ({', '.join(TRAINED)}), a run of "
        f"{Path(config.runs).absolute()} ({', '.join(existing(config.runs)) or 'none there'}), "
        "or the folder of a run, a stage or a checkpoint."
    )


def _furthest(folder: Path, config: Config) -> Path:
    for stage in reversed(TRAINED):
        if (found := newest(folder / stage)) is not None:
            return found
    raise UserError(
        f"No checkpoint in {folder.absolute()}: looked for {', '.join(reversed(TRAINED))}. "
        f"Make one with `{command(config, 'run_pipeline.py')}`."
    )


def fine_tuning(config: Config) -> list[str]:
    """The stages of fine-tuning that this run has, in their order: those with conversations."""
    return [stage for stage in FINE_TUNING if config.sets(stage)]


def chat_text(config: Config, stage: str, source: ChatSource) -> Path:
    """The folder of a stage's text shards of one set of conversations: the same for all stages that
    hold out as many and keep the same questions out.
    """

    def kept(name: str) -> tuple[Any, ...]:
        loop = getattr(config, name)
        return loop.test_sets(), loop.validation_share

    sharing = (n for n in FINE_TUNING if any(s.name == source.name for s in config.sets(n)))
    own = "" if kept(next(sharing, stage)) == kept(stage) else f"-{stage}"
    return config.run_dir / "text" / "chat" / f"{source.name}{own}"


# ------------------------------------------------------------------------------- what it remembers


def load_settings(folder: Path) -> Config | None:
    """The settings of the run in `folder`, None where it has none yet.

    What was edited in `config.py` since, and not set by hand for this run, is followed.
    """
    record = _load(folder)
    if record is None:
        return None
    settings = storage.field(record, "settings", dict, folder / SETTINGS)
    then = storage.field(record, "preset", dict, folder / SETTINGS)
    preset = PRESETS.get(str(settings.get("preset")))
    if preset is not None:
        settings = _followed(then, cli.plain(preset), settings)
    return cli.from_plain(Config, settings, folder / SETTINGS)


def _followed(then: Any, now: Any, saved: Any) -> Any:
    """`saved`, but what is as the preset was `then` becomes as the preset is `now`; so does what
    neither of them knew.
    """
    if all(isinstance(value, dict) for value in (then, now, saved)):
        new = [name for name in now if name not in then and name not in saved]
        # a stage of fine-tuning that the run was made without stays left out of it
        return {name: now[name] for name in new if name not in FINE_TUNING} | {
            name: _followed(then[name], now[name], value) if name in then and name in now else value
            for name, value in saved.items()
        }
    return now if saved == then else saved


def _load(folder: Path) -> dict[str, Any] | None:
    path = folder / SETTINGS
    if not path.is_file():
        return None
    record = storage.read_json(path)
    if record.get("version") != VERSION:
        raise UserError(f"{path} is of another version of this program. Take another --name.")
    return record


def settings_of(stage: str, config: Config) -> dict[str, Any]:
    """The settings that decide the result of a stage, by name, as JSON holds them; what they leave
    open as the rule fills it in.
    """
    config = settled(config)
    found = {
        name: cli.plain(value)
        for name, value in cli.flat(config).items()
        if _is_counted(name, STAGES[stage].reads)
    }
    if "model.token_shift" in found:  # the head's own settings are there only where it is
        found["model.hrm"] = config.model.hrm is not None
    corpora = config.data.corpora()
    if stage == "text":
        for name in ("sources", "text_files", "text_column", "text_weights"):
            del found[f"data.{name}"]
        found["corpora"] = [_what_is_read(source) for source in corpora]
    if stage in ("tokenizer", "base"):
        found["corpora"] = [[source.name, source.weight] for source in corpora]
    if f"{stage}.sources" in found:
        for name in ("sources", "files", "calls"):
            del found[f"{stage}.{name}"]
        found[f"{stage}.files"] = [_what_is_read(source) for source in config.sets(stage)]
        del found[f"{stage}.exclude_files"]
        test_sets = getattr(config, stage).test_sets()
        found[f"{stage}.exclude"] = [_what_is_read(source) for source in test_sets]
        # its own ones take their place
        del found["optim.weight_decay"], found["optim.momentum_warmup_steps"]
    return found


def _is_counted(name: str, reads: Iterable[str]) -> bool:
    """Whether a setting may change the result of what reads these settings or parts of them."""
    inside = any(name == read or name.startswith(read + ".") for read in reads)
    return inside and name.rpartition(".")[2] not in FREE


def _what_is_read(source: Any) -> dict[str, Any]:
    """A corpus or a set of conversations; files by where they are, however that is written."""
    facts = {name: value for name, value in cli.plain(source).items() if name != "name"}
    facts["files"] = [os.path.abspath(Path(file).expanduser()) for file in source.files]
    return {n: v for n, v in facts.items() if v not in (None, [], ()) and v is not False}


@dataclass(frozen=True)
class Difference:
    """A setting or an input that is not what a stage used."""

    name: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {_short(self.then)}, is {_short(self.now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The entries in which two records differ."""
    return [
        Difference(name, then.get(name), now.get(name))
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]


class InputsChanged(UserError):
    """What lies in a folder was made from something else than it would be made from now."""

    def __init__(self, folder: Path, differing: Sequence[Difference]) -> None:
        listed = "; ".join(map(str, differing))
        super().__init__(f"{folder} was made from something else: {listed}.")
        self.differences = differing


# ----------------------------------------------------------------------------------- working on it


class Run:
    """The run that a process works on: see `working_on`."""

    def __init__(self, config: Config, record: dict[str, Any]) -> None:
        self.config, self.folder, self._record = config, config.run_dir, record

    @property
    def _stages(self) -> dict[str, Any]:
        return self._record["stages"]

    def begun(self, stage: str) -> dict[str, Any] | None:
        """What a stage used, None where there is nothing of it."""
        there = any((self.folder / name).exists() for name in STAGES[stage].folders)
        return self._stages.get(stage) if there else None

    def begin(self, stage: str, inputs: Mapping[str, Any], **notes: Any) -> None:
        """Write down what a stage uses, before it makes anything; `check` where it was begun.

        notes: further facts of its record, which nothing is held against.
        """
        if self.begun(stage) is not None:
            self.check(stage, inputs)
        elif log.is_first():
            settings = settings_of(stage, self.config)
            self._stages[stage] = {"settings": settings, "inputs": dict(inputs), **notes}
            self._write()

    def check(self, stage: str, inputs: Mapping[str, Any]) -> None:
        """Raises UserError where a stage that was begun is stale: it used other inputs."""
        if (then := self.begun(stage)) is not None:
            found = [d for d in differences(then["inputs"], inputs) if d.name in inputs]
            if found:
                raise self.stale(stage, found)

    def stale(self, stage: str, found: Sequence[Difference | str]) -> UserError:
        """What to say of a stage that was made from something else than there is now."""
        listed = "".join(f"\n  {difference}" for difference in found)
        return UserError(
            f"{STAGES[stage].title} in {self.folder} is stale: it was made from something "
            f"else.{listed}\nMake it and what follows again with "
            f"`{command(self.config, STAGES[stage].script, '--redo', stage)}`, or take another "
            "--name to keep both."
        )

    @contextlib.contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Inside, a folder that was made from something else is said to be of this stage."""
        try:
            yield
        except InputsChanged as error:
            raise self.stale(stage, error.differences) from error

    def require_consistent(self, before: str | None = None) -> None:
        """Raises UserError where a setting contradicts what a stage, of those `before` one where
        that is to be made again, has used already.
        """
        for stage in STAGES:
            if stage == before:
                return
            if (then := self.begun(stage)) is None:
                continue
            now = settings_of(stage, self.config)
            known = then["settings"].keys() & now  # by both versions of this program
            if found := [d for d in differences(then["settings"], now) if d.name in known]:
                listed = "; ".join(map(str, found))
                again = command(self.config, STAGES[stage].script, "--redo", stage)
                raise UserError(
                    f"{STAGES[stage].title} in {self.folder} has used other settings: {listed}. "
                    f"Make it and what follows again with `{again}`, leave the new "
                    "settings away, or take another --name."
                )

    def remove_from(self, stage: str) -> None:
        """Remove a stage and all that follow it."""
        names = list(STAGES)
        for name in names[names.index(stage) :]:
            self.remove(name)

    def remove(self, stage: str) -> None:
        """Remove a stage alone: it may be begun with other inputs then."""
        self._stages.pop(stage, None)
        for folder in STAGES[stage].folders:
            shutil.rmtree(self.folder / folder, ignore_errors=True)
        self._write()

    def save_settings(self, saved: Config | None) -> None:
        """Write down the settings in force; what is free stays as it was when the run began."""
        settings = cli.plain(self.config)
        if saved is not None:
            read = {"chat.name", "chat.owner"}.union(*(stage.reads for stage in STAGES.values()))
            counted = {name for name in cli.flat(self.config) if _is_counted(name, read)}
            settings = _only(counted, settings, cli.plain(saved))
        settings |= {"runs": "runs", "name": None}  # of the folder, which may be moved
        preset = cli.plain(PRESETS.get(self.config.preset, self.config))
        if (settings, preset) != (self._record.get("settings"), self._record.get("preset")):
            self._record |= {"settings": settings, "preset": preset}
            self._write()

    def _write(self) -> None:
        order = ("version", "settings", "stages", "preset")
        storage.write_json(self.folder / SETTINGS, {n: self._record.get(n) for n in order})


def _only(counted: set[str], new: Any, old: Any, path: str = "") -> Any:
    """`old` with the counted fields of `new`."""
    if not (isinstance(new, dict) and isinstance(old, dict)):
        inside = any(name.startswith(path + ".") for name in counted)
        return new if path in counted or inside else old
    return {
        name: _only(counted, value, old.get(name), f"{path}.{name}" if path else name)
        for name, value in new.items()
    }


@contextlib.contextmanager
def working_on(
    config: Config, *, makes: Sequence[str], redo: str | None = None, creates: bool = False
) -> Iterator[Run]:
    """Inside, this process alone works on the run, whose settings are those of `config`.

    makes: the stages that this script makes. redo: the stage that is removed first, with all that
    follow. creates: whether the run may be a new one. Of several processes that torchrun started
    the first one does all this, the others wait for it.

    Raises UserError where another process works on it, where there is no such run, or where a
    setting contradicts what a stage has used.
    """
    folder = config.run_dir
    if not creates and not folder.is_dir():
        raise no_such_run(config)
    if redo is not None and redo not in makes:
        raise UserError(f"--redo {redo}: this script makes {', '.join(makes)}.")
    if not log.is_first():
        _wait_for_first(folder)
        yield Run(config, _load(folder) or {"stages": {}})
        return
    with locked(folder):
        record = _load(folder)
        if record is None and any(
            (folder / n).exists() for s in STAGES.values() for n in s.folders
        ):
            raise UserError(
                f"{folder} was made by an earlier version, whose settings and checkpoints cannot "
                "be read any more. Remove it, or take another --name."
            )
        saved = load_settings(folder)
        run = Run(config, record or {"version": VERSION, "stages": {}})
        run.require_consistent(before=redo)
        if redo is not None:
            run.remove_from(redo)
        run.save_settings(saved)
        _note_ready(folder)
        yield run


# -------------------------------------------------------------------------------------------- lock


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process works on `folder`; the lock dies with this process.

    Raises UserError with the other one's process id.
    """
    with storage.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    with file:
        try:
            _lock(file)
        except OSError:
            file.seek(0)
            pid = file.read().split(maxsplit=1)
            raise UserError(
                f"Another process works on {folder}{f' (pid {pid[0]})' if pid else ''}. Wait until "
                "it ends, stop it, or take another --name."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} ")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # a later start on several machines must not take it for its own


def _lock(file: Any) -> None:
    """Take the lock of an open file; OSError where somebody holds it."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        import msvcrt

        file.seek(1 << 30)  # locks there hide nothing of the file from those who read it
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _start() -> str:
    """What the processes that torchrun started together have in common, and those of no other
    start: on one machine its own process id, which a restart does not share.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return "/".join([str(os.getppid() if alone else ""), *(os.environ.get(n, "") for n in names)])


def _note_ready(folder: Path) -> None:
    with (folder / LOCK).open("a", encoding="utf-8") as file:
        file.write(_start())


def _wait_for_first(folder: Path, minutes: float = 5.0) -> None:
    """Wait until the first process has made the run's folder what all start from."""
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if (folder / LOCK).read_text(encoding="utf-8").endswith(f" {_start()}"):
                return
        time.sleep(0.05)
    raise UserError(
        f"The first process has not begun to work on {folder}. Processes on several machines need "
        "one run folder that all of them see, such as a shared one (NFS, SMB) given by --runs."
    )
