"""What of a text is kept: rules for single documents, and the memory of those seen before.

In: the UTF-8 bytes of a document. Out: a `Rejected` with its reason, or None.
Knows nothing of files and shards.
"""

from __future__ import annotations

import importlib.util
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

from config import DataConfig, UserError
from hearth import log

MAX_BYTES = 1 << 30  # of a document
SEEN_LIMIT = 24_000_000  # document hashes held in memory, 8 bytes each in a table at most 3/4 full


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used: `reason` is what is counted, `detail` what is shown."""

    reason: str
    detail: str = ""


def as_bytes(value: Any) -> bytes | Rejected:
    """The UTF-8 bytes of a value that should be text; of `bytes` the reader has made sure."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            return Rejected("invalid UTF-8", str(error))
    if value is None:
        return Rejected("null")
    return (
        value
        if isinstance(value, Rejected)
        else Rejected("wrong type in column", type(value).__name__)
    )


CONTROL = bytes(byte for byte in range(32) if byte not in b"\t\n\r\f\v\x1b") + b"\x7f"


def unfit(data: bytes, config: DataConfig) -> Rejected | None:
    """Why a document is no use for training, None where it is."""
    if len(data) > MAX_BYTES:
        return Rejected("too long", f"more than {log.size(MAX_BYTES)}")
    if b"\0" in data:
        return Rejected("NUL bytes")
    if len(data.strip()) < 4 * config.min_chars and len(data.decode().strip()) < config.min_chars:
        return Rejected("too short")
    head = data[:4096]
    odd = len(head) - len(head.translate(None, CONTROL))
    if not head.isascii():
        odd += 3 * head.count(b"\xef\xbf\xbd")
    if odd > len(head) / 10:
        return Rejected("not text", "control characters or U+FFFD")
    if repeated_line_share(data, config.max_repeated_line_share) > config.max_repeated_line_share:
        return Rejected("mostly one repeated line")
    return None


def repeated_line_share(data: bytes, matters_above: float = 0.0) -> float:
    """The share of the bytes that the repeated line with most bytes makes up; 0 where it is not
    above `matters_above`.

    Of a line that stands there m ≥ 2 times, m - 1 are redundant: it has at most twice the bytes of
    what is redundant.
    """
    lines = data.split(b"\n")
    distinct = set(lines)
    redundant = len(data) - len(lines) + 1 - sum(map(len, distinct))
    if 2 * redundant <= matters_above * len(data):
        return 0.0
    times = Counter(line for line in lines if line)
    return max((len(line) * n for line, n in times.items() if n > 1), default=0) / len(data)


def text_hash(data: bytes) -> int:
    """64 bits of a document's text: equal for duplicates, and below the held-out share for
    validation.
    """
    import xxhash

    return xxhash.xxh3_64_intdigest(data)


class Seen:
    """A set of 64-bit hashes in a table with linear probing: at most 12 bytes each, `limit` of
    them.

    Beyond the limit no more are remembered: `n_forgotten` counts them.
    """

    def __init__(self, limit: int = SEEN_LIMIT) -> None:
        self.limit, self.n, self.n_forgotten = limit, 0, 0
        self._table = array("Q", bytes(8 << 16))

    def __contains__(self, key: int) -> bool:
        return self._table[self._slot(key)] != 0

    def add(self, key: int) -> bool:
        """Remember `key`; True where it was known."""
        slot = self._slot(key)
        if self._table[slot]:
            return True
        if self.n >= self.limit:
            self.n_forgotten += 1
            return False
        self._table[slot] = key or 1
        self.n += 1
        if 4 * self.n > 3 * len(self._table):
            old, self._table = self._table, array("Q", bytes(16 * len(self._table)))
            for known in old:
                if known:
                    self._table[self._slot(known)] = known
        return False

    def _slot(self, key: int) -> int:
        """Where `key` lies, or the empty slot where it would."""
        table, key = self._table, key or 1
        mask = len(table) - 1
        slot = key & mask
        while (found := table[slot]) and found != key:
            slot = (slot + 1) & mask
        return slot


class NearDuplicates:
    """MinHash with locality-sensitive hashing (`datasketch`): a document is near one that shares a
    band of its sketch.

    Only the 64-bit hash of each band is kept, so memory stays bounded; that two sketches truly
    agree is not checked.
    """

    PERMUTATIONS = 64
    WORDS = 5  # in a shingle

    def __init__(self, threshold: float) -> None:
        if importlib.util.find_spec("datasketch") is None:
            raise UserError(
                "data.near_duplicates needs the package datasketch: run with `uv run --extra "
                "near-duplicates ...`."
            )
        from datasketch import MinHashLSH

        lsh = MinHashLSH(threshold=threshold, num_perm=self.PERMUTATIONS)
        self.bands, self.rows = lsh.b, lsh.r
        self.seen = Seen()

    def add(self, data: bytes) -> bool:
        """Remember a document's bands; True where one was known, and then nothing is remembered."""
        keys = self._keys(data)
        if any(key in self.seen for key in keys):
            return True
        for key in keys:
            self.seen.add(key)
        return False

    def _keys(self, data: bytes) -> list[int]:
        import xxhash
        from datasketch import MinHash

        words = data.lower().split()
        shingles = {
            b" ".join(words[i : i + self.WORDS]) for i in range(max(1, len(words) - self.WORDS + 1))
        }
        sketch = MinHash(self.PERMUTATIONS, seed=1, hashfunc=xxhash.xxh32_intdigest)
        sketch.update_batch(sorted(shingles))
        values = sketch.hashvalues[: self.bands * self.rows].reshape(self.bands, self.rows)
        return [xxhash.xxh3_64_intdigest(band.tobytes(), seed=i) for i, band in enumerate(values)]
