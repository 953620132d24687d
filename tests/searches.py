"""What tests of searching share: a tiny CLIP, a folder of images, and the right answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

import openeva
from checkpoints.tiny_clip import randomised
from openeva.checkpoints.native import save_native
from openeva.cli import app
from openeva.config import validate
from openeva.heads.clip import ClipConfig, ClipModel
from openeva.inference import Index, inputs

IMAGE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2, "mlp_hidden": 48}
TEXT = {"width": 16, "num_heads": 2, "depth": 1, "context_length": 16}
NAMES = ["a.png", "b.jpg", "c.png", "d.png", "sub/e.png", "sub/f.png"]


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


def put_image(path: Path, seed: int, side: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)  # coarse: JPEG keeps it
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(path)


def put_photos(folder: Path) -> Path:
    """A folder with `NAMES`, and a file that is no image."""
    for number, name in enumerate(NAMES):
        put_image(folder / name, number)
    (folder / "notes.txt").write_text("no image")
    return folder


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Content of every image file that is read from now on."""
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


def stop_after(number: int) -> Callable[[int, int, str | None], None]:
    def finished(done: int, total: int, broken: str | None) -> None:
        if done == number:
            raise KeyboardInterrupt

    return finished
