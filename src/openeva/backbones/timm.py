"""Any model of timm as an image encoder: vision transformers (DINOv2, DINOv3, EVA ...) and ConvNets (a stage of them).

normalised image -> `forward_intermediates` of the model -> the chosen layer as patches

Source: timm's own weights and normalisation. A layer that timm can put through the model's final norm (transformers)
goes through it; stages of ConvNets come as they are.
"""

from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jaxtyping import Bool, Float
from pydantic import Field, field_validator
from timm.data.config import resolve_model_data_config
from torch import Tensor

from openeva.backbones.base import STATISTICS, Backbone, Features, Normalisation
from openeva.checkpoints.efficientnet_lite import convert_efficientnet_lite, is_efficientnet_lite
from openeva.checkpoints.files import read_state_dict
from openeva.checkpoints.weights import WeightsError, digest_of_file, digest_of_weights, fetch, find_weights
from openeva.config import ComponentConfig
from openeva.layers.flops import trace_shapes
from openeva.registry import did_you_mean


class Config(ComponentConfig):
    """A model of timm."""

    name: str = "timm"
    model: str = Field(
        description="timm's name, optionally with the tag of its weights: vit_small_patch14_dinov2.lvd142m"
    )
    weights: str = Field(
        "pretrained",
        description="pretrained (from the hub) | random | path of a file | package:NAME/GLOB (inside a package)",
    )
    layer: int = Field(
        -1, description="which block (transformer) or stage (ConvNet) gives the patches; negative from the end"
    )
    norm: bool = Field(
        True, description="true = the layer goes through the final norm, where the model has one for tokens"
    )
    image_size: int | tuple[int, int] | None = Field(
        None, description="pixels (side, or rows and columns); default: timm's"
    )
    statistics: Literal["model", "clip", "imagenet", "half"] = Field("model", description="normalisation of the input")
    seed: int = Field(0, description="seed of random weights")

    @field_validator("model")
    @classmethod
    def _known(cls, model: str) -> str:
        if not timm.is_model(model):
            architecture = model.partition(".")[0]
            raise ValueError(f"timm has no model {architecture!r}{did_you_mean(architecture, timm.list_models())}")
        return model

    def hub_repository(self) -> str | None:
        """Repository on the Hugging Face hub that the weights come from; None where they do not."""
        known = timm.get_pretrained_cfg(self.model) if self.weights == "pretrained" else None
        return known.hf_hub_id.partition("@")[0] if known is not None and known.hf_hub_id else None

    def build(self) -> "TimmBackbone":
        """Make the model and load its weights.

        Raises:
            WeightsError: The weights cannot be reached or do not fit the model.
            ValueError: No such layer, or an image size that the model cannot take.
        """
        return TimmBackbone(self)


