"""Folders of shards on disk: manifests, commits and checks.

In: finished `.part` files with their facts, or a folder. Out: a folder that is whole or continued,
never half trusted. Knows nothing of what is in the shards.

    manifest.json
        written last and atomically; without it the folder is unfinished and is continued, not
        trusted
    manifest.part.json
        the same while the folder is unfinished: the units done so far and where to go on
    *.part
        a file being written; worthless after a kill, removed at the next start

A unit is what is committed at once: one text shard of each split, or one token shard. It notes
where in the source it began, so that a lost unit can be made again alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config import UserError
from hearth import log
from hearth.run import InputsChanged, differences
from hearth.storage import checksum, field, read_json, shown, sync_folder, write_json, writing

SCHEMA = 2  # version of the manifest
MANIFEST = "manifest.json"
DRAFT = "manifest.part.json"
SPLITS = ("train", "validation")
MAX_MANIFEST_BYTES = 64 << 20
TOTALS = ("documents", "text_bytes", "tokens")
# by kind, what a unit and a finished manifest hold besides what every one does
TEXT_UNIT = {"from": list, "to": list, "last": bool}
TEXT_FACTS = {
    "name": str,
    "source": dict,
    "revision": str | None,
    "licence": str,
    "dropped": dict,
    "lengths": dict,
    "samples": list,
    "reasoning": dict | None,
}
UNIT_FIELDS: dict[str, dict[str, Any]] = {
    "text": TEXT_UNIT,
    "chat": TEXT_UNIT,
    "tokens": {"split": str, "first_document": int, "documents": int},
}
FACTS: dict[str, dict[str, Any]] = {
    "text": TEXT_FACTS,
    "chat": TEXT_FACTS,
    "tokens": {"tokenizer": str, "masked": bool},
    "tokenizer": {"hash": str, "entries": int},
}
COUNTS = ("dropped", "lengths", "reasoning")  # of these, each value is a number
FILE_NAME = re.compile(r"[a-z]+-\d{5,}[a-z.]*\.(arrow|npy)")  # of a shard: never a path


def fingerprint(value: Any) -> str:
    """A short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------- a folder of shards


class ShardFolder:
    """A folder of shards in the making: what is done, whether it is finished, and how to commit
    more.

    damaged: what is wrong with which file, by size, and with `verify` by checksum. Raises
    `InputsChanged` where the folder was made with other settings than `settings` (with `remake` it
    is made again), `UserError` where it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        settings: dict[str, Any],
        *,
        verify: bool = False,
        remake: bool = False,
    ) -> None:
        self.folder, self.kind = Path(folder), kind
        try:
            self._open(settings)
        except InputsChanged:
            if not remake:
                raise
            shutil.rmtree(self.folder)
            self._open(settings)
        self.damaged = damaged_files(self.folder, self.manifest, full=verify)
        for name, what in self.damaged.items():
            log.say(f"{self.folder / name} {what}: making it again")
        self._remove_leftovers()

    def _open(self, settings: dict[str, Any]) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.finished = is_finished(self.folder)
        self.manifest = load_manifest(self.folder) or {
            "schema": SCHEMA,
            "kind": self.kind,
            "settings": settings,
            "units": [],
        }
        self._require(settings)

    def _require(self, settings: dict[str, Any]) -> None:
        if self.manifest["kind"] != self.kind:
            raise _foreign(self.folder)
        if differing := differences(self.manifest["settings"], settings):
            raise InputsChanged(self.folder, differing)

    def _remove_leftovers(self) -> None:
        """Remove what no unit holds: files half written, and shards of an attempt given up."""
        known = {name for unit in self.units for name in unit["files"]}
        with writing(self.folder):
            for path in self.folder.iterdir():
                if path.suffix == ".part" or (
                    FILE_NAME.fullmatch(path.name) and path.name not in known
                ):
                    path.unlink()

    @property
    def units(self) -> list[dict[str, Any]]:
        return self.manifest["units"]

    def part(self, name: str) -> Path:
        """Where to write file `name` until its unit is committed."""
        return self.folder / (name + ".part")

    def commit(self, unit: dict[str, Any]) -> None:
        """Put the finished `.part` files of `unit["files"]` in place, then note the unit in the
        draft.

        Each file's facts hold its `size` and `sha256`, and it is on the disk already: see
        `finish_file`.
        """
        self._place(unit, unit["files"])
        self.units.append(unit)
        self.save_draft()

    def is_damaged(self, unit: dict[str, Any]) -> bool:
        return any(name in self.damaged for name in unit["files"])

    def replace(self, unit: dict[str, Any], made: dict[str, dict[str, Any]]) -> None:
        """Put what was made again in place of the damaged files of a unit; it must be the same byte
        for byte.
        """
        names = [name for name in unit["files"] if name in self.damaged]
        for name in names:
            if made.get(name, {}).get("sha256") != unit["files"][name]["sha256"]:
                raise UserError(
                    f"{self.folder / name} was damaged, and making it again gave another content: "
                    "its source has "
                    f"changed since. Remove {self.folder} and make it again."
                )
        self._place(unit, names)
        for name in names:
            del self.damaged[name]
        for name in set(made) - set(names):
            self.part(name).unlink()

    def require_mended(self) -> None:
        if self.damaged:
            raise UserError(
                f"{', '.join(self.damaged)} in {self.folder} could not be made again: its source "
                "has changed since. "
                f"Remove {self.folder} and make it again."
            )

    def _place(self, unit: dict[str, Any], names: Iterable[str]) -> None:
        with writing(self.folder):
            for name in names:
                os.replace(self.part(name), self.folder / name)
            sync_folder(self.folder)

    def save_draft(self) -> None:
        write_json(self.folder / DRAFT, self.manifest)

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest with `facts` and each split's totals; the folder is finished from here
        on.
        """
        self.manifest = {
            **self.manifest,
            **facts,
            "splits": {split: self.totals(split) for split in SPLITS},
        }
        # the long list last, for those who read the file
        self.manifest["units"] = self.manifest.pop("units")
        write_json(self.folder / MANIFEST, self.manifest)
        (self.folder / DRAFT).unlink(missing_ok=True)
        self.finished = True
        return self.manifest

    def totals(self, split: str) -> dict[str, int]:
        """Documents, text bytes and tokens of one split so far."""
        files = [f for unit in self.units for f in unit["files"].values() if f["split"] == split]
        return {name: sum(f.get(name, 0) for f in files) for name in TOTALS}

    def start_again(self, **facts: Any) -> None:
        """Forget every unit, and keep `facts` in the draft for the next attempt."""
        self.manifest = {**self.manifest, **facts, "units": []}
        self.save_draft()
        self._remove_leftovers()


