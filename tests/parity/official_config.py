"""The configuration of a golden case of EVA-01, in the official code's words, as a config of our transformer."""

from typing import Any

from openeva.backbones.vit import Config

RELATIVE = {
    "use_shared_rel_pos_bias": "shared",
    "use_rel_pos_bias": "per_block",
    "use_shared_decoupled_rel_pos_bias": "shared_decoupled",
    "use_decoupled_rel_pos_bias": "per_block_decoupled",
}


def vit_config(official: dict[str, Any], **more: Any) -> Config:
    """What student and classifier share; `more` says the rest."""
    return Config(
        image_size=official["img_size"],
        patch_size=official["patch_size"],
        width=official["embed_dim"],
        depth=official["depth"],
        num_heads=official["num_heads"],
        mlp_hidden=official["mlp_hidden"],
        norm_eps=official["ln_eps"],
        positions="learned" if official.get("use_abs_pos_emb", True) else "none",
        relative_position=next((ours for flag, ours in RELATIVE.items() if official.get(flag)), "none"),
        layer_scale=official.get("init_values") or None,
        **more,
    )
