"""Retrieval against its definition, one query at a time; what is equally near; what a user is told."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from e2e.pairs import COLOURS, PAIRS
from e2e.pairs import Config as PairsConfig
from openeva.checkpoints.published_clip import published_retrieval
from openeva.config import ConfigError, validate
from openeva.data.views import ViewSpec
from openeva.evals import retrieval
from openeva.evals.retrieval import Config, Pairs, paired, retrieval_metrics
from openeva.text.tokenizer import Tokenizer


def some_pairs(counts: Sequence[int], seed: int = 0) -> Pairs:
    """Random features of images with so many captions each, some texts shared by several images."""
    generator = torch.Generator().manual_seed(seed)
    image_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    num_texts = len(image_of) - 3
    text_of = torch.cat([torch.arange(num_texts), torch.randint(num_texts, (3,), generator=generator)])
    image_BE = F.normalize(torch.randn(len(counts), 6, generator=generator), dim=-1)
    text_UE = F.normalize(torch.randn(num_texts, 6, generator=generator), dim=-1)
    return Pairs(image_BE, text_UE, text_of, image_of)


def by_definition(pairs: Pairs, orders: int = 400) -> dict[str, float]:
    """Rows and columns sorted one by one; what is equally near in many random orders."""
    cosine_BC = (pairs.image.double() @ pairs.text.double().T)[:, pairs.text_of].numpy().round(9)
    own_BC = pairs.image_of.numpy()[None] == np.arange(len(pairs.image))[:, None]
    rng, ranks = np.random.default_rng(0), {"i2t": [], "t2i": []}
    for way, cosine, own in (("i2t", cosine_BC, own_BC), ("t2i", cosine_BC.T, own_BC.T)):
        for _ in range(orders):
            order = np.lexsort((rng.random(cosine.shape), -cosine), axis=1)
            ranks[way].append(np.take_along_axis(own, order, 1).argmax(1))
    found = {}
    for way, some in ranks.items():
        rank = np.array(some)
        found |= {f"{way}_r{k}": float((rank < k).mean()) for k in (1, 5, 10)}
        found |= {f"{way}_mean_rank": float(rank.mean()) + 1}
    return found


@pytest.mark.parametrize("cells", [1 << 24, 40])
def test_several_captions_per_image_and_shared_ones(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_CELLS", cells)  # also a few rows at a time
    pairs = some_pairs([1, 3, 2, 5, 1, 4, 2, 6, 3, 1, 2, 4])
    found, expected = retrieval_metrics(pairs), by_definition(pairs)
    assert found["i2t_r1"] < found["i2t_r5"] < 1
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=0.01)


def test_what_is_found_first_is_found() -> None:
    image_BE = torch.eye(12)
    found = retrieval_metrics(paired(image_BE, 3 * image_BE))
    assert set(found) == {f"{way}_{kind}" for way in ("i2t", "t2i") for kind in KINDS}
    assert set(found.values()) == {1.0}
    away = retrieval_metrics(paired(image_BE, -image_BE))
    assert (away["i2t_r10"], away["t2i_r1"], away["t2i_mean_rank"], away["i2t_median_rank"]) == (0, 0, 12, 12)


KINDS = ("r1", "r5", "r10", "mean_rank", "median_rank")


def test_a_model_that_finds_all_alike_is_as_good_as_guessing() -> None:
    same_BE = torch.ones(40, 4)
    found = retrieval_metrics(paired(same_BE, same_BE))
    for way in ("i2t", "t2i"):
        assert [found[f"{way}_r{k}"] for k in (1, 5, 10)] == pytest.approx([1 / 40, 5 / 40, 10 / 40])
        assert found[f"{way}_mean_rank"] == pytest.approx(20.5)


# ------------------------------------------------------------------------------------------------- evaluation


class ColourClip(nn.Module):
    """Sees the colours left and right, and reads them in texts: "red beside blue"."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.model, self.tokenizer = nn.Parameter(torch.zeros(())), nn.Module(), Tokenizer()
        self.model.embed_dim = 6
        self.read: list[str] = []

    def view_spec(self, *, train: bool) -> ViewSpec:
        return ViewSpec((32, 32))

    def encode_image(self, image_BCYX: Tensor) -> Tensor:
        left_BC, right_BC = image_BCYX[:, :, 16, 4].float(), image_BCYX[:, :, 16, 27].float()
        return torch.cat([left_BC, right_BC], dim=1) - 127

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        self.read += texts
        words = [[word.strip(",") for word in text.split() if word.strip(",") in COLOURS] for text in texts]
        return torch.tensor([[*COLOURS[left], *COLOURS[right]] for left, right in words]).float() - 127


