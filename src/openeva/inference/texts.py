"""Texts that images are compared with: a CLIP as a classifier whose classes are anybody's sentences.

texts (x templates) -> text tower -> classifier[E, V]; image -> image tower -> 100 x cosine with each -> softmax

Source: spec sections 1.5 and 3.1 of EVA-CLIP: the factor is 100, the temperature that was learnt is not used.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openeva.backbones.base import Backbone, Features
from openeva.checkpoints.pretrained import PRETRAINED
from openeva.heads.classifier import ImageClassifier
from openeva.heads.clip import ClipModel
from openeva.text.prompts import LOGIT_SCALE, PLAIN, read_templates, zero_shot_classifier, zero_shot_logits
from openeva.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Templates = str | Path | Sequence[str]
"""A name such as "imagenet", a template with a place for the text, several, or a file of them."""

LONGEST_SHOWN = 60


class TextClassifier(ImageClassifier):
    """A CLIP that tells texts apart; what explains a classifier explains it too.

    Args:
        model: Its image tower is shared, its text tower is not needed any more.
        classifier_EV: From `zero_shot_classifier`.
    """

    def __init__(self, model: ClipModel, classifier_EV: Float[Tensor, "E V"]) -> None:
        super().__init__(model.backbone, classifier_EV.shape[1], pooling="cls")
        self.projection, self.classifier = model.projection, _Cosines(classifier_EV)

    def pool(self, image_BCYX: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B E"]:
        """Features in the joint space, not of length 1."""
        return self.projection(self.backbone(image_BCYX).pooled)

    @staticmethod
    def cosines(logits_BV: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """What the logits were made of."""
        return logits_BV / LOGIT_SCALE


class _Cosines(nn.Module):
    weight: Tensor

    def __init__(self, weight_EV: Float[Tensor, "E V"]) -> None:
        super().__init__()
        self.register_buffer("weight", weight_EV)

    def forward(self, image_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B V"]:
        return zero_shot_logits(image_BE, self.weight)


class JointBackbone(Backbone):
    """An image tower with the projection that a CLIP put behind it."""

    def __init__(self, model: ClipModel) -> None:
        super().__init__()
        inner = model.backbone
        self.backbone, self.projection = inner, model.projection
        self.width, self.stride, self.num_layers = model.embed_dim, inner.stride, inner.num_layers
        self.image_size, self.normalisation, self.identity = inner.image_size, inner.normalisation, inner.identity
        vars(self).update({key: vars(inner)[key] for key in ("origin", "load_report") if key in vars(inner)})

    def forward(self, image_BCYX: Tensor, mask_BN: Tensor | None = None, layers: tuple[int, ...] = ()) -> Features:
        """See `Backbone.forward`; pooled, patches and cls are in the joint space."""
        found = self.backbone(image_BCYX, mask_BN, layers)
        cls = None if found.cls is None else self.projection(found.cls)
        patches = self.projection(found.patches)
        return Features(self.projection(found.pooled), patches, found.grid, found.pyramid, cls=cls)

    def flops(self) -> float:
        """See `Backbone.flops`."""
        return self.backbone.flops() + sum(2.0 * parameter.numel() for parameter in self.projection.parameters())


def image_tower(model: ClipModel) -> Backbone:
    """What turns images into features of the joint space."""
    return model.backbone if isinstance(model.projection, nn.Identity) else JointBackbone(model)


def text_classifier(
    model: ClipModel, texts: Sequence[str], templates: Sequence[str], autocast: AbstractContextManager[Any]
) -> TextClassifier:
    """A classifier whose classes are texts, where the model is.

    Args:
        model: On its device, in evaluation mode.
        texts: From `checked_texts`.
        templates: With a place for the text.
        autocast: Precision of the text tower.
    """
    with torch.no_grad(), autocast:
        classifier_EV = zero_shot_classifier(model.encode_text, texts, templates)
    made = TextClassifier(model, classifier_EV).to(classifier_EV.device).eval()
    vars(made).update({key: vars(model)[key] for key in ("origin", "load_report") if key in vars(model)})
    return made


def checked_texts(texts: Sequence[str]) -> list[str]:
    """The texts without spaces around them and without repetitions.

    Raises:
        ValueError: One is empty.
    """
    if isinstance(texts, str):
        texts = [texts]
    stripped = [text.strip() for text in texts]
    if "" in stripped:
        raise ValueError(f"text {stripped.index('') + 1} is empty; write what may be seen, such as 'a photo of a cat'")
    return list(dict.fromkeys(stripped))


def checked_templates(templates: Templates | None) -> tuple[str, ...]:
    """The templates that were asked for, or the text alone.

    Raises:
        ValueError: No such list or file, or a template without a place for the text.
    """
    return PLAIN if templates is None else read_templates(templates)


def tell_cut(texts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Warn about texts of which the model sees only the beginning."""
    for text, num_tokens in _too_long(texts, tokenizer):
        shown = text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 1] + "…"
        log.warning(
            "only the beginning of a text counts: %r has %d tokens, the model takes %d",
            shown, num_tokens, tokenizer.context_length - 2,
        )  # fmt: skip


def _too_long(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    for text in texts:
        num_tokens = len(tokenizer.encode(text))
        if num_tokens > tokenizer.context_length - 2:  # without start and end
            yield text, num_tokens


def read_texts(file: Path) -> list[str]:
    """The lines of a file, without empty ones.

    Raises:
        ValueError: There are none.
    """
    texts = [line.strip() for line in file.expanduser().read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{file} holds no text; write one per line")
    return texts


def no_text_tower(weights: object) -> ValueError:
    """What to say about weights that cannot be compared with texts."""
    name = f"weights {str(weights)!r}" if isinstance(weights, str | Path) else f"this {type(weights).__name__}"
    known = ", ".join(entry.name for entry in PRETRAINED.values() if entry.clip is not None)
    return ValueError(
        f"{name} cannot be compared with texts: there is no text tower; give a CLIP: a run of `task: {{name: clip}}`, "
        f"open_clip's NAME:TAG of an EVA-CLIP, or one of {known}"
    )
