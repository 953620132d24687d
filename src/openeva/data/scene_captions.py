"""Texts about a drawn scene: several true phrasings, from all that it shows down to one word about the main object.

`Scene` -> what can be seen of it -> phrases for things, surfaces, places and relations -> captions

Every word follows from the numbers of the scene: objects that are hidden behind others are not mentioned (nor counted),
"left of" and "above" need a clear distance, "larger than" a clear difference. The main object is always named, and
first, but for relations, which may be told from the other end. Left and right are those of the picture as it was drawn:
mirroring it makes captions wrong.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from openeva.data.scene import Pattern, Scene, Texture, Thing, coverage

PATTERN_WORDS: MappingProxyType[Pattern, str] = MappingProxyType({
    "plain": "plain", "stripes": "striped", "checks": "checkered", "dots": "dotted", "waves": "wavy",
    "gradient": "shaded",
})  # fmt: skip

TEMPLATES: MappingProxyType[str, tuple[str, ...]] = MappingProxyType({
    "shape": (
        "a {c}", "a picture of a {c}", "an image of a {c}", "a drawing of a {c}", "there is a {c}", "a large {c}",
        "a huge {c}", "the largest shape is a {c}", "a picture of a huge {c}", "a picture of a large {c}",
    ),
    "colour": ("the largest shape is {c}", "a large {c} shape", "a picture of a huge {c} shape", "{c}"),
    "pattern": ("the largest shape is {c}", "a large {c} shape", "a picture of a huge {c} shape", "{c}"),
})  # fmt: skip
"""Zero-shot templates that fit these captions, by the `label` of the source `scenes`; `{c}` is the class."""

SIZES: tuple[tuple[str, float], ...] = (("tiny", 0.24), ("small", 0.4), ("large", 0.58), ("huge", float("inf")))
"""Words for the radius of an object, and the radius at which each ends."""

CENTRE = 0.25
"""A place this near to the middle of the picture is central."""

APART = 0.3
"""Centres this far from each other are clearly left of, or above, one another."""

LARGER = 1.3
"""Ratio of radii from which one object is said to be larger."""

_PLACES = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the centre", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)
_OPENINGS = ("", "", "a picture of ", "an image of ", "a drawing of ", "there is ")
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

Fact = Literal["size", "colour", "pattern"]
_FACTS: tuple[Fact, ...] = ("size", "colour", "pattern")


def captions_of(scene: Scene, seed: int, num: int = 5) -> list[str]:
    """Different texts about a scene, each true.

    Args:
        scene: What there is.
        seed: Chooses words and facts.
        num: Number of captions, at least 1.

    Returns:
        The first names all that can be seen and tells most scenes apart; the others say less, of different things.
    """
    rng = random.Random(seed)
    seen = things_in_sight(scene)
    writers: Sequence[Callable[[], str]] = (
        partial(_short, seen[0], rng), partial(_with_ground, seen[0], scene.ground, rng),
        partial(_relation, scene, seen, rng), partial(_statement, scene, seen, rng),
    )  # fmt: skip
    captions = [_everything(scene.ground, seen, rng)]
    while len(captions) < num:
        write = writers[(len(captions) - 1) % len(writers)]
        tries = (write() for _ in range(8))  # another draw says something else nearly always
        captions.append(next((text for text in tries if text not in captions), captions[0]))
    return captions


def things_in_sight(scene: Scene) -> list[Thing]:
    """The objects that can be made out: the main one, then the others from front to back."""
    main, *others = reversed(scene.things)
    free = 1 - _mask(main)
    seen = [main]
    for thing in others:
        mask = _mask(thing)
        left = float((mask * free).sum())
        if left >= 0.4 * float(mask.sum()) and left >= 0.004 * mask.size:
            seen.append(thing)
        free = free * (1 - mask)
    return seen


def size_word(thing: Thing) -> str:
    """Its size in a word."""
    return next(word for word, end in SIZES if thing.radius < end)


def place_words(thing: Thing) -> str:
    """Where its centre is, in the ninth of the picture that it says."""
    row, column = (int(at > -CENTRE) + int(at > CENTRE) for at in (thing.y, thing.x))
    return _PLACES[row][column]


def relations(scene: Scene, one: Thing, other: Thing) -> list[tuple[str, str]]:
    """What is clearly so between two objects: how the one stands to the other, and the other to the one."""
    dx, dy = one.x - other.x, one.y - other.y
    behind = scene.things.index(other) < scene.things.index(one)
    hidden = float((_mask(one) * _mask(other)).sum()) / max(1.0, float(_mask(other if behind else one).sum()))
    known = {
        ("to the left of", "to the right of"): dx <= -APART,
        ("left of", "right of"): dx <= -APART,
        ("to the right of", "to the left of"): dx >= APART,
        ("right of", "left of"): dx >= APART,
        ("above", "below"): dy <= -APART,
        ("below", "above"): dy >= APART,
        ("larger than", "smaller than"): one.radius >= LARGER * other.radius,
        ("smaller than", "larger than"): other.radius >= LARGER * one.radius,
        ("in front of", "behind"): behind and hidden >= 0.1,
        ("behind", "in front of"): not behind and hidden >= 0.1,
    }
    return [words for words, true in known.items() if true]


def _mask(thing: Thing) -> npt.NDArray[np.float32]:
    return coverage(thing, (32, 32))


# ----------------------------------------------------------------------------------------------------- captions


def _everything(ground: Texture, seen: Sequence[Thing], rng: random.Random) -> str:
    main, *others = seen
    text = f"{_thing(main, _FACTS, rng)} {place_words(main)} {_on(ground, ('colour', 'pattern'), rng)}"
    rest = [f"{_thing(thing, ('size', 'colour'), rng)} {place_words(thing)}" for thing in others]
    return rng.choice(_OPENINGS) + text + (f", with {_listed(rest)}" if rest else "")


def _short(main: Thing, rng: random.Random) -> str:
    facts = rng.sample(_FACTS, rng.choice((0, 1, 1, 2)))
    noun = "shape" if facts and rng.random() < 0.25 else main.shape
    return rng.choice(_OPENINGS) + _thing(main, facts, rng, noun)


def _with_ground(main: Thing, ground: Texture, rng: random.Random) -> str:
    of_ground: list[list[Fact]] = [["colour"], ["pattern"], ["colour", "pattern"]]
    thing = _thing(main, rng.sample(_FACTS, rng.choice((1, 2, 3))), rng)
    return f"{rng.choice(_OPENINGS)}{thing} {_on(ground, rng.choice(of_ground), rng)}"


def _relation(scene: Scene, seen: Sequence[Thing], rng: random.Random) -> str:
    """The main object and another, or where there is none its place."""
    main, *others = seen
    other = rng.choice(others) if others else None
    known = relations(scene, main, other) if other else []
    facts: list[list[Fact]] = [rng.sample(_FACTS[:2], rng.choice((1, 2))) for _ in range(2)]
    if other is None or not known:
        return f"{rng.choice(_OPENINGS)}{_thing(main, facts[0], rng)} {place_words(main)}"
    there, back = rng.choice(known)
    one, two = _thing(main, facts[0], rng), _thing(other, facts[1], rng)
    return f"{one} {there} {two}" if rng.random() < 0.75 else f"{two} {back} {one}"


def _statement(scene: Scene, seen: Sequence[Thing], rng: random.Random) -> str:
    """A sentence on one thing: number, colour, pattern, shape or place."""
    main = seen[0]
    before, _ = _surface(main.texture, ["colour"], rng)
    sentences = [
        f"the largest shape is {before}",
        f"the largest shape is {PATTERN_WORDS[main.texture.pattern]}",
        f"the largest shape is {_thing(main, rng.sample(_FACTS, 1), rng)}",
        f"the {main.shape} is {place_words(main)}" if _is_only(main, seen) else f"{_a(main.shape)} {place_words(main)}",
    ]
    if len(seen) == len(scene.things):  # otherwise it is unclear what counts
        count = _COUNTS[len(seen)] if len(seen) < len(_COUNTS) else str(len(seen))
        are = "there is one shape" if len(seen) == 1 else f"there are {count} shapes"
        sentences += [f"{are} {_on(scene.ground, [fact], rng)}" for fact in _FACTS[1:]]
    return rng.choice(sentences)


def _is_only(main: Thing, seen: Sequence[Thing]) -> bool:
    return sum(thing.shape == main.shape for thing in seen) == 1


# ------------------------------------------------------------------------------------------------------ phrases


def _thing(thing: Thing, facts: Sequence[Fact], rng: random.Random, noun: str | None = None) -> str:
    """Such as "a large red star with white dots"."""
    before, after = _surface(thing.texture, facts, rng)
    return _joined(_a(_joined(size_word(thing) if "size" in facts else "", before, noun or thing.shape)), after)


def _on(ground: Texture, facts: Sequence[Fact], rng: random.Random) -> str:
    """Such as "on a background with blue and green stripes"."""
    before, after = _surface(ground, facts, rng)
    return _joined("on", _a(_joined(before, rng.choice(("ground", "background")))), after)


def _surface(texture: Texture, facts: Sequence[Fact], rng: random.Random) -> tuple[str, str]:
    """What to say of a surface before the noun, and after it."""
    first, second = texture.colours
    both, pattern, word = f"{first} and {second}", texture.pattern, PATTERN_WORDS[texture.pattern]
    if "colour" not in facts:
        return (word if "pattern" in facts else ""), ""
    if "pattern" not in facts:  # one colour where it is that of nearly everything
        return (first if pattern in {"plain", "dots"} else both), ""
    if pattern == "plain":
        return f"plain {first}", ""
    if rng.random() < 0.5:
        return f"{both} {word}", ""
    if pattern == "dots":
        return first, f"with {second} dots"
    return "", f"fading from {first} to {second}" if pattern == "gradient" else f"with {both} {pattern}"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _joined(*words: str) -> str:
    return " ".join(filter(None, words))


def _listed(items: Sequence[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last
