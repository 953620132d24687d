"""Prediction on anybody's images: what is read, what is answered, what is written."""

import csv
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from typer.testing import CliRunner, Result

import openeva
from openeva.backbones.vit import Config, VisionTransformer
from openeva.checkpoints.native import save_native
from openeva.cli import app
from openeva.heads.classifier import ImageClassifier
from openeva.inference import ImageError, Predictor, Wanted, features, find_images, predict
from openeva.inference.classes import class_names
from openeva.inference.maps import attention_map, relevance_map
from openeva.inference.picture import overlay

SIZE, PATCH, WIDTH, DEPTH = 32, 8, 32, 3
NAMES = ["dark", "light", "green"]


def small_config(**changes: Any) -> dict[str, Any]:
    sizes = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "depth": DEPTH, "num_heads": 2, "mlp_hidden": 48}
    return {**sizes, "init_std": 0.2, **changes}


def classifier(pooling: str = "mean", num_classes: int = 3, **changes: Any) -> ImageClassifier:
    torch.manual_seed(0)
    backbone = VisionTransformer(Config(**small_config(final_norm=pooling == "cls", **changes)))
    model = ImageClassifier(backbone, num_classes, pooling=pooling)
    torch.nn.init.normal_(model.classifier.weight)
    return model.eval()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose model tells three classes apart."""
    model = classifier()
    task = {
        "name": "classify", "backbone": model.backbone.config.model_dump(mode="json"), "num_classes": 3,
        "class_names": NAMES, "pooling": "mean", "batch_norm": False,
    }  # fmt: skip
    save_native(tmp_path / "run" / "model", model.state_dict(), {"task": task})
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of different sizes, one deeper than the others, and a file that is none."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name, size in {"a.png": (40, 60), "b.jpg": (32, 32), "sub/c.png": (70, 40)}.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


@pytest.fixture
def server() -> Iterator[str]:
    """A web server with one image, one page, and nothing else."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "png")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = {"/red.png": buffer.getvalue(), "/page": b"<html></html>"}.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Type", "text/html" if self.path == "/page" else "image/png")
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def sources(images: Any) -> list[str]:
    return [Path(found.source).name for found in find_images(images)]


# ---------------------------------------------------------------------------------------------------- images


def test_folders_patterns_and_lists_lead_to_images_in_order(photos: Path) -> None:
    assert sources(photos) == ["a.png", "b.jpg", "c.png"]
    assert sources(str(photos / "**" / "*")) == ["a.png", "b.jpg", "c.png"]
    assert sources([photos / "b.jpg", str(photos / "*.png")]) == ["b.jpg", "a.png"]


def test_all_addresses_that_lead_nowhere_are_named_at_once(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no such file") as error:
        find_images([photos / "a.png", tmp_path / "gone.png", tmp_path / "empty", f"{tmp_path}/*.gif", "ftp://x/y.png"])
    assert [line.split(": ")[1][:16] for line in str(error.value).splitlines()] == [
        "no such file or ", "no images in thi", "no image fits th", "only http and ht",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["uint8", "float", "grey", "rgba", "tensor", "pillow", "bytes"])
def test_arrays_and_images_in_memory_are_the_same_as_the_file(photos: Path, kind: str) -> None:
    image = Image.open(photos / "a.png")
    pixels = np.array(image)
    given: Any = {
        "uint8": pixels,
        "float": (pixels / 255).astype(np.float32),
        "grey": pixels[:, :, 0],
        "rgba": np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
        "pillow": image,
        "bytes": (photos / "a.png").read_bytes(),
    }[kind]
    expected = np.repeat(pixels[:, :, :1], 3, axis=2) if kind == "grey" else pixels
    (found,) = find_images(given)
    np.testing.assert_array_equal(found.read(), expected)


def test_a_batch_in_memory_is_many_images() -> None:
    found = list(find_images([np.zeros((4, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)]))
    assert [image.source for image in found] == [f"image {number}" for number in range(1, 6)]


def test_normalised_pixels_are_refused_with_the_fix() -> None:
    (found,) = find_images(np.full((8, 8, 3), -1.5, np.float32))
    with pytest.raises(ImageError, match=r"image 1: float32 values must be floats in 0\.\.1"):
        found.read()


def test_urls_are_fetched_and_their_failures_told(server: str) -> None:
    good, missing, page = find_images([f"{server}/red.png", f"{server}/gone.png", f"{server}/page"])
    assert (good.read() == (255, 0, 0)).all()
    with pytest.raises(ImageError, match=r"gone\.png: the server answers 404"):
        missing.read()
    with pytest.raises(ImageError, match="text/html"):
        page.read()


def test_a_server_that_does_not_answer_is_told() -> None:
    (found,) = find_images("http://127.0.0.1:9/x.png")
    with pytest.raises(ImageError, match=r"x\.png: cannot be reached"):
        found.read()


# ---------------------------------------------------------------------------------------------------- answers


def test_probabilities_are_those_of_the_model_on_its_evaluation_view(photos: Path) -> None:
    model = classifier()
    (prediction,) = predict(photos / "b.jpg", weights=model, precision="fp32")
    view = torch.from_numpy(np.array(Image.open(photos / "b.jpg"))).permute(2, 0, 1)[None] / 255  # 32 x 32: uncut
    statistics = model.backbone.normalisation
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (statistics.mean, statistics.std))
    with torch.no_grad():
        expected = model((view - mean) / std).softmax(-1)[0]
    order = expected.argsort(descending=True).tolist()
    assert [guess.index for guess in prediction.top] == order
    torch.testing.assert_close(torch.tensor([g.probability for g in prediction.top]), expected[order])


def test_batches_of_any_size_answer_alike_and_in_order(photos: Path) -> None:
    images = [*sorted(photos.glob("*.[pj]*")), np.zeros((50, 20, 3), np.uint8), photos / "sub"]
    one, three = (predict(images, weights=classifier(), batch_size=size, precision="fp32") for size in (1, 3))
    assert [Path(p.source).name for p in one] == ["a.png", "b.jpg", "image 1", "c.png"]
    for left, right in zip(one, three, strict=True):
        assert left.source == right.source
        assert [g.index for g in left.top] == [g.index for g in right.top]
        assert left.top[0].probability == pytest.approx(right.top[0].probability, abs=1e-5)


def test_a_broken_image_is_an_error_or_a_remark_and_the_others_are_answered(photos: Path) -> None:
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:200])
    with pytest.raises(ImageError, match=r"b\.jpg"):
        predict(photos, weights=classifier())
    first, broken, last = predict(photos, weights=classifier(), on_error="return", batch_size=2)
    assert broken.error
    assert not broken.top
    assert first.top
    assert last.top


