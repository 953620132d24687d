"""What every test of searching starts from: a cache of its own, a folder of images, the weights of a tiny CLIP."""

from pathlib import Path

import pytest

from searches import clip, put_photos, saved


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return put_photos(tmp_path / "photos")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return saved(tmp_path / "run", clip())
