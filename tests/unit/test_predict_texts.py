"""`openeva predict IMAGE --text ...`: a CLIP tells apart what a user writes."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner, Result

import openeva as package
from checkpoints.tiny_clip import randomised
from openeva.backbones import vit
from openeva.checkpoints.native import save_native
from openeva.cli import app
from openeva.config import validate
from openeva.data.views import normalise
from openeva.heads.clip import ClipConfig, ClipModel

TOWER = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2, "mlp_hidden": 64}
PAIR = {"embed_dim": 16, "text": {"width": 16, "num_heads": 2, "depth": 1}}
TEXTS = ["a photo of a cat", "a dog, at night", "the sea"]


def openeva(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", *[str(argument) for argument in arguments]])


def given(texts: list[str]) -> list[str]:
    return [part for text in texts for part in ("--text", text)]


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClipModel:
    """A CLIP in the folder `mine`, and two images."""
    monkeypatch.chdir(tmp_path)
    found = randomised(ClipModel(validate(ClipConfig, {"backbone": TOWER, **PAIR})), 0).eval()
    task = {"name": "clip", **found.config.model_dump(mode="json")}
    crop = {"kind": "center", "crop_pct": 1.0, "hflip": 0.0}
    save_native(Path("mine"), found.state_dict(), {"task": task, "val_crop": crop})
    for number in range(2):
        Image.linear_gradient("L").convert("RGB").resize((32, 32)).rotate(90 * number).save(f"{number}.png")
    return found


def expected(model: ClipModel, image: str, texts: list[str]) -> tuple[list[float], list[float]]:
    """Cosine and probability of each text, by hand."""
    statistics = model.backbone.normalisation
    pixels_BCYX = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None]
    with torch.no_grad():
        image_BE = model.encode_image(normalise(pixels_BCYX, statistics.mean, statistics.std))
        cosine_L = F.cosine_similarity(image_BE, model.encode_text(texts))
    return cosine_L.tolist(), (100 * cosine_L).softmax(0).tolist()


def test_texts_are_ranked(model: ClipModel) -> None:
    result = openeva("0.png", "1.png", "--weights", "mine", *given(TEXTS), "--json", "--precision", "fp32")
    assert result.exit_code == 0, result.output
    for record in json.loads(result.stdout):
        cosines, probabilities = expected(model, record["image"], TEXTS)
        order = sorted(range(3), key=lambda index: -probabilities[index])
        assert [guess["name"] for guess in record["top"]] == [TEXTS[index] for index in order]
        assert [guess["class"] for guess in record["top"]] == order
        for guess in record["top"]:
            assert guess["cosine"] == pytest.approx(cosines[guess["class"]], abs=2e-6)
            assert guess["probability"] == pytest.approx(probabilities[guess["class"]], abs=1e-4)


def test_table_and_csv_say_the_same() -> None:
    record = json.loads(openeva("0.png", "--weights", "mine", *given(TEXTS), "--json").stdout)[0]
    shown = openeva("0.png", "--weights", "mine", *given(TEXTS)).stdout
    rows = list(csv.DictReader(io.StringIO(openeva("0.png", "--weights", "mine", *given(TEXTS), "--csv").stdout)))
    assert [row["name"] for row in rows] == [guess["name"] for guess in record["top"]]
    for row, guess in zip(rows, record["top"], strict=True):
        assert float(row["cosine"]) == pytest.approx(guess["cosine"], abs=1e-5)
        assert f"{guess['probability']:.1%}" in shown
        assert f"{guess['cosine']:.3f}" in shown
    assert "softmax of 100 × cosine over the texts" in shown


def test_templates_a_file_of_texts_and_many_of_them(model: ClipModel) -> None:
    Path("texts.txt").write_text("\n".join(["a cat", "", " a dog ", *(f"thing {n}" for n in range(100))]))
    result = openeva("0.png", "--weights", "mine", "--texts", "texts.txt", "--text", "the sea", "--json")
    (record,) = json.loads(result.stdout)
    assert len(record["top"]) == 10
    assert sum(guess["probability"] for guess in record["top"]) < 1  # of all 103
    arguments = ("0.png", "--weights", "mine", *given(["cat", "dog"]), "--templates", "a photo of a {c}.", "--json")
    (record,) = json.loads(openeva(*arguments, "--precision", "fp32").stdout)
    cosines, _ = expected(model, "0.png", ["a photo of a cat.", "a photo of a dog."])
    assert {guess["name"]: guess["cosine"] for guess in record["top"]} == pytest.approx(
        dict(zip(("cat", "dog"), cosines, strict=True)), abs=2e-6
    )


def test_one_text_is_told_by_its_cosine() -> None:
    result = openeva("0.png", "--weights", "mine", "--text", " a cat ", "--text", "a cat")
    assert result.exit_code == 0, result.output
    assert "100.0%" in result.stdout
    assert "one text alone always has 100 %: its cosine says how near it is" in result.stdout


def test_of_a_long_text_the_beginning_counts(caplog: pytest.LogCaptureFixture) -> None:
    long = "word " * 100
    result = openeva("0.png", "--weights", "mine", "--text", long + "cat", "--text", long + "dog", "--json")
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.stdout)[0]["top"]
    assert first["cosine"] == second["cosine"]
    assert caplog.text.count("only the beginning of a text counts: 'word word") == 2
    assert "has 101 tokens, the model takes 75" in caplog.text


def test_a_picture_shows_where_a_text_is_seen() -> None:
    result = openeva("0.png", "1.png", "--weights", "mine", *given(TEXTS), "--picture", "pictures")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("pictures").iterdir()) == ["0.png", "1.png"]
    result = openeva("0.png", "--weights", "mine", "--features", "x.npz", "--picture", "one.png")
    assert result.exit_code == 2
    assert "give texts too (--text)" in result.stderr


def test_mistakes_are_told() -> None:
    tower = vit.Config(**TOWER).build()
    tensors = {f"backbone.{name}": value for name, value in tower.state_dict().items()}
    task = {"name": "pretrain", "backbone": tower.config.model_dump(mode="json")}
    save_native(Path("tower"), tensors, {"task": task})
    Path("empty.txt").write_text("\n")
    for arguments, said in (
        (["--weights", "mine", "--text", "a", "--text", " "], "text 2 is empty; write what may be seen"),
        (["--weights", "mine"], "these weights are a CLIP, which tells apart what you write: give texts"),
        (["--weights", "mine", "--templates", "simple"], "templates are what texts are put into; give texts too"),
        (["--weights", "mine", "--text", "a", "--templates", "a photo"], "no templates named 'a photo'"),
        (["--weights", "mine", "--texts", "empty.txt"], "empty.txt holds no text"),
        (["--weights", "mine", "--texts", "no.txt"], "no.txt"),
        (
            ["--weights", "tower", "--text", "a"],
            "weights 'tower' cannot be compared with texts: there is no text tower",
        ),
    ):
        result = openeva("0.png", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert said in result.stderr.replace("\n", " "), arguments
        assert "Traceback" not in result.stderr


def test_python_gives_the_same(model: ClipModel) -> None:
    (by_name,) = package.predict("0.png", weights="mine", texts=TEXTS, precision="fp32")
    (by_model,) = package.predict(Image.open("0.png"), weights=model, texts=TEXTS, precision="fp32")
    assert [guess.name for guess in by_name.top] == [guess.name for guess in by_model.top]
    with pytest.raises(ValueError, match="there is no text tower; give a CLIP"):
        package.predict("0.png", weights=vit.Config(**TOWER).build(), texts=TEXTS)