def test_images_are_read_as_they_are_asked_for() -> None:
    asked = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal asked
        while True:
            asked += 1
            yield np.zeros((32, 32, 3), np.uint8)

    predictions = Predictor(classifier(), batch_size=2)(endless())
    for _ in range(3):
        next(predictions)
    assert asked <= 10
    predictions.close()  # type: ignore[attr-defined]


def test_class_names_come_from_the_run_else_imagenet_else_numbers() -> None:
    own = class_names(3, {"task": {"class_names": NAMES}})
    assert list(own.names) == NAMES
    assert class_names(1000).names[0] == "tench"
    synsets = ImageNetInfo("imagenet-22k").label_names()
    assert synsets == sorted(synsets)  # the order in which the official data set numbers its folders
    assert class_names(21841).names[:2] == ["organism, being", ImageNetInfo("imagenet-22k").index_to_description(1)]
    assert class_names(1000, {"task": {"name": "classify"}}).names[7] == "7"  # a run's thousand classes are its own
    with pytest.raises(ValueError, match="names 3 classes, but the classifier has 4"):
        class_names(4, {"task": {"class_names": NAMES}})


def test_weights_without_classifier_say_what_to_do() -> None:
    backbone = VisionTransformer(Config(**small_config()))
    with pytest.raises(ValueError, match="no classifier"):
        predict(np.zeros((32, 32, 3), np.uint8), weights=backbone)
    assert features(np.zeros((32, 32, 3), np.uint8), weights=backbone).pooled.shape == (1, WIDTH)


def test_a_run_is_used_with_its_names_at_any_size(run: Path, photos: Path) -> None:
    (prediction,) = openeva.predict(photos / "a.png", weights=str(run), topk=2, image_size=48)
    assert len(prediction.top) == 2
    assert {guess.name for guess in prediction.top} <= set(NAMES)


# ---------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("positions", ["none", "shared", "per_block"])
def test_attention_of_the_cls_token_is_softmax_of_its_logits(positions: str) -> None:
    model = classifier("cls", relative_position=positions)
    attention, image = model.backbone.blocks[-1].attn, torch.randn(2, 3, SIZE, SIZE)
    inputs: list[tuple[Tensor, ...]] = []
    attention.register_forward_pre_hook(lambda _m, given: inputs.append(given))
    heat = attention_map(model, image).values
    tokens, bias, *_ = (*inputs[0], None)
    with torch.no_grad():
        q, k, _ = torch.nn.functional.linear(tokens, attention.qkv.weight, attention._bias()).chunk(3, dim=-1)
        q, k = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k))
        logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        for table in (bias, attention.position_bias() if attention.position_bias else None):
            logits = logits if table is None else logits + table
    expected = logits.softmax(-1).mean(1)[:, 0, 1:].unflatten(1, model.backbone.grid)
    torch.testing.assert_close(heat, expected)


