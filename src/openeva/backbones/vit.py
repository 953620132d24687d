"""ONE vision transformer for the whole EVA family; variants are data.

image[B,3,Y,X] -> patches[B,N,D] -> masked ones replaced -> cls + positions -> blocks -> norm -> Features
clip[B,T,3,Y,X] -> patches of all time slots, one raster after the other -> the same

Paper: EVA section 2.1, table 1; EVA-02 (arXiv 2303.11331) section 2.1. Source: spec sections 1.1-1.6 of EVA-01, 1.3 and
4.1-4.3 of EVA-02, 2 of video (joint attention over space and time). Deliberate differences: relative position tables
hang on the module that uses them; q, k and v are one matrix, gate and value too (names and layout are translated in
`checkpoints/`); index tables and rotary tables are recomputed and never stored; attention is fused; images may have any
size and shape.
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openeva.backbones.base import STATISTICS, Backbone, Features
from openeva.checkpoints.load import LoadReport, check_unseen, described_backbone, load_into, read_weights
from openeva.checkpoints.native import WEIGHTS_FILE, model_path
from openeva.checkpoints.pretrained import find_entry
from openeva.checkpoints.resize import (
    AnyGrid,
    Grid,
    resize_decoupled_relative_position_table,
    resize_position_embedding,
    resize_relative_position_table,
)
from openeva.checkpoints.weights import digest_of_file
from openeva.config import ComponentConfig
from openeva.layers.attention import Attention, QkvBias
from openeva.layers.block import Block, NormOrder
from openeva.layers.init import (
    init_patches_,
    init_tokens_,
    truncated_normal_,
    xavier_normal_blocks_,
    xavier_uniform_,
)
from openeva.layers.mlp import Mlp, SwiGlu
from openeva.layers.norm import LayerNorm
from openeva.layers.patch_embed import PatchEmbed
from openeva.layers.per_grid import PerGrid
from openeva.layers.relative_position import (
    DecoupledRelativePositionBias,
    Place,
    RelativePosition,
    RelativePositionBias,
)
from openeva.layers.rope import rope_table
from openeva.layers.sincos import sincos_positions
from openeva.registry import did_you_mean

RelativeKind = Literal["none", "shared", "per_block", "shared_decoupled", "per_block_decoupled"]

EVA02: dict[str, Any] = {"patch_size": 14, "rope_grid": 16, "mlp": "swiglu", "init": "xavier"}
"""What all sizes of EVA-02 share."""

VARIANTS: dict[str, dict[str, Any]] = {
    "eva_g_14": {"patch_size": 14, "width": 1408, "depth": 40, "num_heads": 16, "mlp_hidden": 6144, "init_std": 0.015},
    "eva_l_14": {
        "patch_size": 14, "width": 1024, "depth": 24, "num_heads": 16, "mlp_hidden": 4096,
        "qkv_bias": "full", "positions": "sincos",
    },
    "eva_b_16": {"patch_size": 16, "width": 768, "depth": 12, "num_heads": 12, "mlp_hidden": 3072},
    "eva_s_16": {"patch_size": 16, "width": 384, "depth": 12, "num_heads": 6, "mlp_hidden": 1536},
    "eva_ti_16": {"patch_size": 16, "width": 192, "depth": 12, "num_heads": 3, "mlp_hidden": 768},
    "eva02_ti_14": {**EVA02, "width": 192, "depth": 12, "num_heads": 3, "mlp_hidden": 512},
    "eva02_s_14": {**EVA02, "width": 384, "depth": 12, "num_heads": 6, "mlp_hidden": 1024},
    "eva02_b_14": {**EVA02, "width": 768, "depth": 12, "num_heads": 12, "mlp_hidden": 2048, "sub_norm": "mlp"},
    "eva02_l_14": {**EVA02, "width": 1024, "depth": 24, "num_heads": 16, "mlp_hidden": 2730, "sub_norm": "mlp"},
    "eva02_e_14": {
        "patch_size": 14, "width": 1792, "depth": 64, "num_heads": 16, "mlp_hidden": 15360, "norm_order": "post",
    },
    "eva_8b_14": {"patch_size": 14, "width": 4096, "depth": 32, "num_heads": 32, "mlp_hidden": 20480},
    "eva_18b_14": {"patch_size": 14, "width": 5120, "depth": 48, "num_heads": 40, "mlp_hidden": 25600},
}  # fmt: skip
"""Architectures of EVA's table 1 and of EVA-02, and small ones in the same style; a recipe may override every key.

