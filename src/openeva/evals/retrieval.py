"""Retrieval by a CLIP: how early an image's captions come among all captions, and a caption's image among all images.

image -> features [B, E]; captions -> features [U, E] of the distinct texts; cosines, a part of the rows at a time ->
rank of the best right answer -> recall at 1, 5, 10, mean and median rank, in both directions

Metrics: `retrieval_i2t_r1`, `..._r5`, `..._r10` (shares), `..._mean_rank`, `..._median_rank` (the first is 1) from
image to text, `retrieval_t2i_...` from text to image. An image counts as found by any of its captions; each caption
looks for its own image.

Source: clip_and_eva02 sections 2.7 (ranks of pairs, floor of the median) and 3.3 (several captions, CLIP_benchmark).
Deliberate difference: of answers that are equally near, as of two images with the same caption, every order counts
alike, where the official code takes whatever a sort leaves first; a model that finds all alike gets the recalls of
guessing. Images and texts are encoded once, on however many processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from scipy.special import comb
from torch import Tensor

from openeva.config import ConfigError
from openeva.config import Source as SourceField
from openeva.data.labels import has_captions
from openeva.data.views import CropConfig
from openeva.engine.distributed import gather_over_processes, merge_over_processes
from openeva.evals.base import OwnImages, encode_images, own_crop, text_task

RECALLS = (1, 5, 10)
WAYS = {"i2t": "image to text", "t2i": "text to image"}
COLUMNS = ("search", "R@1 %", "R@5 %", "R@10 %", "mean rank", "median rank", "published", "difference")
"""Of `Row.cells`."""
_CELLS = 1 << 24
"""So many cosines at a time: 64 MiB."""
TIE = 1e-6
"""Cosines this close are equal: what rounding makes of two products of the same features."""


class Config(OwnImages):
    """Retrieval among the held-out images and their captions, or among those of `source`."""

    name: str = "retrieval"
    source: SourceField | None = Field(None, description="images with captions; the held-out ones when left out")
    captions: int | None = Field(None, gt=0, description="use the first ones of an image only; all if left out")
    crop: CropConfig | None = Field(None, description="of images of `source`; as the model's held-out ones if left out")
    prefix: str = Field("", description="of the metrics' names, where several of these stand in one recipe")
    text_batch_size: int = Field(256, gt=0, description="texts per forward pass")

    def build(self) -> "Retrieval":
        """Make the evaluation.

        Raises:
            ConfigError: The source is not there, or has no captions.
        """
        source = None if self.source is None else self.source.build()
        if self.source is not None and not has_captions(source):
            text = f"source {self.source.name} has no captions; give images with captions, such as source captions"
            raise ConfigError([f"evaluation retrieval: {text}"])
        return Retrieval(self, source)


class Retrieval:
    """See the module's text.

    Attributes:
        broken: Name -> reason of the files that could not be read.
        tell: Called with a line when it is done.
    """

    needs = frozenset({"text"})

    def __init__(self, config: Config, source: Any) -> None:
        self.config, self._source = config, source
        self.broken: dict[str, str] = {}
        self.tell: Callable[[str], None] | None = None

    def check(self, task: Any) -> None:
        """Whether the task encodes images and texts.

        Raises:
            ValueError: It does not.
        """
        text_task(task, self.config.name)

    @torch.no_grad()
    def run(self, task: Any, loaders: Mapping[str, Any]) -> dict[str, float]:
        """Metrics as in the module's text.

        Raises:
            ValueError: See `check`; or there are no images with captions.
        """
        self.check(task)
        config, loader = self.config, loaders.get("val")
        if self._source is not None:
            size, crop = task.view_spec(train=False).image_size, config.crop or own_crop(task, loaders)
            loader = config.loader(self._source, size, crop, task.tokenizer)
        if loader is None:
            raise ValueError("evaluation retrieval has no images: give it a `source`, or data.val or data.holdout")
        pairs = _encode(task, loader, config.captions, config.text_batch_size)
        if self._source is not None:
            self.broken |= merge_over_processes(loader.broken)
        metrics = retrieval_metrics(pairs)
        if self.tell is not None:
            i2t, t2i = (f"{100 * metrics[f'{way}_r1']:.2f} %" for way in ("i2t", "t2i"))
            self.tell(f"{len(pairs.image)} images, {len(pairs.text_of)} captions: R@1 {i2t} of texts, {t2i} of images")
        if self._source is not None:
            metrics |= {"images": float(len(pairs.image)), "captions": float(len(pairs.text_of))}
        return {f"{config.prefix}retrieval_{key}": value for key, value in metrics.items()}

    def notes(self, task: Any) -> list[str]:
        """What a reader of the numbers should know."""
        if not self.broken:
            return []
        some = "; ".join(f"{name}: {reason}" for name, reason in list(self.broken.items())[:5])
        return [f"{len(self.broken)} images could not be read, or have no caption, and were left out: {some}"]

    def rows(self, metrics: Mapping[str, float], published: Mapping[str, float]) -> list["Row"]:
        """The table of what was measured.

        Args:
            metrics: Of `run`.
            published: Of the same weights, recalls in percent, such as `coco_t2i_r5`; `prefix` names the data set.
        """
        rows, start = [], f"{self.config.prefix}retrieval_"
        for way, title in WAYS.items():
            recalls = [100 * metrics[f"{start}{way}_r{number}"] for number in RECALLS]
            theirs = [published.get(f"{self.config.prefix}{way}_r{number}") for number in RECALLS]
            mean, median = (metrics[f"{start}{way}_{kind}_rank"] for kind in ("mean", "median"))
            rows.append(Row(f"{self.config.prefix.rstrip('_')} {title}".strip(), recalls, mean, median, theirs))
        return rows


class Row(NamedTuple):
    """One line of the table: recalls at 1, 5, 10 in percent, ranks from 1."""

    title: str
    recalls: list[float]
    mean_rank: float
    median_rank: float
    published: list[float | None]

    def cells(self) -> tuple[str, ...]:
        """As text."""
        known = [value for value in self.published if value is not None]
        published = " / ".join("–" if value is None else f"{value:.2f}" for value in self.published) if known else ""
        pairs = zip(self.recalls, self.published, strict=True)
        difference = " / ".join("–" if value is None else f"{recall - value:+.2f}" for recall, value in pairs)
        return (
            self.title, *(f"{value:.2f}" for value in self.recalls), f"{self.mean_rank:.1f}",
            f"{self.median_rank:.0f}", published, difference if known else "",
        )  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Images and their captions, the same on every process.

    Attributes:
        image: Features of length 1.
        text: Features of length 1 of the distinct texts.
        text_of: Of each caption, which text it is.
        image_of: Of each caption, which image it belongs to; every image has at least one.
    """

    image: Float[Tensor, "B E"]
    text: Float[Tensor, "U E"]
    text_of: Int[Tensor, "C"]
    image_of: Int[Tensor, "C"]


