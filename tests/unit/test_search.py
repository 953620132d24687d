"""Search: what is found, what is encoded again, what survives interruption and damage, what is told."""

import base64
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

import openeva
from checkpoints.tiny_clip import randomised
from openeva.checkpoints.native import save_native
from openeva.cli import app
from openeva.config import ConfigError, validate
from openeva.data.file_index import locked
from openeva.heads.clip import ClipConfig, ClipModel
from openeva.inference import Index, contact_sheet, found, index_file, inputs, search, towers
from openeva.inference.index_file import Files, Stamp

IMAGE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2, "mlp_hidden": 48}
TEXT = {"width": 16, "num_heads": 2, "depth": 1, "context_length": 16}
NAMES = ["a.png", "b.jpg", "c.png", "d.png", "sub/e.png", "sub/f.png"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def clip(seed: int = 0) -> ClipModel:
    config = validate(ClipConfig, {"embed_dim": 12, "backbone": IMAGE, "text": TEXT}, where="tiny")
    model = randomised(ClipModel(config), seed).eval()
    noise = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # else all images are alike to it
        model.backbone.projection.bias.sub_(model.encode_image(noise).mean(dim=0))
    return model


def saved(folder: Path, model: ClipModel) -> Path:
    task = {"name": "clip", **model.config.model_dump(mode="json"), "loss": "infonce"}
    save_native(folder / "model", model.state_dict(), {"task": task})
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return saved(tmp_path / "run", clip())


@pytest.fixture
def other_weights(tmp_path: Path) -> Path:
    return saved(tmp_path / "other", clip(seed=1))


def put_image(path: Path, seed: int, side: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)  # coarse: JPEG keeps it
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        put_image(tmp_path / "photos" / name, number)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


@pytest.fixture
def read_images(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Content of every image file that is read."""
    seen: list[bytes] = []
    decode = inputs.decode
    monkeypatch.setattr(inputs, "decode", lambda data: seen.append(data) or decode(data))
    return seen


def indexed(photos: Path, weights: Path, **options: Any) -> Index:
    index = Index(photos, weights=weights, num_readers=1, **options)
    index.update()
    return index


def names(hits: Any, folder: Path) -> list[str]:
    return [str(hit.path.relative_to(folder)) for hit in hits]


def scores(hits: Any, folder: Path) -> dict[str, float]:
    return dict(zip(names(hits, folder), [hit.score for hit in hits], strict=True))


def assert_as_made_anew(photos: Path, weights: Path) -> None:
    """The index gives what one gives that was made in one go (up to rounding: batches are of other sizes)."""
    anew = indexed(photos, weights, place=photos.parent / "anew.idx").search("a dog")
    assert scores(Index(photos).search("a dog"), photos) == pytest.approx(scores(anew, photos), abs=1e-3)


class Direct:
    """Features by the model itself, without any of the code that is tested."""

    def __init__(self, weights: Path) -> None:
        self.model = openeva.load_checkpoint(str(weights))
        self.view = openeva.transforms_for(self.model).evaluate

    @torch.no_grad()
    def image(self, path: Path) -> Tensor:
        return F.normalize(self.model.encode_image(self.view(path)[None])[0], dim=0)

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        return F.normalize(self.model.encode_text([text])[0], dim=0)

    def scores(self, folder: Path, *parts: Tensor) -> dict[str, float]:
        query = F.normalize(torch.stack(parts).mean(dim=0), dim=0)
        cosines = {name: float(self.image(folder / name) @ query) for name in NAMES}
        return dict(sorted(cosines.items(), key=lambda item: -item[1]))


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


# ---------------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("kind", ["text", "texts", "image", "own image", "both"])
def test_scores_are_the_cosines_of_the_towers(tmp_path: Path, photos: Path, weights: Path, kind: str) -> None:
    index, direct = indexed(photos, weights, precision="fp32"), Direct(weights)
    put_image(tmp_path / "like.png", 77)
    texts = {"text": ["a dog"], "texts": ["a dog", "at night"], "both": ["a dog"]}.get(kind, [])
    images = {"image": [tmp_path / "like.png"], "own image": [photos / "c.png"], "both": [tmp_path / "like.png"]}
    given_images = images.get(kind, [])
    expected = direct.scores(photos, *map(direct.text, texts), *map(direct.image, given_images))
    hits = index.search(texts, given_images)
    assert scores(hits, photos) == pytest.approx(expected, abs=1e-3)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert max(expected.values()) - min(expected.values()) > 0.05  # else nothing was compared
    fresh = Index(photos, precision="fp32")  # from the file alone, by the weights that it names
    assert fresh.search(texts, given_images) == hits
    assert fresh.weights == str(weights)


def test_one_text_is_a_list_of_one_and_paths_are_those_of_the_folder(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    index = indexed(Path("photos"), weights)
    assert index.search(" a dog ") == index.search(["a dog", "a dog"])
    assert all(hit.path.parts[0] == "photos" and hit.path.is_file() for hit in index.search("a dog"))


def test_top_and_threshold(photos: Path, weights: Path) -> None:
    index = indexed(photos, weights)
    hits = index.search("a dog", top=None)
    assert len(hits) == len(NAMES)
    assert index.search("a dog", top=2) == hits[:2]
    assert index.search("a dog", top=100) == hits
    middle = hits[2].score
    assert index.search("a dog", threshold=middle) == hits[:3]
    assert index.search("a dog", threshold=middle, top=1) == hits[:1]
    assert index.search("a dog", threshold=1.0) == []
    with pytest.raises(ValueError, match="top 0 must be at least 1"):
        index.search("a dog", top=0)


def test_equal_scores_keep_the_order_of_the_folder(photos: Path, weights: Path) -> None:
    for name in ("copy.png", "sub/copy.png", "z.png"):
        shutil.copy(photos / "c.png", photos / name)
    index = indexed(photos, weights)
    same = ["c.png", "copy.png", "z.png", "sub/copy.png"]  # files of a folder come before those of folders in it
    assert names(index.search(images=photos / "z.png", top=4), photos) == same
    assert names(index.search(images=photos / "z.png", top=2), photos) == same[:2]


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5]) | st.floats(-1, 1, width=32)), st.integers(1, 12) | st.none())
def test_the_largest_are_those_of_a_stable_sort(values: list[float], top: int | None) -> None:
    expected = sorted(range(len(values)), key=lambda row: -values[row])[:top]
    assert search._largest(np.array(values, np.float32), top) == expected


@pytest.mark.parametrize("rows", [1, 1023, 1024, 2500])
def test_cosines_are_those_of_all_blocks(rows: int) -> None:
    rng = np.random.default_rng(0)
    features, query = rng.normal(size=(rows, 12)).astype(np.float16), rng.normal(size=12).astype(np.float32)
    features.setflags(write=False)  # as in a mapped file
    np.testing.assert_allclose(
        search.cosines(features, query), features.astype(np.float32) @ query, rtol=1e-5, atol=1e-5
    )


def test_an_image_of_the_index_needs_no_model_until_it_changes(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed(photos, weights)
    with monkeypatch.context() as without:
        without.setattr(towers, "load_any", lambda *_: pytest.fail("the model was loaded"))
        hits = Index(photos).search(images=photos / "sub" / "e.png")
    assert names(hits, photos)[0] == "sub/e.png"
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    shutil.copy(photos / "a.png", photos / "sub" / "e.png")
    assert names(Index(photos).search(images=photos / "sub" / "e.png"), photos)[0] == "a.png"


def test_only_the_text_tower_is_loaded_for_texts(photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hits = indexed(photos, weights).search("a dog")
    monkeypatch.setattr(towers, "load_any", lambda *_: pytest.fail("the image tower was loaded"))
    again = Index(photos, weights=weights)
    again.update()
    assert scores(again.search("a dog"), photos) == pytest.approx(scores(hits, photos), abs=1e-6)


def test_a_model_in_memory(photos: Path) -> None:
    model = clip().train()
    index = Index(photos, weights=model)
    assert index.update().num_new == len(NAMES)
    assert Index(photos, weights=model).update().num_new == 0
    assert Index(photos, weights=model).search("a dog") == index.search("a dog")
    with pytest.raises(ValueError, match="made with a model in memory; give weights"):
        Index(photos)
    with torch.no_grad():
        model.text.token_embedding.weight.add_(1)
    assert Index(photos, weights=model).update().num_new == len(NAMES)


def test_what_cannot_be_looked_for(photos: Path, weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = indexed(photos, weights)
    with pytest.raises(ValueError, match="nothing to look for"):
        index.search()
    with pytest.raises(ValueError, match="text 2 is empty"):
        index.search(["a dog", "  "])
    with pytest.raises(ValueError, match=r"nowhere\.png: no such file"):
        index.search(images=photos / "nowhere.png")
    with pytest.raises(OSError, match=r"notes\.txt: not an image"):
        index.search(images=photos / "notes.txt")
    assert not caplog.messages
    assert index.search("word " * 20) == index.search("word " * 14)
    assert "only the beginning of a text counts" in caplog.text


def test_without_an_index_the_fix_is_named(photos: Path, weights: Path) -> None:
    with pytest.raises(ValueError, match=r"no index of .*photos yet .*update\(\).*--no-update"):
        Index(photos, weights=weights).search("a dog")
    with pytest.raises(ValueError, match=r"notes\.txt is not a folder"):
        Index(photos / "notes.txt", weights=weights)


def test_weights_without_a_text_tower_are_refused_before_an_image_is_read(
    tmp_path: Path, photos: Path, read_images: list[bytes]
) -> None:
    backbone = openeva.create_model("eva_ti_16", **IMAGE)
    task = {"name": "pretrain", "backbone": backbone.config.model_dump(mode="json")}
    save_native(tmp_path / "plain" / "model", backbone.state_dict(), {"task": task})
    with pytest.raises(ValueError, match=r"plain.* cannot be compared with texts.*give a CLIP"):
        Index(photos, weights=tmp_path / "plain").update()
    with pytest.raises(ConfigError, match="unknown weights 'EVA02_CLIP_B'"):
        Index(photos, weights="EVA02_CLIP_B").update()
    assert not read_images


# ---------------------------------------------------------------------------------------------------- what is encoded


def test_only_new_and_changed_images_are_encoded(photos: Path, weights: Path, read_images: list[bytes]) -> None:
    index = Index(photos, weights=weights)
    done = index.update()
    assert (done.num_new, done.num_images, len(index)) == (6, 6, 6)
    assert done.lines() == ["6 images in the index, 6 new"]
    assert len(read_images) == 6
    written = index.place.stat().st_mtime_ns
    assert Index(photos).update().lines() == ["6 images in the index"]
    assert index.place.stat().st_mtime_ns == written
    assert len(read_images) == 6
    put_image(photos / "new.png", 50)
    put_image(photos / "c.png", 51, side=24)
    os.utime(photos / "d.png", ns=(0, 1))  # a change that leaves the size as it is
    (photos / "b.jpg").unlink()
    (photos / "sub" / "e.png").rename(photos / "sub" / "renamed.png")
    done = Index(photos).update()
    assert (done.num_new, done.num_changed, done.num_removed, done.num_images) == (2, 2, 2, 6)
    assert done.lines() == ["6 images in the index, 2 new, 2 changed, 2 no longer there"]
    assert set(read_images[6:]) == {
        (photos / name).read_bytes() for name in ("new.png", "c.png", "d.png", "sub/renamed.png")
    }
    hits = Index(photos).search("a dog")
    assert set(names(hits, photos)) == {"a.png", "c.png", "d.png", "new.png", "sub/f.png", "sub/renamed.png"}
    assert_as_made_anew(photos, weights)


def test_rows_of_several_sources_are_put_together_in_pieces(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "COPIED_ROWS", 2)
    indexed(photos, weights)
    for number, name in enumerate(NAMES[::2]):
        put_image(photos / name, 60 + number, side=24)
    indexed(photos, weights)
    assert_as_made_anew(photos, weights)


def test_a_broken_image_is_named_once_and_tried_again_when_it_changes(
    photos: Path, weights: Path, read_images: list[bytes]
) -> None:
    whole = (photos / "c.png").read_bytes()
    (photos / "c.png").write_bytes(whole[:40])
    (photos / "d.png").write_bytes(b"")
    done = Index(photos, weights=weights).update()
    assert {Path(name).name for name in done.broken} == {"c.png", "d.png"}
    assert done.broken[str(photos / "d.png")] == "the file is empty"
    assert done.lines() == ["4 images in the index, 4 new, 2 not readable"]
    read_images.clear()
    written = Index(photos).place.stat().st_mtime_ns
    again = Index(photos).update()
    assert (again.broken, again.num_broken, read_images) == ({}, 2, [])
    assert Index(photos).place.stat().st_mtime_ns == written
    (photos / "c.png").write_bytes(whole)
    (photos / "d.png").unlink()
    mended = Index(photos).update()
    assert mended.lines() == ["5 images in the index, 1 changed, 1 no longer there"]
    assert "c.png" in names(Index(photos).search("a dog"), photos)


def test_a_file_that_cannot_be_opened_is_tried_every_time(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "c.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    with monkeypatch.context() as locked_away:
        locked_away.setattr(Path, "read_bytes", refused)
        locked_away.setattr(search, "_can_be_opened", lambda path: path.name != "c.png")
        for num_new in (5, 0):
            done = Index(photos, weights=weights).update()
            assert done.broken == {str(photos / "c.png"): "Permission denied"}
            assert (done.num_new, done.num_broken) == (num_new, 1)
    assert Index(photos).update().num_new == 1
    assert search._can_be_opened(photos / "c.png")
    assert not search._can_be_opened(photos / "gone.png")


def test_answers_that_are_not_finite_are_never_kept(photos: Path, weights: Path, tmp_path: Path) -> None:
    model = clip()
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc2.weight[:] = torch.nan
    broken = saved(tmp_path / "nan", model)
    done = Index(photos, weights=broken).update()
    assert done.num_images == 0
    assert set(done.broken.values()) == {"the model's answer is not finite; try precision fp32"}
    assert Index(photos).search("a dog") == []
    assert len(Index(photos).update().broken) == len(NAMES)
    assert Index(photos, weights=weights).update().num_images == len(NAMES)


# ---------------------------------------------------------------------------------------------------- interruption


def stop_after(number: int) -> Callable[[int, int, str | None], None]:
    def finished(done: int, total: int, broken: str | None) -> None:
        if done == number:
            raise KeyboardInterrupt

    return finished


@pytest.mark.parametrize("part_rows", [1, 2, 100])
def test_what_is_done_before_ctrl_c_is_not_done_again(
    photos: Path, weights: Path, read_images: list[bytes], monkeypatch: pytest.MonkeyPatch, part_rows: int
) -> None:
    monkeypatch.setattr(search, "PART_ROWS", part_rows)
    (photos / "b.jpg").write_bytes(b"broken")
    index = Index(photos, weights=weights, batch_size=1, num_readers=1)
    with pytest.raises(KeyboardInterrupt):
        index.update(stop_after(4))
    assert not index.place.exists()
    with pytest.raises(ValueError, match="no index"):
        index.search("a dog")
    read_images.clear()
    done = Index(photos).update()  # the parts say which weights
    assert (done.num_new, done.broken, done.num_broken, done.num_images) == (2, {}, 1, 5)
    assert read_images == [(photos / name).read_bytes() for name in NAMES[4:]]
    assert [path.suffix for path in sorted(index.place.parent.iterdir())] == [".idx", ".lock"]
    assert_as_made_anew(photos, weights)


def test_a_change_between_interruption_and_resumption_counts(photos: Path, weights: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Index(photos, weights=weights, batch_size=1).update(stop_after(4))
    put_image(photos / "a.png", 70, side=28)
    (photos / "b.jpg").unlink()
    done = Index(photos, weights=weights).update()
    assert (done.num_new, done.num_changed, done.num_removed) == (2, 1, 1)
    assert_as_made_anew(photos, weights)


def test_many_parts_become_one(photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PART_ROWS", 1)
    monkeypatch.setattr(index_file, "MAX_PARTS", 2)
    for number in range(10):
        put_image(photos / f"more{number}.png", 100 + number)
    index = Index(photos, weights=weights, batch_size=1)
    most = 0

    def finished(done: int, _total: int, _broken: str | None) -> None:
        nonlocal most
        most = max(most, len(list(index.place.parent.glob("*.part-*"))))
        if done == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.update(finished)
    assert most == 2
    assert Index(photos).update().num_new == 2
    assert_as_made_anew(photos, weights)


KILLED = """
import os, signal, sys
from openeva.inference import Index, search
search.PART_ROWS = 2
def finished(done, total, broken):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Index(sys.argv[1], weights=sys.argv[2], batch_size=1, num_readers=1).update(finished)
"""


def test_killed_it_goes_on_from_the_last_part(photos: Path, weights: Path, read_images: list[bytes]) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, photos, weights], check=False)
    assert done.returncode == -signal.SIGKILL
    assert Index(photos).update().num_new == 2
    assert read_images == [(photos / name).read_bytes() for name in NAMES[4:]]
    assert len(Index(photos)) == len(NAMES)


def test_leftovers_are_taken_away_and_only_ones_own(
    photos: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "kept" / "my"
    with pytest.raises(KeyboardInterrupt):
        Index(photos, weights=weights, place=place, batch_size=1).update(stop_after(4))
    part = place.with_name("my.part-000001")
    part.write_bytes(part.read_bytes()[:-3])
    leftovers = [place.with_name(f"my{kind}.123.0a1b2c3d.tmp") for kind in ("", ".part-000002")]
    others = [place.with_name(name) for name in ("my2.123.0a1b2c3d.tmp", "my.part-1.bak", "mine.part-000001")]
    for path in (*leftovers, *others):
        path.write_bytes(b"x")
    assert Index(photos, weights=weights, place=place).update().num_new == len(NAMES)
    assert f"{part} is damaged; its images are encoded again" in caplog.text
    assert {path.name for path in place.parent.iterdir()} == {"my", "my.lock", *(path.name for path in others)}


def test_the_second_process_waits_for_the_first(
    photos: Path, weights: Path, read_images: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    indexes = [Index(photos, weights=weights) for _ in range(2)]
    waiting = threading.Thread(target=indexes[1].update)
    with locked(indexes[0].place):
        waiting.start()
        deadline = time.monotonic() + 20
        while "another process is indexing" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not read_images
    waiting.join()
    assert f"another process is indexing {photos}; waiting" in caplog.text
    assert indexes[0].update().num_new == 0
    assert len(read_images) == len(NAMES)
    assert len(indexes[0].search("a dog")) == len(NAMES)


# ---------------------------------------------------------------------------------------------------- other weights


def test_other_weights_make_it_anew_and_say_so(photos: Path, weights: Path, other_weights: Path) -> None:
    indexed(photos, weights)
    index = Index(photos, weights=other_weights)
    with pytest.raises(
        ValueError, match=r"made with other weights \(.*run\) than .*other; make it anew .* or give those"
    ):
        index.search("a dog")
    done = index.update()
    assert (done.replaced, done.num_new, done.num_images) == (str(weights), len(NAMES), len(NAMES))
    assert done.lines()[0] == f"the index was of other weights ({weights}), so it was made anew"
    direct = Direct(other_weights)
    expected = direct.scores(photos, direct.text("a dog"))
    assert scores(Index(photos).search("a dog"), photos) == pytest.approx(expected, abs=1e-3)
    assert Index(photos).update().replaced is None


def test_until_it_is_complete_the_index_of_the_old_weights_stays(
    photos: Path, weights: Path, other_weights: Path, read_images: list[bytes]
) -> None:
    hits, direct = indexed(photos, weights).search("a dog"), Direct(other_weights)
    with pytest.raises(KeyboardInterrupt):
        Index(photos, weights=other_weights, batch_size=1).update(stop_after(4))
    assert Index(photos, weights=weights).search("a dog") == hits
    read_images.clear()
    done = Index(photos, weights=other_weights, num_readers=1).update()
    assert (done.num_new, done.replaced, len(read_images)) == (2, str(weights), 2)
    with pytest.raises(KeyboardInterrupt):
        Index(photos, weights=weights, batch_size=1).update(stop_after(4))
    assert Index(photos, weights=other_weights).update().lines() == ["6 images in the index"]
    assert Index(photos).update().lines() == ["6 images in the index"]
    expected = direct.scores(photos, direct.text("a dog"))  # and nothing of the part of the old weights
    assert scores(Index(photos).search("a dog"), photos) == pytest.approx(expected, abs=1e-3)


def test_weights_that_learnt_more_are_others_and_moved_ones_the_same(
    photos: Path, weights: Path, tmp_path: Path, read_images: list[bytes]
) -> None:
    indexed(photos, weights)
    read_images.clear()
    weights.rename(tmp_path / "moved")
    done = Index(photos, weights=tmp_path / "moved").update()
    assert (done.lines(), read_images) == (["6 images in the index"], [])
    assert Index(photos).weights == str(tmp_path / "moved")
    saved(tmp_path / "moved", clip(seed=3))
    done = Index(photos).update()
    assert (done.num_new, done.replaced) == (len(NAMES), str(tmp_path / "moved"))


# ---------------------------------------------------------------------------------------------------- files and folders


def test_a_moved_folder_takes_its_index_along(
    photos: Path, weights: Path, tmp_path: Path, read_images: list[bytes]
) -> None:
    place = tmp_path / "photos.idx"
    hits = indexed(photos, weights, place=place).search("a dog")
    read_images.clear()
    moved = photos.rename(tmp_path / "moved")
    assert names(Index(moved, place=place).search("a dog"), moved) == names(hits, photos)
    assert Index(moved, place=place).update().lines() == ["6 images in the index"]
    assert not read_images
    (tmp_path / "link").symlink_to(moved)
    assert len(Index(tmp_path / "link", place=place).search("a dog")) == len(NAMES)
    put_image(tmp_path / "others" / "x.png", 0)
    with pytest.raises(ValueError, match=r"photos\.idx is the index of .*moved, not of .*others; give another place"):
        Index(tmp_path / "others", place=place)


def test_an_empty_folder_is_told_and_does_not_cost_an_index(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images in this folder \(jpg, jpeg, png, .*\)$"):
        Index(tmp_path / "empty").update()
    place = indexed(photos, weights).place
    photos.rename(tmp_path / "elsewhere")
    photos.mkdir()  # as where a drive is not there
    with pytest.raises(ValueError, match=rf"photos: no images .*; the index of its 6 images is kept \({place}\)"):
        Index(photos).update()
    photos.rmdir()
    (tmp_path / "elsewhere").rename(photos)
    assert Index(photos).update().lines() == ["6 images in the index"]


def test_nothing_is_written_into_the_folder(photos: Path, weights: Path, cache: Path) -> None:
    before = sorted(photos.rglob("*")), photos.stat().st_mtime_ns
    index = indexed(photos, weights)
    assert (sorted(photos.rglob("*")), photos.stat().st_mtime_ns) == before
    assert index.place.parent == cache / "search"
    assert index.place.name.startswith("photos-")


def test_an_index_that_cannot_be_written(photos: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((ValueError, OSError), match=r"file.x\.idx"):
        Index(photos, weights=weights, place=tmp_path / "file" / "x.idx").update()


@pytest.mark.parametrize("there", [True, False])
def test_a_place_that_is_read_only(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, *, there: bool
) -> None:
    index = indexed(photos, weights)
    if not there:
        index.place.unlink()
    opened = Path.open

    def read_only(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "w" in mode or "x" in mode:
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(
        ValueError, match=r"\.idx: the index cannot be written there \(Read-only .*--index.*--no-update"
    ):
        Index(photos, weights=weights).update()
    if there:
        assert len(Index(photos).search("a dog")) == len(NAMES)


def test_a_full_disk_is_named(photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_file.ArrayFileWriter, "append", full)
    with pytest.raises(OSError, match=r"No space left on device.*photos-.*\.idx"):
        Index(photos, weights=weights).update()


def test_files_that_are_no_index_are_left_alone(photos: Path, weights: Path, tmp_path: Path) -> None:
    place = indexed(photos, weights, place=tmp_path / "good.idx").place
    good = place.read_bytes()
    other_format = tmp_path / "format.idx"
    files = Files([b"a"], np.ones(1, np.int64), np.ones(1, np.int64))
    index_file.write(other_format, files, [np.zeros((1, 4), np.float16)], {}, {})
    other_format.write_bytes(other_format.read_bytes().replace(b"openeva-search/1", b"openeva-search/9"))
    damaged = {
        "cut.idx": good[:-20], "tail.idx": good[200:], "empty.idx": b"",
        "footer.idx": good.replace(b'"arrays"', b'"arrayz"'),
        "json.idx": good.replace(b'{"arrays"', b'["arrays"'), "photo.png": (photos / "a.png").read_bytes(),
        "format.idx": other_format.read_bytes(),
        "dtype.idx": good.replace(b'"<f2"', b'"<i2"'), "names.idx": good.replace(b'"names.starts"', b'"names.starrs"'),
    }  # fmt: skip
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{name} is damaged, or not an index of images; delete it .*\(--index\)$"
        ):
            Index(photos, weights=weights, place=tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    with pytest.raises(ValueError, match=r"run is a folder; give the file of an index"):
        Index(photos, place=weights)
    with pytest.raises(ValueError, match=r"x\.lock: files ending in \.lock are for locks"):
        Index(photos, weights=weights, place=tmp_path / "x.lock")


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_an_index_file_gives_back_what_was_written(tmp_path: Path, count: int) -> None:
    written = [b"folder/\xff%d.png" % number for number in range(count)]
    features = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float16)
    broken = {b"br\xfeken\n.png": (Stamp(3, 2**60), "why")}
    stamps = Files(written, np.arange(count), np.arange(count) + 2**60)
    index_file.write(tmp_path / "x.idx", stamps, [features[:2], features[2:]], broken, {"folder": "/x"})
    stored = index_file.read(tmp_path / "x.idx")
    assert stored is not None
    assert list(stored.files.names) == [stored.files.names[row] for row in range(count)] == written
    assert len(stored) == len(stored.files.names) == count
    assert [stored.files.stamp(row) for row in range(count)] == [Stamp(row, row + 2**60) for row in range(count)]
    assert (stored.features.size, stored.broken) == (count * 6, broken)
    np.testing.assert_array_equal(stored.features, features if count else np.empty((0, 0)))
    assert stored.meta["folder"] == "/x"


def test_names_that_are_not_utf8(photos: Path, weights: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff od&d\n<b>.png")
    shutil.copy(photos / "c.png", photos / odd)
    os.utime(photos / odd)
    done = cli(photos, "--weights", weights, "--image", photos / odd, "--top", "2", "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert r"\xff od&d" in done.output
    (photos / odd).write_bytes(b"broken now")
    for kind in ("json", "csv"):
        done = cli(photos, "a dog", "--out", tmp_path / f"out.{kind}")
        assert done.exit_code == (1 if kind == "json" else 0), done.output
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "%FF%20od%26d%0A%3Cb%3E.png" in page
    assert r"\xff od&amp;d" in page
    assert "<b>.png" not in page


# ---------------------------------------------------------------------------------------------------- command line


def test_the_command_indexes_once_and_tells(photos: Path, weights: Path, read_images: list[bytes]) -> None:
    done = cli(photos, "--weights", weights)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "6 images in the index, 6 new\n")
    read_images.clear()
    done = cli(photos, "a dog", "--top", "3")
    assert (done.exit_code, done.stderr, read_images) == (0, "6 images in the index\n", [])
    hits = Index(photos).search("a dog", top=3)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[:2] == [["a", "dog"], ["rank", "score", "image"]]
    assert lines[2:] == [[str(n), f"{hit.score:.3f}", str(hit.path)] for n, hit in enumerate(hits, start=1)]


def test_json_and_csv_for_programs(photos: Path, weights: Path, tmp_path: Path) -> None:
    index = indexed(photos, weights)
    expected = [
        (query, rank, str(hit.path), hit.score)
        for query, hits in (("a dog", index.search("a dog", top=2)), ("a cat", index.search("a cat", top=2)))
        for rank, hit in enumerate(hits, start=1)
    ]
    arguments = (photos, "a dog", " a cat", "--each", "--top", "2")
    cli(*arguments, "--out", tmp_path / "out.json")
    for text in (cli(*arguments, "--json").stdout, (tmp_path / "out.json").read_text(encoding="utf-8")):
        rows = [(a["query"], f["rank"], f["image"], f["score"]) for a in json.loads(text) for f in a["found"]]
        assert [row[:3] for row in rows] == [row[:3] for row in expected]
        assert [row[3] for row in rows] == pytest.approx([row[3] for row in expected], abs=1e-6)
    told = cli(*arguments, "--out", tmp_path / "out.csv")
    assert told.stdout == ""
    assert f"written: {tmp_path / 'out.csv'}" in told.stderr
    for text in (cli(*arguments, "--csv").stdout, (tmp_path / "out.csv").read_text(encoding="utf-8")):
        table = list(csv.reader(io.StringIO(text)))
        assert table[0] == ["query", "rank", "image", "score"]
        assert [(query, int(rank), image) for query, rank, image, _ in table[1:]] == [row[:3] for row in expected]


def test_queries_count_together_unless_each_is_asked_for(photos: Path, weights: Path) -> None:
    index = indexed(photos, weights)
    query = found.Query(["a dog", "at night"], [str(photos / "d.png")])
    (answer,) = query.answers(index)
    assert answer.query == "a dog + at night + like d.png"
    assert answer.hits == index.search(["a dog", "at night"], photos / "d.png")
    each = found.Query(["a dog", "at night"], [str(photos / "d.png")], each=True, top=2).answers(index)
    assert [answer.query for answer in each] == ["a dog + like d.png", "at night + like d.png"]
    assert each[1].hits == index.search("at night", photos / "d.png", top=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "25", "a dog"], "threshold 25 is a cosine, from -1 to 1"),
        (["--each"], "--each looks for each query by itself; give queries"),
        ([""], "text 1 is empty"),
        (["--image", "nowhere.png"], "nowhere.png: no such file or folder"),
        (["--html", "page.html"], "tell what is found; give a query"),
        (["--json"], "tell what is found; give a query"),
        (["a dog", "--json", "--csv"], "--json and --csv exclude each other"),
        (["a dog", "--out", "x.txt"], "--out x.txt must end in .json or .csv"),
        (["a dog", "--no-update"], "there is no index of"),
    ],
)
def test_mistakes_are_told_before_any_work(
    photos: Path, weights: Path, read_images: list[bytes], arguments: list[str], message: str
) -> None:
    done = cli(photos, "--weights", weights, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not read_images


def test_exit_status_1_where_an_image_is_found_to_be_broken(photos: Path, weights: Path) -> None:
    (photos / "c.png").write_bytes(b"no image")
    done = cli(photos, "a dog", "--weights", weights)
    assert done.exit_code == 1
    assert f"broken image: {photos / 'c.png'}: not an image, or of an unknown format" in done.stderr
    assert "5 images in the index, 5 new, 1 not readable" in done.stderr
    assert len(done.stdout.splitlines()) == 2 + 5
    done = cli(photos, "a dog")
    assert (done.exit_code, done.stderr) == (0, "5 images in the index, 1 not readable\n")


def test_ctrl_c_tells_what_is_kept(photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Index.update

    def stopped(index: Index, finished: Any) -> Any:
        def until(done: int, total: int, broken: str | None) -> None:
            finished(done, total, broken)
            stop_after(4)(done, total, broken)

        return update(index, until)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(Index, "update", stopped)
        done = cli(photos, "a dog", "--weights", weights, "--batch-size", "1")
    assert done.exit_code == 130
    assert done.stderr.startswith("4 images were encoded and are kept; the same command goes on from there")
    assert cli(photos, "a dog").stderr == "6 images in the index, 2 new\n"


def test_nothing_found_is_said_and_no_update_looks_at_no_folder(photos: Path, weights: Path) -> None:
    assert "a dog: nothing was found" in cli(photos, "a dog", "--weights", weights, "--threshold", "1").stdout
    put_image(photos / "new.png", 50)
    done = cli(photos, "a dog", "--no-update")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "new.png" not in done.stdout
    assert "new.png" in cli(photos, "a dog").stdout


# ---------------------------------------------------------------------------------------------------- contact sheet


class Page(HTMLParser):
    """Links, pictures, texts and every address of a page; checks that elements are closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[Image.Image] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        values = dict(attrs)
        self.addresses += [value for name, value in values.items() if name in {"src", "href", "srcset", "action"}]
        if tag == "a":
            self.links.append(values["href"])
        if tag == "img":
            assert values["alt"]
            kind, _, data = values["src"].partition(";base64,")
            assert kind == "data:image/jpeg"
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
            assert self.pictures[-1].size == (int(values["width"]), int(values["height"]))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page(photos: Path, *arguments: str | Path) -> Page:
    file = photos.parent / "pages" / "page.html"
    done = cli(photos, *arguments, "--html", file)
    assert done.exit_code == 0, done.output
    assert f"written: {file}" in done.output
    return Page(file.read_text(encoding="utf-8"))


def test_the_contact_sheet_stands_alone(photos: Path, weights: Path) -> None:
    hits = indexed(photos, weights).search('a <b>dog</b> & "cat"', top=4)
    made = page(photos, 'a <b>dog</b> & "cat"', "--top", "4")
    assert made.links == [hit.path.as_uri() for hit in hits]
    assert len(made.pictures) == 4
    for picture, hit in zip(made.pictures, hits, strict=True):
        with Image.open(hit.path) as original:
            expected = np.asarray(original.convert("RGB")).astype(int)
        assert np.abs(np.asarray(picture).astype(int) - expected).mean() < 12
    assert not [
        address for address in made.addresses if not address.startswith(("data:image/jpeg;base64,", "file:///"))
    ]
    assert not {"script", "link", "iframe", "b"} & set(made.tags) - {"b"}
    assert made.tags.count("b") == 4  # the ranks: the query's own are text
    text = "".join(made.texts)
    assert 'a <b>dog</b> & "cat"' in text
    assert "6 images searched with" in text
    assert [f"{hit.score:.3f}" in text for hit in hits] == [True] * 4
    assert "url(" not in text
    assert "@import" not in text


def test_the_contact_sheet_shows_what_was_looked_for(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact_sheet, "MOST_OF_A_QUERY", 3)
    made = page(photos, "--image", photos, "--weights", weights, "--top", "2")
    assert len(made.pictures) == 3 + 2
    assert "like photos" in made.texts


def test_several_searches_on_one_page(photos: Path, weights: Path) -> None:
    made = page(photos, "a dog", "a cat", "--each", "--top", "2", "--weights", weights)
    assert [text for text in made.texts if text in {"2 searches", "a dog", "a cat"}] == ["2 searches", "a dog", "a cat"]
    assert len(made.links) == 4
    made = page(photos, "a dog", "--threshold", "1")
    assert "Nothing was found." in made.texts


def test_an_image_that_is_gone_since_is_a_word_on_the_page(photos: Path, weights: Path) -> None:
    indexed(photos, weights)
    (photos / "c.png").unlink()
    made = page(photos, "a dog", "--no-update")
    assert len(made.pictures) == len(NAMES) - 1
    assert "cannot be read any more" in made.texts


def test_pictures_are_small_and_keep_their_shape(tmp_path: Path, weights: Path) -> None:
    put_image(tmp_path / "photos" / "large.png", 0, side=1000)
    Image.new("RGB", (1200, 300)).save(tmp_path / "photos" / "wide.png")
    made = page(tmp_path / "photos", "a dog", "--weights", weights)
    assert {picture.size for picture in made.pictures} == {(256, 256), (256, 64)}
