import io
import multiprocessing
import random
import subprocess
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from openeva.data.loader import DataConfig, EvalLoader, TooManyBrokenError, TrainLoader
from openeva.data.masking import AlternateMasking, BlockMasking, RandomMasking
from openeva.data.mixture import Mixture, Streams
from openeva.data.sources import scenes
from openeva.data.sources.base import Sample
from openeva.data.subset import hold_out
from openeva.data.views import CropConfig, ViewSpec

PLAIN = ViewSpec((16, 16))
MASKED = ViewSpec((16, 16), None, BlockMasking(num_masked=6, min_block=2).build((4, 4)))


class Colours:
    """Sample i is a PNG of one colour that says i; some are broken, in one of two ways."""

    num_classes = 7

    def __init__(self, length, broken=(), missing=(), offset=0):
        self.length, self.broken, self.missing, self.offset = length, set(broken), set(missing), offset

    def __len__(self):
        return self.length

    def read(self, index):
        assert 0 <= index < self.length
        number = index + self.offset
        if index in self.missing:
            raise FileNotFoundError(2, "No such file or directory", f"gone{number}.png")
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (number % 256, number // 256, 9)).save(buffer, "PNG")
        data = buffer.getvalue()
        return Sample(data[:30] if index in self.broken else data, f"{number}.png", number % 7)


class Numbers:
    """A stream: part p of n gives the samples p, p + n, ..."""

    num_classes = 0

    def __init__(self, length, broken=()):
        self.samples_per_epoch, self.broken = length, broken

    def stream(self, *, epoch, seed, part, num_parts):
        order = list(range(self.samples_per_epoch))
        random.Random(f"{epoch} {seed}").shuffle(order)
        for number in order[part::num_parts]:
            image = b"?" if number in self.broken else Image.new("RGB", (8, 8), (number, 0, epoch))
            yield Sample(image, str(number))


def mixture(*sources, weights=None):
    return Mixture(list(sources), weights or [1.0] * len(sources))


def loader(source=None, spec=PLAIN, **options):
    options.setdefault("batch_size", 4)
    return TrainLoader(source or mixture(Colours(30)), spec, CropConfig(), **options)


def steps(the_loader, count, start=0):
    batches = the_loader.batches(start)
    result = list(islice(batches, count))
    batches.close()
    return result


def numbers(batch):
    """Which samples a batch of `Colours` shows, read off its pixels."""
    image = batch["image"].long()
    assert (image.amax((2, 3)) == image.amin((2, 3))).all()
    return (image[:, 0, 0, 0] + 256 * image[:, 1, 0, 0]).tolist()


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key], key


