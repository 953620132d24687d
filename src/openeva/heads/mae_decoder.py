"""A student whose encoder sees the visible patches only, and the light decoder that predicts the others from them.

image[B,3,Y,X], mask[B,N] -> backbone on visible patches[B,P,D] -> linear -> mask tokens in all other places, fixed
positions -> blocks -> those asked for [M,W] -> norm -> linear -> predictions[M,V]

Paper: MAE (arXiv 2111.06377) section 3, on EVA's targets; it made EVA-L. Source: spec sections 1.6 and 1.7. Deliberate
differences: visible patches enter the encoder in raster order, not shuffled (positions travel with them, so that the
result is the same); norm and prediction are computed where the loss looks only.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openeva.backbones.base import Backbone
from openeva.config import Config
from openeva.data.masking import MaskGenerator
from openeva.layers.attention import Attention
from openeva.layers.block import Block
from openeva.layers.init import xavier_uniform_
from openeva.layers.mlp import Mlp
from openeva.layers.norm import LayerNorm
from openeva.layers.sincos import sincos_positions

TOKEN_STD = 0.02


class MaeDecoderConfig(Config):
    """Only visible patches go through the encoder; a small transformer predicts the hidden ones."""

    name: Literal["mae"] = "mae"
    width: int = Field(512, gt=0, description="channels per token of the decoder")
    depth: int = Field(4, gt=0, description="number of its blocks")
    num_heads: int = Field(16, gt=0)
    mlp_hidden: int = Field(2048, gt=0, description="channels inside its MLPs")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "MaeDecoderConfig":
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.width % 4:
            raise ValueError(f"the decoder's fixed positions need a width that is a multiple of 4, not {self.width}")
        return self

    def build(self, backbone: Backbone, masking: MaskGenerator, predict_width: int) -> "MaeStudent":
        """Make the student.

        Raises:
            ValueError: The backbone cannot encode visible patches only, or none is visible.
        """
        if not hasattr(backbone, "forward_visible"):
            raise ValueError(
                f"task.decoder mae: {type(backbone).__name__} cannot encode the visible patches only; use a backbone "
                "of kind vit, or task.decoder={name: none}"
            )
        if masking.max_masked >= masking.grid[0] * masking.grid[1]:
            raise ValueError(
                f"task.decoder mae: masks of the {masking.grid[0]} x {masking.grid[1]} grid leave no patch visible; "
                "lower task.masking.ratio"
            )
        return MaeStudent(backbone, masking, predict_width, self)


class MaeStudent(nn.Module):
    """The part that learns: backbone without mask token, and decoder.

    Attributes:
        prediction_part: Name of the part that belongs to the target; another target needs a fresh one.
    """

    prediction_part = "decoder"
    backbone: Any

    def __init__(
        self, backbone: Backbone, masking: MaskGenerator, predict_width: int, config: MaeDecoderConfig
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.backbone.mask_token = None  # the mask token is the decoder's; nothing may wait for this one's gradient
        self.num_visible = masking.grid[0] * masking.grid[1] - masking.max_masked
        checkpointing = bool(getattr(getattr(backbone, "config", None), "activation_checkpointing", False))
        self.decoder = MaeDecoder(
            config, backbone.width, predict_width, masking.grid, activation_checkpointing=checkpointing
        )

    def forward(
        self,
        image_BCYX: Float[Tensor, "B C Y X"],
        mask_BN: Bool[Tensor, "B N"],
        index_M: Int[Tensor, "M"],
    ) -> Float[Tensor, "M V"]:
        """Predictions at the patches `index_M` (of the flattened `[B * N]`) of images whose `mask_BN` is hidden.

        Every row of the mask leaves `num_visible` patches visible.
        """
        # a stable sort of the mask lists the visible patches first, in raster order, without asking the device for more
        visible_BM = mask_BN.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.num_visible]
        features = self.backbone.forward_visible(image_BCYX, visible_BM)
        return self.decoder(features.cls, features.patches, visible_BM, index_M)

    def blocks(self) -> list[nn.Module]:
        """Repeated layers: the units of sharding and of block-wise compilation."""
        return [*getattr(self.backbone, "blocks", []), *self.decoder.blocks]

    def encoder_flops(self) -> float:
        """The backbone's share of `flops`."""
        return float(self.backbone.flops(self.num_visible))

    def flops(self, num_masked: int) -> float:
        """FLOPs of one forward pass of one image of which `num_masked` patches are predicted."""
        return self.encoder_flops() + self.decoder.flops(self.num_visible, num_masked)


class MaeDecoder(nn.Module):
    """Transformer over all patches: encoded ones, and one learned vector in place of each hidden one.

    Args:
        config: Its sizes.
        encoder_width: D of the encoded patches.
        predict_width: V.
        grid: Rows and columns of patches.
        activation_checkpointing: Keep no activations inside blocks; compute them again for the backward pass.
    """

    pos_embed: Tensor

    def __init__(
        self,
        config: MaeDecoderConfig,
        encoder_width: int,
        predict_width: int,
        grid: tuple[int, int],
        *,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embed = nn.Linear(encoder_width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.register_buffer("pos_embed", sincos_positions(grid, config.width))
        self.blocks = nn.ModuleList(
            Block(
                Attention(config.width, config.num_heads, qkv_bias="full"),
                Mlp(config.width, config.mlp_hidden),
                width=config.width,
            )
            for _ in range(config.depth)
        )
        self.norm = LayerNorm(config.width, eps=1e-6)
        self.pred = nn.Linear(config.width, predict_width)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights (spec section 1.6): Xavier-uniform matrices, biases 0, mask token normal."""
        xavier_uniform_(self)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)

    def forward(
        self,
        cls_BD: Float[Tensor, "B D"],
        visible_BPD: Float[Tensor, "B P D"],
        visible_BP: Int[Tensor, "B P"],
        index_M: Int[Tensor, "M"],
    ) -> Float[Tensor, "M V"]:
        """Predict (`P` visible patches per image, `W` the decoder's width).

        Args:
            cls_BD: The encoder's cls token.
            visible_BPD: The encoded patches, in any order.
            visible_BP: Which patch of its image each of them is.
            index_M: Patches to predict, of the flattened `[B * N]`.
        """
        x_BSW = self.embed(torch.cat([cls_BD[:, None], visible_BPD], dim=1))
        place_BPW = visible_BP[:, :, None].expand(-1, -1, x_BSW.shape[2])
        num_patches = self.pos_embed.shape[1] - 1
        hidden_BNW = self.mask_token.to(x_BSW.dtype).expand(x_BSW.shape[0], num_patches, -1)
        patches_BNW = hidden_BNW.scatter(1, place_BPW, x_BSW[:, 1:])
        x_BSW = torch.cat([x_BSW[:, :1], patches_BNW], dim=1) + self.pos_embed
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x_BSW = checkpoint(block, x_BSW, use_reentrant=False)
            else:
                x_BSW = block(x_BSW)
        return self.pred(self.norm(x_BSW[:, 1:].flatten(0, 1).index_select(0, index_M)))

    def flops(self, num_visible: int, num_masked: int) -> float:
        """FLOPs (2 per multiply-add) of one image: matrix products and attention."""
        width, num_tokens = self.config.width, self.pos_embed.shape[1]
        per_token = 4 * width * width + 2 * width * self.config.mlp_hidden + 2 * num_tokens * width
        embed = (1 + num_visible) * self.embed.in_features * width
        return 2.0 * (embed + self.config.depth * num_tokens * per_token + num_masked * width * self.pred.out_features)