8B and 18B have the dimensions of their paper (arXiv 2402.04252); their norms and biases are EVA-g's here, which was not
verified: a released file that differs is refused on loading.
"""

CLASSIFIER_STD = 0.02
PROJECTION_SCALE = 0.001
"""A fresh projection starts close to zero: normal with `CLASSIFIER_STD`, times this."""
TOKEN_STD = 0.02
"""Of cls, mask and positions under init: xavier and mae."""


class Config(ComponentConfig):
    """A vision transformer: a variant's name, or its dimensions, or a variant with some keys overridden."""

    name: str = "vit"
    variant: str | None = Field(
        None, description=f"one of {', '.join(VARIANTS)}; its values are defaults for all keys below"
    )
    image_size: int | tuple[int, int] = Field(224, description="pixels: side, or (height, width)")
    patch_size: int = Field(gt=0, description="pixels")
    num_frames: int | None = Field(None, gt=0, description="T, frames of a clip; none = the model takes images")
    tubelet: int = Field(1, gt=0, description="frames of a patch of a clip")
    width: int = Field(gt=0, description="D, channels per token")
    depth: int = Field(gt=0, description="number of blocks")
    num_heads: int = Field(gt=0)
    head_width: int | None = Field(None, description="channels per head; width / num_heads when left out")
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_hidden: int = Field(gt=0, description="channels inside the MLP")
    sub_norm: Literal["none", "mlp", "mlp_attention"] = Field(
        "none",
        description="a norm before the last linear layer of the MLP (EVA-02), of attention too (EVA02-CLIP)",
    )
    qkv_bias: QkvBias = "qv"
    norm_eps: float = 1e-6
    norm_order: NormOrder = "pre"
    final_norm: bool = True
    positions: Literal["learned", "sincos", "none"] = "learned"
    relative_position: RelativeKind = "none"
    rope_grid: int | None = Field(
        None, gt=0, description="turn q and k by their patch's place (RoPE); side of the pre-training grid"
    )
    dynamic_size: bool = Field(
        False, description="take images of any multiple of patch_size; positions are resized for each grid that comes"
    )
    layer_scale: float | None = Field(None, ge=0, description="initial value; none or 0 leaves it out")
    drop_path: float = Field(0.0, ge=0, lt=1, description="rate of the last block; rises linearly from 0 at the first")
    dropout: float = Field(0.0, ge=0, lt=1)
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    patch_grad_scale: float = Field(1.0, ge=0, le=1, description="gradient into the patch embedding; 0 freezes it")
    init: Literal["mim", "classifier", "xavier", "mae"] = Field(
        "mim",
        description="fresh weights as in EVA's pre-training, its classifiers, EVA-02's pre-training, or EVA-L's (MAE)",
    )
    init_std: float = Field(0.02, gt=0, description="of the normal distribution that mim draws from; cut at one of it")
    activation_checkpointing: bool = False
    projection: int | None = Field(
        None, gt=0, description="E: cls and patches go through a linear layer to the joint space of images and texts"
    )
    patch_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the patches that training leaves out, others for each image (FLIP)"
    )
    statistics: Literal["clip", "imagenet", "half"] = Field(
        "clip", description="mean and deviation its input is normalised with"
    )
    weights: str | None = Field(None, description="folder or file to start from: an openeva model, or official weights")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        variant = values.get("variant")
        if variant is None:
            if isinstance(values.get("weights"), str) and "width" not in values:  # the file says what it is
                return {**architecture_of(values["weights"], values.get("num_heads")), **values}
            return values
        if variant not in VARIANTS:
            raise ValueError(
                f"unknown variant {variant!r}{did_you_mean(str(variant), list(VARIANTS))} ({', '.join(VARIANTS)})"
            )
        return {**VARIANTS[variant], **values}

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Config":
        if any(side % self.patch_size for side in self.image_shape):
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}; give head_width")
        head_width = self.head_width or self.width // self.num_heads
        if self.rope_grid is not None and head_width % 4:
            raise ValueError(f"rope_grid needs heads whose width is a multiple of 4, not {head_width}")
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(f"positions: sincos needs a width that is a multiple of 4, not {self.width}")
        self._time_fits()
        return self

    def _time_fits(self) -> None:
        if self.num_frames is None:
            if self.tubelet != 1:
                raise ValueError(f"tubelet {self.tubelet} is for clips; give num_frames too")
            return
        if self.num_frames % self.tubelet:
            raise ValueError(f"num_frames {self.num_frames} is not a multiple of tubelet {self.tubelet}")
        without_time = {
            "positions": self.positions == "sincos", "relative_position": self.relative_position != "none",
            "rope_grid": self.rope_grid is not None, "dynamic_size": self.dynamic_size,
        }  # fmt: skip
        if found := [key for key, given in without_time.items() if given]:
            raise ValueError(
                f"{' and '.join(found)} cannot go with num_frames: a model of clips has learned positions and nothing"
                " else, as EVA-01's image models have (EVA-02 turns q and k by two-dimensional tables)"
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image_shape[0] // self.patch_size, self.image_shape[1] // self.patch_size

    @property
    def slots(self) -> int:
        """Patches along the time axis; 1 for images."""
        return (self.num_frames or 1) // self.tubelet

    @property
    def token_grid(self) -> AnyGrid:
        """As `grid`, of clips with the time slots in front."""
        return self.grid if self.num_frames is None else (self.slots, *self.grid)

    def build(self) -> "VisionTransformer":
        """Make the model, with the given weights or freshly drawn ones.

        Raises:
            WeightsError: `weights` names no file.
            ValueError: They do not fit this architecture; the message lists every tensor that does not.
        """
        model = VisionTransformer(self)
        if self.weights is not None:
            path = model_path(self.weights)
            fresh, weights = ("backbone.mask_token",), read_weights(path)  # only pre-trained encoders have mask tokens
            check_unseen(self, weights, f"weights {self.weights}")
            model.load_report = load_into(model, weights, fresh=fresh, part="backbone", grid=self.token_grid)
            model.identity = (
                f"{model.identity}/{path.name}-{digest_of_file(path / WEIGHTS_FILE if path.is_dir() else path)}"
            )
        return model


def architecture_of(weights: str, num_heads: int | None = None, num_frames: int | None = None) -> dict[str, Any]:
    """Dimensions and switches of the transformer in a model folder or weight file, a CLIP's projection among them."""
    return described_backbone(read_weights(model_path(weights)), num_heads=num_heads, num_frames=num_frames)


TRAINING_KEYS = (
    *("weights", "init", "final_norm", "drop_path", "dropout", "attention_dropout", "patch_grad_scale"),
    *("activation_checkpointing", "patch_dropout", "projection"),
)
"""Keys that are not part of the architecture, and so are not taken from weights."""


def architecture_to_fine_tune(
    weights: str, num_heads: int | None = None, num_frames: int | None = None
) -> dict[str, Any]:
    """Keys of a transformer that starts from weights; of released ones without looking at the file.

    Fixed sin-cos positions become learned ones, which start from the table (spec section 1.1).
    """
    entry = None if Path(weights).expanduser().exists() else find_entry(weights)
    if entry is None:
        found = architecture_of(weights, num_heads, num_frames)
    else:
        size = {} if entry.image_size is None else {"image_size": entry.image_size}
        found = {"variant": entry.variant, **VARIANTS[entry.variant], **size, **entry.overrides}
    if found.get("positions") == "sincos":
        found["positions"] = "learned"
    return {key: value for key, value in found.items() if key not in TRAINING_KEYS}


class VisionTransformer(Backbone):
    """The transformer. `mask_token` and all options of spec section 1 are switches of `Config`."""

    pos_embed: Tensor | None
    mask_token: nn.Parameter | None
    load_report: LoadReport | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.width, self.stride, self.num_layers = config.projection or config.width, config.patch_size, config.depth
        self.image_size, self.grid, self.num_frames = config.image_shape, config.grid, config.num_frames
        self.token_grid = config.token_grid
        self.normalisation = STATISTICS[config.statistics]
        self.identity = f"vit:{config.variant or 'custom'}"
        num_tokens = 1 + math.prod(config.token_grid)

        tubelet = None if config.num_frames is None else config.tubelet
        self.patch_embed = PatchEmbed(config.patch_size, config.width, tubelet)
        if config.patch_grad_scale == 0.0:  # nothing may wait for a gradient that never comes, as DDP would
            self.patch_embed.requires_grad_(False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, config.width))
        else:
            fixed = sincos_positions(config.grid, config.width) if config.positions == "sincos" else None
            self.register_buffer("pos_embed", fixed)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.fixed_positions, self.rope_tables = PerGrid(), PerGrid()
        self.relative_position = _position_bias(config, "shared")
        self.blocks = nn.ModuleList(_block(config, number) for number in range(config.depth))
        self.norm = LayerNorm(config.width, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.projection = nn.Linear(config.width, config.projection) if config.projection else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights as `init` says (spec sections 1.6 of EVA-01, 4.3 of EVA-02).

        "mim": linear and patch kernels, cls, mask and position tables normal with `init_std`, cut at one standard
        deviation. "classifier": the same with 0.02, not cut, but for the patch kernel, which is PyTorch's. Both divide
        the output projections of block i (from 1) by sqrt(2 i). "xavier": see `xavier_normal_blocks_`. "mae":
        Xavier-uniform matrices, tokens normal with 0.02. Biases are 0; post-norm blocks start as identities (norms at
        0).
        """
        tokens = (self.cls_token, self.mask_token, self.pos_embed)
        if self.config.init == "xavier":
            xavier_normal_blocks_(self._blocks(), split=self.config.sub_norm != "none")
            init_patches_(self.patch_embed.proj)
            init_tokens_(tokens, TOKEN_STD, 1.0)
        elif self.config.init == "mae":
            xavier_uniform_(self.blocks)
            init_patches_(self.patch_embed.proj)
            init_tokens_(tokens, TOKEN_STD, None)
        else:
            cut = 1.0 if self.config.init == "mim" else None
            std = self.config.init_std if cut else CLASSIFIER_STD
            for module in self.modules():
                if isinstance(module, nn.Linear) or (cut and isinstance(module, nn.Conv2d | nn.Conv3d)):
                    truncated_normal_(module.weight, std, cut)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            init_tokens_(tokens, std, cut)
            if not cut:
                self.patch_embed.proj.reset_parameters()
            for number, block in enumerate(self._blocks(), start=1):
                for layer in (block.attn.proj, block.mlp.last):
                    layer.weight.div_((2 * number) ** 0.5)
        self.init_projection()
        if self.config.norm_order == "post" and self.config.init == "mim":
            for block in self._blocks():
                for norm in (block.norm1, block.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)

    @torch.no_grad()
    def init_projection(self) -> None:
        """Draw the projection to the joint space anew (spec section 1.6 of EVA-CLIP)."""
        if self.projection is not None:
            truncated_normal_(self.projection.weight, CLASSIFIER_STD, None)
            self.projection.weight.mul_(PROJECTION_SCALE)
            nn.init.zeros_(self.projection.bias)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(
        self,
        image_BCYX: Float[Tensor, "B C Y X"] | Float[Tensor, "B T C Y X"],
        mask_BN: Bool[Tensor, "B N"] | None = None,
        layers: tuple[int, ...] = (),
    ) -> Features:
        """Encode normalised images; masked patches are replaced by `mask_token` (positions stay visible).

        Args:
            image_BCYX: Normalised images of `image_size`, or of any size with `dynamic_size`; clips of `num_frames`.
            mask_BN: True where a patch is hidden.
            layers: Indices of blocks whose output (before the final norm) is returned in `Features.pyramid`.

        Raises:
            ValueError: The image has a size that the model does not take.
        """
        if self.training and self.config.patch_dropout:
            if mask_BN is not None or layers:
                raise ValueError("patch_dropout goes with neither masks nor feature maps; set patch_dropout: 0")
            return self.forward_visible(image_BCYX, self._kept_patches(image_BCYX))
        return self._encode(self.embed(image_BCYX, mask_BN), self._grid_of(image_BCYX), None, layers)

    def _kept_patches(self, image_BCYX: Tensor) -> Int[Tensor, "B M"]:
        """What patch dropout leaves of each image, in random order (spec section 2.5)."""
        num_patches = self.config.slots * math.prod(self._grid_of(image_BCYX))
        scores_BN = torch.randn(len(image_BCYX), num_patches, device=image_BCYX.device)
        return scores_BN.topk(self.num_kept(num_patches), dim=1).indices

    def num_kept(self, num_patches: int) -> int:
        """Patches of an image that training sees."""
        return max(1, int(num_patches * (1 - self.config.patch_dropout)))

    def forward_visible(
        self, image_BCYX: Float[Tensor, "B C Y X"] | Float[Tensor, "B T C Y X"], visible_BM: Int[Tensor, "B M"]
    ) -> Features:
        """Encode some patches of each image as if there were no others (MAE-style encoders, patch dropout).

        Args:
            image_BCYX: Normalised images, as for `forward`.
            visible_BM: Index of each patch that enters the blocks, in raster order of the whole grid, in any order.

        Returns:
            Features whose `patches` are in the order of `visible_BM`; positions of all kinds follow the index.

        Raises:
            ValueError: The image has a size that the model does not take.
        """
        x_BSD = self.embed(image_BCYX, visible_BM=visible_BM)
        token_BS = torch.nn.functional.pad(visible_BM + 1, (1, 0))  # cls is token 0
        return self._encode(x_BSD, self._grid_of(image_BCYX), token_BS, ())

    def _encode(self, x_BSD: Tensor, grid: Grid, token_BS: Tensor | None, layers: tuple[int, ...]) -> Features:
        """Blocks and final norm, for tokens of all patches of `grid` or those of the index `token_BS`."""
        rope = self._rope(grid, x_BSD.device)
        if rope is not None and token_BS is not None:
            rope = rope[token_BS]
        plain = grid == self.grid and token_BS is None and rope is None
        place = None if plain else Place(grid, token_BS, rope)
        bias = None if self.relative_position is None else self.relative_position(place)
        wanted = {layer % self.num_layers: layer for layer in layers}
        pyramid: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            if self.config.activation_checkpointing and self.training:
                x_BSD = checkpoint(block, x_BSD, bias, None, place, use_reentrant=False)
            else:
                x_BSD = block(x_BSD, bias, None, place)
            if number in wanted:
                slots = () if self.num_frames is None else (self.config.slots,)
                pyramid[wanted[number]] = x_BSD[:, 1:].transpose(1, 2).unflatten(2, (*slots, *grid))
        x_BSD = self.norm(x_BSD)
        cls_BD, patches_BND = x_BSD[:, 0], x_BSD[:, 1:]
        if self.projection is not None:  # apart, so that the backward pass of CLIP ends at cls
            cls_BE, patches_BNE = self.projection(cls_BD), self.projection(patches_BND)
            return Features(cls_BE, patches_BNE, grid, pyramid, cls_BE, self.config.slots)
        return Features(patches_BND.mean(dim=1), patches_BND, grid, pyramid, cls_BD, self.config.slots)

    def embed(
        self,
        image_BCYX: Float[Tensor, "B C Y X"] | Float[Tensor, "B T C Y X"],
        mask_BN: Bool[Tensor, "B N"] | None = None,
        visible_BM: Int[Tensor, "B M"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Tokens that enter the first block: cls and patches (all or some), masked ones replaced, with positions."""
        grid = self._grid_of(image_BCYX)
        x_BND = self.patch_embed(image_BCYX, visible_BM)
        scale = self.config.patch_grad_scale
        if scale != 1.0:  # the value stays, the gradient is scaled
            x_BND = x_BND.detach() if scale == 0.0 else scale * x_BND + (1 - scale) * x_BND.detach()
        if mask_BN is not None:
            if self.mask_token is None:
                raise ValueError("a mask was given, but this model's mask token was taken off; build another one")
            x_BND = torch.where(mask_BN[:, :, None], self.mask_token.to(x_BND.dtype), x_BND)
        x_BSD = torch.cat([self.cls_token.to(x_BND.dtype).expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        pos_1SD = self._positions(grid)
        if pos_1SD is not None and visible_BM is not None:
            patches_BMD = pos_1SD[:, 1:].take_along_dim(visible_BM[:, :, None], dim=1)
            pos_1SD = torch.cat([pos_1SD[:, :1].expand(len(patches_BMD), -1, -1), patches_BMD], dim=1)
        return self.dropout(x_BSD if pos_1SD is None else x_BSD + pos_1SD)

    def _grid_of(self, image_BCYX: Tensor) -> Grid:
        """Rows and columns of an image's patches.

        Raises:
            ValueError: The model does not take that size.
        """
        height, width = image_BCYX.shape[-2:]
        frames = None if image_BCYX.ndim == 4 else image_BCYX.shape[1]
        if frames != self.num_frames:
            wanted = "images [B, 3, Y, X]" if self.num_frames is None else f"clips [B, {self.num_frames}, 3, Y, X]"
            raise ValueError(
                f"this model takes {wanted}, got {tuple(image_BCYX.shape)}; build it with num_frames={frames}"
            )
        if (height, width) == self.image_size:
            return self.grid
        if not self.config.dynamic_size:
            raise ValueError(
                f"this model takes {self.image_size} pixels, got {(height, width)}; build it with"
                f" image_size={(height, width)}, or with dynamic_size=true for images of any size"
            )
        if height % self.stride or width % self.stride or not (height and width):
            raise ValueError(
                f"images of {(height, width)} pixels cannot be cut into patches of {self.stride}; resize or pad them to"
                f" {(-(-height // self.stride) * self.stride, -(-width // self.stride) * self.stride)}"
            )
        return height // self.stride, width // self.stride

    def _positions(self, grid: Grid) -> Float[Tensor, "1 S D"] | None:
        """Absolute positions of a grid: as on loading, learned ones are resized and fixed ones computed anew."""
        if self.pos_embed is None or grid == self.grid:
            return self.pos_embed
        if self.config.positions == "learned":
            return resize_position_embedding(self.pos_embed, self.grid, grid)
        return self.fixed_positions.get(
            grid, self.pos_embed.device, lambda grid, device: sincos_positions(grid, self.config.width).to(device)
        ).to(self.pos_embed.dtype)

    def _rope(self, grid: Grid, device: torch.device) -> Float[Tensor, "S P 2"] | None:
        config = self.config
        if config.rope_grid is None:
            return None
        head_width, pretrain_grid = config.head_width or config.width // config.num_heads, config.rope_grid
        return self.rope_tables.get(
            grid, device, lambda grid, device: rope_table(grid, head_width, pretrain_grid, device)
        )

    def flops(self, num_visible: int | None = None) -> float:
        """FLOPs (2 per multiply-add) of one forward pass of one image or clip: matrix products and attention.

        Args:
            num_visible: Patches that enter the blocks; all when None.
        """
        config = self.config
        num_patches = math.prod(self.token_grid) if num_visible is None else num_visible
        num_tokens = 1 + num_patches
        inner = config.num_heads * (config.head_width or config.width // config.num_heads)
        matrices = 3 if config.mlp == "swiglu" else 2
        per_token = 4 * config.width * inner + matrices * config.width * config.mlp_hidden
        attention = 2 * num_tokens * inner
        patches = num_patches * config.width * 3 * config.tubelet * config.patch_size**2
        projection = num_tokens * config.width * (config.projection or 0)
        return 2.0 * (config.depth * num_tokens * (per_token + attention) + patches + projection)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beside the 1-D ones (spec section 5.1; `mask_token` is decayed)."""
        return {"pos_embed", "cls_token"}


def _position_bias(config: Config, where: Literal["shared", "per_block"]) -> RelativePosition | None:
    if config.relative_position == where:
        return RelativePositionBias(config.grid, config.num_heads, resize_relative_position_table)
    if config.relative_position == f"{where}_decoupled":
        return DecoupledRelativePositionBias(config.grid, config.num_heads, resize_decoupled_relative_position_table)
    return None


def _block(config: Config, number: int) -> Block:
    attention = Attention(
        config.width,
        config.num_heads,
        head_width=config.head_width,
        qkv_bias=config.qkv_bias,
        dropout=config.attention_dropout,
        position_bias=_position_bias(config, "per_block"),
        norm_eps=config.norm_eps if config.sub_norm == "mlp_attention" else None,
    )
    sub_norm_eps = None if config.sub_norm == "none" else config.norm_eps
    mlp_class = SwiGlu if config.mlp == "swiglu" else Mlp
    mlp = mlp_class(config.width, config.mlp_hidden, config.dropout, norm_eps=sub_norm_eps)
    return Block(
        attention,
        mlp,
        width=config.width,
        norm_eps=config.norm_eps,
        norm_order=config.norm_order,
        layer_scale=config.layer_scale or None,
        drop_path=config.drop_path * number / max(config.depth - 1, 1),
    )
