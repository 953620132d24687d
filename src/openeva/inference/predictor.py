"""A model that answers for anybody's images: read and cut in threads, answered in batches, one result per image.

images -> `find_images` -> pixels (threads) -> the model's own evaluation view -> batch -> logits and features ->
`Prediction`s in the order of the images; the classes are the model's, or, of a CLIP, any texts
videos -> `videos.answers` -> the same, one `VideoPrediction` per video

Source: spec section 7: images are seen as in the official evaluation of these weights (`transforms_for`).
"""

import os
import random
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from openeva.backbones.base import Backbone, Features
from openeva.data.views import normalise
from openeva.engine.distributed import start
from openeva.engine.precision import DTYPES, PrecisionName, resolve_precision
from openeva.heads.classifier import ImageClassifier
from openeva.heads.clip import ClipModel
from openeva.inference.classes import ClassNames, class_names
from openeva.inference.inputs import FoundImage, ImageError, Input, find_images
from openeva.inference.maps import MAPS, MapKind
from openeva.inference.texts import (
    Templates,
    TextClassifier,
    checked_templates,
    checked_texts,
    image_tower,
    no_text_tower,
    tell_cut,
    text_classifier,
)
from openeva.models import load_checkpoint, transforms_for

if TYPE_CHECKING:
    from openeva.inference.videos import Windows

Weights = str | Path | ImageClassifier | Backbone | ClipModel
"""What to answer with: official name, run, model folder or file; or a model that is there already."""

BATCH_SIZE = 32
TOPK = 5
TOPK_TEXTS = 10
"""Where the classes are texts."""
MAX_READERS = 16
"""Threads that read images, unless asked otherwise; no more than processors."""
READ_AHEAD_BATCHES = 2
"""Images that are read while the model is busy."""
SEES_IMAGES = (
    "these weights see images; look at frames of it (--frames 8; Windows(num_frames=8) in Python), or give weights of "
    "a video model"
)
"""Why a video will not do."""


@dataclass(frozen=True)
class Guess:
    """One class, or text, and how probable the model finds it (softmax over all of them).

    Attributes:
        index: Its number.
        name: In words.
        probability: 0..1.
        cosine: Of a text: that of image and text in the joint space, which the probability is made of.
    """

    index: int
    name: str
    probability: float
    cosine: float | None = None


@dataclass(frozen=True)
class Embedding:
    """Features of one image, float32.

    Attributes:
        pooled: What the classifier sees, or the backbone's pooled vector where there is no classifier, `[D]`.
        patches: Last layer, `[N, D]` in raster order; None where not asked for.
        layers: By number of the block, from 0: its output before the final norm, `[N, D]`, or the mean over patches
            `[D]` where patches were not asked for.
        grid: Rows and columns of patches.
    """

    pooled: NDArray[np.float32]
    patches: NDArray[np.float32] | None
    layers: dict[int, NDArray[np.float32]]
    grid: tuple[int, int]


