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
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config import UserError
from hearth import log
from hearth.run import InputsChanged, differences
from hearth.storage import checksum, sync_folder, write_json, writing

SCHEMA = 1  # version of the manifest
MANIFEST = "manifest.json"
DRAFT = "manifest.part.json"
SPLITS = ("train", "validation")


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
        with writing(self.folder):
            for leftover in self.folder.glob("*.part"):
                leftover.unlink()

    def _open(self, settings: dict[str, Any]) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.finished = is_finished(self.folder)
        self.manifest = load_json(
            self.folder / (MANIFEST if self.finished else DRAFT)
        ) or self._fresh(settings)
        self._require(settings)

    def _fresh(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"schema": SCHEMA, "kind": self.kind, "settings": settings, "units": []}

    def _require(self, settings: dict[str, Any]) -> None:
        if self.manifest.get("schema") != SCHEMA or self.manifest.get("kind") != self.kind:
            raise UserError(
                f"{self.folder} was made by another version of this program: remove it and start "
                "again."
            )
        if differing := differences(self.manifest["settings"], settings):
            raise InputsChanged(self.folder, differing)

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
        return {
            name: sum(f.get(name, 0) for f in files)
            for name in ("documents", "text_bytes", "tokens")
        }

    def start_again(self, **facts: Any) -> None:
        """Forget every unit, and keep `facts` in the draft for the next attempt."""
        self.manifest = {**self.manifest, **facts, "units": []}
        self.save_draft()


def is_finished(folder: Path) -> bool:
    """Whether `folder` has its manifest."""
    return (Path(folder) / MANIFEST).is_file()


def load_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot read {path}: {error}. Remove the folder {path.parent} and make it again."
        ) from error


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
    manifest = load_json(folder / MANIFEST)
    if manifest is None:
        found = "is unfinished" if (folder / DRAFT).exists() else "holds no manifest.json"
        if not folder.exists():
            found = "does not exist"
        raise UserError(f"No shards: {folder} {found}. Make them with `{command}`.")
    if manifest.get("schema") != SCHEMA:
        raise UserError(
            f"{folder} was made by another version of this program: remove it and run `{command}`."
        )
    return manifest


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
        lines = [f"  {Path(folder) / name} {what}" for name, what in found.items()]
        raise UserError(
            "Damaged shards:\n"
            + "\n".join(lines)
            + f"\n`{command}` makes these again and leaves the others alone."
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