def test_attentive_pooling_shows_what_its_query_looks_at() -> None:
    model = classifier("attention")
    heat = attention_map(model, torch.randn(2, 3, SIZE, SIZE)).values
    assert heat.shape == (2, *model.backbone.grid)
    torch.testing.assert_close(heat.sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize("pooling", ["mean", "cls", "attention"])
def test_relevance_is_high_where_removing_a_patch_costs_most(pooling: str) -> None:
    """To first order, gradient x token is what the logit loses when that token is scaled to nothing."""
    model = classifier(pooling)
    image, label = torch.randn(1, 3, SIZE, SIZE), torch.tensor([1])
    heat = relevance_map(model, image, label).values.flatten()
    module = model.backbone.blocks[-1] if pooling == "cls" else model.backbone
    step = 1e-3
    losses = []
    with torch.no_grad():
        before = model(image)[0, 1]
        for patch in range(heat.numel()):

            def shrink(tokens: Tensor, place: int) -> Tensor:
                tokens = tokens.clone()
                tokens[:, place] *= 1 - step
                return tokens

            if pooling == "cls":
                hook = module.register_forward_pre_hook(lambda _m, i, p=patch: (shrink(i[0], p + 1), *i[1:]))
            else:

                def change(_m: Any, _i: Any, out: Any, p: int = patch) -> Any:
                    out.patches = shrink(out.patches, p)
                    return out

                hook = module.register_forward_hook(change)
            losses.append((before - model(image)[0, 1]).item() / step)
            hook.remove()
    torch.testing.assert_close(heat, torch.tensor(losses).clamp_min(0), rtol=0.05, atol=5e-3)
    assert heat.max() > 0


def test_maps_leave_no_gradient_and_no_hook_behind(photos: Path) -> None:
    model = classifier("cls")
    for kind in ("attention", "relevance"):
        (prediction,) = Predictor(model)(photos / "a.png", Wanted(map=kind))
        assert prediction.heat is not None
        assert prediction.heat.values.shape == model.backbone.grid
        assert prediction.view is not None
        assert prediction.view.shape == (SIZE, SIZE, 3)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_the_overlay_is_brightest_at_the_strongest_patch() -> None:
    heat = np.zeros((4, 4))
    heat[1, 2] = 1
    grey = np.full((32, 32, 3), 90, np.uint8)
    colour = np.abs(overlay(grey, heat).astype(int) - overlay(grey, np.zeros((4, 4)))).sum(axis=2)
    row, column = np.unravel_index(colour.argmax(), colour.shape)
    assert 8 <= row < 16 <= column < 24
    assert (colour[24:, :4] == 0).all()


# ---------------------------------------------------------------------------------------------------- features


def test_features_hold_what_the_model_computes(photos: Path) -> None:
    model = classifier()
    found = features(photos, weights=model, patches=True, layers=(0, -1), batch_size=2, precision="fp32")
    assert [Path(source).name for source in found.sources] == ["a.png", "b.jpg", "c.png"]
    assert found.grid == model.backbone.grid == (4, 4)
    assert found.patches is not None
    assert found.patches.shape == (3, 16, WIDTH)
    assert sorted(found.layers) == [0, DEPTH - 1]
    assert found.layers[0].shape == (3, 16, WIDTH)
    np.testing.assert_allclose(found.layers[DEPTH - 1], found.patches)  # there is no final norm between them
    with torch.no_grad():
        pooled = model.fc_norm(torch.from_numpy(found.patches).mean(1))
    np.testing.assert_allclose(found.pooled, pooled, atol=1e-5)
    mean = features(photos, weights=model, layers=(0,), precision="fp32")
    np.testing.assert_allclose(mean.layers[0], found.layers[0].mean(1), atol=1e-6)
    assert mean.patches is None


def test_layers_that_are_not_there_are_named(photos: Path) -> None:
    with pytest.raises(ValueError, match=r"layers \[3\]: the model has blocks 0 to 2"):
        features(photos, weights=classifier(), layers=(0, 3))


# ---------------------------------------------------------------------------------------------------- command


def test_the_command_prints_a_table_with_the_runs_names(run: Path, photos: Path) -> None:
    result = cli(photos, "--weights", run, "--topk", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("%") == 6
    assert str(photos / "a.png") in result.stdout
    assert "class names: the run" in result.stdout


def test_json_and_csv_say_the_same_as_python(run: Path, photos: Path, tmp_path: Path) -> None:
    expected = predict(photos, weights=str(run))
    records = json.loads(cli(photos, "--weights", run, "--json").stdout)
    result = cli(photos, "--weights", run, "--out", tmp_path / "out.csv")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [record["image"] for record in records] == [p.source for p in expected]
    assert [(r["image"], int(r["class"]), r["name"]) for r in rows] == [
        (p.source, g.index, g.name) for p in expected for g in p.top
    ]
    assert records[0]["top"][0]["probability"] == pytest.approx(expected[0].top[0].probability, abs=1e-6)


def test_broken_images_are_named_and_skipped_with_exit_status_1(run: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "b.jpg").write_bytes(b"\xff\xd8\xff broken")
    result = cli(photos, "--weights", run, "--json", "--features", tmp_path / "f.npz")
    assert result.exit_code == 1
    assert f"broken image: {photos / 'b.jpg'}" in result.stderr
    assert "1 of 3 images could not be read" in result.stderr
    records = json.loads(result.stdout)
    assert ["error" in record for record in records] == [False, True, False]
    assert [Path(name).name for name in np.load(tmp_path / "f.npz")["source"]] == ["a.png", "c.png"]


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_where_all_images_are_broken_the_json_is_whole_and_there_are_no_features(
    run: Path, photos: Path, tmp_path: Path, suffix: str
) -> None:
    found = tmp_path / f"f.{suffix}"
    result = cli(photos / "notes.txt", "--weights", run, "--json", "--features", found)
    assert result.exit_code == 1
    (record,) = json.loads(result.stdout)
    assert record["error"] == "not an image, or of an unknown format"
    assert not found.exists()
    with pytest.raises(ValueError, match="no features"):
        features(photos / "notes.txt", weights=str(run), on_error="skip")


def test_wrong_input_is_told_before_the_model_is_loaded(run: Path, photos: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([tmp_path / "gone.png"], "no such file"),
        ([photos, "--picture", "x.png"], "one file, but there are 3 images"),
        ([photos, "--picture", "x.gif"], "a new folder has no ending"),
        ([photos, "--out", "x.json", "--csv"], "--csv does not fit --out x.json"),
        ([photos, "--features", "x.txt"], "npz or .parquet"),
        ([photos, "--patches"], "--features"),
        ([photos, "--map", "attention"], "--picture"),
        ([photos, "--out", "x.txt"], ".json or .csv"),
        ([photos, "--json", "--csv"], "exclude each other"),
        ([photos, "--features", "x.npz", "--layers", "a"], "numbers of blocks"),
    ):
        result = cli(*arguments, "--weights", "nowhere")
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.output


def test_features_on_disk_equal_those_in_memory(run: Path, photos: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    options = ("--weights", run, "--patches", "--layers", "1", "--precision", "fp32")
    for name in ("f.npz", "f.parquet"):
        result = cli(photos, *options, "--features", tmp_path / name)
        assert result.exit_code == 0, result.output
    expected = features(photos, weights=str(run), patches=True, layers=(1,), precision="fp32")
    arrays = np.load(tmp_path / "f.npz")
    table = pq.read_table(tmp_path / "f.parquet")
    assert list(arrays["source"]) == table["source"].to_pylist() == expected.sources
    for name, values in {"pooled": expected.pooled, "patches": expected.patches, "layer_1": expected.layers[1]}.items():
        np.testing.assert_allclose(arrays[name], values, atol=1e-5)
        shape = [int(size) for size in table.schema.field(name).metadata[b"shape"].split(b",")]
        flat = np.array(table[name].to_pylist(), np.float32)
        np.testing.assert_allclose(flat.reshape(-1, *shape), values, atol=1e-5)
    assert tuple(arrays["grid"]) == expected.grid


def test_parquet_is_written_in_pieces_and_only_whole(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    from openeva.inference import embeddings, writing

    monkeypatch.setattr(embeddings, "ROW_GROUP_BYTES", 1)
    predictions = list(Predictor(classifier())(photos, Wanted(embedding=True)))
    with writing(tmp_path / "f.parquet") as writer:
        for prediction in predictions:
            writer.add(prediction.source, prediction.embedding)
    assert pq.ParquetFile(tmp_path / "f.parquet").num_row_groups == 3

    def stopped() -> None:
        with writing(tmp_path / "g.parquet") as writer:
            writer.add(predictions[0].source, predictions[0].embedding)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert [path.name for path in tmp_path.iterdir() if path.suffix in {".parquet", ".part"}] == ["f.parquet"]


def test_pictures_are_drawn_one_per_image(run: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "sub" / "a.png").write_bytes((photos / "a.png").read_bytes())
    result = cli(photos, "--weights", run, "--picture", tmp_path / "maps")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["a-2.png", "a.png", "b.png", "c.png"]
    result = cli(photos / "a.png", "--weights", run, "--picture", tmp_path / "one.png", "--map", "attention")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.width > 1000
