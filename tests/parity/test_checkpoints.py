"""Loading and resizing against the official code."""

import pytest
import torch
from torch import nn

from openeva.backbones.vit import Config
from openeva.checkpoints.load import LoadReport, adapt, load_into
from openeva.checkpoints.official import from_official, official_name
from openeva.checkpoints.resize import resize_patch_kernel, resize_position_embedding
from openeva.layers.norm import LayerNorm
from parity.golden import Case, cases


@pytest.mark.parametrize("case", cases("load_pos_embed"), ids=str)
def test_positions(case: Case) -> None:
    for sizes in case.config["cases"]:
        key, grid_from, grid_to = sizes["key"], (sizes["src_grid"],) * 2, (sizes["dst_grid"],) * 2
        positions = case.tensors[f"in.pos_embed_{key}"]
        case.close(resize_position_embedding(positions, grid_from, grid_to), f"out.pos_embed_{key}")
        half = resize_position_embedding(positions.half(), grid_from, grid_to)
        assert half.dtype == torch.float16
        case.close(half, f"out.pos_embed_fp16_{key}", "fp16_tolerance")


@pytest.mark.parametrize("case", cases("load_pos_embed"), ids=str)
def test_positions_in_a_model_of_another_grid(case: Case) -> None:
    official = case.config["e2e"]
    config = Config(
        image_size=official["dst_grid"] * official["patch_size"],
        patch_size=official["patch_size"],
        width=official["embed_dim"],
        depth=official["depth"],
        num_heads=official["num_heads"],
        mlp_hidden=official["mlp_hidden"],
        final_norm=False,
    )
    model = nn.Module()
    model.backbone = config.build()
    model.fc_norm = LayerNorm(config.width, eps=1e-6)
    model.classifier = nn.Linear(config.width, official["num_classes"])
    report = load_into(model, from_official(case.prefix("sd.")), fresh=("backbone.mask_token",))
    assert list(report.resized) == ["backbone.pos_embed"]
    assert report.fresh == ["backbone.mask_token"]
    pooled = model.backbone(case.tensors["in.image_e2e"]).pooled
    case.close(model.classifier(model.fc_norm(pooled)), "out.logits_e2e")


@pytest.mark.parametrize("case", cases("load_rel_pos"), ids=str)
def test_joint_relative_positions(case: Case) -> None:
    for sizes in case.config["joint"]:
        tag = sizes["tag"]
        source = from_official({"rel_pos_bias.relative_position_bias_table": case.tensors[f"in.shared_{tag}"]})
        check_spread_and_resized(case, source, f"out.{tag}.", sizes["src_grid"], sizes["dst_grid"])


@pytest.mark.parametrize("case", cases("load_rel_pos"), ids=str)
def test_decoupled_relative_positions(case: Case) -> None:
    axes = ("high", "width")
    source = from_official(
        {f"rel_pos_bias.relative_position_bias_for_{axis}": case.tensors[f"in.decoupled_{axis}"] for axis in axes}
    )
    sizes = case.config["decoupled"]
    check_spread_and_resized(case, source, "out.decoupled.", sizes["src_grid"], sizes["dst_grid"])


def check_spread_and_resized(case: Case, source: dict, prefix: str, grid_from: int, grid_to: int) -> None:
    """A shared table goes to every block that the case knows, in the wanted size."""
    expected = from_official(case.prefix(prefix))
    report = LoadReport()
    adapted = adapt(source, expected, report, grid=(grid_to,) * 2, source_grid=(grid_from,) * 2)
    assert set(report.resized) == set(expected)
    for key, table in adapted.items():
        case.close(table, prefix + official_name(key))


@pytest.mark.parametrize("case", cases("patch_14to16"), ids=str)
def test_patch_kernel(case: Case) -> None:
    sizes = case.config
    kernel = case.tensors["in.patch_embed.proj.weight"]
    case.close(resize_patch_kernel(kernel, sizes["dst_patch"]), "out.patch_embed.proj.weight")
    assert resize_patch_kernel(kernel.half(), sizes["dst_patch"]).dtype == torch.float32
    grids = (sizes["src_grid"],) * 2, (sizes["dst_grid"],) * 2
    case.close(resize_position_embedding(case.tensors["in.pos_embed"], *grids), "out.pos_embed")


CLASSIFIER = {"head.weight", "head.bias"}
MEAN_POOLED = {"fc_norm.weight", "fc_norm.bias", *CLASSIFIER}
NORM = {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("case", cases("load_report"), ids=str)
@pytest.mark.parametrize(
    ("transition", "source_extra", "model_extra"),
    [
        ("mim_pretrain_to_meanpool", NORM, MEAN_POOLED),
        ("mim_pretrain_to_clstoken", NORM, NORM | CLASSIFIER),
        ("mae_pretrain_to_meanpool", NORM, MEAN_POOLED),
        ("ft21k_to_ft1k", MEAN_POOLED, MEAN_POOLED),
    ],
)
def test_which_names_are_dropped_and_fresh(
    case: Case, transition: str, source_extra: set[str], model_extra: set[str]
) -> None:
    golden = case.json[transition]
    common = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
    source = from_official({key: torch.zeros(1, 5, 7) for key in {*common, *source_extra, *golden["unexpected"]}})
    model = from_official({key: torch.zeros(1, 5, 8 if key in CLASSIFIER else 7) for key in common | model_extra})
    report = LoadReport()
    adapted = adapt(source, model, report, fresh=("fc_norm", "classifier"))
    assert {official_name(key) for key in report.fresh} == set(golden["missing"])
    unused = {official_name(key) for key in report.dropped if key not in report.fresh}
    assert unused == set(golden["unexpected"])
    assert set(adapted) == set(model) - set(report.fresh)
