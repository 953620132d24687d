"""The image tower of any open_clip model, or of a file in OpenAI's CLIP layout, as an image encoder.

normalised image -> blocks -> patch tokens of the last block -> final norm -> projection (the one CLIP applies to cls)

Paper: EVA section 2.1 (the teacher). Source: spec section 2.1: the cls token is dropped, every patch goes through
ln_post and the projection, and nothing is normalised to length 1. What other towers of open_clip do per patch:
    timm transformers (EVA02-*): final norm, then the linear head. Where they pool by attention (SigLIP): final norm
        only, since what follows belongs to the pooled vector.
    timm ConvNeXt: the head's norm, then its projection.
    CLIP ResNets: value and output projection of the attention pool, without its positions (as MaskCLIP does).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from jaxtyping import Bool, Float
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from openeva.backbones.base import CLIP_STATISTICS, STATISTICS, Backbone, Features, Normalisation
from openeva.checkpoints.files import read_state_dict
from openeva.checkpoints.openai_clip import (
    is_openai_layout,
    resnet_arguments,
    vision_transformer_arguments,
    vision_weights,
)
from openeva.checkpoints.resize import resize_position_embedding
from openeva.checkpoints.torchscript import is_torchscript, read_torchscript
from openeva.checkpoints.weights import (
    WeightsError,
    digest_of_file,
    digest_of_weights,
    fetch,
    fetch_open_clip,
    find_weights,
    is_file_address,
    open_clip_facts,
)
from openeva.config import ComponentConfig
from openeva.layers.flops import trace_shapes
from openeva.registry import did_you_mean

SCHEMAS = ("hf-hub:", "local-dir:")


class Config(ComponentConfig):
    """An image tower of open_clip."""

    name: str = "open_clip"
    model: str | None = Field(
        None,
        description="open_clip's name (ViT-L-14), hf-hub:ORG/REPO or local-dir:PATH; "
        "default: read off the shapes of a file in OpenAI's layout",
    )
    pretrained: str | None = Field(
        None,
        description="tag of the weights (openai) | path of a file | package:NAME/GLOB | random; none with a schema",
    )
    projection: bool = Field(True, description="true = patches go through the projection to the joint space")
    image_size: int | None = Field(
        None, description="pixels of a side; positions are resized; default: the model's own"
    )
    statistics: Literal["model", "clip", "imagenet", "half"] = Field("model", description="normalisation of the input")
    seed: int = Field(0, description="seed of random weights")

    @field_validator("model")
    @classmethod
    def _known(cls, model: str | None) -> str | None:
        if model is not None and not model.startswith(SCHEMAS) and open_clip.get_model_config(model) is None:
            raise ValueError(f"open_clip has no model {model!r}{did_you_mean(model, open_clip.list_models())}")
        return model

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.model is not None and self.model.startswith(SCHEMAS):
            if self.pretrained is not None:
                raise ValueError(f"{self.model} brings its own weights; leave out pretrained")
        elif self.pretrained is None:
            raise ValueError("give pretrained: a tag such as openai, the path of a file, or random")
        elif self.pretrained != "random" and not is_file_address(self.pretrained):
            tags = open_clip.list_pretrained_tags_by_model(self.model) if self.model else []
            if self.model is None or not open_clip.get_pretrained_cfg(self.model, self.pretrained):
                hint = f"tags of {self.model}: {', '.join(tags) or 'none'}" if self.model else "give the model too"
                raise ValueError(
                    f"pretrained {self.pretrained!r} is neither a known tag nor the path of a file; {hint}"
                )
        elif self.model is None and self.pretrained == "random":
            raise ValueError("random weights need the name of a model")
        return self

    def hub_repository(self) -> str | None:
        """Repository on the Hugging Face hub that the weights come from; None where they do not."""
        if self.model is not None and self.model.startswith("hf-hub:"):
            return self.model.removeprefix("hf-hub:").partition("@")[0]
        if self.model is None or self.pretrained is None:
            return None
        tag = open_clip.get_pretrained_cfg(self.model, self.pretrained)  # {} where it is no tag
        return tag.get("hf_hub", "").rpartition("/")[0] or None

    def build(self) -> "OpenClipBackbone":
        """Make the tower and load its weights.

        Raises:
            WeightsError: The weights cannot be reached or do not fit the model.
            ValueError: The tower has no projection that applies to patches.
        """
        return OpenClipBackbone(self)


class OpenClipBackbone(Backbone):
    """The image tower alone; the text tower is never kept.

    `pooled` is the image's vector in the joint space where the patches are projected to it too, else their mean.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        tower: Any
        tower, self.normalisation, identity = _load(config)
        if config.statistics != "model":
            self.normalisation = STATISTICS[config.statistics]
        self.identity = identity if config.projection else f"{identity}, not projected"
        if config.image_size is not None:
            _set_image_size(tower, config.image_size)
        self.tower = tower
        size = tower.image_size
        self.image_size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.num_layers = _num_layers(tower)
        _check_projection(tower, config)
        features, self._flops = trace_shapes(self, (1, 3, *self.image_size))
        self.width, self.stride = features.patches.shape[2], round(self.image_size[0] / features.grid[0])

    def forward(
        self,
        image_BCYX: Float[Tensor, "B C Y X"],
        mask_BN: Bool[Tensor, "B N"] | None = None,
        layers: tuple[int, ...] = (),
    ) -> Features:
        """Encode normalised images.

        Args:
            image_BCYX: Normalised images of `image_size`.
            mask_BN: Must be None: the towers have no mask token.
            layers: Blocks (stages of ResNets) to return in `Features.pyramid`, before any final norm.
        """
        if mask_BN is not None:
            raise ValueError("open_clip's towers have no mask token; only frozen teachers and classifiers can be one")
        if image_BCYX.shape[2:] != self.image_size:
            raise ValueError(
                f"this tower takes images of {self.image_size}, not {tuple(image_BCYX.shape[2:])}; set image_size"
            )
        last = self.num_layers - 1
        wanted = sorted({last, *(layer % self.num_layers for layer in layers)})
        output = self.tower.forward_intermediates(
            image_BCYX, indices=wanted, output_fmt="NCHW", intermediates_only=not self.config.projection
        )
        of_layer = dict(zip(wanted, output["image_intermediates"], strict=True))
        map_BDYX = of_layer[last]
        patches_BND = _per_patch(self.tower, map_BDYX, projection=self.config.projection)
        pooled_BD = output.get("image_features")
        if pooled_BD is None or pooled_BD.shape[1] != patches_BND.shape[2]:
            pooled_BD = patches_BND.mean(dim=1)
        return Features(
            pooled=pooled_BD,
            patches=patches_BND,
            grid=(map_BDYX.shape[2], map_BDYX.shape[3]),
            pyramid={layer: of_layer[layer % self.num_layers] for layer in layers},
        )

    def flops(self) -> float:
        """FLOPs (2 per multiply-add) of one forward pass of one image of `image_size`, counted by operator."""
        return self._flops


