"""CLIP's text tower: open_clip's transformer, for rows of any length up to the context.

ids[B,L] -> token + position embeddings -> causal transformer -> row of the end token -> final norm -> projection[B,E]

Source: spec sections 1.4 and 1.6. GELU is exact in every EVA-CLIP, norms have epsilon 1e-5. Deliberate difference:
attention is told to be causal instead of given a mask, which leaves more kernels to choose from.
"""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from open_clip.transformer import TextTransformer, text_global_pool
from pydantic import Field, model_validator
from torch import Tensor, nn

from openeva.config import Config
from openeva.layers.attention import composed_attention, prefers_composed
from openeva.text.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE


class TextConfig(Config):
    """A text tower."""

    context_length: int = Field(CONTEXT_LENGTH, gt=1, description="L, longest text in tokens")
    vocab_size: int = Field(VOCAB_SIZE, gt=0, description="that of the tokenizer")
    width: int = Field(gt=0, description="channels per token")
    num_heads: int = Field(gt=0)
    depth: int = Field(gt=0, description="number of blocks")
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _heads_fit(self) -> "TextConfig":
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        return self

    def build(self, embed_dim: int) -> "TextTower":
        """Make the tower with freshly drawn weights.

        Args:
            embed_dim: E, width of the joint space.
        """
        return TextTower(self, embed_dim)


class CausalAttention(nn.Module):
    """Self-attention of each token to itself and those before it, with the weights of torch's module and its names.

    Args:
        weights: Whose parameters it takes over.
    """

    def __init__(self, weights: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = weights.num_heads
        self.in_proj_weight, self.in_proj_bias = weights.in_proj_weight, weights.in_proj_bias
        self.out_proj = weights.out_proj

    def forward(
        self, x_BLD: Float[Tensor, "B L D"], *_: Any, attn_mask: Float[Tensor, "L L"], **__: Any
    ) -> tuple[Float[Tensor, "B L D"], None]:
        """Attend; called as open_clip's block calls torch's module.

        Args:
            x_BLD: Tokens.
            attn_mask: -inf where a token may not look, 0 elsewhere; that of a causal transformer.
        """
        qkv_BLF = F.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        q_BHLK, k_BHLK, v_BHLK = qkv_BLF.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if prefers_composed(q_BHLK):
            out_BHLK = composed_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask)
        else:
            out_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=True)
        return self.out_proj(out_BHLK.transpose(1, 2).flatten(2)), None


class TextTower(TextTransformer):
    """open_clip's text transformer under its own names, which are the official ones."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.num_heads,
            layers=config.depth,
            output_dim=embed_dim,
        )
        self.config = config
        for block in self.transformer.resblocks:
            block.attn = CausalAttention(block.attn)
        self.set_grad_checkpointing(config.activation_checkpointing)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.config.depth

    def forward(self, text_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        """Features of texts, not normalised.

        Args:
            text_BL: Token ids; rows may be shorter than the context, as all that counts comes before the end token.
        """
        length = text_BL.shape[1]
        x_BLD, mask_LL = self._embeds(text_BL)
        x_BLD = self.transformer(x_BLD, attn_mask=mask_LL[:length, :length])
        # the norm is per token, so that only the end token needs it
        end_BD = text_global_pool(x_BLD, text_BL, pool_type="argmax")
        return self.ln_final(end_BD) @ self.text_projection

    def flops(self, length: int | None = None) -> float:
        """FLOPs (2 per multiply-add) of one forward pass of one text of `length` tokens (default: the context)."""
        width, length = self.config.width, length or self.config.context_length
        per_token = 12 * width**2 + 2 * length * width
        return 2.0 * (self.config.depth * length * per_token + width * self.output_dim)
