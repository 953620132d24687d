"""Exported models compute what the model computes, or are not there; model cards say what is so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import openeva
from openeva import export
from openeva.backbones.vit import Config, VisionTransformer
from openeva.checkpoints.native import read_native, save_native
from openeva.cli import app
from openeva.data.views import normalise
from openeva.export import ExportError, export_model, exported_metadata
from openeva.heads.classifier import ImageClassifier
from openeva.models import transforms_for

SIZE = 32
SIZES = {"image_size": SIZE, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 48}


def backbone(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(Config(**{**SIZES, "init_std": 0.2, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at its neutral value: forgotten tensors must show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def classifier(pooling: str = "mean", **changes: Any) -> ImageClassifier:
    model = ImageClassifier(backbone(final_norm=pooling == "cls", **changes), 5, pooling=pooling)
    nn.init.normal_(model.classifier.weight)
    return model.eval()


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


EVA_02 = {"rope_grid": 4, "mlp": "swiglu", "sub_norm": "mlp", "positions": "none"}


@pytest.mark.parametrize(
    ("pooling", "changes", "expects"),
    [
        ("cls", {"relative_position": "shared", "layer_scale": 0.5}, "normalised"),
        ("mean", EVA_02, "uint8"),
        ("attention", {"image_size": (32, 48), "norm_order": "post"}, "unit"),
        ("mean", {"num_frames": 4, "tubelet": 2}, "uint8"),
    ],
)
def test_onnx_takes_any_batch_and_gives_the_models_logits(
    tmp_path: Path, pooling: str, changes: dict[str, Any], expects: Any
) -> None:
    model = classifier(pooling, **changes)
    result = export_model(model, tmp_path / "m.onnx", expects=expects)
    assert result.files == [tmp_path / "m.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    frames = [] if model.backbone.num_frames is None else [model.backbone.num_frames]
    assert session.get_inputs()[0].shape == ["batch", *frames, 3, *model.backbone.image_size]
    given, expected = pixels_and_logits(model, expects)
    torch.testing.assert_close(run_file(tmp_path / "m.onnx", given), expected, rtol=1e-3, atol=1e-3)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["openeva"])
    assert facts == exported_metadata(tmp_path / "m.onnx")
    assert facts["expects"] == expects
    assert facts["class_names"] == ["0", "1", "2", "3", "4"]
    assert facts["mean"] == pytest.approx(list(model.backbone.normalisation.mean))


def test_torch_programs_take_any_batch_and_bytes(tmp_path: Path) -> None:
    model = classifier(**EVA_02)
    export_model(model, tmp_path / "m.pt2", expects="uint8")
    given, expected = pixels_and_logits(model, "uint8")
    torch.testing.assert_close(run_file(tmp_path / "m.pt2", given), expected)
    assert exported_metadata(tmp_path / "m.pt2")["expects"] == "uint8"


def pixels_and_logits(model: ImageClassifier, expects: str) -> tuple[Tensor, Tensor]:
    """Random input of an exported program, and what the model says about it."""
    statistics = model.backbone.normalisation
    frames = [] if model.backbone.num_frames is None else [model.backbone.num_frames]
    pixels = torch.randint(0, 256, (4, *frames, 3, *model.backbone.image_size), dtype=torch.uint8)
    normalised = normalise(pixels, statistics.mean, statistics.std)
    with torch.no_grad():
        return {"uint8": pixels, "unit": pixels / 255, "normalised": normalised}[expects], model(normalised)


def run_file(file: Path, image: Tensor) -> Tensor:
    if file.suffix == ".onnx":
        return torch.from_numpy(onnxruntime.InferenceSession(file).run(["logits"], {"image": image.numpy()})[0])
    return torch.export.load(file).module()(image)[0].detach()


def test_a_backbone_gives_pooled_and_patches(tmp_path: Path) -> None:
    model = backbone(depth=1)
    export_model(model, tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    image = torch.randn(5, 3, SIZE, SIZE)
    pooled, patches = program(image)
    expected = model(image)
    torch.testing.assert_close(pooled, expected.pooled)
    torch.testing.assert_close(patches, expected.patches)


@pytest.mark.parametrize("wrong", ["value", "shape", "nan", "crash"])
def test_a_program_that_computes_something_else_is_an_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    model = classifier()

    def broken_export(program: Any, path: Path) -> Any:
        path.write_text("a file that must not stay")

        def call(image: Tensor) -> list[np.ndarray]:
            logits = program(image)[0].detach().numpy()
            if wrong == "crash":
                raise RuntimeError("Got invalid dimensions")
            return [{"value": logits + 0.5, "shape": logits[:1, :2], "nan": logits * np.nan}[wrong]]

        return call

    monkeypatch.setattr(export, "_to_onnx", broken_export)
    message = {"value": r"differs from the model's by 0\.5", "shape": "has shape", "nan": "nan", "crash": "dimensions"}
    with pytest.raises(ExportError, match=message[wrong]):
        export_model(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_small_outputs_are_compared_by_their_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier()
    with torch.no_grad():  # as fresh heads are
        model.classifier.weight.mul_(1e-4)
        model.classifier.bias.zero_()
    assert model(torch.randn(1, 3, SIZE, SIZE)).abs().max() < 1e-2
    monkeypatch.setattr(export, "_to_onnx", lambda one, _: lambda image: [1.01 * one(image)[0].detach().numpy()])
    with pytest.raises(ExportError, match="differs from the model's"):
        export_model(model, tmp_path / "m.onnx")


def test_weights_come_back_as_the_same_model(tmp_path: Path) -> None:
    model = classifier(**EVA_02)
    export_model(model, tmp_path / "folder", "safetensors")
    export_model(model, tmp_path / "m.safetensors")
    image = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(openeva.load_checkpoint(str(tmp_path / "folder"))(image), expected, rtol=0, atol=0)
    assert transforms_for(openeva.load_checkpoint(str(tmp_path / "folder"))) == transforms_for(model)
    state_dict, config = read_native(tmp_path / "folder")
    assert config["task"]["name"] == "classify"
    assert all(torch.equal(tensor, state_dict[key]) for key, tensor in model.state_dict().items())


def test_size_and_names_of_a_run_are_kept(tmp_path: Path) -> None:
    model = classifier()
    names = ["a", "b", "c", "d", "é"]
    task = {
        "name": "classify", "backbone": model.backbone.config.model_dump(mode="json"), "num_classes": 5,
        "class_names": names, "pooling": "mean", "batch_norm": False, "smoothing": 0.2,
    }  # fmt: skip
    save_native(tmp_path / "run" / "model", model.state_dict(), {"task": task, "step": 7})
    result = cli("export", tmp_path / "run", tmp_path / "m.pt2", "--image-size", "48", "--input", "uint8")
    assert result.exit_code == 0, result.output
    assert "image [batch, 3, 48, 48] (uint8, RGB) -> logits" in result.stdout
    assert exported_metadata(tmp_path / "m.pt2")["class_names"] == names
    export_model(str(tmp_path / "run"), tmp_path / "copy", "safetensors", image_size=48)
    _, config = read_native(tmp_path / "copy")
    assert (config["step"], config["task"]["smoothing"], config["task"]["class_names"]) == (7, 0.2, names)
    assert config["task"]["backbone"]["image_size"] == 48


def test_kinds_and_endings_must_fit(tmp_path: Path) -> None:
    for out, to, expects, message in (
        ("m.bin", None, "normalised", "must end in .onnx, .pt2, .safetensors"),
        ("m.pt2", "onnx", "normalised", "must end in .onnx for onnx"),
        ("m.pt2", "safetensors", "normalised", "or be a folder"),
        ("m.safetensors", None, "uint8", "weights only"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(classifier(), tmp_path / out, to, expects=expects)
    assert not list(tmp_path.iterdir())


def test_large_programs_bring_their_weights_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 2 GB, ONNX keeps weights beside the program; the program finds them under the name they end up with."""
    from torch.onnx import ONNXProgram

    save = ONNXProgram.save
    monkeypatch.setattr(ONNXProgram, "save", lambda self, path: save(self, path, external_data=True))
    model = classifier()
    result = export_model(model, tmp_path / "m.onnx")
    assert result.files == [tmp_path / "m.onnx", tmp_path / "m.onnx.data"]
    image = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(run_file(tmp_path / "m.onnx", image), model(image), rtol=1e-3, atol=1e-3)
