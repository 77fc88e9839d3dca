"""The tokenizer: every byte comes back, nothing a text spells becomes a special token, training
repeats itself.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from config import UserError
from hearth.data.tokenizer import SPECIAL_TOKENS, Tokenizer

AWKWARD = (
    "",
    " leading and trailing ",
    "\r\n\n\t tabs \x00 NUL",
    "naïve café 🎉👩‍👩‍👧 中文 עברית",
    "x = 1234567 + 0.5e-10",
    "def f(x):\n    return x**2  # twice\n\n\n",
    "".join(SPECIAL_TOKENS),
    "<|bos|><|end|> <think>no</think><|unused_300|>",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "said", "hello", "to", "12", "dogs"]
    draw = random.Random(0)
    return Tokenizer.train(
        [" ".join(draw.choices(words, k=50)) + "".join(SPECIAL_TOKENS) for _ in range(50)], 512
    )


@pytest.mark.parametrize("text", AWKWARD)
def test_text_comes_back_and_no_special_id_appears(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_every_byte_string_comes_back(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    for data in [
        bytes(range(256)),
        bytes(range(255, -1, -1)),
        *(draw.randbytes(40) for _ in range(50)),
    ]:
        assert tokenizer.decode_bytes(map(tokenizer.byte_id, data)) == data


def test_lone_surrogates_become_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83c\udf89")) == "🎉"


def test_digits_are_split_one_by_one(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.encode("123456")] == list("123456")


def test_no_space_is_added_in_front(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("the cat") == tokenizer.encode("the") + tokenizer.encode(" cat")


def test_special_tokens_are_the_first_ids_and_show_as_their_spelling(tokenizer: Tokenizer) -> None:
    assert [tokenizer.special[name] for name in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.decode(range(len(SPECIAL_TOKENS))) == "".join(SPECIAL_TOKENS)


def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes.dtype == np.int64
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    for text in AWKWARD:
        ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.end]
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_ids_beyond_a_small_corpus_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 512 > tokenizer.n_entries
    assert tokenizer.decode_bytes(range(tokenizer.n_entries, tokenizer.vocab_size)) == b""


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    draw = random.Random(2)
    texts = ["".join(draw.choices("abcdefgh ", k=400)) for _ in range(200)]
    for name in ("one", "two"):
        Tokenizer.train(iter(texts), 600).save(tmp_path / name)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (
        tmp_path / "two/tokenizer.json"
    ).read_bytes()


def test_saved_tokenizer_loads_as_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.hash, loaded.vocab_size) == (tokenizer.hash, tokenizer.vocab_size)
    for text in AWKWARD:
        assert loaded.encode(text) == tokenizer.encode(text)


def test_missing_or_broken_tokenizer_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="uv run make_it"):
        Tokenizer.load(tmp_path, "uv run make_it")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="uv run make_it"):
        Tokenizer.load(tmp_path, "uv run make_it")


def test_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="vocab_size"):
        Tokenizer.train(["abc"], 128)


def harm_ids(content: dict) -> None:
    content["model"]["vocab"]["zz"] = 2**32 - 1


def harm_places(content: dict) -> None:
    vocab = content["model"]["vocab"]
    vocab["<|bos|>"], vocab["<|pad|>"] = vocab["<|pad|>"], vocab["<|bos|>"]


def harm_bytes(content: dict) -> None:
    model = content["model"]
    last = max(model["vocab"], key=model["vocab"].get)
    model["vocab"]["日"] = model["vocab"].pop(last)
    model["merges"].pop()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda content: content.pop("model"), "model should be an object, but is missing"),
        (lambda content: content.update(model=[1]), r"model should be an object, but is \[1\]"),
        (lambda content: content["model"].pop("merges"), r"model\.merges should be a list"),
        (lambda content: content["model"].update(vocab="x"), r"model\.vocab should be an object"),
        (lambda content: content["model"].update(merges=[1]), "Cannot read"),
        (lambda content: content["model"].update(type="nonsense"), "Cannot read"),
        (lambda content: content["model"]["vocab"].update(zz=-1), "Cannot read"),
        (lambda content: content["model"]["vocab"].update(zz=300), "each id from 0 to 512 once"),
        (harm_ids, "each id from 0 to 512 once"),
        (harm_places, r"<\|bos\|> should have the id 0, not 7"),
        (lambda content: content["model"].update(vocab={}, merges=[]), "not one of bytes"),
        (lambda content: content.update(added_tokens=[], model={}), "model.vocab should be"),
        (harm_bytes, "not one of bytes: '日'"),
        (lambda content: content.update(added_tokens=7), "Cannot read"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_one_line_with_the_file(
    tokenizer: Tokenizer, tmp_path: Path, harm: Callable[[dict], object], message: str
) -> None:
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    harm(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{message}.* Make it again with `make it`") as found:
        Tokenizer.load(tmp_path, "make it")
    assert str(tmp_path / "tokenizer.json") in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("content", ["", "[]", '{"model": ' + "[" * 10**5, "{"])
def test_a_tokenizer_that_is_no_json_object_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json .* Make it again") as found:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(found.value)


def test_a_tokenizer_that_is_absurdly_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"tokenizer\.json has 1099511627776 bytes"):
        Tokenizer.load(tmp_path)
