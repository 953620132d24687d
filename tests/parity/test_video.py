"""Video against the official code: model, loading, frames, crops, views, mixing, groups and schedule."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openeva.backbones.vit import Config
from openeva.checkpoints.class_map import select_classes
from openeva.checkpoints.detect import detect_layout
from openeva.checkpoints.load import Weights, load_into
from openeva.checkpoints.official import from_official, to_official
from openeva.data.clips import ClipSpec, clip_indices, segment_indices
from openeva.data.mixup import cut_and_paste, cutmix_box, mixed_target, partners
from openeva.data.sources.video_list import parse_line
from openeva.data.views import CropConfig, multiscale_box, multiscale_shapes, normalise
from openeva.engine.optim import param_groups
from openeva.engine.schedule import Schedule
from openeva.heads.classifier import ImageClassifier, over_views
from parity.golden import Case, cases


def config_of(official: dict[str, Any], **more: Any) -> Config:
    pooled = official.get("use_mean_pooling", True)
    return Config(
        image_size=official["img_size"], num_frames=official["num_frames"], tubelet=official["tubelet_size"],
        patch_size=official["patch_size"], width=official["embed_dim"], depth=official["depth"],
        num_heads=official["num_heads"], mlp_hidden=int(official["embed_dim"] * official["mlp_ratio"]),
        final_norm=not pooled, statistics="imagenet", init="classifier", **more,
    )  # fmt: skip


def classifier_of(official: dict[str, Any], **more: Any) -> ImageClassifier:
    pooling = "mean" if official.get("use_mean_pooling", True) else "cls"
    return ImageClassifier(config_of(official, **more).build(), official["num_classes"], pooling=pooling).eval()


def weights_of(tensors: dict[str, Tensor], grid: Any = None) -> Weights:
    renamed = from_official(tensors)
    return Weights(renamed, detect_layout(renamed), Path("a file"), grid, {})


def near(case: Case, actual: Tensor, name: str, kind: str) -> None:
    expected = case.tensors[name]
    assert (actual.detach() - expected).abs().max() <= case.json["tolerance"][kind], name


# ---------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", cases("video_forward"), ids=str)
def test_model(case: Case, checkpointing: bool) -> None:
    model, weights = classifier_of(case.config, activation_checkpointing=checkpointing), case.prefix("sd.")
    report = load_into(model, from_official(weights), grid=model.backbone.token_grid)
    assert report.fresh == []
    assert report.resized == report.dropped == {}
    back = to_official(model.state_dict())
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    video_BTCYX = case.tensors["in.video"]
    assert model.backbone(video_BTCYX).slots * model.backbone.config.tubelet == video_BTCYX.shape[1]
    near(case, model.pool(video_BTCYX), "out.features", "forward_abs")
    near(case, model(video_BTCYX), "out.logits", "forward_abs")
    if "out.patch_embed" in case.tensors:
        near(case, model.backbone.patch_embed(video_BTCYX), "out.patch_embed", "forward_abs")
        near(case, model.backbone.embed(video_BTCYX), "out.tokens_in", "forward_abs")
        near(case, model.patches(video_BTCYX), "out.patch_tokens_fcnorm", "forward_abs")
    if "out.block0" in case.tensors:
        first_BND = model.backbone(video_BTCYX, layers=(0,)).pyramid[0].flatten(2).transpose(1, 2)
        expected = case.tensors["out.block0"][:, 1:]
        assert (first_BND - expected).abs().max() <= case.json["tolerance"]["forward_abs"]
    if "in.label" in case.tensors:
        model.train()
        loss = F.cross_entropy(model(video_BTCYX), case.tensors["in.label"], label_smoothing=0.1)
        near(case, loss, "out.loss_ls0.1", "forward_abs")
        loss.backward()
        gradients = to_official({name: p.grad for name, p in model.named_parameters()})
        for name in case.prefix("out.grad."):
            near(case, gradients[name], f"out.grad.{name}", "grad_abs")


@pytest.mark.parametrize("case", cases("init_from_image"), ids=str)
def test_start_from_an_image_model(case: Case) -> None:
    model = classifier_of(case.config)
    report = load_into(
        model, from_official(case.prefix("sd.")), fresh=("fc_norm", "classifier"), grid=model.backbone.token_grid
    )
    official_names = {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}
    assert set(report.fresh) == official_names
    assert len(report.dropped) == len(case.json["unused_checkpoint_keys"])
    near(case, model.backbone.pos_embed, "out.pos_embed", "init_abs")
    near(case, model.backbone.patch_embed.proj.weight, "out.patch_embed.proj.weight", "init_abs")
    given = {name.replace("head", "classifier"): t for name, t in case.prefix("in.").items() if name != "video"}
    assert not model.load_state_dict(given, strict=False).unexpected_keys
    near(case, model(case.tensors["in.video"]), "out.logits", "forward_abs")


@pytest.mark.parametrize("case", cases("k722_remap"), ids=str)
def test_start_from_a_video_model_with_other_classes_frames_and_size(case: Case) -> None:
    config = case.config
    source, wanted = ({**config, **config[side]} for side in ("src", "dst"))
    grid = config_of(source).token_grid
    rows = case.tensors["in.class_mapping"].tolist()
    names = [str(number) for number in rows]
    weights = select_classes(weights_of(case.prefix("sd."), grid), rows, names, "as the case says")
    model = classifier_of(wanted)
    report = load_into(model, weights, grid=model.backbone.token_grid)
    assert not report.fresh
    back = to_official(model.state_dict())
    near(case, back["pos_embed"], "out.pos_embed", "pos_abs")
    assert torch.equal(back["head.weight"], case.tensors["out.head.weight"])
    assert torch.equal(back["head.bias"], case.tensors["out.head.bias"])
    near(case, model(case.tensors["in.video"]), "out.logits", "forward_abs")


# ----------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("case", cases("annotation_parse"), ids=str)
def test_lines_of_lists(case: Case) -> None:
    """The official parser turns white space in a path into one space; ours keeps it."""
    for line, (path, label) in zip(case.json["lines"], case.json["parsed"], strict=True):
        ours = parse_line(line)
        assert (" ".join(ours[0].split()), ours[1]) == (path, label)
        assert line.startswith(ours[0])


@pytest.mark.parametrize("case", cases("frame_sampling"), ids=str)
def test_frames(case: Case) -> None:
    for one in case.json["test_mode"]:
        assert clip_indices(one["total_frames"], one["num_frames"], 1)[0].tolist() == one["frame_inds"]
    for one in case.json["train_mode"]:
        draws = [draw for call in one["randint_calls"] for draw in call["draws"]]
        assert segment_indices(one["total_frames"], one["num_frames"], draws).tolist() == one["frame_inds"]
    for one in case.json["multiview_random"]:
        chance = np.random.RandomState(7)
        segment, num_frames = one["total_frames"] // one["num_frames"], one["num_frames"]
        draws = [chance.randint(segment, size=num_frames) for _ in range(one["multiview"])]
        clips = [segment_indices(one["total_frames"], num_frames, draw).tolist() for draw in draws]
        assert [index for clip in clips for index in clip] == one["frame_inds"]


@pytest.mark.parametrize("case", cases("multiscale_crop"), ids=str)
def test_multiscale_crops(case: Case) -> None:
    view = (224, 224)
    for one in case.json["cases"]:
        image = tuple(one["img_hw"])
        assert len(multiscale_shapes(image, view)) == len(one["candidate_sizes_wh"])
        for picked in one["picked"]:
            shape = picked["candidate_index"]
            for place, (x, y) in enumerate(picked["offsets_xy"]):
                box = multiscale_box(image, view, lambda _, shape=shape: shape, lambda _, place=place: place)
                assert box == (y, x, *picked["crop_wh"][::-1])


@pytest.mark.parametrize("case", cases("views"), ids=str)
def test_views(case: Case) -> None:
    facts, frames_TYXC = case.json, case.tensors["in.frames"].numpy()
    size = (facts["crop_size"], facts["crop_size"])
    mean, std = (tuple(value / 255 for value in facts["norm"][key]) for key in ("mean", "std"))
    crop = CropConfig(kind="center", hflip=0, interpolation="bilinear", antialias=False)
    spec = ClipSpec(facts["num_frames"], "central", facts["num_clips"], facts["num_crops"])
    views = crop.three_cuts(frames_TYXC, size).flatten(0, 1)
    grey_levels = normalise(views, (0, 0, 0), (1 / 255, 1 / 255, 1 / 255))
    expected = case.tensors["out.views_flat"] * torch.tensor(facts["norm"]["std"])[:, None, None]
    expected += torch.tensor(facts["norm"]["mean"])[:, None, None]
    assert (grey_levels - expected).abs().max() <= (1e-3 if facts["resize_identity"] else 1.01)
    if facts["resize_identity"]:
        near(case, normalise(views, mean, std), "out.views_flat", "views_abs_if_resize_identity")
    first = frames_TYXC[: facts["num_frames"]]
    centre = crop.cut(first, crop.draw(*first.shape[1:3], random.Random(0)), size)
    expected = case.tensors["out.center"] * torch.tensor(facts["norm"]["std"])[:, None, None]
    expected += torch.tensor(facts["norm"]["mean"])[:, None, None]
    assert (centre - expected).abs().max() <= facts["tolerance"]["center_abs_grey_levels"]
    model = classifier_of(facts["config"])
    grid = model.backbone.token_grid
    load_into(model, from_official(case.prefix("sd.")), grid=grid, source_grid=grid)
    view_WTCYX = case.tensors["out.views_flat"].unflatten(0, spec.shape)
    near(case, model(view_WTCYX), "out.view_logits", "logits_abs")
    ours = over_views(model, view_WTCYX[None])
    torch.testing.assert_close(ours.exp() * spec.num_views, case.tensors["out.sum_softmax"], rtol=0, atol=2e-5)
    assert torch.equal(ours.topk(case.tensors["out.top5"].shape[1]).indices, case.tensors["out.top5"])


@pytest.mark.parametrize("case", [*cases("mixup"), *cases("cutmix")], ids=str)
def test_mixed_clips(case: Case) -> None:
    facts, video_BTCYX = case.json, case.tensors["in.video"]
    order_B, label_B, share = case.tensors["in.perm"], case.tensors["in.label"], facts["lam"]
    other_BTCYX = partners(video_BTCYX, order_B)
    if facts["kind"] == "mixup":
        mixed_BTCYX = torch.lerp(other_BTCYX, video_BTCYX, share)
    else:
        box = cutmix_box(*video_BTCYX.shape[-2:], share, (facts["cy"], facts["cx"]))
        mixed_BTCYX, share = cut_and_paste(video_BTCYX, other_BTCYX, box)
    near(case, mixed_BTCYX, "out.video", "abs")
    options = {"smoothing": facts["smoothing"]}
    near(case, mixed_target(label_B, facts["num_classes"], **options), "out.onehot_smoothed", "abs")
    target_BV = mixed_target(label_B, facts["num_classes"], share=share, order_B=order_B, **options)
    near(case, target_BV, "out.target", "abs")


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("case", cases("optim"), ids=str)
def test_groups_and_schedule(case: Case) -> None:
    model = classifier_of(case.config)
    named = to_official(dict(model.named_parameters()))
    groups = param_groups(
        named.items(), weight_decay=case.json["weight_decay"], no_decay=model.backbone.no_weight_decay(),
        layer_decay=case.json["layer_decay"], num_layers=case.config["depth"],
    )  # fmt: skip
    found = {name: group for group in groups for name in group["names"]}
    expected = {one["name"]: one for one in case.json["params"]}
    assert set(found) == set(expected)
    for name, one in expected.items():
        assert found[name]["lr_scale"] == pytest.approx(one["lr_scale"], rel=1e-9), name
        assert found[name]["weight_decay"] == one["weight_decay"], name
    for one in case.json["schedule"]:
        total, warmup = one["epochs"] * one["iters_per_epoch"], one["warmup_epochs"] * one["iters_per_epoch"]
        schedule = Schedule(one["lr"], one["lr_min_cfg"] or one["lr"] / 100, total, warmup, "cosine", "zero_before")
        for step, value in one["points"]:
            if step != "initial" and step < total:
                assert schedule.at(step) == pytest.approx(value, rel=1e-9, abs=1e-20), step


def test_a_sure_and_wrong_view_costs_a_finite_loss() -> None:
    logits_WV = torch.tensor([[200.0, 0.0], [300.0, 0.0]])
    views = iter(logits_WV[:, None])
    found = over_views(lambda _: next(views), torch.zeros(1, 2, 1, 3, 4, 4))
    assert found.isfinite().all()
    assert found[0, 1].item() == pytest.approx(-200 - np.log(2), abs=1e-3)
