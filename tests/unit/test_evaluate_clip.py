"""`openeva evaluate` of CLIP weights: tables, the JSON file, published numbers beside, notes and mistakes."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import datasets
from typer.testing import CliRunner, Result

from checkpoints.tiny_clip import randomised
from openeva import evaluate
from openeva.backbones import vit
from openeva.checkpoints.clip import to_clip
from openeva.checkpoints.files import write_state_dict
from openeva.checkpoints.native import save_native
from openeva.checkpoints.pretrained import VARIABLE
from openeva.cli import app
from openeva.config import validate
from openeva.evals.retrieval import Pairs, retrieval_metrics
from openeva.heads import clip
from openeva.heads.clip import ClipConfig, ClipModel
from openeva.inference.predictor import predict

TOWER = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2, "mlp_hidden": 64}
PAIR = {"embed_dim": 16, "text": {"width": 16, "num_heads": 2, "depth": 1}}
FAST = ["run.device=cpu", "run.precision=fp32", "evals.0.num_workers=0"]
COLOURS = ("red", "green", "blue", "white", "black", "orange", "purple")


def openeva(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a folder of classes and Karpathy's JSON of the same images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path / "cache"))
    listed = []
    for number in range(14):
        path = Path("images") / f"{COLOURS[number % 7]}_thing" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.linear_gradient("L").resize((40, 36)).convert("RGB").rotate(25 * number)
        Image.blend(image, Image.new("RGB", image.size, COLOURS[number % 7]), 0.6).save(path)
        raw = [f"{word} {COLOURS[number % 7]} {number}" for word in ("a", "the", "one")]
        split = "train" if number > 11 else "test"
        sentences = [{"raw": text} for text in raw]
        listed.append({"filename": path.name, "filepath": path.parent.name, "split": split, "sentences": sentences})
    Path("dataset_coco.json").write_text(json.dumps({"images": listed, "dataset": "coco"}))
    return tmp_path


@pytest.fixture
def weights() -> str:
    """A CLIP in openeva's format, with the whole vocabulary."""
    model = randomised(ClipModel(validate(ClipConfig, {"backbone": TOWER, **PAIR})), 0)
    save_native(Path("mine"), model.state_dict(), {"task": {"name": "clip", **model.config.model_dump(mode="json")}})
    return "mine"


