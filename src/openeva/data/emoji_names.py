"""What emoji are called: OpenMoji's table of every sequence -> name, keywords, group -> captions.

`data/openmoji.json` -> `EmojiNames` (by code points, or by the file names of Fluent) -> `Emoji` -> `captions_of`

Only sequences that Unicode lists are known: OpenMoji's additions of its own (private code points, other firms' marks)
are left out.
"""

import json
import random
import re
import unicodedata
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

GROUPS: MappingProxyType[str, str] = MappingProxyType({
    "smileys-emotion": "smileys and emotion", "people-body": "people and body",
    "animals-nature": "animals and nature", "food-drink": "food and drink", "travel-places": "travel and places",
    "activities": "activities", "objects": "objects", "symbols": "symbols", "flags": "flags", "component": "components",
})  # fmt: skip
"""Groups of Unicode as OpenMoji writes them, and in words; their order is that of the labels."""

_TONES = MappingProxyType(
    {"default": "", "light": "1", "medium-light": "2", "medium": "3", "medium-dark": "4", "dark": "5"}
)
_TONED = re.compile(rf"(.+?)-({'|'.join(_TONES)})")
_PEOPLE = frozenset({"man", "woman", "boy", "girl", "person", "adult", "child"})
"""Who a couple or a family is."""
_BARE = frozenset({"bald", "facing right"})
"""What one says without "with"."""
_RENAMED = MappingProxyType({
    "blackbird": "black-bird", "hugging-face": "smiling-face-with-open-hands", "phoenix-bird": "phoenix",
    "knocked-out-face": "face-with-crossed-out-eyes", "pouting-face": "enraged-face",
    "stuffedbread-flat": "stuffed-flatbread", "man-merpeople": "merman", "woman-merpeople": "mermaid",
    "person-merpeople": "merperson", "person-with-bunny-ears": "people-with-bunny-ears",
    "man-with-bunny-ears": "men-with-bunny-ears", "woman-with-bunny-ears": "women-with-bunny-ears",
    "person-wrestling": "people-wrestling", "man-wrestling": "men-wrestling", "woman-wrestling": "women-wrestling",
    "man-blonde-hair": "man-blond-hair", "woman-blonde-hair": "woman-blond-hair",
    "person-blonde-hair": "person-blond-hair",
    **{f"person-{kind}": kind for kind in
       ("elf", "fairy", "genie", "mage", "superhero", "supervillain", "vampire", "zombie")},
})  # fmt: skip
"""File names of Fluent that are older, or other, than Unicode's names of today."""

TEMPLATES = ("{c}", "an emoji of the group {c}", "a drawing, of the group {c}")
"""Zero-shot templates that fit these captions where the classes are groups."""


@dataclass(frozen=True)
class Emoji:
    """One sequence of code points that is shown as one picture.

    Attributes:
        code: Code points in hexadecimal digits, without the selector FE0F that asks for a picture.
        name: As Unicode's annotations have it, "waving hand: light skin tone".
        keywords: What it is found by; those of the sequence without skin tones where it has none of its own.
        group: A key of `GROUPS`.
        subgroup: Finer.
        base: Code of the same without skin tones.
        tones: Numbers of the skin tones, 1 (light) to 5 (dark); empty without.
        author: Who drew it for OpenMoji.
    """

    code: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    base: str
    tones: str
    author: str

    @property
    def label(self) -> int:
        """Number of its group."""
        return list(GROUPS).index(self.group)

    @property
    def phrase(self) -> str:
        """Its name as one would say it: "waving hand with light skin tone", "flag of Germany"."""
        head, colon, rest = self.name.partition(": ")
        if not colon:
            return self.name
        if head in {"flag", "keycap"}:
            return f"flag of {rest}" if head == "flag" else f"keycap {rest}"
        parts = rest.split(", ")
        who = [part for part in parts if part in _PEOPLE]
        has = [part for part in parts if part not in _PEOPLE and part not in _BARE]
        text = f"{head} of {_listed(who)}" if who else head
        text += f"{', ' if ' with ' in text or who else ' with '}{_listed(has)}" if has else ""
        return ", ".join([text, *(part for part in parts if part in _BARE)])