class HeatMap(NamedTuple):
    """One number per patch `[y, x]` (of a clip `[slots, y, x]`), not below 0, and what it means."""

    values: NDArray[np.float32]
    meaning: str


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Attributes:
        source: Path, URL, or "image 3" for one from memory.
        top: Most probable classes first; empty where the image is broken or the model has no classifier.
        error: Why there is no answer; None where there is one.
        embedding: Features, where asked for.
        view: The pixels that the model saw, uint8 `[Y, X, 3]`, where a map was asked for.
        heat: The map that was asked for.
    """

    source: str
    top: tuple[Guess, ...] = ()
    error: str | None = None
    embedding: Embedding | None = field(default=None, repr=False)
    view: NDArray[np.uint8] | None = field(default=None, repr=False)
    heat: HeatMap | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Wanted:
    """What to find out beside the classes.

    Attributes:
        embedding: Features too.
        patches: With one vector per patch.
        layers: Blocks whose output (before the final norm) to return too, from 0; negative ones count from the end.
        map: Where the model looks.
    """

    embedding: bool = False
    patches: bool = False
    layers: tuple[int, ...] = ()
    map: MapKind | None = None


class Predictor:
    """A loaded model, ready for any number of calls.

    Args:
        weights: Official name, run, model folder or file; or a model (put into evaluation mode and moved).
        topk: Classes to return per image; default: 5, or 10 texts.
        batch_size: Images, or frames of clips, per forward pass; a clip is never divided.
        device: "auto", "cpu", "cuda", ...
        precision: Of the backbone; "auto" is bf16 where the hardware multiplies it natively. The classifier itself and
            all results are fp32.
        image_size: Pixels of the side (or rows and columns) to look at; positions are resized. Default: the weights'.
        texts: What may be seen, for the weights of a CLIP: its classes are then these.
        templates: What texts are put into, such as "a photo of a {c}."; several, a file, or a name such as "imagenet".
            Default: texts as they are.
        num_readers: Threads that read images, or videos; default: one per processor, at most 16.

    Raises:
        ConfigError: The weights are unknown or out of reach.
        ValueError: They do not fit, or an argument is out of range.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        topk: int | None = None,
        batch_size: int = BATCH_SIZE,
        device: str = "auto",
        precision: PrecisionName = "auto",
        image_size: int | tuple[int, int] | None = None,
        texts: Sequence[str] = (),
        templates: Templates | None = None,
        num_readers: int | None = None,
    ) -> None:
        texts, self.topk = checked_texts(texts), topk or (TOPK_TEXTS if texts else TOPK)
        self.batch_size, self.num_readers = batch_size, num_readers or min(MAX_READERS, os.cpu_count() or 1)
        if min(self.topk, batch_size, self.num_readers) < 1 or topk == 0:
            raise ValueError(f"topk {topk}, batch_size {batch_size} and num_readers {num_readers} must be at least 1")
        if templates is not None and not texts:
            raise ValueError("templates are what texts are put into; give texts too")
        filled = checked_templates(templates)
        self.device = start(device).device
        self.precision = resolve_precision(precision, self.device)
        model = load_any(weights, image_size).to(self.device).eval()
        self.is_clip, self.classes = isinstance(model, ClipModel), None
        if texts:
            model, self.classes = self._tell_apart(model, weights, texts, filled), ClassNames(texts, "the texts given")
        self.model = image_tower(model) if isinstance(model, ClipModel) else model
        self.backbone = backbone_of(self.model)
        self.transform = transforms_for(self.model).evaluate
        if self.classes is None and isinstance(model, ImageClassifier):
            self.classes = class_names(model.num_classes, config_of(model), of_videos=self.num_frames is not None)

    @property
    def num_frames(self) -> int | None:
        """Frames of the clips that the model sees; None = it sees images."""
        return self.backbone.num_frames

    def _tell_apart(
        self,
        model: ImageClassifier | Backbone | ClipModel,
        weights: Weights,
        texts: Sequence[str],
        templates: Sequence[str],
    ) -> TextClassifier:
        if not isinstance(model, ClipModel):
            raise no_text_tower(weights)
        tell_cut(texts, model.tokenizer)
        return text_classifier(model, texts, templates, self._autocast())

    def __call__(
        self,
        images: Input | Iterable[Input],
        wanted: Wanted = Wanted(),
        windows: "Windows | None" = None,
    ) -> Generator[Prediction, None, None]:
        """Answer for images in their order; a broken one gets an `error`. Closed early, it reads no more of them.

        A video model answers for videos, with a `VideoPrediction` for each.

        Args:
            images: See `openeva.inference.inputs.find_images`, or, for a video model, `find_videos`.
            wanted: What to find out beside the classes.
            windows: How videos are divided and looked at; default: `Windows()` for a video model. With `num_frames` a
                model of images answers for frames of videos.

        Raises:
            ValueError: An address leads nowhere or to the wrong kind, or the model cannot give what is wanted; before
                the first image is read where the images are a list.
            ImportError: What reads videos is missing.
        """
        wanted = self._checked(wanted)
        if self.num_frames is None and windows is None:
            return self._answers(find_images(images, SEES_IMAGES), wanted)
        from openeva.inference import videos

        return videos.answers(self, images, wanted, windows or videos.Windows())

    def _checked(self, wanted: Wanted) -> Wanted:
        if self.classes is None and self.is_clip and (wanted.map or not wanted.embedding):
            raise ValueError(
                "these weights are a CLIP, which tells apart what you write: give texts, such as --text 'a photo of a "
                "cat' --text 'a photo of a dog' (texts=[...] in Python), or ask for features"
            )
        if self.classes is None and (wanted.map or not wanted.embedding):
            raise ValueError(
                "these weights have no classifier, so they name no classes; ask for features, fine-tune them "
                "(`openeva list --recipes`), or give weights that were fine-tuned"
            )
        depth = self.backbone.num_layers
        bad = [layer for layer in wanted.layers if not -depth <= layer < depth]
        if bad:
            raise ValueError(f"layers {bad}: the model has blocks 0 to {depth - 1} (or -{depth} to -1)")
        return replace(wanted, layers=tuple(dict.fromkeys(layer % depth for layer in wanted.layers)))

    def _answers(self, found: Iterable[FoundImage], wanted: Wanted) -> Generator[Prediction, None, None]:
        for batch in self._batches(found):
            good = [view for _, view in batch if isinstance(view, Tensor)]
            answers = iter(self._answer(torch.stack(good), wanted) if good else ())
            for image, view in batch:
                if isinstance(view, Tensor):
                    yield replace(next(answers), source=image.source)
                else:
                    yield Prediction(image.source, error=view.reason)

    def _batches(
        self, found: Iterable[FoundImage]
    ) -> Iterator[list[tuple[FoundImage, UInt8[Tensor, "3 Y X"] | ImageError]]]:
        waiting: deque[tuple[FoundImage, Future[Tensor | ImageError]]] = deque()
        with ThreadPoolExecutor(self.num_readers, thread_name_prefix="openeva-read") as pool:
            try:
                for image in found:
                    waiting.append((image, pool.submit(self._view, image)))
                    if len(waiting) >= READ_AHEAD_BATCHES * self.batch_size:
                        yield [_done(waiting.popleft()) for _ in range(self.batch_size)]
                while waiting:
                    yield [_done(waiting.popleft()) for _ in range(min(self.batch_size, len(waiting)))]
            finally:  # the caller stopped early: nothing more is read for nobody
                pool.shutdown(wait=False, cancel_futures=True)

    def _view(self, image: FoundImage) -> UInt8[Tensor, "3 Y X"] | ImageError:
        try:
            pixels_YXC = image.read()
        except ImageError as error:
            return error
        rows, columns = pixels_YXC.shape[:2]
        crop = self.transform.crop
        return crop.cut(pixels_YXC, crop.draw(rows, columns, random.Random(0)), self.transform.image_size)

    def _answer(self, view_BCYX: UInt8[Tensor, "B 3 Y X"], wanted: Wanted) -> list[Prediction]:
        pooled_BD, logits_BV, features = self.see(view_BCYX, wanted.layers)
        results = [Prediction("") for _ in range(len(view_BCYX))]
        if logits_BV is not None:
            results = [replace(r, top=top) for r, top in zip(results, self.guesses(logits_BV), strict=True)]
        if wanted.embedding:
            embeddings = embeddings_of(pooled_BD, features, wanted)
            results = [replace(r, embedding=e) for r, e in zip(results, embeddings, strict=True)]
        if wanted.map and logits_BV is not None:
            heats = self.explain(view_BCYX, logits_BV.argmax(dim=1), wanted.map)
            results = [
                replace(r, view=view.permute(1, 2, 0).numpy(), heat=heat)
                for r, view, heat in zip(results, view_BCYX, heats, strict=True)
            ]
        return results

    def see(
        self, view: UInt8[Tensor, "B *T 3 Y X"], layers: tuple[int, ...] = ()
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B V"] | None, Features]:
        """One forward pass: what the classifier sees, its logits (None without one), and what the backbone said."""
        image = self._normalised(view)
        with torch.no_grad(), self._autocast(), _features_of(self.backbone, layers) as seen:
            classifier = self.model if isinstance(self.model, ImageClassifier) else None
            pooled_BD = self.model(image).pooled if classifier is None else classifier.pool(image)
        pooled_BD = pooled_BD.float()
        with torch.no_grad():
            return pooled_BD, None if classifier is None else classifier.classifier(pooled_BD), seen[0]

    def explain(self, view: UInt8[Tensor, "B *T 3 Y X"], class_B: Int[Tensor, "B"], kind: MapKind) -> list[HeatMap]:
        """Where a classifier looks for a class."""
        assert isinstance(self.model, ImageClassifier)
        with self._autocast():
            maps = MAPS[kind](self.model, self._normalised(view), class_B)
        return [HeatMap(values, maps.meaning) for values in maps.values.float().cpu().numpy()]

    def guesses(self, logits_BV: Float[Tensor, "B V"]) -> list[tuple[Guess, ...]]:
        """The most probable classes in words, best first."""
        assert self.classes is not None
        names, cosine_BK = self.classes.names, None
        top_BK = logits_BV.softmax(dim=-1).topk(min(self.topk, logits_BV.shape[1]))
        if isinstance(self.model, TextClassifier):
            cosine_BK = self.model.cosines(logits_BV.gather(1, top_BK.indices)).tolist()
        found = []
        for row, (probabilities, indices) in enumerate(
            zip(top_BK.values.tolist(), top_BK.indices.tolist(), strict=True)
        ):
            cosines = [None] * len(indices) if cosine_BK is None else cosine_BK[row]
            found.append(
                tuple(
                    Guess(i, names[i], p, cosine) for i, p, cosine in zip(indices, probabilities, cosines, strict=True)
                )
            )
        return found

    def _normalised(self, view: UInt8[Tensor, "B *T 3 Y X"]) -> Float[Tensor, "B *T 3 Y X"]:
        return normalise(view.to(self.device), self.transform.mean, self.transform.std)

    def _autocast(self) -> Any:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)