def is_finished(folder: Path) -> bool:
    """Whether `folder` has its manifest."""
    return (Path(folder) / MANIFEST).is_file()


def load_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or its draft where it is unfinished; None where it has neither.

    Raises `UserError` that names file and field where one cannot be used: numbers that cannot be
    right or contradict each other, names that are no shard's, another version of this program.
    """
    path = Path(folder) / (MANIFEST if is_finished(folder) else DRAFT)
    if not path.is_file():
        return None
    try:
        manifest = read_json(path, max_bytes=MAX_MANIFEST_BYTES)
        if manifest.get("schema") == SCHEMA:
            _check(manifest, path)
    except UserError as error:
        raise UserError(f"{error} Remove the folder {folder} to make it again.") from error
    if manifest.get("schema") != SCHEMA:
        raise _foreign(folder)
    return manifest


def _foreign(folder: Path) -> UserError:
    return UserError(
        f"{folder} was made by another version of this program: remove it to make it again."
    )


def _check(manifest: dict[str, Any], path: Path) -> None:
    """Every field that a reader relies on is there, and the numbers belong together."""
    kind = field(manifest, "kind", str, path)
    field(manifest, "settings", dict, path)
    totals = {split: dict.fromkeys(TOTALS, 0) for split in SPLITS}
    cursor = [0, 0]
    for number, unit in enumerate(field(manifest, "units", list, path)):
        at = f"units[{number}]"
        if not isinstance(unit, dict):
            raise UserError(f"{path}: {at} should be an object, but is {shown(unit)}.")
        for name, wanted in UNIT_FIELDS.get(kind, {}).items():
            field(unit, name, wanted, path, at=at)
        if kind == "tokens":
            split = _one_of(SPLITS, unit, "split", path, at)
            _same(unit["first_document"], totals[split]["documents"], path, f"{at}.first_document")
        if kind in ("text", "chat"):
            _same(unit["from"], cursor, path, f"{at}.from")
            cursor = unit["to"]
            if [type(item) for item in cursor] != [int, int]:
                raise UserError(f"{path}: {at}.to should be a file and a row.")
        before = sum(total["documents"] for total in totals.values())
        for name, facts in field(unit, "files", dict, path, at=at).items():
            _check_file(kind, name, facts, totals, path, f"{at}.files[{shown(name)}]")
        if kind == "tokens":
            found = sum(total["documents"] for total in totals.values()) - before
            _same(unit["documents"], found, path, f"{at}.documents")
    if path.name != MANIFEST:
        return
    for name, wanted in FACTS.get(kind, {}).items():
        facts = field(manifest, name, wanted, path)
        for key in facts or () if name in COUNTS else ():
            field(facts, key, int, path, at=name)
            if name == "lengths" and not re.fullmatch("[0-9]{1,2}", key):
                raise UserError(f"{path}: lengths has the key {shown(key)}, no number of bits.")
        for sample in facts if name == "samples" else ():
            if not isinstance(sample, list) or [type(item) for item in sample] != [int, str]:
                raise UserError(f"{path}: samples should hold pairs of a rank and a text.")
    _same(field(manifest, "splits", dict, path), totals, path, "splits")


def _check_file(
    kind: str, name: str, facts: Any, totals: dict[str, dict[str, int]], path: Path, at: str
) -> None:
    """The facts of one shard; adds its amounts to those of its split."""
    if not FILE_NAME.fullmatch(name) or not isinstance(facts, dict):
        raise UserError(f"{path}: {at} is no shard with its facts.")
    split = _one_of(SPLITS, facts, "split", path, at)
    field(facts, "sha256", str, path, at=at)
    counted = {"text": TOTALS[:2], "chat": TOTALS[:2], "tokens": TOTALS}.get(kind, ())
    if name.count(".") > 1:  # what lies beside the tokens counts nothing of its own
        counted = ()
    for amount in {"size", *counted, *set(TOTALS).intersection(facts)}:
        if field(facts, amount, int, path, at=at) < 0:
            raise UserError(f"{path}: {at}.{amount} is {facts[amount]}.")
    for amount in TOTALS:
        totals[split][amount] += facts.get(amount, 0)


def _one_of(values: tuple[str, ...], record: dict[str, Any], name: str, path: Path, at: str) -> str:
    value = field(record, name, str, path, at=at)
    if value not in values:
        raise UserError(f"{path}: {at}.{name} is {shown(value)}, not {' or '.join(values)}.")
    return value


def _same(found: Any, expected: Any, path: Path, name: str) -> None:
    if found != expected:
        raise UserError(
            f"{path}: {name} is {shown(found)}, which does not go with the units: "
            f"{shown(expected)}."
        )


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """A hash of what all shards of a folder hold."""
    return fingerprint(
        [[f["sha256"] for f in unit["files"].values()] for unit in manifest["units"]]
    )


def inputs_of_tokens(manifests: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the tokenizer stage uses, for the run's record: the text of each corpus, by its name."""
    return {f"text of {name}": content_fingerprint(m) for name, m in manifests.items()}


