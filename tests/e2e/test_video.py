"""Runs on videos that are really decoded: from an image or video model, stopped and resumed, on two processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.test_resume import in_one_go_and_in_two
from e2e.toy import BASE, CHANCE, STUDENT, recipe, train_in_processes
from openeva.checkpoints.native import read_native
from openeva.config import ConfigError, apply_overrides, validate
from openeva.data.motion import draw_motion, render_motion
from openeva.data.video_writer import write_video
from openeva.engine.log import read_log
from openeva.evaluate import evaluate, load_recipe, measure
from openeva.tasks.video import VideoTask
from openeva.train import Recipe, dry_run, train

ACTIONS = ("grow", "move_left", "move_right")
SAME = ("loss", "grad_norm", "top1", "held_out_loss", "views_top1", "views_held_out_loss", "shuffled_top1")
CLIPS = {**STUDENT, "num_frames": 4, "tubelet": 2}
OTHER_TASKS = {
    "classify": {"name": "classify"}, "pretrain": BASE["task"],
    "clip": {"name": "clip", "embed_dim": 16, "text": {"width": 16, "num_heads": 2, "depth": 1}},
}  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven short clips of each action."""
    root = tmp_path_factory.mktemp("videos")
    for index in range(33):
        motion = draw_motion(0, index, 8, actions=ACTIONS)
        write_video(root / motion.action / f"{index:03d}.mp4", render_motion(motion, 40))
    return root


def video(out: Path, root: Path, *overrides: str, **task: Any) -> Recipe:
    """The toy recipe on videos: 24 of them, 9 held out, in one, two or six views."""
    content = {
        **BASE, "task": {"name": "video", "backbone": CLIPS, **task},
        "data": {
            "train": [{"name": "video_folder", "root": str(root)}], "holdout": 0.27, "num_workers": 0,
            "crop": {"kind": "multiscale", "hflip": 0, "color_jitter": [0.4, 0.4, 0.2, 0.1], "grey_prob": 0.2},
        },
        "evals": [
            {"name": "topk", "prefix": "views_", "views": {"num_clips": 2, "num_crops": 3}},
            {"name": "topk", "prefix": "shuffled_", "views": {"shuffled": True}},
        ],
    }  # fmt: skip
    return validate(Recipe, apply_overrides(content, ["optim.ema=null", *overrides, f"run.out={out}"]))


def numbers(out: Path) -> dict[tuple[int, str], float]:
    return {(record["step"], key): record[key] for record in read_log(out) for key in SAME if key in record}


def test_two_processes_are_one(videos: Path, tmp_path: Path) -> None:
    """9 held-out videos: 5 for one process, 4 for the other, each counted once in every view."""
    changes = ("run.micro_batch=4", "run.length=6 steps")
    train(video(tmp_path / "one", videos, *changes))
    one = numbers(tmp_path / "one")
    assert {key for _, key in one} == set(SAME)
    last = next(record for record in reversed(read_log(tmp_path / "one")) if "top1" in record)
    assert last["views_images"] == last["shuffled_images"] == 9
    two = numbers(train_in_processes(video(tmp_path / "two", videos, *changes, "run.strategy=ddp"), 2))
    assert two == pytest.approx(one, abs=1e-6, rel=1e-5)


