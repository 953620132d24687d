"""Classes as texts: the published lists of templates, what a user gives instead, and the classifier made of them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openeva.text import prompts
from openeva.text.prompts import fill, in_words, read_class_names, read_templates, templates_for, zero_shot_classifier

COUNTS = {
    "plain": 1, "simple": 1, "imagenet": 80, "cifar10": 18, "cifar100": 18, "ucf101": 48, "kinetics400": 28,
    "kinetics600": 28, "kinetics700": 28,
}  # fmt: skip
DIGESTS = {
    "imagenet": "c078f4d4ced9",
    "cifar10": "1762a3675d32",
    "cifar100": "1762a3675d32",
    "ucf101": "4429939c0c35",
    "kinetics700": "18835ff550e4",
}
"""Of the whole lists: those of ImageNet and CIFAR as clip_benchmark 1.6.2 has them."""


@pytest.fixture
def clip_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of this name that has the data files of the real one, and code that must not be run."""
    folder = tmp_path / "clip_benchmark"
    (folder / "datasets").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    content = {"templates": {"food101": ["a photo of {c}, a type of food."]}, "classnames": {"mnist": ["0", "1"]}}
    names = {"templates": "en_zeroshot_classification_templates.json", "classnames": "en_classnames.json"}
    for kind, name in names.items():
        (folder / "datasets" / name).write_text(json.dumps(content[kind]))
    monkeypatch.syspath_prepend(tmp_path)
    prompts._clip_benchmark.cache_clear()
    yield
    prompts._clip_benchmark.cache_clear()


# -------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_the_published_lists(name: str, count: int) -> None:
    templates = templates_for(name)
    assert len(set(templates)) == len(templates) == count
    assert read_templates(name) == templates  # each has one place for the class
    digest = hashlib.sha256("\n".join(templates).encode()).hexdigest()[:12]
    assert DIGESTS.get(name, digest) == digest


def test_other_data_sets_have_the_templates_of_clip_benchmark(clip_benchmark: None) -> None:
    assert templates_for("food101") == ("a photo of {c}, a type of food.",)
    assert prompts.has_templates("food101")
    assert not prompts.has_templates("pets")
    assert prompts.benchmark_class_names("mnist") == ["0", "1"]
    assert prompts.benchmark_class_names("pets") is None


@pytest.mark.parametrize(("name", "said"), [("imagnet", "did you mean 'imagenet'"), ("food", "pip install clip-bench")])
def test_unknown_lists_are_told(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        templates_for(name)


def test_templates_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("an X-ray of {c}\n\n  a scan of {} \n")
    (tmp_path / "some.json").write_text(json.dumps(["a {c}"]))
    assert read_templates("a painting of {c}") == ("a painting of {c}",)
    assert read_templates(["a {}", "the {c}"]) == ("a {}", "the {c}")
    assert read_templates(str(tmp_path / "some.txt")) == ("an X-ray of {c}", "a scan of {}")
    assert read_templates(tmp_path / "some.json") == ("a {c}",)


def test_wrong_templates_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "other.json").write_text("{}")
    for given, said in (
        (["a cat"], "'a cat' needs one place"), (["{c} or {c}"], "needs one place"), ([], "no templates"),
        ("nowhere.txt", "no file nowhere.txt"), (tmp_path / "empty.txt", "no templates"),
        (tmp_path / "broken.json", "not valid JSON"), (tmp_path / "other.json", "not a JSON list"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            read_templates(given)


# ------------------------------------------------------------------------------------------------ class names


def test_class_names_of_a_user(tmp_path: Path) -> None:
    known = ["tabby_cat", "n01", "T-shirt"]
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    (tmp_path / "names.json").write_text(json.dumps({"n01": "a fish"}))
    assert (
        read_class_names(["a", "b", "c"], known) == read_class_names(tmp_path / "names.txt", known) == ["a", "b", "c"]
    )
    assert read_class_names(str(tmp_path / "names.json"), known) == ["tabby cat", "a fish", "T-shirt"]
    assert read_class_names({"n01": "a fish"}, known, ["x", "y", "z"]) == ["x", "a fish", "z"]


def test_wrong_class_names_are_told() -> None:
    with pytest.raises(ValueError, match="has 1 names, but the images have 2 classes"):
        read_class_names(["a"], ["cat", "dog"])
    with pytest.raises(ValueError, match="renames cta, which the images do not have; did you mean 'cat'"):
        read_class_names({"cta": "a cat"}, ["cat", "dog"])


@pytest.mark.parametrize(
    ("folder", "said"),
    [("golden_retriever", "golden retriever"), ("ApplyEyeMakeup", "Apply Eye Makeup"), ("air drumming", "air drumming"),
     ("TV_set", "TV set"), ("aquarium+fish", "aquarium fish")],
)  # fmt: skip
def test_folders_in_words(folder: str, said: str) -> None:
    assert in_words(folder) == said


# ------------------------------------------------------------------------------------------------- classifier


class Letters:
    """Texts -> how often each of some letters is in them, plus the length; counts what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        return torch.tensor([[len(text), *(text.count(letter) for letter in "abcdefgho")] for text in texts]).float()


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_a_class_is_the_normalised_mean_of_its_normalised_texts(batch_size: int) -> None:
    names, templates, encode = ["cat", "dog", "fish", "cat"], ["a {c}", "the photo of {}", "{c}"], Letters()
    classifier_EV = zero_shot_classifier(encode, names, templates, batch_size=batch_size)
    assert classifier_EV.shape == (10, 4)
    for column, name in enumerate(names):
        rows = Letters()([fill(template, name) for template in templates])
        mean = sum(row / row.norm() for row in rows) / len(rows)
        torch.testing.assert_close(classifier_EV[:, column], mean / mean.norm())
    assert sorted(encode.asked) == sorted({fill(t, n) for t in templates for n in names})  # each text once


def test_logits_are_a_hundred_cosines_in_full_precision() -> None:
    classifier_EV = torch.nn.functional.normalize(torch.randn(64, 3), dim=0)
    image_BE = 7 * torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = prompts.zero_shot_logits(image_BE, classifier_EV)
    expected = 100 * torch.nn.functional.cosine_similarity(image_BE[:, :, None], classifier_EV[None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_classifier_needs_classes_and_templates() -> None:
    for names, templates in (([], ["a {c}"]), (["cat"], [])):
        with pytest.raises(ValueError, match="at least one class and one template"):
            zero_shot_classifier(Letters(), names, templates)
