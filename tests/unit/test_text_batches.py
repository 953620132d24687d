"""Captions on their way into batches: drawn, tokenised, and what happens to images that have none."""

import pickle
from collections import Counter
from itertools import islice

import pytest
import torch
from PIL import Image

from openeva.data import loader as module
from openeva.data.labels import has_captions
from openeva.data.loader import EvalLoader, TooManyBrokenError, TrainLoader
from openeva.data.mixture import Mixture, Streams, balanced
from openeva.data.sources.base import Sample
from openeva.data.subset import hold_out
from openeva.data.views import CropConfig, ViewSpec
from openeva.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(context_length=16)
SPEC = ViewSpec((8, 8), tokenizer=TOKENIZER)
IMAGES = ViewSpec((8, 8))
CROP = CropConfig()


class Pairs:
    """Sample i is one colour and says its number in three ways; some have no caption, some an empty one."""

    num_classes = 2
    has_captions = True

    def __init__(self, length=24, none=(), empty=(), phrasings=3):
        self.length, self.none, self.empty, self.phrasings = length, none, empty, phrasings

    def __len__(self):
        return self.length

    def read(self, index):
        captions = [f"way {n} to {index}" + " , at length" * n for n in range(self.phrasings)]
        extra = {} if index in self.none else {"captions": [" ", ""] if index in self.empty else captions}
        return Sample(Image.new("RGB", (9, 9), (index, 0, 0)), f"{index}.png", index % 2, extra)


class Images(Pairs):
    has_captions = False


class Stream:
    num_classes = 0
    has_captions = True

    def __init__(self, length=24, empty=()):
        self.samples_per_epoch, self.pairs = length, Pairs(length, empty=empty)

    def stream(self, *, epoch, seed, part, num_parts):
        yield from (self.pairs.read(number) for number in range(part, self.samples_per_epoch, num_parts))


def train(source=None, spec=SPEC, **options):
    options = {"batch_size": 4, **options}
    return TrainLoader(Mixture([source or Pairs()], [1.0]), spec, CROP, **options)


def take(loader, steps, start=0):
    batches = loader.batches(start)
    taken = [batch for step in islice(batches, steps) for batch in step]
    batches.close()
    return taken


def texts_of(batches, length=16):
    """All rows of some batches, padded to one length."""
    return torch.cat([torch.nn.functional.pad(b["text"], (0, length - b["text"].shape[1])) for b in batches])


def phrasing_of(row):
    """The words that a row of token ids says, up to its end."""
    ids = row[1 : row.tolist().index(49_407)].tolist()
    known = {tuple(TOKENIZER.encode(f"way {n}")): n for n in range(3)}
    return known[tuple(ids[: len(next(iter(known)))])]


def test_rows_hold_the_ids_of_one_caption_of_their_image_and_are_as_long_as_the_longest():
    for batch in take(train(), 6):
        captions = [
            Pairs().read(index).extra["captions"][phrasing_of(row)]
            for index, row in zip(batch["index"].tolist(), batch["text"], strict=True)
        ]
        assert torch.equal(batch["text"], TOKENIZER(captions))
        assert batch["text"].dtype == torch.int64
    assert {b["text"].shape[1] for b in take(train(), 12)} <= {8, 16}
    assert {b["text"].shape[1] for b in take(train(Pairs(phrasings=1)), 12)} == {8}


def test_phrasings_are_drawn_evenly_and_anew_in_each_epoch_without_changing_the_crop():
    batches = take(train(), 6 * 30)
    drawn = Counter(phrasing_of(row) for batch in batches for row in batch["text"])
    assert all(200 < drawn[n] < 280 for n in range(3)), drawn
    of_first = {phrasing_of(row) for b in batches for i, row in zip(b["index"], b["text"], strict=True) if i == 0}
    assert of_first == {0, 1, 2}
    for with_text, without in zip(take(train(), 6), take(train(spec=IMAGES), 6), strict=True):
        assert "text" not in without
        assert torch.equal(with_text["image"], without["image"])
        assert torch.equal(with_text["flip"], without["flip"])


def test_same_captions_with_any_workers_processes_and_after_resume():
    alone = texts_of(take(train(accumulation=2), 6))
    assert torch.equal(texts_of(take(train(accumulation=2, num_workers=2), 6)), alone)
    ranks = [take(train(rank=rank, world_size=2, num_workers=rank), 6) for rank in range(2)]
    assert torch.equal(texts_of([batch for step in zip(*ranks, strict=True) for batch in step]), alone)
    assert torch.equal(texts_of(take(train(accumulation=2), 3, start=24)), alone[24:])
    assert not torch.equal(texts_of(take(train(accumulation=2, seed=1), 6)), alone)


