"""Captions of scenes are read back by a grammar of their own here, and every statement compared with the numbers."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from openeva.data import scene_captions as words
from openeva.data.labels import has_captions
from openeva.data.mixture import open_sources
from openeva.data.scene import COLOURS, SHAPES, Scene, Texture, Thing, draw_scene
from openeva.data.sources import scenes

PATTERN_OF = {word: pattern for pattern, word in words.PATTERN_WORDS.items()}
SURE_COLOUR = {"plain", "dots"}
NOUN = rf"(?:{'|'.join(SHAPES)}|shape|ground|background)"
PHRASE = rf"an? (?:[a-z]+ ){{0,5}}?{NOUN}(?: with [a-z ]*?(?:dots|stripes|checks|waves)| fading from [a-z]+ to [a-z]+)?"
PLACE = (
    "at the top|at the bottom|on the left|on the right|in the (?:centre|upper left|upper right|lower left|lower right)"
)
RELATION = "to the left of|to the right of|left of|right of|above|below|larger than|smaller than|in front of|behind"
SIZES = {"tiny": (0, 0.24), "small": (0.24, 0.4), "large": (0.4, 0.58), "huge": (0.58, 9)}
LABELS_BEFORE = [2, 0, 4, 5, 3, 5, 2, 3, 5, 4, 4, 7, 4, 1, 5, 6]
MEANS_BEFORE = [
    138.23,
    138.28,
    166.68,
    165.7,
    147.04,
    187.93,
    116.23,
    100.12,
    107.19,
    121.93,
    150.79,
    148.25,
    192.21,
    100.85,
    147.25,
    149.95,
]
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


def surface_is(text: str, texture: Texture) -> bool:
    """Whether the words for a surface, without the noun, are right."""
    first, second = texture.colours
    known = {"", first if texture.pattern in SURE_COLOUR else f"{first} and {second}", pattern_word(texture)}
    match texture.pattern:
        case "plain":
            known = {"", first, "plain", f"plain {first}"}
        case "dots":
            known |= {f"{first} and {second} dotted", f"{first} with {second} dots"}
        case "gradient":
            known |= {f"{first} and {second} shaded", f"fading from {first} to {second}"}
        case pattern:
            known |= {f"{first} and {second} {pattern_word(texture)}", f"with {first} and {second} {pattern}"}
    return text in known


def pattern_word(texture: Texture) -> str:
    return words.PATTERN_WORDS[texture.pattern]


def split_phrase(phrase: str) -> tuple[str, str, str]:
    """Size, surface and noun of "a large star with red and white stripes"; the article must be right."""
    article, rest = phrase.split(" ", 1)
    assert article == ("an" if rest[0] in "aeiou" else "a"), phrase
    found = re.fullmatch(rf"(?:({'|'.join(SIZES)}) )?(.*?)({NOUN})(.*)", rest)
    assert found, phrase
    size, before, noun, after = found.groups()
    return size or "", f"{before.strip()} {after.strip()}".strip(), noun


def is_thing(phrase: str, thing: Thing) -> bool:
    size, surface, noun = split_phrase(phrase)
    low, high = SIZES.get(size, (0, 9))
    return noun in {thing.shape, "shape"} and low <= thing.radius < high and surface_is(surface, thing.texture)


def is_ground(phrase: str, scene: Scene) -> bool:
    size, surface, noun = split_phrase(phrase)
    return not size and noun in {"ground", "background"} and surface_is(surface, scene.ground)


def is_there(place: str, thing: Thing) -> bool:
    right = ("right" in place) - ("left" in place)
    low = ("lower" in place or "bottom" in place) - ("upper" in place or "top" in place)
    return all(at * side > 0.25 if side else abs(at) <= 0.25 for at, side in ((thing.x, right), (thing.y, low)))


def stand_so(relation: str, one: Thing, other: Thing, scene: Scene) -> bool:
    in_front = scene.things.index(one) > scene.things.index(other)
    near = np.hypot(one.x - other.x, one.y - other.y) < 1.4 * (one.radius + other.radius)
    return {
        "left of": one.x <= other.x - 0.3, "right of": one.x >= other.x + 0.3,
        "above": one.y <= other.y - 0.3, "below": one.y >= other.y + 0.3,
        "larger than": one.radius > 1.29 * other.radius, "smaller than": other.radius > 1.29 * one.radius,
        "in front of": in_front and near, "behind": not in_front and near,
    }[relation.removeprefix("to the ")]  # fmt: skip


def is_true(caption: str, scene: Scene) -> bool:
    main = scene.things[-1]
    if found := re.fullmatch(rf"({PHRASE}) ({RELATION}) ({PHRASE})", caption):
        one, relation, two = found.groups()
        pairs = [(a, b) for a, b in itertools.permutations(scene.things, 2) if is_thing(one, a) and is_thing(two, b)]
        return any(stand_so(relation, a, b, scene) and main in (a, b) for a, b in pairs)
    if found := re.fullmatch(rf"the largest shape is ({PHRASE})", caption):
        return is_thing(found[1], main)
    if found := re.fullmatch(r"the largest shape is ([a-z ]+)", caption):
        return surface_is(found[1], main.texture)
    if found := re.fullmatch(rf"the ([a-z]+) is ({PLACE})", caption):
        return found[1] == main.shape and is_there(found[2], main)
    if found := re.fullmatch(rf"there (is|are) ([a-z]+) shapes? on ({PHRASE})", caption):
        return NUMBERS.get(found[2]) == len(scene.things) and is_ground(found[3], scene)
    pattern = rf"(?:(?:a picture of|an image of|a drawing of|there is) )?({PHRASE})(?: ({PLACE}))?(?: on ({PHRASE}))?"
    found = re.match(pattern, caption)
    assert found, caption
    phrase, place, ground = found.groups()
    if not is_thing(phrase, main) or (place and not is_there(place, main)) or (ground and not is_ground(ground, scene)):
        return False
    rest = caption[found.end() :]
    if not rest:
        return True
    others = re.findall(rf"({PHRASE}) ({PLACE})", rest)
    left = re.sub(rf"({PHRASE}) ({PLACE})", "#", rest)
    assert re.fullmatch(r", with (#(, #)* and )?#", left), caption
    return all(any(is_thing(p, t) and is_there(where, t) for t in scene.things[:-1]) for p, where in others)


def test_every_statement_is_true_of_its_scene_and_false_of_most_others():
    described = [(draw_scene(0, index), index) for index in range(600)]
    for scene, index in described:
        for caption in words.captions_of(scene, index, num=9):
            assert is_true(caption, scene), (caption, scene)
    strangers = [is_true(words.captions_of(scene, index)[0], described[index - 1][0]) for scene, index in described]
    assert sum(strangers) == 0


def test_first_captions_tell_scenes_apart():
    source = scenes.Config(num_images=1000, size=8, captions=True).build()
    first = Counter(source.read(i).extra["captions"][0] for i in range(len(source)))
    assert sum(count == 1 for count in first.values()) > 950


def test_captions_vary_and_depend_on_the_seed_alone():
    scene = draw_scene(0, 4)
    assert words.captions_of(scene, 7) == words.captions_of(scene, 7)
    assert len({tuple(words.captions_of(scene, seed)) for seed in range(30)}) == 30
    captions = [caption for i in range(300) for caption in words.captions_of(draw_scene(0, i), i)]
    assert len(set(captions)) > 0.8 * len(captions)
    for statement in ("left of", "above", "larger than", "in front of", "behind", "is plain", "there are", "an orange"):
        assert any(statement in caption for caption in captions), statement
    lengths = {len(caption.split()) for caption in captions}
    assert min(lengths) <= 3
    assert 30 < max(lengths) < 70


def test_what_is_hidden_is_neither_named_nor_counted():
    plain = Texture("plain", ("red", "blue"), 0.5, 0.0)
    hidden = Thing("heart", Texture("plain", ("green", "white"), 0.5, 0.0), 0.0, 0.0, 0.2, 0.0)
    beside = Thing("star", Texture("plain", ("pink", "white"), 0.5, 0.0), -0.7, 0.7, 0.2, 0.0)
    main = Thing("disc", plain, 0.1, -0.1, 0.6, 0.0)
    scene = Scene(Texture("plain", ("grey", "blue"), 0.5, 0.0), (hidden, beside, main), 0.0, 0)
    assert words.things_in_sight(scene) == [main, beside]
    captions = [caption for seed in range(50) for caption in words.captions_of(scene, seed)]
    assert any("star" in caption for caption in captions)
    assert not any("heart" in caption or "shapes" in caption for caption in captions)


def test_captions_leave_pictures_and_labels_as_they_were():
    """The numbers are those from before scenes had captions."""
    described, plain = (scenes.Config(num_images=16, size=48, captions=c).build() for c in (True, False))
    pairs = [(described.read(i), plain.read(i)) for i in range(16)]
    assert all((np.asarray(one.image) == np.asarray(two.image)).all() for one, two in pairs)
    assert [one.label for one, _ in pairs] == [two.label for _, two in pairs] == LABELS_BEFORE
    means = [float(np.asarray(two.image).mean()) for _, two in pairs]
    assert means == pytest.approx(MEANS_BEFORE, abs=0.1)


def test_source_says_whether_it_has_captions():
    with_captions, without = (scenes.Config(num_images=4, size=8, captions=c).build() for c in (True, False))
    assert has_captions(with_captions)
    assert not has_captions(without)
    assert open_sources([scenes.Config(num_images=4, size=8, captions=True, limit=2)]).has_captions
    assert len(with_captions.read(0).extra["captions"]) == 5
    assert "captions" not in without.read(0).extra


@pytest.mark.parametrize("label", ["shape", "colour", "pattern"])
def test_classes_are_what_captions_call_them(label):
    """Zero-shot: with a template of its label, the name of the right class makes a true text, another name does not."""
    source = scenes.Config(num_images=200, size=8, captions=True, label=label).build()
    assert source.labels().tolist() == [source.read(i).label for i in range(200)]
    template = next(t for t in words.TEMPLATES[label] if t in {"a {c}", "the largest shape is {c}"})
    for sample in map(source.read, range(200)):
        main = sample.extra["scene"].things[-1]
        if label == "colour" and main.texture.pattern not in SURE_COLOUR:
            assert main.texture.colours[0] == source.class_names[sample.label]
            continue
        true = [name for name in source.class_names if is_true(template.replace("{c}", name), sample.extra["scene"])]
        assert true == [source.class_names[sample.label]]


def test_templates_are_made_of_the_words_of_captions():
    captions = [caption for i in range(400) for caption in words.captions_of(draw_scene(1, i), i)]
    known = {word for caption in captions for word in caption.split()}
    assert set(COLOURS) | set(SHAPES) | set(PATTERN_OF) <= known
    for template in itertools.chain(*words.TEMPLATES.values()):
        assert set(template.split()) - {"{c}"} <= known, template
    shapes = {f"a picture of a {shape}" for shape in SHAPES}
    many = {caption for i in range(3000) for caption in words.captions_of(draw_scene(2, i), i)}
    assert shapes <= many
