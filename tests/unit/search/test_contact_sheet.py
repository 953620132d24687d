"""The page of pictures of a search."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openeva.inference import contact_sheet
from searches import (
    NAMES,
    cli,
    indexed,
    put_image,
)


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