def predict(
    images: Input | Iterable[Input],
    *,
    weights: Weights,
    texts: Sequence[str] = (),
    templates: Templates | None = None,
    topk: int | None = None,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
    precision: PrecisionName = "auto",
    image_size: int | tuple[int, int] | None = None,
    windows: "Windows | None" = None,
    on_error: Literal["raise", "return"] = "raise",
) -> list[Prediction]:
    """Name what is in images: the classes of a classifier, or, with a CLIP, which of some texts fits.

    Of videos, with a video model, the predictions are `VideoPrediction`s: actions with times.

    For many calls with one model, or results one by one, make a `Predictor`.

    Args:
        images: Paths, folders, patterns, URLs, Pillow images, arrays, tensors, or any iterable of them; for a video
            model paths, folders and patterns of videos.
        weights: See `Predictor`, as are all others.
        texts: For a CLIP: what may be seen.
        templates: What texts are put into.
        topk: Classes to return per image; default: 5, or 10 texts.
        batch_size: Images, or frames of clips, per forward pass.
        device: "auto", "cpu", "cuda", ...
        precision: Of the backbone.
        image_size: Pixels to look at.
        windows: How videos are divided, and in how many views they are seen.
        on_error: What a broken image or video does: "raise", or "return" a `Prediction` with `error`.

    Raises:
        ImageError: An image is broken and `on_error` is "raise".
        ConfigError: The weights are unknown or out of reach.
        ValueError: No such images, or weights without a classifier, or, for texts, without a text tower.
    """
    predictor = Predictor(
        weights, topk=topk, batch_size=batch_size, device=device, precision=precision, image_size=image_size,
        texts=texts, templates=templates,
    )  # fmt: skip
    return list(checked(predictor(images, windows=windows), on_error))


