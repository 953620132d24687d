"""Image-text shards of emoji: small real pictures of 3,953 things by four vendors, with names and keywords.

npm packages (`emoji_packages.py`) -> drawings with names (`emoji_names.py`) -> pictures on a plain ground, captions
-> `OUT/train/VENDOR-000000.tar`, `OUT/test/...` (one vendor), README.md, LICENSES.txt, classes.txt, emoji.json

A sample is `KEY.png`, `KEY.json` (captions, name, keywords, group, subgroup, code points, vendor, licence, credit) and
`KEY.cls` (number of the group, by classes.txt). One vendor is held out: the same things, in a hand that training has
not seen. `unseen` also holds out a share of the things, with all their skin tones: `OUT/test_unseen`.

A shard has its name only once it is whole, and `emoji.json` is written last: a build that was cut short goes on with
the first shard that is missing.
"""

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from openeva.config import ConfigError
from openeva.data.emoji_names import GROUPS, Emoji, EmojiNames, captions_of
from openeva.data.emoji_packages import (
    VENDORS,
    Drawing,
    Files,
    check_vendors,
    drawings_of,
    fetch,
    licence_texts,
    read_package,
)
from openeva.data.file_index import cache_dir

SHARD = 1000
"""Drawings per shard."""
COMPLETE, UNFINISHED = "emoji.json", ".building.json"
"""What tells a finished folder, and one that is being built."""

Watch = Callable[[str, int, int | None], None]
"""Told what is done now, how much of it is done, and of how much (None = unknown)."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What to build.

    Attributes:
        vendors: Keys of `VENDORS`.
        held_out: The one of them that is for testing.
        size: Side length of the pictures in pixels.
        background: What stands behind the drawings, which are transparent: white, or a light colour per picture.
        unseen: Share of the things, without regard to skin tones, that training never sees.
        skin_tones: False leaves out the variants with skin tones, which are more than half of all.
        seed: Of captions, colours, order, and what is unseen.
    """

    vendors: tuple[str, ...] = tuple(VENDORS)
    held_out: str = "fluentui"
    size: int = 64
    background: Literal["white", "colours"] = "white"
    unseen: float = 0.0
    skin_tones: bool = True
    seed: int = 0