def test_a_stop_changes_nothing(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not within an epoch of 3 steps, with everything that is random in model, frames, crops, colours and mixing."""
    mixup = {"mixup": 0.8, "cutmix": 1.0, "partners": "shuffled"}
    changes = (*CHANCE, "optim.ema=0.9", "run.length=5 steps", "evals=[]")
    assert in_one_go_and_in_two(lambda out: video(out, videos, *changes, mixup=mixup), tmp_path, monkeypatch, 2) == 5


@pytest.fixture(scope="module")
def mim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mim")
    train(recipe(out, "run.length=2 steps", "run.evaluate_every=0 steps", "data.holdout=0"))
    return out


def started(out: Path, root: Path, **task: Any) -> VideoTask:
    """The task as a run would start it."""
    made = video(out, root, **task)
    train_data, val_data = made.data.open()
    return made.task.fit_to(train_data, val_data).build()


def test_an_image_model_starts_a_video_model(mim: Path, videos: Path, tmp_path: Path) -> None:
    """At the start it sees the mean of the frames of each tubelet as the image model sees an image."""
    backbone = {"name": "vit", "num_frames": 4, "tubelet": 2}
    task = started(tmp_path, videos, init_from=str(mim), backbone=backbone).eval()
    report = task.load_report
    assert report is not None
    assert set(report.resized) == {"backbone.pos_embed", "backbone.patch_embed.proj.weight"}
    assert set(report.fresh) == {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}
    weights, _ = read_native(mim / "model")
    positions_SND = task.backbone.pos_embed[0, 1:].unflatten(0, (2, 16))
    assert torch.equal(positions_SND[0], positions_SND[1])
    assert torch.equal(positions_SND[0], weights["backbone.pos_embed"][0, 1:])
    video_BTCYX = torch.randn(1, 4, 3, 32, 32)
    kept, mixed = (task.backbone(x).pooled for x in (video_BTCYX, video_BTCYX[:, [1, 0, 2, 3]]))
    assert torch.allclose(kept, mixed, atol=1e-5)  # order within a tubelet cannot be seen yet
    swapped = task.backbone(video_BTCYX[:, [2, 3, 0, 1]]).pooled
    assert torch.allclose(kept, swapped, atol=1e-5)  # nor that of the tubelets
    lines = dry_run(video(tmp_path, videos, init_from=str(mim), backbone=backbone))
    assert any("pos_embed: 1x17x32 -> 1x33x32 (grid 4x4 -> 2x4x4)" in line for line in lines)


def test_an_image_model_of_another_resolution_is_resized_first(mim: Path, videos: Path, tmp_path: Path) -> None:
    backbone = {"name": "vit", "num_frames": 2, "image_size": 48}
    task = started(tmp_path, videos, init_from=str(mim), backbone=backbone)
    assert task.backbone.pos_embed.shape == (1, 1 + 2 * 36, 32)


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(video(out, videos, "run.length=3 steps"))
    return out


def test_a_video_model_starts_another(trained: Path, videos: Path, tmp_path: Path) -> None:
    backbone = {"name": "vit", "num_frames": 8}
    task = started(tmp_path, videos, init_from=str(trained), backbone=backbone)
    assert (task.backbone.config.tubelet, task.backbone.pos_embed.shape) == (2, (1, 1 + 4 * 16, 32))
    weights, _ = read_native(trained / "model")
    assert torch.equal(task.classifier.classifier.weight, weights["classifier.weight"])
    fresh = started(tmp_path, videos, init_from=str(trained), backbone=backbone, init_head=False)
    assert not torch.equal(fresh.classifier.classifier.weight, weights["classifier.weight"])


def test_rows_of_the_classifier_follow_the_names_of_classes(trained: Path, videos: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer"
    for action in ("move_right", "grow"):
        (fewer / action).parent.mkdir(exist_ok=True)
        (fewer / action).symlink_to(videos / action)
    weights, _ = read_native(trained / "model")
    by_names = started(tmp_path, fewer, init_from=str(trained))
    assert torch.equal(by_names.classifier.classifier.weight, weights["classifier.weight"][[0, 2]])
    (tmp_path / "map.json").write_text("[2, 1]")
    by_map = started(tmp_path, fewer, init_from=str(trained), class_map=str(tmp_path / "map.json"))
    assert torch.equal(by_map.classifier.classifier.weight, weights["classifier.weight"][[2, 1]])
    assert any("2 of 3 classes, by task.class_map" in line for line in by_map.load_report.lines())  # type: ignore[union-attr]
    for wrong, told in (("[1]", "1 entries for 2 classes"), ("[0, 3]", "names class 3"), ("{}", "not a list")):
        (tmp_path / "map.json").write_text(wrong)
        with pytest.raises(ValueError, match=told):
            started(tmp_path, fewer, init_from=str(trained), class_map=str(tmp_path / "map.json"))


def test_what_cannot_be_trained_is_told_before(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task video needs a model of clips"):
        video(tmp_path, videos, "task.backbone.num_frames=null", "task.backbone.tubelet=1")
    with pytest.raises(ConfigError, match="random erasing is for images"):
        video(tmp_path, videos, "task.erasing.prob=0.5")
    with pytest.raises(ConfigError, match="rope_grid cannot go with num_frames"):
        video(tmp_path, videos, "task.backbone.rope_grid=4")
    with pytest.raises(ConfigError, match="num_frames 5 is not a multiple of tubelet 2"):
        video(tmp_path, videos, "task.backbone.num_frames=5")
    for name in ("classify", "pretrain", "clip"):
        with pytest.raises(ConfigError, match=r"model of clips|sees images"):
            video(tmp_path, videos, f"task={json.dumps({**OTHER_TASKS[name], 'backbone': CLIPS})}")
    images = {"name": "scenes", "num_images": 8}
    with pytest.raises(ConfigError, match=r"data\.train\.0 has no videos"):
        dry_run(video(tmp_path, videos, f"data.train=[{json.dumps(images)}]"))


def test_a_finished_run_is_measured_by_an_evaluation_recipe(trained: Path, videos: Path, tmp_path: Path) -> None:
    """With the weights alone, on any videos; the numbers are those of the run's own evaluation in as many views."""
    held_out = tmp_path / "list.txt"
    rows = (trained / "held_out.csv").read_text().splitlines()[1:]
    names = ["grow", "move_left", "move_right"]
    lines = [row.rsplit(",", 1) for row in rows]
    held_out.write_text("".join(f"{path} {names.index(label)}\n" for path, label in lines))
    (tmp_path / "labels.csv").write_text("id,name\n" + "".join(f"{n},{name}\n" for n, name in enumerate(names)))
    source = f"{{name: video_list, root: /, file: {held_out}, labels: {tmp_path / 'labels.csv'}}}"
    found = measure(load_recipe("evaluate/kinetics", [
        f"evals.0.source={source}", "evals.0.views={num_clips: 2, num_crops: 3}", "evals.0.num_workers=0",
        "evals.0.crop=null", f"run.out={tmp_path / 'measured'}", "run.device=cpu", "run.precision=fp32",
    ], weights=str(trained)))  # fmt: skip
    own = evaluate(trained)
    assert found.metrics["kinetics_400_top1"] == own["views_top1"]
    assert found.metrics["kinetics_400_held_out_loss"] == pytest.approx(own["views_held_out_loss"], abs=1e-6)
    (row,) = found.rows
    assert row.title == "Kinetics-400, 2 x 3 views"
    assert (row.images, row.published) == (9, None)
