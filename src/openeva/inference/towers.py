"""Both towers of a CLIP, each loaded when it is first needed.

weights -> `Towers`: image -> features[E], texts -> features[B, E], all of length 1; an identity, told without loading
where nothing has changed
"""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from openeva.checkpoints.native import CONFIG_FILE, WEIGHTS_FILE, model_path
from openeva.checkpoints.weights import digest_of_weights
from openeva.engine.distributed import start
from openeva.heads.clip import ClipModel
from openeva.inference.index_file import Stamp
from openeva.inference.inputs import FoundImage
from openeva.inference.predictor import Predictor, Wanted, checked, load_any
from openeva.inference.texts import no_text_tower, tell_cut
from openeva.models import load_text_tower
from openeva.text.tokenizer import Tokenizer
from openeva.text.tower import TextTower

SMALLEST = 1e-12
"""Vectors are not divided by less."""


def unit(vector_E: NDArray[np.float32]) -> NDArray[np.float32]:
    """A vector of the same direction and length 1."""
    return vector_E / max(float(np.linalg.norm(vector_E)), SMALLEST)


class Towers:
    """The model of an index, loaded no further than it is needed.

    Args:
        weights: Address, or a model.
        settings: Of the `Predictor`.
    """

    def __init__(self, weights: str | Path | ClipModel, settings: Mapping[str, Any]) -> None:
        self.weights, self.settings = weights, settings
        self._identity: str | None = None

    @property
    def name(self) -> str:
        """The weights in words."""
        return type(self.weights).__name__ if isinstance(self.weights, nn.Module) else str(self.weights)

    @cached_property
    def stamp(self) -> list[Any] | None:
        """What tells without reading them that weights are still the same; None for a model in memory."""
        if isinstance(self.weights, nn.Module):
            return None
        path = model_path(str(self.weights))
        files = [path / WEIGHTS_FILE, path / CONFIG_FILE] if path.is_dir() else [path]
        stamps = [Stamp.of(file) for file in files]
        return [os.path.abspath(path), *([stamp.size, stamp.mtime_ns] for stamp in stamps)]  # noqa: PTH100

    def made(self, meta: Mapping[str, Any]) -> bool:
        """Whether an index was made with these weights."""
        if self.stamp is not None and meta["stamp"] == self.stamp:
            self._identity = meta["identity"]
        return bool(meta["identity"] == self.identity)

    @property
    def identity(self) -> str:
        """Two models of the same identity give the same features."""
        if self._identity is None:
            backbone, transform = self.predictor.backbone, self.predictor.transform
            weights = backbone.identity
            if isinstance(self.weights, nn.Module):
                weights = digest_of_weights(self.weights)
            rows, columns = transform.image_size
            self._identity = f"{weights} {rows}x{columns} {transform.crop.model_dump_json()}"
        return self._identity

    def facts(self) -> dict[str, Any]:
        """What an index must know about its weights."""
        address = None
        if not isinstance(self.weights, nn.Module):
            address = str(self.weights)
            if Path(address).expanduser().exists():
                address = os.path.abspath(Path(address).expanduser())  # noqa: PTH100
        return {"weights": address, "identity": self.identity, "stamp": self.stamp}

    @cached_property
    def clip(self) -> ClipModel:
        """Both towers.

        Raises:
            ValueError: The weights have no text tower.
        """
        model = load_any(self.weights)
        if not isinstance(model, ClipModel):
            raise no_text_tower(self.weights)
        return model

    @cached_property
    def predictor(self) -> Predictor:
        """The image tower."""
        return Predictor(self.clip, **self.settings)

    def images(self, found: Sequence[FoundImage]) -> list[NDArray[np.float32]]:
        """Features `[E]` of length 1, one per image.

        Raises:
            ImageError: An image cannot be read.
        """
        answers = checked(self.predictor(list(found), Wanted(embedding=True)), "raise")
        return [unit(answer.embedding.pooled) for answer in answers if answer.embedding is not None]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Features `[B, E]` of length 1."""
        if "clip" in vars(self) or isinstance(self.weights, nn.Module):
            tower, device = self.clip.text.eval(), self.clip.logit_scale.device
        else:
            tower, device = self._text_tower, start(self.settings["device"]).device
        tokenizer = Tokenizer(tower.config.context_length)
        tell_cut(texts, tokenizer)
        text_BE = tower.to(device)(tokenizer(texts).to(device))
        return F.normalize(text_BE.float(), dim=-1).cpu().numpy()

    @cached_property
    def _text_tower(self) -> TextTower:
        return load_text_tower(str(self.weights))