def read_manifest(folder: Path, command: str) -> dict[str, Any]:
    """The manifest of a finished folder; `command` is what makes it, for the error where it is
    missing.
    """
    folder = Path(folder)
    manifest = load_manifest(folder) if is_finished(folder) else None
    if manifest is not None:
        return manifest
    found = "is unfinished" if (folder / DRAFT).exists() else "holds no manifest.json"
    if not folder.exists():
        found = "does not exist"
    raise UserError(f"No shards: {folder} {found}. Make them with `{command}`.")


def damaged_files(folder: Path, manifest: dict[str, Any], *, full: bool = False) -> dict[str, str]:
    """What is wrong with which shard: missing, another size, and with `full` another checksum."""
    found = {}
    for unit in manifest["units"]:
        for name, facts in unit["files"].items():
            path = Path(folder) / name
            if not path.is_file():
                found[name] = "is missing"
            elif path.stat().st_size != facts["size"]:
                found[name] = f"has {path.stat().st_size} bytes instead of {facts['size']}"
            elif full and checksum(path) != facts["sha256"]:
                found[name] = "has another checksum than when it was written"
    return found


def require_whole(
    folder: Path, manifest: dict[str, Any], command: str, *, full: bool = False
) -> None:
    """Raise a `UserError` that names every damaged shard of `folder`; `command` makes
    them again.
    """
    found = damaged_files(folder, manifest, full=full)
    if found:
        first = "; ".join(f"{name} {what}" for name, what in list(found.items())[:5])
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(
            f"Damaged shards in {folder}: {first}{more}. `{command}` makes these again and leaves "
            "the others alone."
        )


def file_names(manifest: dict[str, Any], split: str, ending: str) -> list[str]:
    """Names of the shards of `split` that end in `ending`, in order."""
    names = [
        n
        for unit in manifest["units"]
        for n, facts in unit["files"].items()
        if facts["split"] == split
    ]
    return sorted(name for name in names if name.endswith(ending))