@dataclass
class Built:
    """What lies in the folder.

    Attributes:
        options: As given.
        shards: Per shard: number of samples, and the files that could not be read with the reason.
        left_out: Per vendor: how many files there are that Unicode does not list, or that were not wanted.
        versions: Of the packages.
    """

    options: Options
    shards: dict[str, Record] = field(default_factory=dict)
    left_out: dict[str, Record] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def count(self, start: str) -> int:
        """Samples of the shards whose name starts so, "train/" or "test/fluentui"."""
        return sum(record["samples"] for name, record in self.shards.items() if name.startswith(start))

    @property
    def broken(self) -> dict[str, str]:
        """Files that could not be drawn, and why."""
        return {path: why for record in self.shards.values() for path, why in record["broken"].items()}

    def to_json(self) -> str:
        """Readable by `read_built`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def build(out: Path, options: Options, watch: Watch | None = None) -> Built:
    """Make the shards, or those that are still missing.

    Args:
        out: Folder for them; it may hold what an earlier call with the same options left.
        options: What to build.
        watch: Told how far it is.

    Raises:
        ConfigError: An option makes no sense, or the folder holds something else.
        ImportError: Pictures must be drawn, and `resvg-py` is missing.
        FileNotFoundError: There is no `npm`.
        OSError: A package cannot be fetched, or the disk is full.
        ValueError: A package is not what it should be.
    """
    watch = watch or (lambda what, done, total: None)
    _check(options)
    built = _continued(out, options)
    if (out / COMPLETE).is_file():
        return built
    if any(VENDORS[name].is_drawn for name in options.vendors):
        _rasteriser()  # said before 165 MB are fetched
    archives = {}
    # the names of all come with OpenMoji
    for name in dict.fromkeys(["openmoji", *options.vendors]):
        watch(f"fetching {VENDORS[name].title} ({VENDORS[name].megabytes} MB)", 0, None)
        archives[name] = fetch(VENDORS[name], cache_dir() / "npm")
    table = read_package(VENDORS["openmoji"], archives["openmoji"])
    names = EmojiNames(table.get("data/openmoji.json", b""))
    licences = [
        f"The names and keywords of all pictures, and the pictures of OpenMoji\n\n{licence_texts('openmoji', table)}"
    ]
    for name in options.vendors:
        files = table if name == "openmoji" else read_package(VENDORS[name], archives[name])
        licences += [] if name == "openmoji" else [licence_texts(name, files)]
        built.versions[VENDORS[name].package] = VENDORS[name].version
        _build_vendor(out, name, files, names, built, watch)
    _write(out / "LICENSES.txt", ("\n\n" + "=" * 100 + "\n\n").join(licences) + "\n")
    _write(out / "classes.txt", "".join(f"{words}\n" for words in GROUPS.values()))
    _write(out / "README.md", _readme(built))
    _write(out / COMPLETE, built.to_json())
    (out / UNFINISHED).unlink(missing_ok=True)
    return built


def _check(options: Options) -> None:
    check_vendors(list(options.vendors), options.held_out)
    if not 16 <= options.size <= 1024:
        raise ConfigError([f"--size: {options.size} pixels; choose from 16 to 1024"])
    if not 0 <= options.unseen < 1:
        raise ConfigError([f"--unseen: {options.unseen} is no share; choose from 0 to below 1, such as 0.1"])


def _continued(out: Path, options: Options) -> Built:
    """What an earlier call left in the folder.

    Raises:
        ConfigError: It was made with other options, or it is something else.
    """
    file = next((out / name for name in (COMPLETE, UNFINISHED) if (out / name).is_file()), None)
    if file is None:
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError([f"--out: {out} is not empty, and holds no emoji; choose another folder"])
        out.mkdir(parents=True, exist_ok=True)
        return Built(options)
    try:
        content = json.loads(file.read_bytes())
        made = Options(**content["options"] | {"vendors": tuple(content["options"]["vendors"])})
        found = Built(made, content["shards"], content["left_out"], content["versions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"--out: {file} cannot be read ({error!r}); delete the folder, or choose another"]) from None
    if made != options:
        other = [f"{key} {value!r}" for key, value in asdict(made).items() if value != asdict(options)[key]]
        raise ConfigError(
            [f"--out: {out} was built with {', '.join(other)}; ask for the same, or choose another folder"]
        )
    # a shard that somebody deleted is made again
    missing = [name for name in found.shards if not (out / name).is_file()]
    for name in missing:
        del found.shards[name]
    if missing and file.name == COMPLETE:
        file.unlink()
    return found


# -------------------------------------------------------------------------------------------------------- shards


def _build_vendor(out: Path, name: str, files: Files, names: EmojiNames, built: Built, watch: Watch) -> None:
    options = built.options
    drawings, unknown = drawings_of(name, files, names)
    parts: dict[str, list[Drawing]] = {}
    for drawing in drawings:
        parts.setdefault(_part_of(drawing, options), []).append(drawing)
    dropped = len(parts.pop("", []))
    built.left_out[name] = {"not listed by Unicode": len(unknown), "not wanted": dropped}
    done, total = 0, sum(map(len, parts.values()))
    for part, chosen in parts.items():
        random.Random(f"{options.seed}/{name}").shuffle(chosen)  # streams mix little
        for number, begin in enumerate(range(0, len(chosen), SHARD)):
            shard, members = f"{part}/{name}-{number:06d}.tar", chosen[begin : begin + SHARD]
            if shard not in built.shards:
                told = partial(_tell, watch, f"drawing {VENDORS[name].title}", done, total)
                built.shards[shard] = _write_shard(out / shard, members, options, told)
                _write(out / UNFINISHED, built.to_json())
            done += len(members)


def _tell(watch: Watch, what: str, before: int, total: int, done: int) -> None:
    watch(what, before + done, total)


def _part_of(drawing: Drawing, options: Options) -> str:
    """Folder of a sample; empty if it is in none."""
    emoji, held_out = drawing.emoji, drawing.vendor == options.held_out
    if emoji.tones and not options.skin_tones:
        return ""
    if options.unseen and random.Random(f"{options.seed}/unseen/{emoji.base}").random() < options.unseen:
        return "test_unseen" if held_out else ""  # by one vendor, so that no name comes twice
    return "test" if held_out else "train"


def _write_shard(path: Path, drawings: Sequence[Drawing], options: Options, told: Callable[[int], None]) -> Record:
    """One shard, under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    broken: dict[str, str] = {}
    with partial.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, drawing in enumerate(drawings):
                told(number)
                try:
                    image = picture_of(drawing, options)
                except (ValueError, OSError, SyntaxError) as error:
                    broken[f"{drawing.vendor}: {drawing.path}"] = str(error)
                    continue
                for suffix, content in _files_of(drawing, image, options):
                    member = tarfile.TarInfo(f"{drawing.vendor}-{drawing.emoji.code.lower()}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        file.flush()
    partial.replace(path)
    return {"samples": len(drawings) - len(broken), "broken": broken}


def _files_of(drawing: Drawing, image: Image.Image, options: Options) -> Iterator[tuple[str, bytes]]:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    yield "png", encoded.getvalue()
    yield "json", json.dumps(_described(drawing, options), ensure_ascii=False).encode()
    yield "cls", str(drawing.emoji.label).encode()


def _described(drawing: Drawing, options: Options) -> Record:
    emoji, vendor = drawing.emoji, VENDORS[drawing.vendor]
    rng = random.Random(f"{options.seed}/captions/{drawing.vendor}/{emoji.code}")
    author = {"author": emoji.author} if drawing.vendor == "openmoji" else {}
    return {
        "captions": captions_of(emoji, rng, drawing.aliases), "name": emoji.name, "keywords": emoji.keywords,
        "group": emoji.group, "subgroup": emoji.subgroup, "code_points": emoji.code, "base": emoji.base,
        "vendor": drawing.vendor, "licence": vendor.licence, "credit": vendor.credit, **author,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ pictures


def picture_of(drawing: Drawing, options: Options) -> Image.Image:
    """RGB picture of a drawing, `size` pixels in square, on a plain ground.

    Raises:
        ValueError: It is no SVG, or nothing is to be seen.
        OSError: It is no picture.
    """
    content = drawing.content
    if VENDORS[drawing.vendor].is_drawn:
        content = _rasteriser()(content.decode("utf-8", "replace"), options.size)
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = opened.convert("RGBA")
    except UnidentifiedImageError:
        raise OSError("not a picture") from None
    alpha = image.getchannel("A")
    if alpha.getextrema()[1] == 0:
        raise ValueError("nothing is to be seen")
    side = max(image.size)
    ground = Image.new("RGB", (side, side), _background(drawing.emoji, drawing.vendor, options))
    ground.paste(image, ((side - image.width) // 2, (side - image.height) // 2), alpha)
    return ground.resize((options.size, options.size), Image.Resampling.LANCZOS) if side != options.size else ground


def _background(emoji: Emoji, vendor: str, options: Options) -> tuple[int, int, int]:
    if options.background == "white":
        return 255, 255, 255
    rng = random.Random(f"{options.seed}/background/{vendor}/{emoji.code}")
    return rng.randint(192, 255), rng.randint(192, 255), rng.randint(192, 255)


def _rasteriser() -> Callable[[str, int], bytes]:
    """(SVG, pixels) -> PNG.

    Raises:
        ImportError: `resvg-py` is missing.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ImportError(
            "OpenMoji and Fluent Emoji are SVG drawings, which resvg turns into pictures: pip install 'openeva[emoji]',"
            " or leave them out (--vendors noto,twemoji --held-out twemoji)"
        ) from None
    return lambda svg, size: svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)


# ---------------------------------------------------------------------------------------------------------- texts


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def rows_of(built: Built) -> list[tuple[str, ...]]:
    """Set, licence, part, number of pictures, and what was left out, for people."""
    options = built.options
    rows: list[tuple[str, ...]] = []
    for name in options.vendors:
        vendor, part = VENDORS[name], "test" if name == options.held_out else "train"
        left_out = [f"{count:,} {why}" for why, count in built.left_out[name].items() if count]
        count = built.count(f"{part}/{name}-")
        rows.append((vendor.title, vendor.licence, part, f"{count:,}", ", ".join(left_out) or "none"))
    if options.unseen:
        vendor = VENDORS[options.held_out]
        rows.append((vendor.title, vendor.licence, "test_unseen", f"{built.count('test_unseen/'):,}", ""))
    return rows


def _readme(built: Built) -> str:
    options = built.options
    broken = "".join(f"- {path}: {why}\n" for path, why in built.broken.items())
    return _README.format(
        table="\n".join(f"| {' | '.join(row)} |" for row in rows_of(built)),
        total=built.count(""), size=options.size, held_out=VENDORS[options.held_out].title,
        background="white" if options.background == "white" else "a light colour that differs from picture to picture",
        broken=f"Could not be drawn:\n\n{broken}" if broken else "None of the files was broken.",
        num_classes=len(GROUPS), unseen=_UNSEEN if options.unseen else _SEEN,
    )  # fmt: skip


_SEEN = """The things of the test are those of training, by other
vendors: what is measured is whether names carry over to another hand. `--unseen 0.1` holds out things as well."""
_UNSEEN = """The things in `test` are those of training, by
other vendors. Those in `test_unseen`, with all their skin tones, are in no other part."""
_README = """# Emoji with captions

{total:,} pictures of {size} x {size} pixels, built by `openeva data emoji` from npm packages of free licences.
LICENSES.txt says which, and whom to credit; what is made from these pictures must keep to them. Names and keywords are
OpenMoji's.

| set | licence | part | pictures | left out |
| --- | --- | --- | ---: | --- |
{table}

{held_out} is held out: no picture of it is in `train`. {unseen}

A sample is `KEY.png` (the drawing on a plain ground: {background}), `KEY.json` (captions, the first one the name;
name, keywords, group, subgroup, code points, vendor, licence, credit) and `KEY.cls` (number of the group: 0 is the
first line of classes.txt). As data of a recipe:

```yaml
data:
  train: [{{name: webdataset, shards: "DIR/train/*.tar", caption_key: json, num_classes: {num_classes}}}]
  val: [{{name: webdataset, shards: "DIR/test/*.tar", caption_key: json, num_classes: {num_classes}}}]
```

{broken}
"""