def code_of(text: str) -> str:
    """Code points as they are compared: upper case, without FE0F."""
    return "-".join(part for part in text.upper().split("-") if part != "FE0F")


class EmojiNames:
    """All sequences of OpenMoji's table.

    Raises:
        ValueError: The content is no such table.
    """

    def __init__(self, content: bytes) -> None:
        try:
            rows = [row for row in json.loads(content) if row["group"] in GROUPS]
            by_code = {code_of(row["hexcode"]): row for row in rows}
            known = [_emoji_of(row, by_code) for row in rows]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"openmoji: data/openmoji.json is not the table it should be ({error!r})") from None
        self.all = {emoji.code: emoji for emoji in known}
        # Fluent names a file by the sequence without skin tones, then the tone
        slugs = [(_slug(self.all.get(emoji.base, emoji).name), emoji) for emoji in known]
        self._by_slug = {(slug, emoji.tones): emoji for slug, emoji in reversed(slugs)}
        self._by_words = {(frozenset(slug.split("-")), emoji.tones): emoji for slug, emoji in reversed(slugs)}

    def by_code(self, text: str) -> Emoji | None:
        """The sequence of these code points, such as "1F44B-1F3FB"."""
        return self.all.get(code_of(text))

    def by_file_name(self, stem: str) -> Emoji | None:
        """The sequence that a file of Fluent shows, such as "waving-hand-medium-dark"."""
        found = _TONED.fullmatch(stem)
        readings = [(stem, "")] + ([(found[1], _TONES[found[2]])] if found else [])
        for file_name, tones in readings:
            slug = _RENAMED.get(file_name, file_name)
            if emoji := self._by_slug.get((slug, tones)) or self._by_words.get((frozenset(slug.split("-")), tones)):
                return emoji
        return None


def _emoji_of(row: dict[str, Any], by_code: dict[str, dict[str, Any]]) -> Emoji:
    base = code_of(row["skintone_base_hexcode"] or row["hexcode"])
    keywords = _keywords(row) or _keywords(by_code.get(base, row))
    return Emoji(
        code_of(row["hexcode"]), row["annotation"], keywords, row["group"], row["subgroups"], base,
        str(row["skintone"]), row.get("openmoji_author", ""),
    )  # fmt: skip


def _keywords(row: dict[str, Any]) -> tuple[str, ...]:
    words = (word.strip() for key in ("tags", "openmoji_tags") for word in row.get(key, "").split(","))
    return tuple(dict.fromkeys(word for word in words if word and word != row["annotation"]))


def _slug(name: str) -> str:
    """Letters and digits of a name, joined by hyphens."""
    name = re.sub(r"[“”’'.]", "", name.replace("#", " hashtag").replace("*", " asterisk"))
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def captions_of(emoji: Emoji, rng: random.Random, aliases: tuple[str, ...] = ()) -> list[str]:
    """Texts about the picture of an emoji: its name alone and in sentences, keywords, its group, other names.

    Args:
        emoji: What is shown.
        rng: Chooses the phrasings and which keywords are named.
        aliases: Other names.

    Returns:
        Different texts; the first is the name, which no other sequence has.
    """
    name = emoji.phrase
    sentences = (
        f"a drawing of the emoji {name}", f"the {name} emoji", f"a picture of the {name} emoji", f"an icon: {name}",
        f"a small drawing, {name}", f"an emoji that shows {name}",
    )  # fmt: skip
    captions = [name, *rng.sample(sentences, 2)]
    if emoji.keywords:
        captions.append(", ".join(rng.sample(emoji.keywords, min(len(emoji.keywords), rng.randint(2, 4)))))
        captions.append(f"{name} ({', '.join(rng.sample(emoji.keywords, min(len(emoji.keywords), 2)))})")
    captions.append(f"{name}, of the group {GROUPS[emoji.group]}")
    captions += [f"the {alias} emoji" for alias in aliases]
    return list(dict.fromkeys(captions))


def _listed(items: list[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last
