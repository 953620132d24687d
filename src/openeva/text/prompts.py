"""Classes as texts: templates, class names, and the classifier that a text tower makes of them.

class names x templates -> texts -> `encode_text` -> length 1 -> mean per class -> length 1 -> classifier[E, V]

Paper: arXiv 2103.00020, section 3.1.4. Source: spec sections 3.1 and 3.2. ImageNet's 80 templates and class names are
open_clip's copies of OpenAI's, which the official code uses; those of CIFAR (18), UCF-101 (48) and Kinetics (28) are
OpenAI's published lists, which are products of a few words; others come from `clip_benchmark` where it is installed.
"""

import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from openeva.registry import did_you_mean

EncodeText = Callable[[Sequence[str]], Tensor]
"""Texts -> features `[B, E]`, of any length."""

LOGIT_SCALE = 100.0
"""What products of features of length 1 are multiplied with: fixed, the temperature that was learnt is not used."""

PLAIN = ("{c}",)
SIMPLE = ("a photo of a {c}.",)
_PLACES = ("{c}", "{}")


@cache
def _imagenet() -> tuple[str, ...]:
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{c}") for template in OPENAI_IMAGENET_TEMPLATES)


def _cifar() -> tuple[str, ...]:
    kinds = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
    return tuple(
        text
        for article in ("a", "the")
        for text in (
            *(f"a {kind}photo of {article} {{c}}." for kind in kinds),
            *(f"a photo of {article} {size} {{c}}." for size in ("small", "big")),
        )
    )


_MEDIA, _DOING = (
    ("photo", "video", "example", "demonstration"),
    ("using", "doing", "during", "performing", "practicing"),
)


def _ucf101() -> tuple[str, ...]:
    parts = itertools.product(("", *(f" {word}" for word in _DOING)), ("a", "the"), _MEDIA)
    return tuple(f"a {medium} of {article} person{word} {{c}}." for word, article, medium in parts)


def _kinetics() -> tuple[str, ...]:
    whos = ("", "a person ", *(f"a person {word} " for word in _DOING))
    return tuple(f"a {medium} of {who}{{c}}." for medium in _MEDIA for who in whos)


_OWN: Mapping[str, Callable[[], tuple[str, ...]]] = {
    "plain": lambda: PLAIN, "simple": lambda: SIMPLE, "imagenet": _imagenet, "cifar10": _cifar, "cifar100": _cifar,
    "ucf101": _ucf101, "kinetics400": _kinetics, "kinetics600": _kinetics, "kinetics700": _kinetics,
}  # fmt: skip


def template_names() -> list[str]:
    """Names of the lists of templates that are at hand."""
    return [*_OWN, *(name for name in _clip_benchmark("templates") if name not in _OWN)]


def templates_for(name: str) -> tuple[str, ...]:
    """The templates of a data set; `{c}` stands for the class.

    Args:
        name: "imagenet" (80), "cifar10", "ucf101", "kinetics400" ..., "simple" ("a photo of a {c}."), "plain" (the
            name alone), or any of `clip_benchmark`'s where it is installed.

    Raises:
        ValueError: No such list.
    """
    if name in _OWN:
        return _OWN[name]()
    found = _clip_benchmark("templates").get(name)
    if not isinstance(found, list):
        hint = "" if _clip_benchmark_file("templates") else "; more come with `pip install clip-benchmark`"
        known = template_names()
        raise ValueError(f"no templates named {name!r}{did_you_mean(name, known)} ({', '.join(known)}{hint})")
    return tuple(found)


def has_templates(name: str) -> bool:
    """Whether a data set has templates of its own."""
    return name in _OWN or isinstance(_clip_benchmark("templates").get(name), list)


def benchmark_class_names(name: str) -> list[str] | None:
    """Class names that `clip_benchmark` uses for one of its data sets; None without any, or without the package."""
    found = _clip_benchmark("classnames").get(name)
    return None if found is None else [str(one) for one in found]


def _clip_benchmark_file(kind: str) -> Path | None:
    spec = importlib.util.find_spec("clip_benchmark")  # found, not imported: its data files need no code
    if spec is None or spec.origin is None:
        return None
    names = {"templates": "en_zeroshot_classification_templates.json", "classnames": "en_classnames.json"}
    return Path(spec.origin).parent / "datasets" / names[kind]


@cache
def _clip_benchmark(kind: str) -> Mapping[str, Any]:
    file = _clip_benchmark_file(kind)
    if file is None or not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


# ------------------------------------------------------------------------------------------------- of the user


