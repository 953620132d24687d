"""`openeva predict clip.mp4`: actions with their times, and where the model looked."""

import csv
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

import openeva
from checkpoints.tiny_clip import randomised
from openeva.backbones.vit import Config, VisionTransformer
from openeva.checkpoints.native import save_native
from openeva.cli import app
from openeva.config import validate
from openeva.data.batches import BatchMaker
from openeva.data.clips import ClipSpec, central_indices
from openeva.data.sources.base import Sample
from openeva.data.video import Video, _PyAvVideo
from openeva.data.video_writer import write_video
from openeva.data.views import CropConfig, ViewSpec, normalise
from openeva.heads.classifier import ImageClassifier, over_views
from openeva.heads.clip import ClipConfig, ClipModel
from openeva.inference import ImageError, Predictor, Segment, VideoPrediction, Wanted, Windows, features, predict
from openeva.inference.classes import class_names
from openeva.inference.maps import attention_map, relevance_map
from openeva.inference.strip import heat_of
from openeva.inference.videos import MOST_VIEWS, HeatMap, clock

SIZE, PATCH, WIDTH, FRAMES, TUBELET = 32, 16, 32, 4, 2
FPS = 10
DARK, LIGHT = 40, 200
NAMES = ["dark", "light"]


def classifier(pooling: str = "mean", *, num_classes: int = 2, **changes: Any) -> ImageClassifier:
    torch.manual_seed(0)
    sizes = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "depth": 2, "num_heads": 2, "mlp_hidden": 48}
    clips = {"num_frames": FRAMES, "tubelet": TUBELET, "init_std": 0.2, "final_norm": pooling == "cls"}
    backbone = VisionTransformer(Config(**{**sizes, **clips, **changes}))
    model = ImageClassifier(backbone, num_classes, pooling=pooling)
    torch.nn.init.normal_(model.classifier.weight)
    return model.eval()


@torch.no_grad()
def tells_brightness(model: ImageClassifier) -> ImageClassifier:
    """Its two classes are dark and light."""
    lead = () if model.backbone.num_frames is None else (FRAMES,)
    statistics = model.backbone.normalisation
    pooled_2D = torch.cat([
        model.pool(normalise(torch.full((1, *lead, 3, SIZE, SIZE), grey).byte(), statistics.mean, statistics.std))
        for grey in (DARK, LIGHT)
    ])  # fmt: skip
    direction_D = pooled_2D[0] - pooled_2D[1]
    model.classifier.weight.copy_(torch.stack([direction_D, -direction_D]) / 8)
    middle = direction_D @ pooled_2D.mean(0) / 8
    model.classifier.bias.copy_(torch.stack([-middle, middle]))
    return model