def evaluation(**changes: Any) -> Any:
    source = {"name": "e2e.pairs", "num_images": 20}
    return validate(Config, {"source": source, "num_workers": 0, "batch_size": 8, **changes}).build()


def test_images_are_found_by_their_captions() -> None:
    task, told = ColourClip(), []
    one = evaluation()
    one.tell = told.append
    metrics = one.run(task, {})
    assert {name: value for name, value in metrics.items() if "_r" in name} == {
        f"retrieval_{way}_{kind}": 1.0 for way in ("i2t", "t2i") for kind in KINDS
    }
    assert (metrics["retrieval_images"], metrics["retrieval_captions"]) == (20, 40)
    assert len(task.read) == len(set(task.read)) == 40
    assert told == ["20 images, 40 captions: R@1 100.00 % of texts, 100.00 % of images"]
    task.read.clear()
    metrics = evaluation(captions=1, prefix="mine_").run(task, {})
    assert metrics["mine_retrieval_captions"] == 20
    assert all("beside" in text for text in task.read)


def test_tables_say_what_was_published() -> None:
    recalls = {"r1": 0.4507, "r5": 0.685, "r10": 0.7733, "mean_rank": 10.04, "median_rank": 2.0}
    metrics = {f"coco_retrieval_{way}_{kind}": value for way in ("i2t", "t2i") for kind, value in recalls.items()}
    of_texts, of_images = evaluation(prefix="coco_").rows(metrics, published_retrieval("eva_clip_psz14"))
    assert of_images.cells() == (
        "coco text to image", "45.07", "68.50", "77.33", "10.0", "2", "44.07 / 68.50 / 77.33", "+1.00 / +0.00 / +0.00",
    )  # fmt: skip
    assert of_texts.cells()[6:] == ("61.76 / 83.28 / 89.96", "-16.69 / -14.78 / -12.63")
    _, of_images = evaluation(prefix="coco_").rows(metrics, published_retrieval("EVA02_CLIP_B_psz16_s8B"))
    assert of_images.cells()[6:] == ("– / 66.90 / –", "– / +1.60 / –")
    assert evaluation(prefix="coco_").rows(metrics, {})[0].cells()[6:] == ("", "")


def test_images_that_cannot_be_read_or_have_no_text_are_named(tmp_path: Path) -> None:
    for number, (left, right) in enumerate(PAIRS[:5]):
        image = PairsConfig(num_images=5).build().read(number).image
        image.save(tmp_path / f"{number}.png")
        if number != 3:
            (tmp_path / f"{number}.txt").write_text(f"{left} beside {right}")
    (tmp_path / "4.png").write_bytes(b"no image")
    one = evaluation(source={"name": "captions", "root": tmp_path}, max_broken=0.5)
    assert one.run(ColourClip(), {})["retrieval_images"] == 3
    (note,) = one.notes(None)
    assert note.startswith("2 images could not be read, or have no caption, and were left out: ")
    assert "4.png" in note


def test_images_without_captions_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(ConfigError, match="source image_folder has no captions; give images with captions"):
        evaluation(source={"name": "image_folder", "roots": [tmp_path]})
    with pytest.raises(ValueError, match="has no images: give it a `source`"):
        evaluation(source=None).run(ColourClip(), {})
    with pytest.raises(ValueError, match="needs a model of images and texts"):
        evaluation().check(nn.Identity())