def read_templates(given: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Templates that a user gave.

    Args:
        given: Themselves; or a name of `templates_for`; or a file with one per line or a JSON list.

    Raises:
        ValueError: No such name or file, or a template without a place for the class.
    """
    if isinstance(given, str) and any(place in given for place in _PLACES):
        given = [given]
    elif isinstance(given, str) and not Path(given).suffix:
        return templates_for(given)
    elif isinstance(given, str | Path):
        given = _lines(Path(given).expanduser(), "templates")
    if not given:
        raise ValueError("no templates: give at least one, such as 'a photo of a {c}.'")
    for template in given:
        if sum(template.count(place) for place in _PLACES) != 1:
            raise ValueError(f"template {template!r} needs one place for the class: {{c}} or {{}}")
    return tuple(given)


def read_class_names(
    given: str | Path | Sequence[str] | Mapping[str, str], known: Sequence[str], otherwise: Sequence[str] | None = None
) -> list[str]:
    """Class names to put into templates, by label.

    Args:
        given: A list in the order of the labels, or own name -> name in words; or a file: one per line, or JSON.
        known: The data's own names by label, such as folders.
        otherwise: By label, what a class is called that a mapping leaves out; default: its own name in words.

    Raises:
        ValueError: Another number of names than classes, or names of classes that are not there.
    """
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        given = _json(path, "class names") if path.suffix == ".json" else _lines(path, "class names")
    if isinstance(given, Mapping):
        if strange := [name for name in given if name not in known]:
            raise ValueError(
                f"class_names renames {', '.join(strange[:5])}, which the images do not have"
                f"{did_you_mean(strange[0], list(known))}; their classes are {', '.join(known[:5])} ..."
            )
        otherwise = otherwise or [in_words(name) for name in known]
        return [str(given.get(name, other)) for name, other in zip(known, otherwise, strict=True)]
    if len(given) != len(known):
        raise ValueError(
            f"class_names has {len(given)} names, but the images have {len(known)} classes; give one per class in the"
            " order of the labels, or a mapping from the classes that need another name"
        )
    return [str(name) for name in given]


def in_words(name: str) -> str:
    """A folder's name as a phrase: `golden_retriever`, `ApplyEyeMakeup` -> golden retriever, Apply Eye Makeup."""
    name = re.sub(r"[_+\s]+", " ", name).strip()
    return name if " " in name else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)


def _lines(path: Path, what: str) -> list[str]:
    if path.suffix == ".json":
        content = _json(path, what)
        if not isinstance(content, list):
            raise ValueError(f"{path} is not a JSON list of {what}")
        return [str(one) for one in content]
    if not path.is_file():
        raise ValueError(f"{what}: there is no file {path}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{what}: there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


# -------------------------------------------------------------------------------------------------- classifier


def fill(template: str, name: str) -> str:
    """The text that a template makes of a class."""
    for place in _PLACES:
        template = template.replace(place, name)
    return template


@torch.no_grad()
def zero_shot_classifier(
    encode_text: EncodeText, class_names: Sequence[str], templates: Sequence[str], *, batch_size: int = 256
) -> Float[Tensor, "E V"]:
    """Weights of a classifier made of texts; `zero_shot_logits` applies them.

    Args:
        encode_text: Texts -> features.
        class_names: By label.
        templates: With `{c}` or `{}` for the class.
        batch_size: Texts at a time.

    Raises:
        ValueError: No classes or no templates.
    """
    if not class_names or not templates:
        raise ValueError("a zero-shot classifier needs at least one class and one template")
    texts = [fill(template, name) for name in class_names for template in templates]
    distinct = list(dict.fromkeys(texts))
    # rows are as long as the longest text of their batch: long ones together
    order = sorted(range(len(distinct)), key=lambda number: len(distinct[number]))
    features: dict[str, Tensor] = {}
    for first in range(0, len(order), batch_size):
        batch = [distinct[number] for number in order[first : first + batch_size]]
        features.update(zip(batch, F.normalize(encode_text(batch).float(), dim=-1), strict=True))
    means = [
        torch.stack([features[text] for text in texts[first : first + len(templates)]]).mean(0)
        for first in range(0, len(texts), len(templates))
    ]
    return F.normalize(torch.stack(means), dim=-1).T


def zero_shot_logits(image_BE: Float[Tensor, "B E"], classifier_EV: Float[Tensor, "E V"]) -> Float[Tensor, "B V"]:
    """100 x cosine of image features, of any length, with each class."""
    with torch.autocast(image_BE.device.type, enabled=False):  # near classes are told apart in full precision
        return LOGIT_SCALE * F.normalize(image_BE.float(), dim=-1) @ classifier_EV.float()


def __getattr__(name: str) -> Any:
    if name == "IMAGENET_TEMPLATES":  # open_clip is only imported where they are asked for
        return _imagenet()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