def test_batch_layout():
    spec = ViewSpec((16, 24), (8, 12), BlockMasking(num_masked=10, min_block=2).build((4, 6)))
    the_loader = loader(spec=spec)
    (batch,) = steps(the_loader, 1)[0]
    assert batch["image"].shape == (4, 3, 16, 24)
    assert batch["target_image"].shape == (4, 3, 8, 12)
    assert batch["image"].dtype == batch["target_image"].dtype == torch.uint8
    assert batch["mask"].shape == (4, 24)
    assert batch["mask"].dtype == batch["flip"].dtype == torch.bool
    assert batch["index"].tolist() == numbers(batch)
    assert batch["label"].tolist() == [n % 7 for n in numbers(batch)]
    assert batch["broken"] == []
    assert the_loader.num_read == 4
    (plain,) = steps(loader(), 1)[0]
    assert set(plain) == {"image", "index", "flip", "label", "broken"}


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), ratio=st.floats(0.05, 0.95), block=st.booleans())
def test_masked_index_lists_the_masked_patches(seed, ratio, block):
    masking = BlockMasking(num_masked=20, min_block=12, tries=1) if block else RandomMasking(ratio=ratio)
    spec = ViewSpec((8, 8), None, masking.build((8, 8)))
    (batch,) = steps(loader(spec=spec, seed=seed), 1)[0]
    real = batch["masked_weight"].bool()
    expected = batch["mask"].flatten().nonzero()[:, 0]
    assert batch["masked_index"].shape == batch["masked_weight"].shape == (4 * spec.masking.max_masked,)
    assert batch["masked_index"][real].tolist() == expected.tolist()
    assert real.tolist() == sorted(real.tolist(), reverse=True)
    assert (batch["masked_index"][~real] == 0).all()
    assert set(batch["masked_weight"].tolist()) <= {0.0, 1.0}


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order():
    the_loader = loader(mixture(Colours(30), Colours(10, offset=300)))
    assert (the_loader.steps_per_epoch, the_loader.samples_per_epoch) == (10, 40)
    seen = [n for (batch,) in steps(the_loader, 20) for n in numbers(batch)]
    assert sorted(seen[:40]) == sorted(seen[40:]) == [*range(30), *range(300, 310)]
    assert seen[:40] != seen[40:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_goes_on_at_the_same_sample(num_workers):
    """In the middle of the second epoch, with a last incomplete batch dropped: all tensors equal."""
    whole = steps(loader(spec=MASKED, num_workers=num_workers), 12)
    rest = steps(loader(spec=MASKED), 3, start=9 * 4)
    for first, second in zip(whole[9:], rest, strict=True):
        assert_equal(first[0], second[0])


def test_two_processes_see_what_one_sees_with_accumulation():
    one = steps(loader(spec=MASKED, accumulation=4, seed=3), 3)
    two = [steps(loader(spec=MASKED, accumulation=2, rank=rank, world_size=2, seed=3), 3) for rank in (0, 1)]
    four = [steps(loader(spec=MASKED, rank=rank, world_size=4, seed=3), 3) for rank in range(4)]
    for number, step in enumerate(one):
        assert len(step) == 4
        for micro, batch in enumerate(step):
            assert_equal(batch, two[micro % 2][number][micro // 2])
            assert_equal(batch, four[micro][number][0])


def test_samples_do_not_depend_on_the_batch_size():
    small = [batch["image"] for (batch,) in steps(loader(spec=MASKED, batch_size=3), 10)]
    large = [batch["image"] for (batch,) in steps(loader(spec=MASKED, batch_size=15), 2)]
    assert torch.equal(torch.cat(small), torch.cat(large))


def test_crops_and_masks_change_with_the_epoch_and_the_seed():
    source = mixture(scenes.Config(num_images=4, size=32).build())
    views = [steps(loader(source, MASKED, seed=seed), 2) for seed in (0, 1)]
    flat = [batch for run in views for (batch,) in run]
    for i, first in enumerate(flat):
        for second in flat[:i]:
            assert not torch.equal(first["mask"], second["mask"])
            a, b = (dict(zip(x["index"].tolist(), x["image"], strict=True)) for x in (first, second))
            assert not any(torch.equal(a[index], b[index]) for index in a)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_state_is_left_alone(num_workers, monkeypatch):
    for name in ("random", "uniform", "randint", "shuffle", "choice", "choices", "sample"):
        monkeypatch.setattr(random, name, None)  # the state itself cannot be compared: beartype draws from it
    torch.manual_seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    steps(loader(spec=MASKED, num_workers=num_workers), 2)
    list(EvalLoader(mixture(Colours(5)), MASKED, CropConfig(), batch_size=2, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_workers_outlive_signals_to_the_whole_run():
    batches = loader(num_workers=2).batches()
    next(batches)
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    assert len(workers) == 2
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert len(list(islice(batches, 12))) == 12
    for worker in workers:  # what an interpreter does that ends while they work; it waits for them
        worker.terminate()
        worker.join(timeout=5)
        assert worker.exitcode == 0
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(islice(batches, 20))


# ---------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_are_replaced_counted_and_named(num_workers):
    source = mixture(Colours(40, broken=[3], missing=[5]))
    the_loader = loader(source, MASKED, max_broken=0.2, num_workers=num_workers)
    batches = [batch for (batch,) in steps(the_loader, 10)]
    seen = [n for batch in batches for n in numbers(batch)]
    assert len(seen) == 40
    assert not {3, 5} & set(seen)
    assert set(range(40)) - {3, 5} <= set(seen)
    named = {name for batch in batches for name in batch["broken"]}
    assert named == {"3.png", "gone5.png"} == set(the_loader.broken)
    assert the_loader.broken["gone5.png"] == "No such file or directory"
    assert the_loader.num_read == 40 + sum(len(batch["broken"]) for batch in batches)
    for batch in batches:
        assert batch["label"].tolist() == [n % 7 for n in numbers(batch)]
    again = [batch for (batch,) in steps(loader(source, MASKED, max_broken=0.2), 4, start=24)]
    for first, second in zip(batches[6:], again, strict=True):
        assert_equal(first, second)


def test_too_many_broken_files_stop_the_run_with_their_names():
    with pytest.raises(TooManyBrokenError, match=r"max_broken=0.1(.|\n)*14\.png: not an image"):
        steps(loader(mixture(Colours(40, broken=range(13, 20))), max_broken=0.1), 100)
    steps(loader(mixture(Colours(40, broken=range(13, 20))), max_broken=0.3), 100)
    steps(loader(mixture(Colours(2000, broken=[1])), max_broken=0.01), 260)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_broken_files_stops_at_once(num_workers):
    with pytest.raises(TooManyBrokenError, match="max_broken"):
        steps(loader(mixture(Colours(5000, missing=range(5000))), num_workers=num_workers), 1)


# ------------------------------------------------------------------------------------------------ evaluation


@settings(max_examples=30)
@given(length=st.integers(1, 40), batch_size=st.integers(1, 9), world_size=st.integers(1, 4), limit=st.integers(1, 50))
def test_evaluation_sees_every_sample_exactly_once(length, batch_size, world_size, limit):
    seen, sizes = [], []
    for rank in range(world_size):
        the_loader = EvalLoader(
            mixture(Colours(length)),
            PLAIN,
            CropConfig(),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            limit=limit,
        )
        batches = list(the_loader)
        assert len(batches) == len(the_loader)
        sizes.append(sum(len(batch["index"]) for batch in batches))
        seen += [n for batch in batches for n in numbers(batch)]
    assert len(seen) == len(set(seen)) == min(length, limit) == the_loader.num_samples
    assert max(sizes) - min(sizes) <= 1
    if limit >= length and world_size == 1:
        assert seen == [*range(length)]


def test_evaluation_repeats_itself_with_fixed_masks():
    source = mixture(scenes.Config(num_images=10, size=40).build())
    crop = CropConfig(kind="center", hflip=0.0)
    for masking in (AlternateMasking().build((4, 4)), BlockMasking(num_masked=6, min_block=2).build((4, 4))):
        the_loader = EvalLoader(source, ViewSpec((32, 32), (16, 16), masking), crop, batch_size=4)
        for first, second in zip(the_loader, the_loader, strict=True):
            assert_equal(first, second)
    whole = next(iter(EvalLoader(source, MASKED, crop, batch_size=10)))["mask"]
    parts = [b["mask"] for r in (0, 1) for b in EvalLoader(source, MASKED, crop, batch_size=2, rank=r, world_size=2)]
    assert torch.equal(torch.cat([whole[0::2], whole[1::2]]), torch.cat(parts))
    assert len(whole.unique(dim=0)) > 3


def test_evaluation_leaves_out_broken_files():
    the_loader = EvalLoader(mixture(Colours(10, broken=[0, 1, 7])), MASKED, CropConfig(), batch_size=2, max_broken=0.5)
    batches = list(the_loader)
    assert [n for batch in batches for n in numbers(batch)] == [2, 3, 4, 5, 6, 8, 9]
    assert all(len(batch["masked_index"]) == 6 * len(batch["index"]) for batch in batches)
    assert set(the_loader.broken) == {"0.png", "1.png", "7.png"}


def test_caches_of_earlier_versions_stay_valid():
    """The identity of plain views is what it was when only these keys existed."""
    the_loader = EvalLoader(mixture(Colours(10)), PLAIN, CropConfig(kind="center"), batch_size=2)
    keys = {"kind", "scale", "ratio", "hflip", "crop_pct", "interpolation", "color_jitter"}
    assert set(the_loader.identity["crop"]) == keys
    augmented = EvalLoader(mixture(Colours(10)), PLAIN, CropConfig(randaugment="rand-m9"), batch_size=2)
    assert augmented.identity["crop"]["randaugment"] == "rand-m9"


def test_a_limit_takes_samples_from_everywhere():
    the_loader = EvalLoader(mixture(Colours(1000)), PLAIN, CropConfig(), batch_size=50, limit=50)
    seen = [n for batch in the_loader for n in numbers(batch)]
    assert 350 < np.mean(seen) < 650


def test_parts_of_an_evaluation_are_its_samples():
    whole = EvalLoader(mixture(Colours(100)), PLAIN, CropConfig(), batch_size=8, limit=40)
    shares = [[n for batch in whole.part(rank=rank, world_size=3) for n in numbers(batch)] for rank in range(3)]
    assert sorted(n for share in shares for n in share) == sorted(n for batch in whole for n in numbers(batch))
    assert {n for batch in whole.part(limit=10) for n in numbers(batch)} < {n for share in shares for n in share}
    assert whole.part(limit=10).num_samples == 10
    assert whole.part(limit=10).identity == whole.identity
    others = [
        EvalLoader(mixture(Colours(99)), PLAIN, CropConfig(), batch_size=8),
        EvalLoader(mixture(Colours(100)), MASKED, CropConfig(hflip=0.0), batch_size=8),
        EvalLoader(mixture(Colours(100)), ViewSpec((16, 16), (32, 32)), CropConfig(), batch_size=8),
    ]
    assert len({str(the_loader.identity) for the_loader in [whole, *others]}) == 4


@pytest.mark.parametrize("limit", [None, 10**12])
def test_the_first_batch_of_very_many_samples_comes_at_once(limit):
    """A list of all requests would not fit into memory."""

    class Huge(Colours):
        def read(self, index):
            return Sample(Image.new("RGB", (20, 20)), str(index), 3)

    the_loader = EvalLoader(mixture(Huge(2 * 10**12)), PLAIN, CropConfig(), batch_size=4, limit=limit)
    assert next(iter(the_loader))["label"].tolist() == [3] * 4


# --------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streams_are_shared_between_readers(num_workers):
    streams = Streams([Numbers(32)], [1.0])
    seen = []
    for rank in (0, 1):
        the_loader = loader(streams, spec=MASKED, rank=rank, world_size=2, num_workers=num_workers)
        assert not the_loader.exact_resume
        assert the_loader.steps_per_epoch == 4
        for (batch,) in steps(the_loader, 4):
            seen += batch["image"][:, 0, 0, 0].tolist()
            assert batch["index"].tolist() == [-1] * 4
    assert sorted(seen) == [*range(32)]


def test_streams_mix_by_weight_and_skip_broken_samples():
    streams = Streams([Numbers(20), Numbers(60, broken=[50])], [3.0, 0.5])
    the_loader = loader(streams, batch_size=10, max_broken=0.2)
    assert the_loader.samples_per_epoch == 90
    values = torch.cat([batch["image"][:, 0, 0, 0] for (batch,) in steps(the_loader, 100)])
    assert (values < 20).float().mean() == pytest.approx((60 + 10) / 90, abs=0.05)
    assert set(the_loader.broken) == {"50"}


def test_a_resumed_stream_goes_on_in_its_epoch():
    (batch,) = steps(loader(Streams([Numbers(16)], [1.0])), 1, start=16 * 3 + 8)[0]
    assert (batch["image"][:, 2] == 3).all()


def test_a_stream_without_samples_is_an_error():
    empty = Numbers(8)
    empty.stream = lambda **_: iter(())
    with pytest.raises(ValueError, match="no samples to any reader"):
        steps(loader(Streams([empty], [1.0])), 1)


# ---------------------------------------------------------------------------------------------------- config


def test_held_out_samples_are_no_training_samples_whatever_the_seed():
    config = DataConfig.model_validate({"train": [{"name": "scenes", "num_images": 50}], "holdout": 0.1})
    train, val = config.open()
    names = [{source.read(i).name for i in range(len(source))} for source in (train, val)]
    assert [len(n) for n in names] == [45, 5]
    assert not names[0] & names[1]
    again = config.open()[1]
    assert [again.read(i).name for i in range(5)] == [val.read(i).name for i in range(5)]


def test_holding_out_always_leaves_something():
    train, val = hold_out(Colours(2), 0.001)
    assert (len(train), len(val)) == (1, 1)
    with pytest.raises(ValueError, match="cannot hold out"):
        hold_out(Colours(1), 0.5)


def test_wrong_data_configs_are_errors():
    source = {"name": "scenes", "num_images": 50}
    for wrong in (
        {"train": []},
        {"train": [source], "val": [source], "holdout": 0.1},
        {"train": [source], "num_workers": -1},
    ):
        with pytest.raises(ValidationError):
            DataConfig.model_validate(wrong)
    with pytest.raises(ValueError, match=r"10 samples .* global batch of 16 = 4 x 2 micro-batches x 2 processes"):
        loader(mixture(Colours(10)), accumulation=2, world_size=2)
    with pytest.raises(ValueError, match="no samples in source 1"):
        mixture(Colours(3), Colours(0))


def test_automatic_number_of_workers(monkeypatch):
    config = DataConfig.model_validate({"train": [{"name": "scenes"}]})
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert config.workers == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert config.workers == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert config.workers == 7
