"""Contrastive training of an image and a text tower (CLIP), from EVA or from nothing.

batch -> towers -> features of length 1 -> loss over the pairs of all micro-batches and processes -> gradients

Paper: EVA section 3.4; EVA-CLIP (arXiv 2303.15389); feature caching: GradCache (arXiv 2101.06983). Source: spec
sections 2.1, 2.2, 2.5 and 6. A batch of several micro-batches is one batch of pairs, not several small ones: features
are computed first, without gradients; the loss gives their gradients; each micro-batch is then computed again, with
the same chance, to carry them on. Deliberate differences: the temperature is clamped in full precision, on the very
value that the optimizer keeps, and enters the loss in full precision whatever the weights are gathered in.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from openeva.backbones.base import Backbone
from openeva.backbones.vit import VisionTransformer, architecture_to_fine_tune
from openeva.checkpoints.clip_init import start_towers
from openeva.checkpoints.load import LoadReport
from openeva.config import ConfigError
from openeva.data.labels import has_captions
from openeva.data.mixture import Mixture, Streams
from openeva.data.views import ViewSpec, normalise
from openeva.engine.distributed import gather_over_processes, sum_over_processes, unwrap
from openeva.engine.optim import TowerLayout
from openeva.heads.clip import ClipConfig, ClipModel
from openeva.layers.flops import training_passes
from openeva.losses.contrastive import Contrast, info_nce, sigmoid_loss
from openeva.tasks.base import Batch, Task, TaskConfig
from openeva.text.tokenizer import Tokenizer

TYPICAL_TEXT_LENGTH = 32
"""Tokens of a caption that FLOPs are counted for; rows may be longer in large batches, up to the context."""

EVALUATED_ROWS = 1024
"""So many held-out pairs at a time are compared with all others."""

_MODES = {
    "local_loss": "each process computes its own rows of the loss",
    "gather_with_grad": "gradients of gathered features are summed over the processes",
}


class Config(TaskConfig, ClipConfig):
    """A CLIP: `variant`, or `backbone`, `text` and `embed_dim`; what it starts from, and its loss."""

    name: str = "clip"
    loss: Literal["infonce", "sigmoid"] = Field(
        "infonce", description="softmax over all pairs of the batch (CLIP), or each pair a question of its own (SigLIP)"
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing of infonce")
    init_image: str | None = Field(
        None,
        description="run, model folder, official name or file of an image encoder, such as EVA, to start the image"
        " tower from; without variant and backbone, its architecture too",
    )
    init_text: str | None = Field(None, description="CLIP weights whose text tower to start from")
    init_from: str | None = Field(None, description="CLIP weights to start all of it from, temperature included")

    @model_validator(mode="before")
    @classmethod
    def _refuse_wrong_modes(cls, values: Any) -> Any:
        for key in sorted(set(values) & set(_MODES)) if isinstance(values, dict) else ():
            raise ValueError(
                f"{key} is no key: {_MODES[key]}, always, since anything else gives wrong gradients or the same ones"
                " at a higher cost; remove it"
            )
        return values

    @model_validator(mode="before")
    @classmethod
    def _complete_backbone(cls, values: Any) -> Any:
        """Fill in the architecture of the image tower from its weights."""
        if not isinstance(values, dict) or not isinstance(values.get("init_image"), str) or values.get("variant"):
            return values
        backbone = values.get("backbone", {})
        if not isinstance(backbone, dict) or backbone.get("name", "vit") != "vit" or {"variant", "width"} & {*backbone}:
            return values
        return {**values, "backbone": {**architecture_to_fine_tune(values["init_image"]), **backbone}}

    @model_validator(mode="after")
    def _one_start(self) -> "Config":
        if self.init_from and (self.init_image or self.init_text):
            raise ValueError("init_from is for all of it: give either it, or init_image and init_text")
        if self.smoothing and self.loss != "infonce":
            raise ValueError("smoothing is for loss: infonce; the sigmoid loss has no labels to smooth")
        return self

    def fit_to(self, train: Mixture | Streams, val: Mixture | None) -> "Config":
        """Itself, where the data has captions.

        Raises:
            ConfigError: Some of it has none.
        """
        problems = [
            f"data.{part}.{number} has no captions, and the task clip learns from images with captions: say where they"
            " are (webdataset: caption_key; huggingface: caption_column; scenes: captions: true), take the source"
            " captions, or remove this one"
            for part, data in (("train", train), ("val", val))
            for number, source in enumerate([] if data is None else data.sources)
            if not has_captions(source)
        ]
        if problems:
            raise ConfigError(problems)
        return self

    def build(self) -> "ClipTask":
        """Make the model.

        Raises:
            ValueError: Weights to start from do not fit.
        """
        return ClipTask(self)


class ClipTask(Task):
    """Both towers and the loss of their pairs.

    Attributes:
        load_report: What became of the weights it starts from.
    """

    config: Config
    trainable: nn.Module
    joint_loss = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.trainable = ClipModel(config, bias=config.loss == "sigmoid")
        self.load_report: LoadReport | None = None
        if config.init_image or config.init_text or config.init_from:
            self.load_report = start_towers(
                self.model, init_image=config.init_image, init_text=config.init_text, init_from=config.init_from,
                grid=getattr(self.backbone, "grid", None),
            )  # fmt: skip

    @property
    def model(self) -> ClipModel:
        """What learns, without the wrapper of data-parallel training."""
        return cast("ClipModel", unwrap(self.trainable))

    @property
    def backbone(self) -> Backbone:
        """The image encoder."""
        return self.model.backbone

    @property
    def tokenizer(self) -> Tokenizer:
        """Makes token ids of captions."""
        return self.model.tokenizer

    def blocks(self) -> list[nn.Module]:
        """The blocks of both towers."""
        return [*super().blocks(), *self.model.text.transformer.resblocks]

    @property
    def towers(self) -> dict[str, TowerLayout]:
        """Image and text (spec section 2.3)."""
        backbone, text = self.backbone, self.model.text
        no_decay = frozenset(backbone.no_weight_decay())
        return {
            "image": TowerLayout("backbone.", backbone.num_layers, no_decay, also=("projection.",)),
            "text": TowerLayout("text.", text.num_layers, frozenset({"positional_embedding"})),
        }

    def view_spec(self, *, train: bool) -> ViewSpec:
        """Images of the backbone's size, and their captions as token ids."""
        return ViewSpec(self.backbone.image_size, mean=self.backbone.normalisation.mean, tokenizer=self.tokenizer)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch's own pairs against those of all processes (collective)."""
        scale_1, bias_1 = self._temperature()  # first: sharded weights are put together in lower precision by then
        image_BE, text_BE = self._features(self.trainable, batch)
        contrast = self._loss(image_BE, text_BE, scale_1, bias_1)
        return contrast.loss, self._scalars(contrast, [batch], scale_1)

    def forward_backward(
        self, micro_batches: Sequence[Batch], backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Accumulate the gradient of the loss over the pairs of all micro-batches; as one batch, in less memory."""
        if len(micro_batches) == 1:
            return super().forward_backward(micro_batches, backward)
        scale_1, bias_1 = self._temperature()
        # ---- features of all pairs
        states, parts = [], []
        with torch.no_grad():
            for batch in micro_batches:
                states.append(_random_state(batch["image"].device))
                parts.append(self._features(self.model, batch))
        # ---- the loss, and its gradients by features and temperature
        image_BE, text_BE = (torch.cat(column).requires_grad_() for column in zip(*parts, strict=True))
        scale_leaf = scale_1.detach().requires_grad_()
        bias_leaf = None if bias_1 is None else bias_1.detach().requires_grad_()
        contrast = self._loss(image_BE, text_BE, scale_leaf, bias_leaf)
        leaves = [leaf for leaf in (image_BE, text_BE, scale_leaf, bias_leaf) if leaf is not None]
        by_image_BE, by_text_BE, *by_temperature = torch.autograd.grad(contrast.loss, leaves)
        loss, scalars = contrast.loss.detach(), self._scalars(contrast, micro_batches, scale_1)
        del contrast  # its logits
        # ---- through the towers, a micro-batch at a time
        sizes = [len(batch["image"]) for batch in micro_batches]
        by_features = zip(by_image_BE.split(sizes), by_text_BE.split(sizes), strict=True)
        for number, (batch, state, gradients) in enumerate(zip(micro_batches, states, by_features, strict=True), 1):
            last = number == len(micro_batches)
            with self._synchronise_gradients(last):
                _restore_random_state(state, batch["image"].device)
                outputs, inner = [*self._features(self.trainable, batch)], [*gradients]
                if last:  # the temperature's gradient counts once
                    outputs += [value for value in (scale_1, bias_1) if value is not None]
                    inner += by_temperature
                products = [(output * gradient).sum() for output, gradient in zip(outputs, inner, strict=True)]
                backward(torch.stack(products).sum())
        return loss, scalars

    def _features(self, module: nn.Module, batch: Batch) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E"]]:
        """Features of length 1 of images and texts."""
        statistics = self.backbone.normalisation
        image_BCYX = normalise(batch["image"], statistics.mean, statistics.std)
        image_BE, text_BE, _, _ = module(image_BCYX, batch["text"])
        return image_BE, text_BE

    def _temperature(self) -> tuple[Float[Tensor, "1"], Float[Tensor, "1"] | None]:
        """Scale and bias of the logits in full precision."""
        bias = self.model.logit_bias
        return _whole(self.model.logit_scale).float().exp(), None if bias is None else _whole(bias).float()

    def _loss(
        self,
        image_BE: Float[Tensor, "B E"],
        text_BE: Float[Tensor, "B E"],
        scale_1: Float[Tensor, "1"],
        bias_1: Float[Tensor, "1"] | None,
        others: tuple[Tensor, Tensor] | None = None,
    ) -> Contrast:
        if bias_1 is not None:
            return sigmoid_loss(image_BE, text_BE, scale_1, bias_1, others=others)
        smoothing = self.config.smoothing if self.training else 0.0
        return info_nce(image_BE, text_BE, scale_1, smoothing=smoothing, others=others)

    @staticmethod
    def _scalars(contrast: Contrast, micro_batches: Sequence[Batch], scale_1: Tensor) -> dict[str, Tensor]:
        """For the log: accuracies among all pairs of the batch, scale of the logits, length of the rows of text."""
        length = sum(batch["text"].shape[1] for batch in micro_batches) / len(micro_batches)
        text_length = torch.full((), length, device=scale_1.device)
        return {**contrast.accuracies(), "scale": scale_1.detach()[0], "text_length": text_length}

    def after_step(self) -> None:
        """Keep the scale between 1 and 100 (spec section 2.2)."""
        self.model.clamp_logit_scale()

    @torch.no_grad()
    def encode_image(self, image_BCYX: UInt8[Tensor, "B C Y X"]) -> Float[Tensor, "B E"]:
        """Features of images as the loader gives them, not of length 1, without gradients."""
        weight, statistics = next(self.backbone.parameters()), self.backbone.normalisation
        image_BCYX = normalise(image_BCYX.to(weight.device), statistics.mean, statistics.std, weight.dtype)
        return self.model.encode_image(image_BCYX).float()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "B E"]:
        """Features of texts, not of length 1, without gradients."""
        return self.model.encode_text(texts).float()

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """Loss of all held-out pairs as one batch, on however many processes (collective)."""
        none = torch.empty(0, self.model.embed_dim)  # a process may have no image
        parts, device = [(none, none)], self.model.logit_scale.device
        for batch in loader:
            image_BE = F.normalize(self.encode_image(batch["image"]), dim=-1)
            text_BE = F.normalize(self.model.encode_text(batch["text"].to(device)).float(), dim=-1)
            parts.append((image_BE.cpu(), text_BE.cpu()))
        own = [torch.cat(column) for column in zip(*parts, strict=True)]
        image_GE, text_GE = (torch.cat(gather_over_processes(column)).to(device) for column in own)
        total = torch.zeros((), device=device)
        for rows in zip(*(column.split(EVALUATED_ROWS) for column in own), strict=True):
            if len(rows[0]):
                contrast = self._loss(rows[0].to(device), rows[1].to(device), *self._temperature(), (image_GE, text_GE))
                total += contrast.loss * len(rows[0])
        return {"held_out_loss": sum_over_processes(total).item() / len(image_GE)}

    def flops_per_sample(self) -> float:
        """Three forward passes of what learns of both towers: of the patches that training sees, of a usual caption."""
        backbone, text = self.backbone, self.model.text
        if isinstance(backbone, VisionTransformer):
            seen = backbone.flops(backbone.num_kept(backbone.grid[0] * backbone.grid[1]))
        else:
            seen = backbone.flops()
        length = min(TYPICAL_TEXT_LENGTH, text.config.context_length)
        return training_passes(backbone) * seen + 3.0 * text.flops(length)

    def identity(self) -> dict[str, Any]:
        """A checkpoint continues only with the same loss in a joint space of the same width."""
        return {"loss": self.config.loss, "embed_dim": self.config.embed_dim}


def _whole(parameter: Tensor) -> Tensor:
    """A parameter in its own precision; of a sharded one all of it, whose gradient is averaged over the processes."""
    if not isinstance(parameter, DTensor):
        return parameter
    whole: Tensor = parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return whole


def _random_state(device: torch.device) -> list[Tensor]:
    """Where the generators of this process stand."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _restore_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