# ---------------------------------------------------------------------------------------------- what patches go through


def _num_layers(tower: Any) -> int:
    if isinstance(tower, VisionTransformer):
        return len(tower.transformer.resblocks)
    if isinstance(tower, ModifiedResNet):
        return 5  # the stem and four stages
    if isinstance(tower, TimmModel):
        return len(tower.trunk.feature_info)
    raise ValueError(
        f"{type(tower).__name__} is not a kind of tower whose patches are known here; choose another model"
    )


def _pools_by_attention(tower: Any) -> bool:
    return getattr(tower.trunk, "attn_pool", None) is not None


def _check_projection(tower: Any, config: Config) -> None:
    """Refuse towers whose projection has no meaning for a patch."""
    if not config.projection:
        return
    without = ""
    if isinstance(tower, VisionTransformer) and tower.attn_pool is not None:
        without = "pools by attention before its final norm"
    if isinstance(tower, TimmModel) and not _pools_by_attention(tower):
        head = getattr(tower.trunk, "head", None)
        if "pool" in dict(tower.head.named_children()):
            without = "pools by attention before its projection"
        elif not (hasattr(tower.trunk, "num_prefix_tokens") or hasattr(head, "norm")):
            without = "has a head that is not known to apply to patches"
    if without:
        raise ValueError(
            f"the tower of {config.model} {without}; set projection: false to predict its last layer instead"
        )


def _per_patch(tower: Any, map_BDYX: Float[Tensor, "B D Y X"], *, projection: bool) -> Float[Tensor, "B N V"]:
    """Final norm and projection of every patch."""
    if isinstance(tower, ModifiedResNet):
        patches_BND = map_BDYX.flatten(2).transpose(1, 2)
        return tower.attnpool.c_proj(tower.attnpool.v_proj(patches_BND)) if projection else patches_BND
    if isinstance(tower, VisionTransformer):
        patches_BND = map_BDYX.flatten(2).transpose(1, 2)
        if tower.attn_pool is None:  # else the norm has another width: it follows the pooling
            patches_BND = tower.ln_post(patches_BND)
        return patches_BND @ tower.proj if projection and tower.proj is not None else patches_BND
    trunk: Any = tower.trunk
    head: Any = getattr(trunk, "head", nn.Identity())
    if hasattr(head, "norm"):  # ConvNeXt
        map_BDYX = head.norm(map_BDYX)
    patches_BND = map_BDYX.flatten(2).transpose(1, 2)
    if hasattr(trunk, "num_prefix_tokens"):
        patches_BND = trunk.norm(patches_BND)
        patches_BND = trunk.fc_norm(patches_BND) if hasattr(trunk, "fc_norm") else patches_BND
    if not projection or _pools_by_attention(tower):
        return patches_BND
    if isinstance(head, nn.Linear):
        patches_BND = head(patches_BND)
    return tower.head(patches_BND)


