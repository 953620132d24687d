"""Recipes of the released EVA-CLIPs against the rows of their training (spec section 2.7) and what they start from."""

from typing import NamedTuple

import pytest

from openeva.checkpoints.pretrained import find_entry
from openeva.config import load_config
from openeva.heads.clip import CLIP_VARIANTS
from openeva.train import Recipe

EVA, E = "eva_psz14", "EVA02_E_psz14"
OPENAI_L, OPENAI_B = "ViT-L-14:openai", "ViT-B-16:openai"
TEXT_H, TEXT_BIG_G = "ViT-H-14:laion2b_s32b_b79k", "ViT-bigG-14:laion2b_s39b_b160k"


class Row(NamedTuple):
    """Start, size of the run, rates and layer decays of image and text, patch dropout."""

    image: str | None
    text: str | None
    per_process: int
    batch: int
    billions: float
    lr: tuple[float, float]
    layer_decay: tuple[float, float]
    patch_dropout: float
    mixed: bool = True


ROWS = {
    "eva01_clip_g_14": Row(EVA, OPENAI_L, 160, 40_960, 11, (4e-4, 4e-5), (0.85, 0.75), 0.0, mixed=False),
    "eva01_clip_g_14_plus": Row(EVA, TEXT_H, 1024, 114_688, 4, (4e-4, 4e-5), (0.85, 0.75), 0.5),
    "eva02_clip_b_16": Row(
        "eva02_B_pt_in21k_p14to16", OPENAI_B, 2048, 131_072, 8, (2e-4, 2e-5), (0.75, 0.75), 0.0
    ),
    "eva02_clip_l_14": Row("eva02_L_pt_m38m_p14", OPENAI_L, 1024, 131_072, 4, (4e-4, 4e-5), (0.85, 0.75), 0.0),
    "eva02_clip_l_14_336": Row(None, None, 480, 61_440, 2, (4e-4, 4e-5), (0.75, 0.65), 0.0),
    "eva02_clip_e_14": Row(E, TEXT_H, 800, 115_200, 4, (4e-4, 4e-5), (0.9, 0.75), 0.5, mixed=False),
    "eva02_clip_e_14_plus": Row(E, TEXT_BIG_G, 1000, 144_000, 4, (4e-4, 4e-5), (0.9, 0.75), 0.5, mixed=False),
}  # fmt: skip
"""By recipe and variant; `mixed` = 1.6 billion pairs of LAION-2B to 0.4 billion of COYO."""


@pytest.mark.parametrize("name", list(ROWS))
def test_the_values_of_a_row(name: str) -> None:
    row, recipe = ROWS[name], load_config(Recipe, f"clip/{name}")
    task, optim, run, data = recipe.task, recipe.optim, recipe.run, recipe.data
    assert (task.variant, task.loss, task.smoothing) == (name, "infonce", 0)
    assert (task.init_image, task.init_text) == (row.image, row.text)
    assert task.init_from == ("EVA02_CLIP_L_psz14_s4B" if row.image is None else None)
    for start in filter(None, (row.image, task.init_from)):
        assert find_entry(start) is not None
    architecture = CLIP_VARIANTS[name]["backbone"]
    assert {key: getattr(task.backbone, key) for key in architecture} == architecture
    assert task.backbone.patch_dropout == row.patch_dropout
    assert task.backbone.drop_path == (0.4 if name == "eva01_clip_g_14" else 0)
    assert task.backbone.activation_checkpointing
    assert task.text.activation_checkpointing

    assert (run.batch_size, run.micro_batch, run.seed) == (row.batch, row.per_process, 4096)
    assert row.batch % row.per_process == 0
    assert (run.length.value, run.length.unit) == (row.billions * 1e9, "samples")

    assert (optim.name, optim.lr, optim.min_lr, optim.weight_decay, optim.clip_grad) == ("lamb", 5e-4, 0, 0.05, 5)
    assert (optim.betas, optim.eps, optim.schedule, optim.layer_decay) == ((0.9, 0.999), 1e-8, "cosine", 1)
    assert (optim.warmup.value, optim.warmup.unit, optim.warmup_from) == (2000, "steps", "first_step")
    for number, tower in enumerate(("image", "text")):
        own = optim.towers[tower]
        assert (own.lr, own.layer_decay, own.weight_decay) == (row.lr[number], row.layer_decay[number], None)

    shares = [source.samples_per_epoch for source in data.train]
    assert len(shares) == (2 if row.mixed else 1)
    assert shares[0] == 4 * shares[1] if row.mixed else True
    assert sum(shares) == (40_700_000 if name == "eva01_clip_g_14" else 40_000_000)
    assert (data.crop.scale, data.crop.hflip, data.crop.randaugment) == ((0.9, 1.0), 0, None)
    assert (data.val_crop.kind, data.val_crop.crop_pct) == ("center", 1.0)
