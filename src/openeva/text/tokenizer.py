"""Captions to token ids: CLIP's byte-level BPE, by open_clip.

text -> cleaned, lower case -> words -> byte pairs -> [start, ids ..., end, 0 ...]

Source: spec section 1.7. open_clip's tokenizer gives the ids of the official EVA-CLIP one; EVA-01's spells the special
tokens `<|startoftext|>`, `<|endoftext|>` where they stand in a text (`specials`). Deliberate difference: rows are only
as long as the longest text needs. What follows the end token never reaches it, since attention is causal, so that the
features are the same and the text tower has three to five times fewer tokens to look at.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import regex
import torch
from jaxtyping import Int
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

Specials = Literal["eva02", "eva01"]

CONTEXT_LENGTH = 77
VOCAB_SIZE = 49_408
START, END = 49_406, 49_407
LENGTH_STEP = 8
"""Rows have a length that is a multiple of this, so that few different shapes occur."""

MAX_CACHED_WORDS = 1 << 17
"""Words whose pieces are remembered, about 30 MB: billions of captions have hundreds of millions of different words."""

_EVA01 = {"<|startoftext|>": "<start_of_text>", "<|endoftext|>": "<end_of_text>"}
"""EVA-01's spelling -> open_clip's."""


class Tokenizer:
    """Callable on captions; small enough to travel to the workers of a loader.

    Args:
        context_length: L, longest row; longer texts are cut and end with the end token.
        specials: How special tokens are spelled inside texts: as in EVA-02-CLIP and open_clip, or as in EVA-01-CLIP.
    """

    def __init__(self, context_length: int = CONTEXT_LENGTH, specials: Specials = "eva02") -> None:
        self.context_length, self.specials = context_length, specials

    def __call__(self, texts: Sequence[str], *, padded: bool = False, truncate: bool = True) -> Int[Tensor, "B L"]:
        """Token ids, zeros after the end token.

        Args:
            texts: Captions.
            padded: Make all rows `context_length` long.
            truncate: Cut what is too long; otherwise it is an error.

        Raises:
            ValueError: A text is too long and `truncate` is off.
        """
        rows = [[START, *self.encode(text), END] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.context_length and not truncate:
                raise ValueError(
                    f"{text[:60]!r} has {len(row)} tokens with start and end, more than the {self.context_length} that"
                    " the model takes; shorten it, or set truncate=True"
                )
        rows = [row if len(row) <= self.context_length else [*row[: self.context_length - 1], END] for row in rows]
        longest = max((len(row) for row in rows), default=0)
        length = self.context_length if padded else min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self.context_length)
        ids_BL = torch.zeros(len(rows), length, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids_BL[number, : len(row)] = torch.tensor(row)
        return ids_BL

    def encode(self, text: str) -> list[int]:
        """Ids of a text without start and end."""
        bpe = _bpe(self.specials)
        if len(bpe.cache) > MAX_CACHED_WORDS:  # to begin anew costs 20 microseconds per caption for a while
            bpe.cache = {word: pieces for word, pieces in bpe.cache.items() if word == pieces}  # special tokens stay
        return bpe.encode(text)


@cache
def _bpe(specials: Specials) -> SimpleTokenizer:
    """One per process: reading the vocabulary takes a second."""
    bpe = SimpleTokenizer(context_length=CONTEXT_LENGTH)
    if specials == "eva01":
        pattern = bpe.pat.pattern
        for ours, theirs in _EVA01.items():
            for table in (bpe.encoder, bpe.cache):
                table[ours] = table.pop(theirs)
            bpe.cache[ours] = ours
            pattern = pattern.replace(theirs, regex.escape(ours))
        bpe.pat = regex.compile(pattern, regex.IGNORECASE)
    return bpe