def _set_image_size(tower: Any, size: int) -> None:
    """Resize the positions of a loaded tower (native towers: bicubic without antialiasing, as the spec has it)."""
    if isinstance(tower, TimmModel):
        tower.set_input_size(size)
        return
    if isinstance(tower, ModifiedResNet):
        holder, grid_from, stride = tower.attnpool, (tower.image_size // 32,) * 2, 32
    else:
        holder, grid_from, stride = tower, tower.grid_size, tower.patch_size[0]
    if size % stride:
        raise ValueError(
            f"image_size {size} is not a multiple of the patch size {stride}; use {size // stride * stride}"
        )
    grid = (size // stride, size // stride)
    positions_1SD = resize_position_embedding(holder.positional_embedding.data[None], grid_from, grid)
    holder.positional_embedding = nn.Parameter(positions_1SD[0])
    tower.image_size = size
    tower.grid_size = grid


# ------------------------------------------------------------------------------------------------------------- loading


def _load(config: Config) -> tuple[nn.Module, Normalisation, str]:
    """Image tower, the statistics it was trained with, and its identity."""
    name, pretrained = config.model, config.pretrained
    if pretrained is None:
        assert name is not None
        return _load_schema(name)
    if pretrained == "random":
        assert name is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            tower = _create(name).visual
        return tower, _statistics(name), f"open_clip:{name}/random-{digest_of_weights(tower)}"
    if is_file_address(pretrained):
        path = find_weights(pretrained)
        identity = f"open_clip:{name or 'openai-layout'}/file-{digest_of_file(path)}"
        return _load_file(name, path), _statistics(name), identity
    assert name is not None
    tag = open_clip_facts(name, pretrained)
    path = fetch_open_clip(name, pretrained, "set `pretrained: /path/to/file` here")
    tower = _load_file(name, path, quick_gelu=tag.get("quick_gelu", False))
    return tower, Normalisation(tuple(tag["mean"]), tuple(tag["std"])), f"open_clip:{name}/{pretrained}"


def _load_schema(name: str) -> tuple[nn.Module, Normalisation, str]:
    def load() -> Any:
        try:
            with _quiet():
                return open_clip.create_model(name, require_pretrained=True, pretrained_text=False, weights_only=True)
        except RuntimeError as error:  # what open_clip makes of any failure to download
            raise OSError(str(error)) from error

    tower: Any = fetch(
        load, f"open_clip model {name}", "copy the repository's files here and use `model: local-dir:/path`"
    ).visual
    statistics = Normalisation(tuple(tower.image_mean), tuple(tower.image_std))
    return (
        tower,
        statistics,
        f"open_clip:{name}" + (f"/{digest_of_weights(tower)}" if name.startswith("local-dir:") else ""),
    )


def _load_file(name: str | None, path: Path, *, quick_gelu: bool = False) -> nn.Module:
    """Tower with the weights of a file: open_clip's, or OpenAI's (a TorchScript archive or a plain state dict)."""
    openai_archive = is_torchscript(path)
    state_dict = {} if path.suffix == ".npz" else read_torchscript(path) if openai_archive else read_state_dict(path)
    weights = vision_weights(state_dict)
    if name is None:
        return _from_shapes(weights, path)
    model = _create(name, quick_gelu=quick_gelu or openai_archive)
    try:
        if weights:
            model.visual.load_state_dict(weights)
        else:  # another project's names, which open_clip may know
            open_clip.load_checkpoint(model, str(path))
    except (RuntimeError, KeyError) as error:
        raise WeightsError(f"{path} does not hold weights of {name}: {str(error)[:500]}") from None
    return model.visual


def _from_shapes(weights: dict[str, Tensor], path: Path) -> nn.Module:
    """A CLIP tower whose architecture the weights themselves tell; OpenAI's activation."""
    if not is_openai_layout(weights):
        raise WeightsError(
            f"{path} is not in OpenAI's CLIP layout (no visual.conv1 and visual.proj); name the model: too"
        )
    tower: nn.Module
    if "proj" in weights:
        tower = VisionTransformer(**vision_transformer_arguments(weights), act_layer=QuickGELU)
    else:
        tower = ModifiedResNet(**resnet_arguments(weights))
    try:
        tower.load_state_dict(weights)
    except RuntimeError as error:
        raise WeightsError(f"{path} is not a complete CLIP tower: {str(error)[:500]}") from None
    return tower


def _create(name: str, *, quick_gelu: bool = False) -> Any:
    # open_clip only warns where weights were trained with QuickGELU and the model's name says otherwise.
    with _quiet():
        return open_clip.create_model(name, pretrained=None, pretrained_text=False, force_quick_gelu=quick_gelu)


def _statistics(name: str | None) -> Normalisation:
    """Statistics that all published weights of a model agree on; CLIP's where there are none or they differ."""
    tags = open_clip.list_pretrained_tags_by_model(name) if name else []
    found = {
        tuple(map(tuple, (cfg["mean"], cfg["std"]))) for cfg in (open_clip.get_pretrained_cfg(name, t) for t in tags)
    }
    return Normalisation(*found.pop()) if len(found) == 1 else CLIP_STATISTICS


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip from logging that a model which gets its weights next is random."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