class TimmBackbone(Backbone):
    """A timm model whose chosen layer is `Features.patches`.

    `pooled` is the model's own pooling of its last layer where that has the width of the patches (class token,
    mean ...), and the mean of the patches otherwise.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model: Any
        self.model, self.identity = _load(config)
        data = resolve_model_data_config(self.model)
        self.normalisation = (
            Normalisation(tuple(data["mean"]), tuple(data["std"]))
            if config.statistics == "model"
            else STATISTICS[config.statistics]
        )
        self.image_size = _set_image_size(self.model, config, data["input_size"][1:])
        self.num_layers = len(self.model.feature_info)
        if not -self.num_layers <= config.layer < self.num_layers:
            raise ValueError(
                f"layer {config.layer} of {config.model}: it has layers 0 to {self.num_layers - 1} (or negative ones)"
            )
        self._layer = config.layer % self.num_layers
        if self._layer != self.num_layers - 1:
            self.identity += f", layer {self._layer}"
        if not config.norm:
            self.identity += ", not normed"
        self._own_pooling = False
        (width, rows, _), self._flops = self._probe()
        self.width, self.stride = width, round(self.image_size[0] / rows)
        self._own_pooling = self._layer == self.num_layers - 1 and self.model.head_hidden_size == width
        # oneDNN's and cuDNN's convolutions are 1.8 times as fast in this layout; transformers do not notice it.
        self.to(memory_format=torch.channels_last)

    def _probe(self) -> tuple[tuple[int, int, int], float]:
        try:
            features, flops = trace_shapes(self, (1, 3, *self.image_size))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"{self.config.model} cannot take images of {self.image_size} pixels: {error}") from None
        return (features.patches.shape[2], *features.grid), flops

    def forward(
        self,
        image_BCYX: Float[Tensor, "B C Y X"],
        mask_BN: Bool[Tensor, "B N"] | None = None,
        layers: tuple[int, ...] = (),
    ) -> Features:
        """Encode normalised images.

        Args:
            image_BCYX: Normalised images.
            mask_BN: Must be None: timm's models have no mask token.
            layers: Layers to return in `Features.pyramid`, through the final norm like `patches`.
        """
        if mask_BN is not None:
            raise ValueError(
                f"{self.config.model} has no mask token; only frozen teachers and classifiers can be timm models"
            )
        wanted = sorted({self._layer, *(layer % self.num_layers for layer in layers)})
        options: dict[str, Any] = {
            "indices": wanted,
            "norm": self.config.norm,
            "stop_early": True,
            "output_fmt": "NCHW",
        }
        if self._own_pooling:
            final, maps = self.model.forward_intermediates(image_BCYX, **options)
            pooled_BD = self.model.forward_head(final, pre_logits=True)
        else:
            maps = self.model.forward_intermediates(image_BCYX, intermediates_only=True, **options)
            pooled_BD = None
        of_layer = dict(zip(wanted, maps, strict=True))
        map_BDYX = of_layer[self._layer]
        patches_BND = map_BDYX.flatten(2).transpose(1, 2)
        return Features(
            pooled=patches_BND.mean(dim=1) if pooled_BD is None else pooled_BD,
            patches=patches_BND,
            grid=(map_BDYX.shape[2], map_BDYX.shape[3]),
            pyramid={layer: of_layer[layer % self.num_layers] for layer in layers},
        )

    def flops(self) -> float:
        """FLOPs (2 per multiply-add) of one forward pass of one image of `image_size`, counted by operator."""
        return self._flops


def _load(config: Config) -> tuple[Any, str]:
    """The model without its classifier, and its identity."""
    model: Any
    if config.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = timm.create_model(config.model, num_classes=0)
        return model, f"timm:{config.model}/random-{digest_of_weights(model)}"
    if config.weights == "pretrained":
        model = fetch(
            lambda: timm.create_model(config.model, pretrained=True, num_classes=0),
            f"timm model {config.model}",
            'download them on a machine that reaches it (`python -c "import timm; timm.create_model('
            f"'{config.model}', pretrained=True)\"`), and set `weights: /path/to/model.safetensors` here",
        )
        return model, f"timm:{model.pretrained_cfg['architecture']}.{model.pretrained_cfg['tag']}"
    path = find_weights(config.weights)
    return _load_file(config, path), f"timm:{config.model}/file-{digest_of_file(path)}"


def _load_file(config: Config, path: Path) -> Any:
    state_dict = read_state_dict(path)
    if is_efficientnet_lite(state_dict):
        state_dict = convert_efficientnet_lite(state_dict)
    defaults = timm.get_pretrained_cfg(config.model)
    head = None if defaults is None else defaults.classifier
    weight = state_dict.get(f"{head}.weight") if isinstance(head, str) else None
    num_classes = 0 if weight is None else weight.shape[0]
    model: Any
    try:
        # The head is built as the file has it, so that every tensor must find its place, and dropped afterwards.
        model = timm.create_model(
            config.model,
            pretrained=True,
            num_classes=num_classes,
            pretrained_cfg_overlay={"state_dict": state_dict, "num_classes": num_classes},
        )
    except RuntimeError as error:
        raise WeightsError(f"{path} does not hold weights of {config.model}: {str(error)[:500]}") from None
    model.reset_classifier(0)
    return model


def _set_image_size(model: Any, config: Config, default: tuple[int, int]) -> tuple[int, int]:
    size = (config.image_size, config.image_size) if isinstance(config.image_size, int) else config.image_size
    if size is None or tuple(size) == tuple(default):
        return (default[0], default[1])
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    return (size[0], size[1])