def paired(image_BE: Float[Tensor, "B E"], text_BE: Float[Tensor, "B E"]) -> Pairs:
    """Images with one caption each, no two of them the same."""
    number_B = torch.arange(len(image_BE))
    return Pairs(F.normalize(image_BE, dim=-1), F.normalize(text_BE, dim=-1), number_B, number_B)


def _encode(task: Any, loader: Any, most: int | None, batch_size: int) -> Pairs:
    """Features of all images and distinct texts of all processes, in the order of the samples (collective)."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = encode_images(task, loader)
    parts: list[Any] = [None] * world_size
    found = (own.features, own.numbers, [captions[:most] for captions in own.captions])
    if world_size > 1:
        dist.all_gather_object(parts, found)
    else:
        parts = [found]
    image_BE, number_B = (torch.cat([part[column] for part in parts]) for column in (0, 1))
    captions = [one for part in parts for one in part[2]]
    order = number_B.argsort().tolist()
    captions = [captions[place] for place in order]
    if not captions or not all(captions):
        raise ValueError("evaluation retrieval needs images with captions; remove it from `evals`, or give a `source`")
    texts = list(dict.fromkeys(text for some in captions for text in some))
    number = {text: place for place, text in enumerate(texts)}
    text_of = torch.tensor([number[text] for some in captions for text in some])
    image_of = torch.tensor([place for place, some in enumerate(captions) for _ in some])
    # rows are as long as the longest text of their batch: long ones together, and each process its share of them
    by_length = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    mine, features = by_length[rank::world_size], [torch.empty(0, image_BE.shape[1])]
    for first in range(0, len(mine), batch_size):
        encoded_BE = task.encode_text([texts[place] for place in mine[first : first + batch_size]])
        features.append(F.normalize(encoded_BE.float(), dim=-1).cpu())
    places = [torch.tensor(by_length[one::world_size], dtype=torch.int64) for one in range(world_size)]
    text_UE = torch.empty(len(texts), image_BE.shape[1])
    text_UE[torch.cat(places)] = torch.cat(gather_over_processes(torch.cat(features)))
    device = next(task.parameters()).device
    return Pairs(image_BE[order].to(device), text_UE.to(device), text_of.to(device), image_of.to(device))


def retrieval_metrics(pairs: Pairs) -> dict[str, float]:
    """Recalls and ranks in both directions: `i2t_r1`, ..., `t2i_median_rank`."""
    metrics: dict[str, float] = {}
    with torch.autocast(pairs.image.device.type, enabled=False):  # neighbours are told apart in full precision
        for way, answers in (("i2t", _image_to_text(pairs)), ("t2i", _text_to_image(pairs))):
            metrics |= {f"{way}_{key}": value for key, value in _recalls(answers).items()}
    return metrics


class Answers(NamedTuple):
    """Of each query, as numbers of answers.

    Attributes:
        nearer: Wrong ones that are nearer than the best right one.
        tied: Wrong ones as near as that.
        right: Right ones as near as that, itself included.
    """

    nearer: Float[Tensor, "Q"]
    tied: Float[Tensor, "Q"]
    right: Float[Tensor, "Q"]


def _image_to_text(pairs: Pairs) -> Answers:
    """Each image among all captions; the best of its own counts."""
    device, num_images = pairs.image.device, len(pairs.image)
    weight_U = torch.bincount(pairs.text_of, minlength=len(pairs.text)).float()  # captions with this text
    first = torch.searchsorted(pairs.image_of, torch.arange(num_images + 1, device=device)).tolist()
    parts, rows = [], max(_CELLS // len(pairs.text), 1)
    for start in range(0, num_images, rows):
        stop = min(start + rows, num_images)
        cosine_BU = pairs.image[start:stop] @ pairs.text.T
        own = slice(first[start], first[stop])
        row_C = pairs.image_of[own] - start
        own_C = cosine_BU[row_C, pairs.text_of[own]]
        best_B = torch.full((stop - start,), -torch.inf, device=device).scatter_reduce(0, row_C, own_C, "amax")
        right_B = torch.zeros_like(best_B).index_add(0, row_C, (own_C >= best_B[row_C] - TIE).float())
        nearer_B = ((cosine_BU > best_B[:, None] + TIE) * weight_U).sum(1)
        not_less_B = ((cosine_BU >= best_B[:, None] - TIE) * weight_U).sum(1)
        parts.append([nearer_B, not_less_B - nearer_B - right_B, right_B])
    return Answers(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _text_to_image(pairs: Pairs) -> Answers:
    """Each caption among all images."""
    parts, rows = [], max(_CELLS // len(pairs.image), 1)
    for text_C, image_C in zip(pairs.text_of.split(rows), pairs.image_of.split(rows), strict=True):
        cosine_CB = pairs.text[text_C] @ pairs.image.T
        own_C1 = cosine_CB.gather(1, image_C[:, None])
        nearer_C = (cosine_CB > own_C1 + TIE).sum(1).float()
        not_less_C = (cosine_CB >= own_C1 - TIE).sum(1).float()
        parts.append([nearer_C, not_less_C - nearer_C - 1, torch.ones_like(nearer_C)])
    return Answers(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _recalls(answers: Answers) -> dict[str, float]:
    """Means over all orders of what is equally near."""
    nearer_Q, tied_Q, right_Q = (numbers.double().numpy() for numbers in answers)
    metrics = {}
    for number in RECALLS:
        free_Q = np.clip(number - nearer_Q, 0, tied_Q + right_Q)  # places left for those that are equally near
        none_right_Q = comb(tied_Q, free_Q) / comb(tied_Q + right_Q, free_Q)
        metrics[f"r{number}"] = float(np.mean(1 - none_right_Q))
    rank_Q = nearer_Q + tied_Q / (right_Q + 1)
    return {**metrics, "mean_rank": float(rank_Q.mean()) + 1, "median_rank": float(np.floor(np.median(rank_Q))) + 1}
