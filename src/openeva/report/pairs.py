"""What a CLIP run's pictures show: which texts it finds for held-out images, and which images for texts.

run folder -> its finished model, held-out pairs -> features of length 1 -> cosines -> `Pairs` (arrays on the CPU)
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from openeva.checkpoints.native import is_complete
from openeva.data.labels import has_captions
from openeva.data.loader import EvalLoader
from openeva.data.mixture import HELD_OUT, Mixture
from openeva.data.views import ViewSpec, normalise
from openeva.engine.distributed import start
from openeva.heads.clip import ClipModel
from openeva.models import load_checkpoint
from openeva.report.look import NoPicturesError, Pixels, Progress, evenly_spread
from openeva.train import Recipe

LOOKED_AT = 512
"""Held-out pairs that are compared."""
NUM_FOUND = 5
BATCH = 32


@dataclass(frozen=True)
class FoundText:
    """A text that the model finds for an image; `own` = it is one of the image's."""

    text: str
    cosine: float
    own: bool


@dataclass(frozen=True)
class ShownImage:
    """An image, its first caption, and the texts that are nearest to it.

    Attributes:
        image: `[Y, X, 3]`.
        caption: What it is said to show.
        found: Nearest first.
        rank: Place of the first text that is its own, from 1.
    """

    image: Pixels
    caption: str
    found: list[FoundText]
    rank: int


@dataclass(frozen=True)
class Query:
    """A text and the images that are nearest to it: `(pixels, cosine, it is the text's own)`."""

    text: str
    found: list[tuple[Pixels, float, bool]]


@dataclass(frozen=True)
class Pairs:
    """Everything that the pictures of a CLIP need.

    Attributes:
        source: Which weights these are, in words.
        held_out: Always true: there are pictures of held-out pairs only.
        num_parameters: Of both towers.
        num_train: Training images, None for streams.
        num_held_out: Held-out images.
        images: Images with what is found for them.
        queries: Texts with what is found for them.
        num_images: Images that were compared.
        num_texts: Texts that were compared.
    """

    source: str
    held_out: bool
    num_parameters: int
    num_train: int | None
    num_held_out: int | None
    images: list[ShownImage]
    queries: list[Query]
    num_images: int
    num_texts: int


@torch.no_grad()
def look_at_pairs(run: Path, recipe: Recipe, *, num_images: int, progress: Progress | None = None) -> Pairs:
    """Bring the finished model back and ask it about held-out pairs.

    Args:
        run: The run's folder.
        recipe: Its recipe.
        num_images: Images to show, and texts.
        progress: Called with the number of images done and of images in all.

    Raises:
        NoPicturesError: There is no finished model, or there are no held-out pairs.
        ValueError: Weights or data do not fit the recipe.
        OSError: The data cannot be found.
    """
    if not is_complete(run / "model"):
        raise NoPicturesError("those of a CLIP are made of its finished model, and it has none yet")
    train, held_out = recipe.data.open(kept=run / HELD_OUT)
    if held_out is None or not all(map(has_captions, held_out.sources)):
        raise NoPicturesError("it has no held-out images with captions")
    device = start(recipe.run.device).device
    model = load_checkpoint(str(run / "model")).to(device).eval()
    assert isinstance(model, ClipModel)
    image_BCYX, image_BE, captions = _encode_images(model, recipe, held_out, device, progress)
    texts = list(dict.fromkeys(text for some in captions for text in some))
    text_UE = torch.cat([
        F.normalize(model.encode_text(texts[begin : begin + BATCH]).float(), dim=-1).cpu()
        for begin in range(0, len(texts), BATCH)
    ])  # fmt: skip
    cosine_BU = image_BE @ text_UE.T
    chosen = evenly_spread(len(captions), num_images)
    return Pairs(
        source="the finished model",
        held_out=True,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_train=len(train) if isinstance(train, Mixture) else None,
        num_held_out=len(held_out),
        images=[_shown(_pixels(image_BCYX[i]), captions[i], texts, cosine_BU[i]) for i in chosen],
        queries=[_query(captions[i][0], texts, captions, image_BCYX, cosine_BU) for i in chosen],
        num_images=len(captions),
        num_texts=len(texts),
    )


def _encode_images(
    model: ClipModel, recipe: Recipe, data: Mixture, device: torch.device, progress: Progress | None
) -> tuple[Tensor, Tensor, list[list[str]]]:
    """Pixels, features of length 1, and captions of held-out images."""
    view = ViewSpec(model.backbone.image_size, tokenizer=model.tokenizer)
    loader = EvalLoader(
        data, view, recipe.data.val_crop, batch_size=BATCH, limit=LOOKED_AT, max_broken=recipe.data.max_broken
    )
    statistics, pixels, features = model.backbone.normalisation, [], []
    captions: list[list[str]] = []
    for batch in loader:
        image_BCYX = normalise(batch["image"].to(device), statistics.mean, statistics.std)
        features.append(F.normalize(model.encode_image(image_BCYX).float(), dim=-1).cpu())
        pixels.append(batch["image"])
        captions += batch["captions"]
        if progress is not None:
            progress(len(captions), loader.num_samples)
    if not captions:
        raise NoPicturesError("none of its images can be read")
    return torch.cat(pixels), torch.cat(features), captions


def _shown(image: Pixels, own: list[str], texts: list[str], cosine_U: Tensor) -> ShownImage:
    order = cosine_U.argsort(descending=True).tolist()
    found = [FoundText(texts[j], cosine_U[j].item(), texts[j] in own) for j in order[:NUM_FOUND]]
    rank = next(place for place, j in enumerate(order, start=1) if texts[j] in own)
    return ShownImage(image, own[0], found, rank)


def _query(text: str, texts: list[str], captions: list[list[str]], image_BCYX: Tensor, cosine_BU: Tensor) -> Query:
    cosine_B = cosine_BU[:, texts.index(text)]
    best = cosine_B.topk(min(NUM_FOUND, len(cosine_B))).indices.tolist()
    return Query(text, [(_pixels(image_BCYX[i]), cosine_B[i].item(), text in captions[i]) for i in best])


def _pixels(image_CYX: Tensor) -> Pixels:
    return image_CYX.permute(1, 2, 0).numpy()
