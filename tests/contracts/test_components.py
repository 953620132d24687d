"""What every component promises, for every file in the component folders.

A new component is tested here as soon as its file exists. One that cannot be built from its defaults, or is large by
default, gets small arguments in `SMALL`; a key `name+words` there is one more configuration of the component.
"""

import importlib
import inspect
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from e2e.imagenet_sets import V2_FOLDER, Colours, write_sets
from e2e.videos import write_video
from openeva.backbones.base import Backbone, Features
from openeva.config import ComponentConfig, component_config, dump_yaml, parse_yaml, validate
from openeva.data.batches import pixels_of_sample
from openeva.data.loader import DataConfig, EvalLoader, TrainLoader
from openeva.data.sources.base import Source, SourceConfig, StreamSource
from openeva.evals.base import Evaluation, needs_of
from openeva.registry import FOLDERS, component_names
from openeva.targets.base import Target
from openeva.tasks.base import Task

VIT = {"name": "vit", "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 64}
CLIP = {"backbone": VIT, "embed_dim": 16, "text": {"width": 16, "num_heads": 2, "depth": 1}}
CONVNET = {"name": "timm", "model": "resnet10t", "weights": "random", "image_size": 64, "layer": -2}


def _folder_of_images(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for number in range(4):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(path)
    return {"roots": [folder], "labels": True}


def _list_of_images(folder: Path) -> dict[str, Any]:
    _folder_of_images(folder)
    file = folder / "labels.csv"
    file.write_text("".join(f"{p.relative_to(folder)},{p.parent.name}\n" for p in sorted(folder.rglob("*.png"))))
    return {"file": file}


def _captioned_images(folder: Path) -> dict[str, Any]:
    _folder_of_images(folder)
    file = folder / "captions.csv"
    file.write_text("".join(f"{p.relative_to(folder)},image {p.stem}\n" for p in sorted(folder.rglob("*.png"))))
    return {"file": file}


def _texts_beside_images(folder: Path) -> dict[str, Any]:
    _folder_of_images(folder)
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"image {path.stem}")
    return {"root": folder}


def _saved_data_set(folder: Path) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    _folder_of_images(folder)
    paths = sorted(map(str, folder.rglob("*.png")))
    data = datasets.Dataset.from_dict({"image": paths, "text": paths}).cast_column("image", datasets.Image())
    data.save_to_disk(folder / "saved")
    return {"dataset": str(folder / "saved")}


def _shards(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for number in range(3):
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(image, "png")
                for suffix, content in (("png", image.getvalue()), ("cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{shard}{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return {"shards": str(folder / "{000000..000001}.tar"), "num_classes": 3}


def _eurosat(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for number in range(4):
        path = folder / "eurosat" / "2750" / ("Forest", "River")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    return {"root": folder}


def _clip_benchmark(folder: Path) -> dict[str, Any]:
    pytest.importorskip("clip_benchmark.datasets.builder", exc_type=ImportError)
    return {**_eurosat(folder), "dataset": "eurosat"}


def _videos(folder: Path, num_videos: int = 4) -> dict[str, Any]:
    for number in range(num_videos):
        path = folder / f"class{number % 2}" / f"{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, [20 * number + frame for frame in range(9)])
    return {"root": folder}


def _listed_videos(folder: Path) -> dict[str, Any]:
    _videos(folder)
    file = folder / "list.txt"
    paths = sorted(folder.rglob("*.mp4"))
    file.write_text("".join(f"{path.relative_to(folder)} {number % 2}\n" for number, path in enumerate(paths)))
    return {"file": file}


SMALL: dict[tuple[str, str], dict[str, Any] | Callable[[Path], dict[str, Any]]] = {
    ("backbone", "vit"): VIT,
    ("backbone", "vit+post norm, relative positions"): {**VIT, "norm_order": "post", "relative_position": "shared"},
    ("backbone", "timm"): CONVNET,
    ("backbone", "timm+transformer"): {"model": "vit_tiny_patch16_224", "weights": "random", "image_size": 32},
    ("backbone", "open_clip"): {"model": "ViT-M-32-alt", "pretrained": "random", "image_size": 64},
    ("target", "features"): {"teacher": CONVNET},
    ("task", "pretrain"): {
        "backbone": VIT,
        "target": {"name": "features", "teacher": CONVNET},
        "masking": {"name": "random", "ratio": 0.4},
    },
    ("task", "classify"): {"backbone": VIT, "num_classes": 8},
    ("task", "clip"): CLIP,
    ("task", "video"): {"backbone": {**VIT, "num_frames": 4, "tubelet": 2}, "num_classes": 8},
    ("task", "clip+sigmoid loss"): {**CLIP, "loss": "sigmoid"},
    ("eval", "linear_probe"): {"folds": 2, "max_iterations": 20},
    ("eval", "robustness"): lambda folder: {"roots": write_sets(folder), "allow_incomplete": True, "num_workers": 0},
    ("source", "clip_benchmark"): _clip_benchmark,
    ("source", "torchvision"): lambda folder: {**_eurosat(folder), "dataset": "EuroSAT"},
    ("source", "video_folder"): _videos,
    ("source", "video_list"): _listed_videos,
    ("source", "captions"): _captioned_images,
    ("source", "captions+texts beside images"): _texts_beside_images,
    ("source", "huggingface"): _saved_data_set,
    ("source", "image_folder"): _folder_of_images,
    ("source", "imagenet"): lambda folder: {"set": "v2", "root": write_sets(folder) / V2_FOLDER},
    ("source", "imagenet+objectnet"): lambda folder: {
        "set": "objectnet",
        "root": write_sets(folder) / "objectnet-1.0",
        "crop_border": True,
        "own_classes": True,
    },
    ("source", "image_list"): _list_of_images,
    ("source", "scenes"): {"num_images": 8},
    ("source", "webdataset"): _shards,
    ("source", "webdataset+stream"): lambda folder: {**_shards(folder), "stream": True, "samples_per_epoch": 6},
}

ALL = [(kind, name) for kind in FOLDERS for name in component_names(kind)]


def names(kind: str) -> Any:
    more = [name for known, name in SMALL if known == kind and "+" in name]
    return pytest.mark.parametrize("name", sorted([*component_names(kind), *more]))


def small_config(kind: str, name: str, folder: Path) -> ComponentConfig:
    arguments = SMALL.get((kind, name), {})
    if callable(arguments):
        arguments = arguments(folder)
    component = name.partition("+")[0]
    return validate(
        component_config(kind, component), {**arguments, "name": component}, where=f"SMALL of {kind} {name}"
    )


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.manual_seed(0)
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path_factory.mktemp("cache")))


# ---------------------------------------------------------------------------------------------- all kinds


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_a_component_is_a_described_file_with_a_config_of_its_name(kind: str, name: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"{FOLDERS[kind]}.{name}")
    first_line = (module.__doc__ or "").partition("\n")[0]
    assert first_line.endswith((".", "):")), "the first line of the module's docstring is shown by `openeva list`"
    config_class = component_config(kind, name)
    assert config_class.model_fields["name"].default == name
    assert "build" in vars(config_class), "the config builds its component"
    assert inspect.getdoc(config_class.build)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_a_config_survives_yaml_and_refuses_unknown_keys(kind: str, name: str, tmp_path: Path) -> None:
    config = small_config(kind, name, tmp_path)
    assert type(config).model_validate(parse_yaml(dump_yaml(config))) == config
    with pytest.raises(ValueError, match="no_such_key"):
        type(config).model_validate({**config.model_dump(), "no_such_key": 1})


# ---------------------------------------------------------------------------------------------- backbones


@pytest.fixture
def backbone(name: str, tmp_path: Path) -> Backbone:
    return small_config("backbone", name, tmp_path).build().eval()


@names("backbone")
@torch.no_grad()
def test_a_backbone_gives_features_of_the_promised_shapes(backbone: Backbone) -> None:
    image_BCYX = torch.randn(2, 3, *backbone.image_size)
    features = backbone(image_BCYX, layers=(0, -1))
    assert isinstance(backbone, Backbone)
    assert isinstance(features, Features)
    rows, columns = features.grid
    assert features.grid == (backbone.image_size[0] // backbone.stride, backbone.image_size[1] // backbone.stride)
    assert features.patches.shape == (2, rows * columns, backbone.width)
    assert features.pooled.shape[0] == 2
    assert features.pooled.ndim == 2
    assert torch.isfinite(features.patches).all()
    assert set(features.pyramid) == {0, -1}
    assert all(layer.shape[0] == 2 and layer.ndim == 4 for layer in features.pyramid.values())


@names("backbone")
@torch.no_grad()
def test_a_backbone_treats_each_image_alone_and_always_the_same(backbone: Backbone) -> None:
    image_BCYX = torch.randn(3, 3, *backbone.image_size)
    together, alone = backbone(image_BCYX).patches, backbone(image_BCYX[1:2]).patches
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(together, backbone(image_BCYX).patches)


@names("backbone")
@torch.no_grad()
def test_patches_come_in_raster_order(backbone: Backbone) -> None:
    """Where the image changes most is where features change most: rows first, then columns."""
    rows, columns = backbone.image_size[0] // backbone.stride, backbone.image_size[1] // backbone.stride
    if rows * columns < 4:
        pytest.skip("a grid too small to tell")
    image_BCYX = torch.randn(1, 3, *backbone.image_size)
    changed_BCYX = image_BCYX.clone()
    y, x = 0, columns - 1
    s = backbone.stride
    changed_BCYX[:, :, y * s : (y + 1) * s, x * s : (x + 1) * s] += 3 * torch.randn(1, 3, s, s)
    moved_N = (backbone(changed_BCYX).patches - backbone(image_BCYX).patches).norm(dim=-1)[0]
    assert moved_N.argmax() == y * columns + x


@names("backbone")
@torch.no_grad()
def test_a_backbone_hides_masked_patches_or_refuses_a_mask(backbone: Backbone) -> None:
    image_BCYX = torch.randn(1, 3, *backbone.image_size)
    num_patches = backbone(image_BCYX).patches.shape[1]
    mask_BN = torch.zeros(1, num_patches, dtype=torch.bool)
    if not hasattr(backbone, "mask_token"):
        with pytest.raises(ValueError, match="mask"):
            backbone(image_BCYX, mask_BN)
        return
    assert torch.equal(backbone(image_BCYX, mask_BN).patches, backbone(image_BCYX).patches)
    mask_BN[0, 1] = True
    s = backbone.stride
    changed_BCYX = image_BCYX.clone()
    changed_BCYX[:, :, :s, s : 2 * s] = 100.0
    assert torch.equal(backbone(changed_BCYX, mask_BN).patches, backbone(image_BCYX, mask_BN).patches)
    assert not torch.equal(backbone(changed_BCYX).patches, backbone(image_BCYX).patches)


@names("backbone")
def test_a_backbone_says_who_it_is_and_what_it_costs(name: str, backbone: Backbone, tmp_path: Path) -> None:
    parameters = sum(p.numel() for p in backbone.parameters())
    assert backbone.identity
    assert backbone.num_layers >= 1
    assert backbone.flops() > 2 * parameters / 10, "every weight of a dense model is used at least once"
    assert backbone.no_weight_decay() <= {name for name, _ in backbone.named_parameters()}
    if "seed" in small_config("backbone", name, tmp_path).model_dump():
        config = small_config("backbone", name, tmp_path)
        assert config.build().identity == backbone.identity
        other = type(config).model_validate({**config.model_dump(), "seed": 1})
        assert other.build().identity != backbone.identity, "other weights, same identity"


# ---------------------------------------------------------------------------------------------- targets


@names("target")
def test_a_target_gives_one_vector_per_patch_without_gradient(name: str, tmp_path: Path) -> None:
    target = small_config("target", name, tmp_path).build((3, 2))
    assert isinstance(target, Target)
    image_BCYX = torch.randn(2, 3, *target.view.image_size)
    vectors_BNV = target(image_BCYX)
    assert vectors_BNV.shape == (2, 6, target.width)
    assert vectors_BNV.dtype == torch.float32
    assert not vectors_BNV.requires_grad
    assert not any(p.requires_grad for p in target.parameters())
    assert target.identity
    assert target.flops() >= 0


@names("target")
def test_the_loss_of_a_target_is_least_for_the_target_and_ignores_padding(name: str, tmp_path: Path) -> None:
    target = small_config("target", name, tmp_path).build((3, 2))
    target_MV = target(torch.randn(2, 3, *target.view.image_size)).flatten(0, 1)
    right = target.loss(target_MV, target_MV)
    predicted_MV = (target_MV + 0.3 * target_MV.std() * torch.randn_like(target_MV)).requires_grad_()
    near = target.loss(predicted_MV, target_MV)
    far = target.loss(torch.randn_like(target_MV), target_MV)
    assert right < near < far
    near.backward()
    assert predicted_MV.grad is not None
    assert predicted_MV.grad.abs().sum() > 0

    weight_M = torch.ones(len(target_MV))
    weight_M[8:] = 0.0
    garbage_MV = predicted_MV.detach().clone()
    garbage_MV[8:] = 100.0
    expected = target.loss(predicted_MV[:8], target_MV[:8])
    torch.testing.assert_close(target.loss(garbage_MV, target_MV, weight_M), expected)


# ---------------------------------------------------------------------------------------------- sources


@names("source")
def test_a_source_reads_images_by_number_in_any_process(name: str, tmp_path: Path) -> None:
    config = small_config("source", name, tmp_path)
    assert isinstance(config, SourceConfig)
    source = config.build()
    if isinstance(source, StreamSource):
        pytest.skip("a stream: see the next test")
    assert isinstance(source, Source)
    assert len(source) > 1
    worker = pickle.loads(pickle.dumps(source))
    assert len(worker) == len(source)
    for index in (0, 1, len(source) - 1):
        sample = source.read(index)
        assert sample.name
        assert -1 <= sample.label < max(source.num_classes, 1)
        pixels = pixels_of_sample(sample)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        again = worker.read(index)
        assert (again.name, again.label, again.image) == (sample.name, sample.label, sample.image)
    assert source.read(0).name != source.read(1).name


@names("source")
def test_the_readers_of_a_stream_share_it_without_overlap(name: str, tmp_path: Path) -> None:
    source = small_config("source", name, tmp_path).build()
    if not isinstance(source, StreamSource):
        pytest.skip("not a stream")
    parts = [[s.name for s in source.stream(epoch=0, seed=0, part=part, num_parts=2)] for part in range(2)]
    whole = [s.name for s in source.stream(epoch=0, seed=0, part=0, num_parts=1)]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    assert len(set(whole)) == len(whole)


# ---------------------------------------------------------------------------------------------- tasks and evals


def scenes(num_images: int) -> Any:
    data = DataConfig.model_validate({"train": [{"name": "scenes", "num_images": num_images, "captions": True}]})
    return data.open()[0], data.crop


@pytest.fixture
def task(name: str, tmp_path: Path) -> Task:
    return small_config("task", name, tmp_path).build()


@pytest.fixture
def samples(task: Task, tmp_path: Path) -> Callable[[int], Any]:
    """What the task sees, so many of them, and a crop."""
    if task.view_spec(train=True).clip is None:
        return scenes

    def videos(number: int) -> Any:
        (tmp_path / "videos").mkdir()
        source = {"name": "video_folder", **_videos(tmp_path / "videos", number)}
        data = DataConfig.model_validate({"train": [source]})
        return data.open()[0], data.crop

    return videos


def micro_batches(task: Task, samples: Callable[[int], Any], number: int) -> list[dict[str, Any]]:
    data, crop = samples(4 * number)
    loader = TrainLoader(data, task.view_spec(train=True), crop, batch_size=4, accumulation=number)
    return next(iter(loader.batches(0)))


def gradients(task: Task) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in task.named_parameters() if p.grad is not None}


@names("task")
def test_a_task_learns_only_with_its_trainable_part(task: Task, samples: Callable[[int], Any]) -> None:
    task.train()
    loss, scalars = task(micro_batches(task, samples, 1)[0])
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert not any(value.requires_grad for value in scalars.values())
    loss.backward()
    learning = set(gradients(task))
    assert learning
    assert all(key.startswith("trainable.") for key in learning)


@names("task")
def test_micro_batches_of_a_task_are_one_batch_or_have_the_gradient_of_their_mean_loss(
    task: Task, samples: Callable[[int], Any]
) -> None:
    task.eval()  # no stochastic depth
    batches = micro_batches(task, samples, 2)
    parts = [joined(batches)] if task.joint_loss else batches
    losses = []
    for batch in parts:
        loss = task(batch)[0]
        (loss / len(parts)).backward()
        losses.append(loss.detach())
    expected = gradients(task)
    task.zero_grad()
    loss, _ = task.forward_backward(batches, lambda value: value.backward())
    torch.testing.assert_close(loss, sum(losses) / len(parts))
    for key, value in gradients(task).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)  # torch 2.11: 3e-5


def joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of several; texts filled up to the longest."""
    longest = max(batch["text"].shape[1] for batch in batches)
    for batch in batches:
        batch["text"] = torch.nn.functional.pad(batch["text"], (0, longest - batch["text"].shape[1]))
    return {
        key: torch.cat([batch[key] for batch in batches])
        for key, value in batches[0].items()
        if isinstance(value, Tensor)
    }


@names("task")
def test_a_task_can_be_measured_and_recorded(task: Task, samples: Callable[[int], Any]) -> None:
    data, crop = samples(6)
    task.eval()
    loader = EvalLoader(data, task.view_spec(train=False), crop, batch_size=4)
    first, second = task.evaluate(loader), task.evaluate(loader)
    assert first
    assert first == second
    assert all(isinstance(value, float) and np.isfinite(value) for value in first.values())
    assert json.loads(json.dumps(task.identity())) == task.identity()
    assert task.flops_per_sample() > 0
    assert isinstance(task.backbone, Backbone)


@names("eval")
def test_an_evaluation_gives_finite_numbers(name: str, tmp_path: Path) -> None:
    evaluation = small_config("eval", name, tmp_path).build()
    assert isinstance(evaluation, Evaluation)
    kind = "clip" if "text" in needs_of(evaluation) else "pretrain"
    task: Any = Colours() if "logits" in needs_of(evaluation) else small_config("task", kind, tmp_path).build()
    task.eval()
    data, crop = scenes(64)
    loader = EvalLoader(data, task.view_spec(train=False), crop, batch_size=16)
    metrics = evaluation.run(task, {"train": loader, "val": loader})
    assert metrics
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())
    assert metrics == evaluation.run(task, {"train": loader, "val": loader})
