"""Byte-level BPE: train, save, load, encode, decode.

In: text. Out: token ids, and text again. Every byte string comes back as it was; digits are split
one by one. Knows nothing of conversations: it only reserves the ids of their special tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from hearth import storage

BOS, SYSTEM, USER, ASSISTANT, END = "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
THINK, END_THINK, PAD = "<think>", "</think>", "<|pad|>"
TOOL_CALL, END_TOOL_CALL, TOOL_RESULT = "<|tool_call|>", "<|end_tool_call|>", "<|tool_result|>"
SPARES = tuple(f"<|spare_{i}|>" for i in range(4))
# their ids are their places here
SPECIAL_TOKENS = (
    *(BOS, SYSTEM, USER, ASSISTANT, END, THINK, END_THINK, PAD),
    *("<|tool|>", TOOL_CALL, END_TOOL_CALL, TOOL_RESULT, *SPARES),
)

FILE = "tokenizer.json"
MAX_FILE_BYTES = 64 << 20
UNUSED = "<|unused_{}|>"  # fills the vocabulary where the corpus was too small to
N_BYTES = 256
PIECE_CHARS = 1 << 16  # longer texts are encoded in pieces
LINE_START = re.compile(r"\n(?=[^\W_])")  # a line end before a letter or digit

# Words with one sign or space before them, digits one by one, runs of signs, line ends, other
# blanks.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to ids and back.

    vocab_size: the ids a model must provide; ids beyond the trained entries stay unused and decode
    to nothing.
    special: spelling → id. token_bytes: bytes of text each id stands for, 0 for special ones, as an
    int64 array.
    hash: changes when any id changes its meaning.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._backend.encode_special_tokens = True  # what spells a special token in a text is text
        self.vocab_size = backend.get_vocab_size()
        self.special = {name: i for i, name in enumerate(SPECIAL_TOKENS)}
        self.bos, self.system, self.user, self.assistant, self.end = (
            self.special[t] for t in SPECIAL_TOKENS[:5]
        )
        self.think, self.end_think, self.pad = (self.special[t] for t in (THINK, END_THINK, PAD))
        self.tool_call, self.end_tool_call, self.tool_result = (
            self.special[t] for t in (TOOL_CALL, END_TOOL_CALL, TOOL_RESULT)
        )
        model = json.loads(backend.to_str())["model"]
        meaning = json.dumps([sorted(backend.get_vocab().items()), model["merges"], PATTERN])
        self.hash = hashlib.sha256(meaning.encode()).hexdigest()[:16]
        self._to_byte = {char: byte for byte, char in _byte_chars().items()}

    # ----------------------------------------------------------------------------- make, save, load

    @classmethod
    def train(
        cls, texts: Iterable[str] | Iterable[list[str]], vocab_size: int, *, progress: bool = False
    ) -> Tokenizer:
        """Learn `vocab_size` entries, special tokens and the 256 bytes included; the same texts
        give the same file.
        """
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Backend

        smallest = len(SPECIAL_TOKENS) + N_BYTES
        if vocab_size < smallest:
            raise UserError(
                f"model.vocab_size is {vocab_size}; special tokens and bytes alone are {smallest}."
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[
                AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS
            ],
            initial_alphabet=sorted(_byte_chars().values()),
            show_progress=progress,
            max_token_length=32,
        )
        backend.train_from_iterator((clean_batch(text) for text in texts), trainer)
        backend.add_special_tokens(
            [UNUSED.format(i) for i in range(backend.get_vocab_size(), vocab_size)]
        )
        return cls(backend)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, in the `tokenizers` format; a kill leaves the old file or the new
        one.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        storage.write_text(Path(folder) / FILE, self._backend.to_str(pretty=True))

    @classmethod
    def load(cls, folder: Path, command: str = "uv run train_tokenizer.py") -> Tokenizer:
        """The tokenizer in `folder`; `command` is what makes it, for the error where it
        is missing.
        """
        from tokenizers import Tokenizer as Backend

        path = Path(folder) / FILE
        if not path.is_file():
            raise UserError(f"No tokenizer: {folder} holds no {FILE}. Make it with `{command}`.")
        try:
            model = storage.field(
                storage.read_json(path, max_bytes=MAX_FILE_BYTES), "model", dict, path
            )
            storage.field(model, "vocab", dict, path, at="model")
            storage.field(model, "merges", list, path, at="model")
            backend = Backend.from_file(str(path))
            _check(backend, path)
        except Exception as error:  # the library raises bare `Exception`
            what = " ".join(str(error).split())[:300]
            if not isinstance(error, UserError):
                what = f"Cannot read {path}: {what}."
            raise UserError(f"{what} Make it again with `{command}`.") from error
        return cls(backend)

    # ---------------------------------------------------------------------------------- text to ids

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; never a special one, whatever it spells."""
        return self._backend.encode(clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores; a long text is worked on in pieces, which bounds the
        memory it takes.
        """
        pieces = [list(_cut(clean(text))) for text in texts]
        flat = [piece for text in pieces for piece in text]
        encoded = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
        return [
            [i for _ in text for i in next(encoded).ids] if len(text) > 1 else next(encoded).ids
            for text in pieces
        ]

    # ---------------------------------------------------------------------------------- ids to text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; special tokens as their spelling, unused ids
        as nothing.
        """
        return b"".join(self._pieces[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for; bytes that are no UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        lengths = np.array([len(piece) for piece in self._pieces], np.int64)
        lengths[: len(SPECIAL_TOKENS)] = 0
        return lengths

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        for token, i in self._backend.get_vocab(with_added_tokens=False).items():
            pieces[i] = (
                bytes(self._to_byte[char] for char in token)
                if token not in self.special
                else token.encode()
            )
        return pieces

    def byte_id(self, byte: int) -> int:
        """The id of a single byte."""
        return self._byte_ids[byte]

    @cached_property
    def _byte_ids(self) -> list[int]:
        return [self._backend.token_to_id(char) for _, char in sorted(_byte_chars().items())]

    @property
    def n_entries(self) -> int:
        """Entries that were learned; fewer than `vocab_size` where the corpus was too small to fill
        it.
        """
        return self._backend.get_vocab_size(with_added_tokens=False)


def clean(text: str) -> str:
    """`text` as something UTF-8 can hold: each lone surrogate becomes U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def clean_batch(texts: str | list[str]) -> str | list[str]:
    return clean(texts) if isinstance(texts, str) else [clean(text) for text in texts]


def _cut(text: str) -> Iterator[str]:
    """`text` in pieces of about `PIECE_CHARS`, cut before a line that begins with a letter: no
    token crosses there.

    A stretch of 16 times that without such a place is cut hard.
    """
    start = 0
    while len(text) - start > 2 * PIECE_CHARS:
        match = LINE_START.search(text, start + PIECE_CHARS, start + 16 * PIECE_CHARS)
        stop = match.end() if match else min(len(text), start + 16 * PIECE_CHARS)
        yield text[start:stop]
        start = stop
    yield text[start:]


def _check(backend: Any, path: Path) -> None:
    """Raise a `UserError` where ids, special tokens or bytes are not as `Tokenizer` takes them
    to be.
    """
    vocab = backend.get_vocab()
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{path}: model.vocab should give each id from 0 to {len(vocab) - 1} once.")
    for i, name in enumerate(SPECIAL_TOKENS):
        if vocab.get(name) != i:
            raise UserError(f"{path}: {name} should have the id {i}, not {vocab.get(name)}.")
    bytes_ = set(_byte_chars().values())
    learned = backend.get_vocab(with_added_tokens=False)
    odd = [t for t in learned if t not in SPECIAL_TOKENS and not bytes_.issuperset(t)]
    odd += bytes_.difference(vocab)
    if odd:
        raise UserError(f"{path}: model.vocab is not one of bytes: {storage.shown(odd[0])}.")


def _byte_chars() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, which the `tokenizers` library writes tokens in."""
    shown = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(N_BYTES) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(N_BYTES + i) for i, byte in enumerate(hidden)
    }