def checked(predictions: Iterable[Prediction], on_error: Literal["raise", "return"]) -> Iterator[Prediction]:
    """The predictions; with "raise", the first broken image is an error.

    Raises:
        ImageError: See above.
    """
    for prediction in predictions:
        if prediction.error is not None and on_error == "raise":
            raise ImageError(prediction.source, prediction.error)
        yield prediction


def load_any(
    weights: Weights, image_size: int | tuple[int, int] | None = None
) -> ImageClassifier | Backbone | ClipModel:
    """The model of an address, or the one that is given.

    Raises:
        ConfigError: The weights are unknown or out of reach.
        ValueError: They do not fit, or a size is asked of a model that is there already.
    """
    if isinstance(weights, nn.Module):
        if image_size is not None:
            raise ValueError("image_size is for weights that are loaded here; build the model with it instead")
        return weights
    overrides: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    return load_checkpoint(str(weights), **overrides)


def load_model(weights: Weights, image_size: int | tuple[int, int] | None = None) -> ImageClassifier | Backbone:
    """As `load_any`, of a CLIP its image tower."""
    model = load_any(weights, image_size)
    return image_tower(model) if isinstance(model, ClipModel) else model


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone of a classifier, or the model itself where it is one."""
    backbone = model.backbone if isinstance(model, ImageClassifier) else model
    if not isinstance(backbone, Backbone):
        raise ValueError(f"{type(model).__name__} is neither an ImageClassifier nor a Backbone")
    return backbone


def config_of(model: nn.Module) -> Mapping[str, Any]:
    """What openeva wrote beside a model's weights; empty for weights from elsewhere."""
    return getattr(getattr(model, "origin", None), "config", {})


@contextmanager
def _features_of(backbone: Backbone, layers: tuple[int, ...]) -> Iterator[list[Features]]:
    """Collect what a backbone returns inside a larger model, with some of its layers."""
    seen: list[Features] = []

    def ask(_module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, {**options, "layers": layers} if layers else options

    handles = [
        backbone.register_forward_pre_hook(ask, with_kwargs=True),
        backbone.register_forward_hook(lambda _m, _i, output: seen.append(output)),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def embeddings_of(pooled_BD: Float[Tensor, "B D"], features: Features, wanted: Wanted) -> Iterator[Embedding]:
    """What is kept of a forward pass, image by image."""

    def on_cpu(tensor: Tensor) -> NDArray[np.float32]:
        return tensor.float().cpu().numpy()

    pooled = on_cpu(pooled_BD)
    patches = on_cpu(features.patches) if wanted.patches else None
    layers = {}
    for layer in wanted.layers:
        tokens_BND = features.pyramid[layer].flatten(2).transpose(1, 2)
        layers[layer] = on_cpu(tokens_BND if wanted.patches else tokens_BND.float().mean(dim=1))
    for i in range(len(pooled)):
        yield Embedding(
            pooled[i],
            None if patches is None else patches[i],
            {layer: values[i] for layer, values in layers.items()},
            features.grid,
        )


def _done(item: tuple[FoundImage, "Future[Tensor | ImageError]"]) -> tuple[FoundImage, Tensor | ImageError]:
    return item[0], item[1].result()