@pytest.fixture
def released(here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Released weights of a family whose member is tiny."""
    name, variant = "EVA02_CLIP_B_psz16_s8B", "eva02_clip_b_16"
    values = clip.CLIP_VARIANTS[variant]
    small = {"backbone": {**values["backbone"], **TOWER}, **PAIR}
    monkeypatch.setitem(vit.VARIANTS, "eva02_b_14", {**vit.VARIANTS["eva02_b_14"], **TOWER})
    monkeypatch.setitem(clip.CLIP_VARIANTS, variant, small)
    model = randomised(ClipModel(validate(ClipConfig, {"variant": variant})), 0)
    write_state_dict(here / "released" / f"{name}.pt", to_clip(model.state_dict()))
    monkeypatch.setenv(VARIABLE, str(here / "released"))
    return name


# ---------------------------------------------------------------------------------------------------- what it says


def test_a_folder_of_classes(weights: str) -> None:
    result = openeva("evaluate", "evaluate/zeroshot_folder", "--weights", weights, "evals.0.source.roots=images", *FAST,
                     "--json", "result.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    for part in ("mean per class %", "image_folder", "published", "written: runs/evaluation-mine/evaluation.json"):
        assert part in result.stdout
    assert "note: image_folder: no templates of their own are at hand" in result.stdout.replace("\n", " ")
    written = json.loads(Path("result.json").read_text())
    assert written == json.loads(Path("runs/evaluation-mine/evaluation.json").read_text())
    assert written["weights"] == written["recipe"]["weights"] == "mine"
    (row,), metrics = written["zero_shot"], written["metrics"]
    assert set(metrics) == {f"zeroshot_{kind}" for kind in ("top1", "top5", "mean_class", "images")}
    assert (row["top1"], row["images"], row["published"]) == (100 * metrics["zeroshot_top1"], 14, None)
    assert (written["table"], written["retrieval"], len(written["notes"])) == ([], [], 1)
    assert "zeroshot_top1:" not in result.stdout  # the table says it
    # the same model asked for the same texts one image at a time
    names = [f"{colour} thing" for colour in sorted(COLOURS)]
    found = predict("images", weights=weights, texts=names, templates="imagenet", topk=1, precision="fp32")
    right = [one.top[0].name.split()[0] in one.source for one in found]
    assert metrics["zeroshot_top1"] == pytest.approx(sum(right) / 14)


def test_karpathys_test_images(weights: str) -> None:
    changes = ["evals.0.source.file=dataset_coco.json", "evals.0.source.root=images", "evals.0.prefix=coco_"]
    Path("mine.yaml").write_text(
        "extends: evaluate/retrieval\nevals: [{name: retrieval, source: {name: captions, split: test}}]"
    )
    result = openeva("evaluate", "mine.yaml", "--weights", weights, *changes, *FAST)
    assert result.exit_code == 0, result.output
    for part in ("coco image to text", "coco text to image", "median rank", "12 images, 36 captions: R@1"):
        assert part in result.stdout
    written = json.loads(Path("runs/evaluation-mine/evaluation.json").read_text())
    metrics = written["metrics"]
    assert (metrics["coco_retrieval_images"], metrics["coco_retrieval_captions"]) == (12, 36)
    assert [row["title"] for row in written["retrieval"]] == ["coco image to text", "coco text to image"]
    assert "coco_retrieval_i2t_r1:" not in result.stdout
    # by hand, from the features of the same model
    model = evaluate.open_model(weights, {"text"}).eval()
    assert isinstance(model, evaluate.ImageTextModel)
    listed = [one for one in json.loads(Path("dataset_coco.json").read_text())["images"] if one["split"] == "test"]
    views = torch.stack([view(model, Path("images") / one["filepath"] / one["filename"]) for one in listed])
    texts = [sentence["raw"] for one in listed for sentence in one["sentences"]]
    features = (F.normalize(found, dim=-1) for found in (model.encode_image(views), model.encode_text(texts)))
    expected = retrieval_metrics(Pairs(*features, torch.arange(36), torch.arange(36) // 3))
    assert {name: metrics[f"coco_retrieval_{name}"] for name in expected} == pytest.approx(expected)


def view(model: evaluate.ImageTextModel, path: Path) -> torch.Tensor:
    pixels_YXC = np.array(Image.open(path).convert("RGB"))
    crop = model.crop.draw(*pixels_YXC.shape[:2], random.Random(0))
    return model.crop.cut(pixels_YXC, crop, model.backbone.image_size)


def test_released_weights_stand_beside_their_published_numbers(released: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cifar:
        def __init__(self, root: Path, train: bool = True, download: bool = False) -> None:
            self.classes, self.targets = list(COLOURS), list(range(7))

        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (32, 32), COLOURS[index]), index

    monkeypatch.setattr(datasets, "CIFAR10", Cifar)
    Path("cifar").mkdir()
    captions = {"name": "captions", "file": "dataset_coco.json", "root": "images", "split": "test"}
    evals = [
        {"name": "zeroshot", "roots": {"cifar10": "cifar"}, "num_workers": 0},
        {"name": "retrieval", "source": captions, "prefix": "coco_", "num_workers": 0},
    ]
    Path("mine.yaml").write_text(json.dumps({"weights": "EVA02-B-16:merged2b_s8b_b131k", "evals": evals}))
    for name in (released, None):  # by the official name, and by open_clip's of the recipe
        result = openeva("evaluate", "mine.yaml", *(["--weights", name] if name else []), *FAST)
        assert result.exit_code == 0, result.output
        written = json.loads(next(Path("runs").glob("*/evaluation.json")).read_text())
        assert [row["published"] for row in written["zero_shot"]] == [98.46, 98.46]  # CIFAR-10, mean of one
        assert written["retrieval"][1]["published"] == [None, 66.9, None]
        assert "98.46" in result.stdout
        assert "– / 66.90 / –" in result.stdout
        assert "note: not measured: ImageNet-1K (no folder given)" in result.stdout.replace("\n", " ")


# ------------------------------------------------------------------------------------------------------- mistakes


def test_weights_without_a_text_tower_are_refused() -> None:
    model = vit.Config(**TOWER).build()
    tensors = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    task = {"name": "pretrain", "backbone": model.config.model_dump(mode="json")}
    save_native(Path("tower"), tensors, {"task": task})
    result = openeva("evaluate", "evaluate/zeroshot_folder", "--weights", "tower", "evals.0.source.roots=images", *FAST)
    assert result.exit_code == 2
    assert "weights tower hold no text tower, which zero-shot classification and retrieval need" in result.stderr
    assert not Path("runs").exists()


FOLDER = {"name": "image_folder", "roots": "images", "labels": True}


@pytest.mark.parametrize(
    ("evals", "said"),
    [
        ([{"name": "zeroshot"}], "zeroshot is measured on the images of a run"),
        ([{"name": "retrieval"}], "retrieval is measured on the images of a run"),
        ([{"name": "retrieval", "source": FOLDER}], "source image_folder has no captions"),
        ([{"name": "zeroshot", "source": FOLDER}, {"name": "topk", "source": FOLDER}], "one recipe for each"),
        ([{"name": "zeroshot", "source": FOLDER}] * 2, "give each a `prefix` of its own"),
        ([{"name": "zeroshot", "source": FOLDER, "class_names": ["a"]}], "has 1 names, but the images have 7 classes"),
        ([{"name": "zeroshot", "source": FOLDER, "templates": "no.txt"}], "there is no file no.txt"),
        ([{"name": "zeroshot", "roots": {"cifar10": "nowhere"}}], "CIFAR-10: nowhere does not exist"),
    ],
)
def test_mistakes_are_one_message(evals: list[dict[str, Any]], said: str, weights: str) -> None:
    Path("mine.yaml").write_text(json.dumps({"weights": weights, "evals": evals}))
    result = openeva("evaluate", "mine.yaml", "run.device=cpu")
    assert result.exit_code == 2, result.output
    assert said in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not Path("runs").exists()


def test_a_clip_is_no_classifier(weights: str) -> None:
    Path("mine.yaml").write_text(json.dumps({"weights": weights, "evals": [{"name": "topk", "source": FOLDER}]}))
    result = openeva("evaluate", "mine.yaml", "run.device=cpu")
    assert result.exit_code == 2
    assert "a CLIP is measured by evaluate/zeroshot_suite and evaluate/retrieval" in result.stderr


@pytest.mark.parametrize("recipe", ["evaluate/retrieval", "evaluate/zeroshot_folder"])
def test_the_folder_of_imagenet_is_for_its_sets(recipe: str) -> None:
    result = openeva("evaluate", recipe, "--imagenet", "images")
    assert result.exit_code == 2
    assert f"which the first evaluation of {recipe} does not measure" in result.stderr
    result = openeva("evaluate", "evaluate/zeroshot_suite", "--imagenet", "images")
    assert "ImageNet-1K: no folder imagenet-1k or imagenet or ILSVRC2012 in images" in result.stderr
