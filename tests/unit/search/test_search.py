"""Search: what is found, and what the command tells."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import openeva
from openeva.checkpoints.native import save_native
from openeva.config import ConfigError
from openeva.inference import Index, found, search, towers
from searches import (
    IMAGE,
    NAMES,
    Direct,
    cli,
    clip,
    count_reads,
    indexed,
    names,
    put_image,
    scores,
    stop_after,
)


@pytest.fixture
def read_images(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    return count_reads(monkeypatch)


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
