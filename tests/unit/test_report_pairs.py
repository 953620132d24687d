"""Pictures of a CLIP run's report: the texts found for images and the images found for texts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from e2e.test_clip import recipe
from openeva.data.views import normalise
from openeva.evaluate import read_run_recipe
from openeva.models import load_checkpoint
from openeva.report import write_report
from openeva.report.look import NoPicturesError
from openeva.report.pairs import Pairs, look_at_pairs
from openeva.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pairs"
    train(recipe(out, "run.length=20 steps", "data.val_crop={kind: center, crop_pct: 1.0, hflip: 0}"))
    return out


@pytest.fixture(scope="module")
def seen(run: Path) -> Pairs:
    return look_at_pairs(run, read_run_recipe(run), num_images=3)


def held_out(run: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """Pixels and captions of the held-out pairs, in their order."""
    _, data = read_run_recipe(run).data.open()
    assert data is not None
    samples = [data.read(number) for number in range(len(data))]
    pixels = torch.stack([torch.from_numpy(np.array(sample.image)).permute(2, 0, 1) for sample in samples])
    return pixels, [sample.extra["captions"] for sample in samples]


def test_what_is_found_is_what_the_model_finds(run: Path, seen: Pairs) -> None:
    pixels, captions = held_out(run)
    model = load_checkpoint(str(run / "model")).eval()
    statistics = model.backbone.normalisation
    with torch.no_grad():
        image_BE = F.normalize(model.encode_image(normalise(pixels, statistics.mean, statistics.std)), dim=-1)
        texts = [text for some in captions for text in some]
        cosine_BU = image_BE @ F.normalize(model.encode_text(texts), dim=-1).T
    assert (seen.num_images, seen.num_texts, seen.num_train) == (len(captions), len(texts), 24)
    by_caption = {some[0]: number for number, some in enumerate(captions)}
    for shown in seen.images:
        number = by_caption[shown.caption]
        order = cosine_BU[number].argsort(descending=True).tolist()
        assert [found.text for found in shown.found] == [texts[j] for j in order[:5]]
        assert [found.cosine for found in shown.found] == pytest.approx(cosine_BU[number][order[:5]].tolist(), abs=1e-4)
        assert [found.own for found in shown.found] == [texts[j] in captions[number] for j in order[:5]]
        assert shown.rank == 1 + min(order.index(texts.index(text)) for text in captions[number])
    for query in seen.queries:
        best = cosine_BU[:, texts.index(query.text)].topk(5)
        assert [cosine for _, cosine, _ in query.found] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [own for *_, own in query.found] == [i == by_caption[query.text] for i in best.indices.tolist()]
        assert query.found[0][0].shape == (32, 32, 3)


def test_the_page_shows_both(run: Path, seen: Pairs) -> None:
    text = write_report(run, num_images=3).read_text(encoding="utf-8")
    assert "Texts found for images" in text
    assert "Images found for texts" in text
    assert "and a text tower" in text
    assert all(shown.caption in text for shown in seen.images)
    marks = sum(found.own for shown in seen.images for found in shown.found)
    assert text.count("<li class=own>") == marks
    assert text.count("its own comes at place") == sum(shown.rank > 5 for shown in seen.images)


def test_without_a_finished_model_or_held_out_pairs_the_reason_is_told(run: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "model")
    with pytest.raises(NoPicturesError, match="finished model"):
        look_at_pairs(unfinished, read_run_recipe(unfinished), num_images=3)
    assert "made of its finished model" in write_report(unfinished).read_text(encoding="utf-8")
    config = read_run_recipe(run)
    nothing = config.model_copy(update={"data": config.data.model_copy(update={"holdout": 0.0})})
    with pytest.raises(NoPicturesError, match="no held-out images with captions"):
        look_at_pairs(run, nothing, num_images=3)