def test_evaluation_reads_the_first_caption_and_carries_all():
    loader = EvalLoader(Mixture([Pairs(10)], [1.0]), SPEC, CROP, batch_size=4)
    batches = list(loader)
    assert [len(batch["captions"]) for batch in batches] == [4, 4, 2]
    for batch in batches:
        assert batch["captions"] == [Pairs().read(i).extra["captions"] for i in batch["index"].tolist()]
        assert torch.equal(batch["text"], TOKENIZER([captions[0] for captions in batch["captions"]]))
    (plain,) = EvalLoader(Mixture([Pairs(4)], [1.0]), IMAGES, CROP, batch_size=4)
    assert not {"text", "captions"} & set(plain)


def test_broken_pairs_are_replaced_counted_and_named():
    loader = train(Pairs(none={3}, empty={7}), max_broken=0.5)
    batches = take(loader, 12)
    assert {"3.png", "7.png"} == set(loader.broken) == {name for batch in batches for name in batch["broken"]}
    assert loader.broken["3.png"] == loader.broken["7.png"] == "no caption for this image, or an empty one"
    assert not {3, 7} & {index for batch in batches for index in batch["index"].tolist()}
    assert all(len(batch["text"]) == 4 for batch in batches)
    images = train(Pairs(none={3}, empty={7}), spec=IMAGES)
    take(images, 6)
    assert not images.broken  # nobody reads their text


def test_broken_pairs_are_left_out_of_evaluation_with_rows_that_still_belong_together():
    loader = EvalLoader(Mixture([Pairs(10, none={1}, empty={2})], [1.0]), SPEC, CROP, batch_size=5, max_broken=1)
    first, second = loader
    assert first["index"].tolist() == [0, 3, 4]
    assert [captions[0] for captions in first["captions"]] == [f"way 0 to {i}" for i in (0, 3, 4)]
    assert torch.equal(first["text"], TOKENIZER([captions[0] for captions in first["captions"]]))
    assert (len(second["text"]), set(loader.broken)) == (5, {"1.png", "2.png"})


def test_only_so_many_broken_pairs_are_named_but_all_are_counted(monkeypatch):
    monkeypatch.setattr(module, "MOST_NAMED", 4)
    loader = train(Pairs(empty=range(1, 24, 2)), max_broken=1)
    take(loader, 30)
    assert 4 <= len(loader.broken) < 12
    assert loader.num_broken == loader.num_read - 120 > 40


def test_too_many_broken_pairs_stop_the_run():
    with pytest.raises(TooManyBrokenError, match=r"(?s)max_broken=0\.01.*5\.png: no caption for this image"):
        take(train(Pairs(empty={5})), 12)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_streams_read_captions_too(num_workers):
    streams = Streams([Stream(empty={4})], [1.0])
    loader = TrainLoader(streams, SPEC, CROP, batch_size=4, num_workers=num_workers, max_broken=0.5)
    batches = take(loader, 11)
    assert set(loader.broken) == {"4.png"}
    seen = [index for batch in batches for index in batch["image"][:, 0, 0, 0].tolist()]
    for row, number in zip(texts_of(batches), seen, strict=True):
        captions = Pairs().read(number).extra["captions"]
        assert torch.equal(row, texts_of([{"text": TOKENIZER([captions[phrasing_of(row)]])}])[0])


def test_stream_without_any_caption_ends_instead_of_searching_for_ever():
    streams = Streams([Stream(empty=range(24))], [1.0])
    with pytest.raises(TooManyBrokenError, match="no caption"):
        take(TrainLoader(streams, SPEC, CROP, batch_size=4, max_broken=1.0), 1)


def test_sources_without_captions_are_refused_where_text_is_read():
    both = Mixture([Pairs(), Images()], [1.0, 1.0])
    for build in (
        lambda spec: TrainLoader(both, spec, CROP, batch_size=4),
        lambda spec: EvalLoader(both, spec, CROP, batch_size=4),
    ):
        with pytest.raises(ValueError, match=r"no captions in source 1 \(Images\); give sources of images with capt"):
            build(SPEC)
        build(IMAGES)


def test_parts_of_a_source_with_captions_have_captions():
    pairs = Pairs()
    parts = [*hold_out(pairs, 0.2), Mixture([pairs], [1.0]), Streams([Stream()], [1.0])]
    parts += balanced(Mixture([_Labelled()], [1.0]), 1.0).sources
    assert all(map(has_captions, parts))
    assert not has_captions(Images())
    assert not has_captions(Mixture([pairs, Images()], [1.0, 1.0]))


class _Labelled(Pairs):
    def labels(self):
        return torch.arange(self.length).numpy() % 2


def test_what_workers_get_survives_pickling():
    dataset = train(Pairs(8))._dataset(0)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[4]["text"], dataset[4]["text"])


def test_a_mirror_that_would_make_captions_wrong_is_told(caplog):
    still = CropConfig(hflip=0.0)
    for crop, spec, rank, told in ((CROP, SPEC, 0, 1), (CROP, SPEC, 1, 0), (still, SPEC, 0, 0), (CROP, IMAGES, 0, 0)):
        caplog.clear()
        TrainLoader(Mixture([Pairs()], [1.0]), spec, crop, batch_size=4, rank=rank, world_size=2)
        assert sum("data.crop.hflip=0" in record.getMessage() for record in caplog.records) == told