def frames_of(*greys: int, noise: bool = False, size: tuple[int, int] = (SIZE, SIZE)) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for grey in greys:
        frame = np.full((*size, 3), grey, np.int16) + (rng.integers(-30, 30, (*size, 3)) if noise else 0)
        yield frame.clip(0, 255).astype(np.uint8)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose model tells dark from light."""
    model = tells_brightness(classifier())
    task = {
        "name": "video", "backbone": model.backbone.config.model_dump(mode="json"), "num_classes": 2,
        "class_names": NAMES, "pooling": "mean", "batch_norm": False,
    }  # fmt: skip
    save_native(tmp_path / "run" / "model", model.state_dict(), {"task": task})
    return tmp_path / "run"


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Twelve seconds: four dark, four light, four dark."""
    path = tmp_path / "film.mp4"
    write_video(path, frames_of(*[DARK] * 40, *[LIGHT] * 40, *[DARK] * 40), fps=FPS)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Two seconds of noise, wider than high, whose frames all differ."""
    path = tmp_path / "clip.mp4"
    write_video(path, frames_of(*range(30, 230, 10), noise=True, size=(48, 80)), fps=FPS)
    return path


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def only(found: Any) -> VideoPrediction:
    (prediction,) = found
    assert isinstance(prediction, VideoPrediction)
    return prediction


def seen_of(prediction: Segment) -> tuple[np.ndarray, np.ndarray]:
    assert prediction.view is not None
    assert prediction.heat is not None
    return prediction.view, prediction.heat.values


# ---------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(("num_clips", "num_crops"), [(1, 1), (2, 3)])
def test_a_short_video_is_seen_just_as_an_evaluation_sees_it(clip: Path, num_clips: int, num_crops: int) -> None:
    model, crop = classifier(num_classes=3), CropConfig(kind="center", hflip=0.0, crop_pct=1.0)
    maker = BatchMaker(ViewSpec((SIZE, SIZE), clip=ClipSpec(FRAMES, "central", num_clips, num_crops)), crop)
    batch = maker.empty(1)
    maker.put(batch, 0, Sample(Video(clip), "clip", 0), 0, 0)
    statistics = model.backbone.normalisation
    with torch.no_grad():
        image = normalise(batch["image"], statistics.mean, statistics.std)
        expected = over_views(model, image).softmax(-1)[0]
    windows = Windows(num_clips=num_clips, num_crops=num_crops)
    prediction = only(predict(clip, weights=model, windows=windows, precision="fp32"))
    assert [(part.start, part.end) for part in prediction.segments] == [(0, pytest.approx(2))]
    for top in (prediction.top, prediction.segments[0].top, prediction.actions[0].top):
        found = {guess.index: guess.probability for guess in top}
        torch.testing.assert_close(torch.tensor([found[i] for i in range(3)]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("duration", "number"), [(0.5, 1), (10, 1), (14.9, 1), (15, 2), (24, 2), (26, 3), (3600, 360), (0, 1)]
)
def test_windows_are_equal_and_cover_the_whole(duration: float, number: int) -> None:
    edges = Windows().edges(duration)
    assert len(edges) == number
    assert edges[0][0] == 0
    assert edges[-1][1] == duration
    assert all(left[1] == right[0] for left, right in pairwise(edges))
    lengths = [end - start for start, end in edges]
    assert max(lengths) == pytest.approx(min(lengths))


def test_actions_have_the_times_at_which_they_happen(run: Path, film: Path) -> None:
    prediction = only(predict(film, weights=str(run), windows=Windows(seconds=2)))
    assert prediction.duration == pytest.approx(12)
    assert [part.top[0].name for part in prediction.segments] == ["dark"] * 2 + ["light"] * 2 + ["dark"] * 2
    assert [(round(a.start, 3), round(a.end, 3), a.top[0].name) for a in prediction.actions] == [
        (0, 4, "dark"), (4, 8, "light"), (8, 12, "dark"),
    ]  # fmt: skip
    assert prediction.top[0].name == "dark"
    mean = np.mean([next(g.probability for g in part.top if g.name == "dark") for part in prediction.segments])
    assert prediction.top[0].probability == pytest.approx(mean, abs=1e-5)


def test_frames_of_a_window_are_the_middles_of_its_segments(film: Path) -> None:
    """Each window is 4 s = 40 frames: of its four segments of 10 frames the sixth; slots show the first of two."""
    prediction = only(Predictor(classifier())(film, Wanted(map="relevance"), Windows(seconds=4)))
    for number, part in enumerate(prediction.segments):
        view, heat = seen_of(part)
        assert view.shape == (FRAMES // TUBELET, SIZE, SIZE, 3)
        assert heat.shape == (FRAMES // TUBELET, 2, 2)
        assert part.times == pytest.approx([4 * number + 0.5, 4 * number + 2.5])
        assert abs(view.mean() - (LIGHT if number == 1 else DARK)) < 6


def test_batches_of_any_size_answer_alike_and_in_order(film: Path, clip: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(film.read_bytes()[:3000])
    videos, windows = [clip, film, broken, film, clip], Windows(seconds=1.5)
    one, many = (
        list(Predictor(classifier(), batch_size=size, precision="fp32", num_readers=readers)(videos, windows=windows))
        for size, readers in ((1, 1), (5 * FRAMES, 3))
    )
    assert [Path(p.source).name for p in one] == ["clip.mp4", "film.mp4", "broken.mp4", "film.mp4", "clip.mp4"]
    assert [len(p.segments) for p in one] == [1, 8, 0, 8, 1]
    for left, right in zip(one, many, strict=True):
        assert (left.source, left.error, len(left.segments)) == (right.source, right.error, len(right.segments))
        for a, b in zip(left.segments, right.segments, strict=True):
            assert (a.start, a.end) == (b.start, b.end)
            assert a.top[0].probability == pytest.approx(b.top[0].probability, abs=1e-5)


def test_no_more_than_the_frames_of_a_window_are_decoded_at_once(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    whole = _PyAvVideo.frames
    monkeypatch.setattr(_PyAvVideo, "frames", lambda self, index: asked.append(len(index)) or whole(self, index))
    only(predict(film, weights=classifier(), windows=Windows(seconds=1)))
    assert asked == [FRAMES] * 12


def test_videos_are_opened_as_they_are_asked_for(clip: Path) -> None:
    asked = 0

    def endless() -> Iterator[Path]:
        nonlocal asked
        while True:
            asked += 1
            yield clip

    predictions = Predictor(classifier(), batch_size=1, num_readers=2)(endless())
    for _ in range(3):
        next(predictions)
    assert asked <= 6
    predictions.close()


def test_a_model_of_images_answers_for_frames(film: Path) -> None:
    model = tells_brightness(classifier(num_frames=None, tubelet=1))
    windows = Windows(seconds=6, num_frames=3)
    prediction = only(predict(film, weights=model, windows=windows, precision="fp32"))
    statistics = model.backbone.normalisation
    with Video(film).opened() as video:
        frames = torch.from_numpy(video.frames(central_indices(60, 3))).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(normalise(frames, statistics.mean, statistics.std)).softmax(-1).mean(0)
    found = {guess.index: guess.probability for guess in prediction.segments[0].top}
    torch.testing.assert_close(torch.tensor([found[0], found[1]]), expected, rtol=1e-4, atol=1e-5)
    (part, _) = only(Predictor(model)(film, Wanted(map="relevance"), windows)).segments
    view, heat = seen_of(part)
    assert (view.shape, heat.shape) == ((3, SIZE, SIZE, 3), (3, 2, 2))
    assert [round(float(frame.mean()), -1) for frame in view] == [DARK, DARK, LIGHT]


def test_a_clip_ranks_texts_for_the_frames_of_a_video(clip: Path, tmp_path: Path) -> None:
    tower = {"image_size": SIZE, "patch_size": PATCH, "width": 32, "depth": 1, "num_heads": 2, "mlp_hidden": 64}
    pair = {"backbone": tower, "embed_dim": 16, "text": {"width": 16, "num_heads": 2, "depth": 1}}
    model, texts = randomised(ClipModel(validate(ClipConfig, pair)), 0).eval(), ["a cat", "a dog"]
    prediction = only(predict(clip, weights=model, texts=texts, windows=Windows(num_frames=4), precision="fp32"))
    with Video(clip).opened() as video:
        frames = [Image.fromarray(frame) for frame in video.frames(central_indices(20, 4))]
    by_frame = predict(frames, weights=model, texts=texts, precision="fp32")
    for guess in prediction.top:
        alone = [next(g.cosine for g in one.top if g.name == guess.name) or 0.0 for one in by_frame]
        assert guess.cosine == pytest.approx(np.mean(alone), abs=1e-4)


def test_classes_of_official_video_models_are_those_of_kinetics() -> None:
    names = class_names(400, of_videos=True).names
    assert (len(names), names[0], names[-1]) == (400, "abseiling", "zumba")
    assert class_names(400).names[0] == "0"  # of images
    assert class_names(1000, of_videos=True).names[7] == "7"
    assert list(class_names(2, {"task": {"class_names": NAMES}}, of_videos=True).names) == NAMES


# ---------------------------------------------------------------------------------------------------- maps


def test_attention_to_a_clip_is_laid_out_in_time_and_space() -> None:
    model, clip = classifier("attention"), torch.randn(2, FRAMES, 3, SIZE, SIZE)
    heat = attention_map(model, clip).values
    with torch.no_grad():
        patches, pool = model.backbone(clip).patches, model.attention_pool
        _, weights = pool.attn(pool.query.expand(2, -1, -1), patches, patches)
    assert heat.shape == (2, FRAMES // TUBELET, 2, 2)
    torch.testing.assert_close(heat[:, 1, 0, 1], weights[:, 0, 4 + 1])
    torch.testing.assert_close(heat[:, 0, 1, 0], weights[:, 0, 2])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_attention_of_the_last_block_is_a_mean_over_heads_and_queries(pooling: str) -> None:
    model, clip = classifier(pooling), torch.randn(1, FRAMES, 3, SIZE, SIZE)
    heat = attention_map(model, clip).values
    inputs: list[Tensor] = []
    attention = model.backbone.blocks[-1].attn
    attention.register_forward_pre_hook(lambda _m, given: inputs.append(given[0]))
    with torch.no_grad():
        model(clip)
        q, k, _ = torch.nn.functional.linear(inputs[0], attention.qkv.weight, attention._bias()).chunk(3, dim=-1)
        q, k = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k))
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
    expected = weights[:, 0, 1:] if pooling == "cls" else weights[:, 1:, 1:].mean(1)
    torch.testing.assert_close(heat, expected.unflatten(1, (FRAMES // TUBELET, 2, 2)))


def test_relevance_of_a_clip_is_laid_out_in_time_and_space() -> None:
    model, clip = classifier(), torch.randn(2, FRAMES, 3, SIZE, SIZE)
    heat = relevance_map(model, clip, torch.tensor([1, 0])).values
    patches = model.backbone(clip).patches.detach().requires_grad_()
    logits = model.classifier(model.fc_norm(patches.mean(1)))
    (gradient,) = torch.autograd.grad(logits[0, 1] + logits[1, 0], patches)
    evidence = (gradient * patches).sum(-1).clamp_min(0).detach()
    torch.testing.assert_close(heat, evidence.unflatten(1, (FRAMES // TUBELET, 2, 2)))
    assert heat.max() > 0


def test_of_a_long_video_only_some_windows_keep_their_frames(film: Path) -> None:
    prediction = only(Predictor(classifier())(film, Wanted(map="attention"), Windows(seconds=1)))
    kept = [part.top[0].probability for part in prediction.segments if part.view is not None]
    others = [part.top[0].probability for part in prediction.segments if part.view is None]
    assert (len(kept), len(others)) == (MOST_VIEWS, 12 - MOST_VIEWS)
    assert min(kept) >= max(others)


def test_the_heat_of_a_row_has_one_scale_and_stays_in_its_frame() -> None:
    view, heat = np.full((4, SIZE, SIZE, 3), 90, np.uint8), np.zeros((4, 4, 4), np.float32)
    heat[1, 2, 3], heat[3, 1, 1] = 1.0, 0.2
    coloured = heat_of(Segment("", view=view, heat=HeatMap(heat, "")))
    plain = heat_of(Segment("", view=view, heat=HeatMap(np.zeros_like(heat), "")))
    change = np.abs(np.stack(coloured).astype(int) - np.stack(plain)).sum(-1)
    frame, row, column = np.unravel_index(change.argmax(), change.shape)
    assert frame == 1
    assert 16 <= row < 24 <= column
    assert not change[[0, 2]].any()
    assert 0 < change[3].max() < 0.6 * change[1].max()


# ---------------------------------------------------------------------------------------------------- command


def test_the_table_joins_windows_of_one_action(run: Path, film: Path) -> None:
    result = cli(film, "--weights", run, "--window", 2)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if "%" in line]
    assert [line[-3:-1] for line in lines] == [["0:00.0-0:04.0", "dark"], ["0:04.0-0:08.0", "light"], [
        "0:08.0-0:12.0", "dark",
    ]]  # fmt: skip
    assert "class names: the run" in result.stdout
    assert cli(film, "--weights", run, "--window", 2, "--topk", 2).stdout.count("%") == 6


def test_json_and_csv_have_every_window_with_its_times(run: Path, film: Path, tmp_path: Path) -> None:
    (record,) = json.loads(cli(film, "--weights", run, "--window", 2, "--json").stdout)
    result = cli(film, "--weights", run, "--window", 2, "--topk", 1, "--out", tmp_path / "out.csv")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert record["video"] == str(film)
    assert record["top"][0]["name"] == "dark"
    edges = [(float(2 * i), float(2 * i + 2)) for i in range(6)]
    assert [(part["start"], part["end"]) for part in record["segments"]] == edges
    assert [(row["video"], float(row["start"]), float(row["end"])) for row in rows] == [
        (str(film), *edge) for edge in edges
    ]
    assert [row["name"] for row in rows] == [part["top"][0]["name"] for part in record["segments"]]
    python = only(openeva.predict(film, weights=str(run), windows=Windows(seconds=2)))
    assert record["segments"][3]["top"][0]["probability"] == pytest.approx(
        python.segments[3].top[0].probability, abs=1e-6
    )


def test_broken_videos_are_named_and_skipped_with_exit_status_1(run: Path, film: Path, clip: Path) -> None:
    (film.parent / "empty.mp4").write_bytes(b"")
    result = cli(film.parent, "--weights", run, "--json")
    assert result.exit_code == 1
    assert f"broken video: {film.parent / 'empty.mp4'}: the file is empty" in result.stderr
    assert "1 of 3 videos could not be read" in result.stderr
    assert ["error" in record for record in json.loads(result.stdout)] == [False, True, False]
    with pytest.raises(ImageError, match=r"empty\.mp4: the file is empty"):
        predict(film.parent / "empty.mp4", weights=str(run))


def test_the_weights_decide_what_is_seen_of_a_folder_of_both(run: Path, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "both" / "a.png")
    (tmp_path / "both" / "b.mp4").write_bytes(clip.read_bytes())
    (record,) = json.loads(cli(tmp_path / "both", "--weights", run, "--json").stdout)
    assert Path(record["video"]).name == "b.mp4"
    images = predict(tmp_path / "both", weights=classifier(num_frames=None, tubelet=1))
    assert [Path(one.source).name for one in images] == ["a.png"]


def test_the_wrong_kind_is_told_with_the_fix(run: Path, film: Path, tmp_path: Path) -> None:
    model = classifier(num_frames=None, tubelet=1)
    task = {"name": "classify", "backbone": model.backbone.config.model_dump(mode="json"), "num_classes": 2}
    save_native(tmp_path / "images" / "model", model.state_dict(), {"task": {**task, "class_names": NAMES}})
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    videos = f"{tmp_path}/*.mp4"
    for arguments, message in (
        (
            [tmp_path / "a.png", "--weights", run],
            "a.png: an image, but these weights see videos (clips of 4 frames); give videos, or weights of",
        ),
        ([film, "--weights", tmp_path / "images"], "film.mp4: a video, but these weights see images"),
        ([film, "--weights", tmp_path / "images"], "--frames 8"),
        ([videos, "--weights", tmp_path / "images"], "*.mp4: videos, no images, but these weights see images"),
        ([tmp_path / "a.png", "--weights", tmp_path / "images", "--window", 5], "windows are of videos"),
        (
            [tmp_path / "a.png", "--weights", tmp_path / "images", "--frames", 5],
            "a.png: an image, but frames of videos",
        ),
        ([film, "--weights", tmp_path / "images", "--frames", 5, "--clips", 2], "clips are for video models"),
        ([film, "--weights", run, "--frames", 5], "these weights see clips of 4 frames"),
        ([film, "--weights", run, "--crops", 2], "2 crops"),
        ([film, "--weights", run, "--window", 0], "a window of 0 seconds"),
        ([film, "--weights", run, "--text", "a cat"], "cannot be compared with texts"),
        ([film, "--weights", run, "--features", "x.npz", "--patches"], "leave out --patches"),
        ([tmp_path / "gone.mp4", "--weights", "nowhere"], "gone.mp4: no such file"),
        (["https://x/y.mp4", "--weights", run], "videos are not fetched"),
    ):
        result = cli(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert len([line for line in result.stderr.splitlines() if "error" in line]) == 1
        assert "Traceback" not in result.output
    with pytest.raises(ValueError, match="ndarray 1: no video, but these weights see videos"):
        predict(np.zeros((32, 32, 3), np.uint8), weights=str(run))


def test_embeddings_are_those_of_windows(run: Path, film: Path, tmp_path: Path) -> None:
    result = cli(film, "--weights", run, "--window", 4, "--features", tmp_path / "f.npz", "--layers", "0")
    assert result.exit_code == 0, result.output
    arrays = np.load(tmp_path / "f.npz")
    assert list(arrays["source"]) == [f"{film} 0.0-4.0", f"{film} 4.0-8.0", f"{film} 8.0-12.0"]
    assert arrays["pooled"].shape == arrays["layer_0"].shape == (3, WIDTH)
    model = tells_brightness(classifier())
    statistics = model.backbone.normalisation
    with Video(film).opened() as video:
        clip = torch.from_numpy(video.frames(40 + central_indices(40, FRAMES))).permute(0, 3, 1, 2)[None]
    with torch.no_grad():
        pooled = model.pool(normalise(clip, statistics.mean, statistics.std))[0]
    np.testing.assert_allclose(arrays["pooled"][1], pooled, rtol=0.05, atol=0.05)  # bf16 where it is native
    whole = features(film, weights=model)
    assert whole.sources == [str(film)]


@pytest.mark.parametrize("kind", ["attention", "relevance"])
def test_a_picture_shows_the_windows(run: Path, film: Path, clip: Path, tmp_path: Path, kind: str) -> None:
    one, three = tmp_path / "one.png", tmp_path / "three.png"
    for place, seconds in ((one, 12), (three, 4)):
        result = cli(film, "--weights", run, "--window", seconds, "--picture", place, "--map", kind)
        assert result.exit_code == 0, result.output
    with Image.open(one) as low, Image.open(three) as high:
        assert low.width == high.width > 1000
        assert high.height > 2 * low.height
    assert cli(film, clip, "--weights", run, "--picture", one).exit_code == 2
    assert cli(film, clip, "--weights", run, "--picture", tmp_path / "strips").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "strips").iterdir()) == ["clip.png", "film.png"]


def test_times_are_told_as_players_tell_them() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 65, 3725)] == ["0:00", "1:00", "1:05", "1:02:05"]
    assert clock(9.96, tenths=True) == "0:10.0"
    assert Segment("", start=3.25, end=4.0).span == "0:03.2-0:04.0"
    assert Segment("", start=10, end=20).span == "0:10-0:20"
