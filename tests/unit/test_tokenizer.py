"""Captions to ids: what a run of billions of captions needs of it; the ids themselves are tested for parity."""

import pickle
import random

import pytest
import torch

from openeva.text import tokenizer as module
from openeva.text.tokenizer import END, START, Tokenizer


@pytest.fixture
def words():
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefghijklm", k=8)) for _ in range(300)]


@pytest.mark.parametrize(("specials", "spelled"), [("eva02", "<end_of_text>"), ("eva01", "<|endoftext|>")])
def test_remembered_words_are_bounded_and_nothing_changes(monkeypatch, words, specials, spelled):
    tokenizer = Tokenizer(specials=specials)
    texts = [f"{word} {spelled} of many" for word in words]
    expected = tokenizer(texts)
    assert (expected == END).sum(1).eq(2).all()
    monkeypatch.setattr(module, "MAX_CACHED_WORDS", 50)
    for text, ids_L in zip(texts, expected, strict=True):
        (ids,) = tokenizer([text])
        assert torch.equal(ids, ids_L[: len(ids)])
        assert len(module._bpe(specials).cache) <= 50 + 3


def test_tokenizer_travels_light_and_keeps_its_arguments():
    tokenizer = Tokenizer(16, "eva01")
    tokenizer(["a cat"])
    sent = pickle.dumps(tokenizer)
    assert len(sent) < 200
    assert torch.equal(pickle.loads(sent)(["<|startoftext|> x"] * 2), tokenizer(["<|startoftext|> x"] * 2))


def test_too_long_texts_end_with_the_end_token_or_are_refused():
    tokenizer = Tokenizer(8)
    (row,) = tokenizer(["one two three four five six seven eight"])
    assert (len(row), int(row[0]), int(row[-1])) == (8, START, END)
    with pytest.raises(ValueError, match=r"'one two three .*has 10 tokens with start and end, more than the 8"):
        tokenizer(["one two three four five six seven eight"], truncate=False)


def test_no_texts_and_empty_texts():
    assert Tokenizer()([]).shape == (0, 0)
    assert Tokenizer()(["", "a"]).tolist() == [[START, END, 0, 0, 0, 0, 0, 0], [START, 320, END, 0, 0, 0, 0, 0]]
