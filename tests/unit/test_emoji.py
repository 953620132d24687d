"""`openeva data emoji` with small packages of the real layouts and an `npm` that is a script: no network."""

import io
import json
import random
import stat
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from openeva.cli import app
from openeva.config import ConfigError
from openeva.data import emoji, emoji_packages
from openeva.data.emoji import Options, build
from openeva.data.emoji_names import GROUPS, EmojiNames, captions_of
from openeva.data.labels import has_captions
from openeva.data.sources import webdataset

pytest.importorskip("resvg_py")

NPM = """#!{python}
import os, pathlib, shutil, sys
registry = pathlib.Path({registry!r})
command, spec, *rest = sys.argv[1:]
assert command == "pack" and rest[0] == "--pack-destination", sys.argv
with (registry / "calls").open("a") as calls:
    print(spec, file=calls)
name = spec.replace("@", "-") + ".tgz"
out = pathlib.Path(rest[1]) / name
if (registry / "offline").exists():
    out.write_bytes(b"half of it")
    print("npm error code ENOTFOUND", file=sys.stderr)
    print("npm error network request to the registry failed, reason: no such host", file=sys.stderr)
    print("npm error A complete log of this run can be found in: /somewhere/log", file=sys.stderr)
    sys.exit(1)
shutil.copy(registry / name, out)
print(name)
"""


def row(code: str, name: str, group: str, tags: str = "", base: str = "", tone: object = "") -> dict[str, object]:
    return {
        "hexcode": code, "annotation": name, "group": group, "subgroups": "some", "tags": tags, "openmoji_tags": "",
        "skintone": tone, "skintone_base_hexcode": base, "openmoji_author": "A. Nother",
    }  # fmt: skip


TABLE = [
    row("1F600", "grinning face", "smileys-emotion", "face, grin, happy"),
    row("1F44B", "waving hand", "people-body", "hand, wave", "1F44B"),
    row("1F44B-1F3FD", "waving hand: medium skin tone", "people-body", "", "1F44B", 3),
    row("1F1E9-1F1EA", "flag: Germany", "flags", "DE, flag"),
    row("0023-FE0F-20E3", "keycap: #", "symbols", "keycap"),
    row("1F404", "cow", "animals-nature", "animal, milk"),
    row("E001", "a firm's mark", "extras-openmoji"),
]
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><circle cx="16" cy="16" r="12" fill="{}"/></svg>'
RED = SVG.format("#d00").encode()


def png(colour: tuple[int, int, int]) -> bytes:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((*colour, 255), (16, 16, 48, 48))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def datasource(vendor: str, said: str) -> dict[str, bytes]:
    own = f"has_img_{vendor}"
    rows = [
        {"name": "GRINNING FACE", "unified": "1F600", "image": "1f600.png", own: True, "short_names": ["grinning"]},
        {"name": "WAVING HAND SIGN", "unified": "1F44B", "image": "1f44b.png", own: True, "short_names": ["wave"],
         "skin_variations": {"1F3FD": {"unified": "1F44B-1F3FD", "image": "1f44b-1f3fd.png", own: True}}},
        # a gap of this vendor that the package fills with another firm's picture
        {"name": "COW", "unified": "1F404", "image": "1f404.png", own: False, "short_names": ["cow2"]},
    ]  # fmt: skip
    images = {f"img/{vendor}/64/{name}.png": png((200, 30, 30)) for name in ("1f600", "1f44b", "1f44b-1f3fd", "1f404")}
    return {
        "LICENSE": b"The MIT License (MIT)", "README.md": said.encode(), "emoji.json": json.dumps(rows).encode(),
        f"img/{vendor}/sheets/64.png": png((0, 0, 0)), **images,
    }  # fmt: skip


def packages() -> dict[str, dict[str, bytes]]:
    stated = {vendor.package: vendor.stated[1] for vendor in emoji_packages.VENDORS.values()}
    return {
        "emoji-datasource-google": datasource("google", f"* {stated['emoji-datasource-google']}"),
        "emoji-datasource-twitter": datasource("twitter", f"* {stated['emoji-datasource-twitter']}"),
        "openmoji": {
            "LICENSE.txt": stated["openmoji"].encode(), "data/openmoji.json": json.dumps(TABLE).encode(),
            "black/svg/1F600.svg": RED, **{f"color/svg/{one['hexcode']}.svg": RED for one in TABLE},
        },
        "fluentui-emoji": {
            "LICENSE": stated["fluentui-emoji"].encode(), "icons/modern/cow.svg": RED,
            **{f"icons/flat/{name}.svg": RED for name in
               ("grinning-face", "waving-hand-default", "waving-hand-medium", "keycap-hashtag", "cow", "red-triangle")},
        },
    }  # fmt: skip


def pack(registry: Path, files: dict[str, dict[str, bytes]]) -> None:
    for vendor in emoji_packages.VENDORS.values():
        with tarfile.open(registry / f"{vendor.package}-{vendor.version}.tgz", "w:gz") as tar:
            for path, content in files[vendor.package].items():
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "registry"
    folder.mkdir()
    pack(folder, packages())
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(NPM.format(python=sys.executable, registry=str(folder)))
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(npm.parent))
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path / "cache"))
    return folder


def samples(out: Path, part: str) -> dict[str, dict[str, object]]:
    """Key -> what its JSON says, of all shards of a part."""
    found = {}
    for shard in sorted((out / part).glob("*.tar")):
        with tarfile.open(shard) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    found[name.removesuffix(".json")] = json.load(tar.extractfile(name))
    return found


def test_shards_are_a_source_of_captions_and_labels(registry: Path, tmp_path: Path):
    out = tmp_path / "out"
    built = build(out, Options(size=48))
    assert (built.count("train/"), built.count("test/")) == (3 + 3 + 6, 5)
    config = {"caption_key": "json", "num_classes": len(GROUPS)}
    source = webdataset.Config(shards=[str(out / "train/*.tar")], **config).build()
    assert has_captions(source)
    assert len(source) == 12
    by_name = {source.read(i).name.rpartition(":")[2]: source.read(i) for i in range(len(source))}
    flag = by_name["openmoji-1f1e9-1f1ea"]
    assert flag.extra["captions"][0] == "flag of Germany"
    assert flag.label == list(GROUPS).index("flags")
    assert (out / "classes.txt").read_text().splitlines()[flag.label] == "flags"
    toned = by_name["twemoji-1f44b-1f3fd"].extra["captions"]
    assert toned[0] == "waving hand with medium skin tone"
    assert any(word in text for text in toned for word in ("hand,", "wave,", ", wave", ", hand"))  # of its base
    assert "the wave emoji" in by_name["noto-1f44b"].extra["captions"]
    for sample in by_name.values():
        image = Image.open(io.BytesIO(sample.image))
        assert (image.size, image.mode) == ((48, 48), "RGB")
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((24, 24))[0] > 150 > image.getpixel((24, 24))[1]
        assert len(set(sample.extra["captions"])) == len(sample.extra["captions"]) >= 4


def test_only_the_art_of_the_vendor_and_of_unicode_is_taken(registry: Path, tmp_path: Path):
    built = build(tmp_path / "out", Options())
    train = samples(tmp_path / "out", "train")
    assert "openmoji-1f404" in train
    assert not {"noto-1f404", "twemoji-1f404", "openmoji-e001"} & set(train)
    assert built.left_out["noto"]["not listed by Unicode"] == 1
    assert built.left_out["openmoji"]["not listed by Unicode"] == 1
    assert built.left_out["fluentui"]["not listed by Unicode"] == 1  # the red triangle has no such name
    assert train["noto-1f600"]["licence"] == "Apache-2.0"
    assert train["openmoji-1f600"]["author"] == "A. Nother"
    licences = (tmp_path / "out" / "LICENSES.txt").read_text()
    for vendor in emoji_packages.VENDORS.values():
        assert vendor.licence in licences
        assert vendor.credit in licences
        assert vendor.stated[1] in licences


def test_one_vendor_is_held_out_and_things_on_request(registry: Path, tmp_path: Path):
    build(tmp_path / "a", Options(held_out="openmoji"))
    assert {one["vendor"] for one in samples(tmp_path / "a", "test").values()} == {"openmoji"}
    assert {one["vendor"] for one in samples(tmp_path / "a", "train").values()} == {"noto", "twemoji", "fluentui"}
    build(tmp_path / "b", Options(unseen=0.4, seed=3))
    parts = {part: samples(tmp_path / "b", part).values() for part in ("train", "test", "test_unseen")}
    bases = {part: {one["base"] for one in found} for part, found in parts.items()}
    assert bases["test_unseen"]
    assert bases["train"]
    assert not bases["test_unseen"] & (bases["train"] | bases["test"])
    assert {one["vendor"] for one in parts["test_unseen"]} == {"fluentui"}
    build(tmp_path / "c", Options(skin_tones=False))
    assert not any("skin tone" in one["name"] for one in samples(tmp_path / "c", "train").values())


def test_broken_drawings_are_left_out_counted_and_named(registry: Path, tmp_path: Path):
    files = packages()
    files["openmoji"]["color/svg/1F600.svg"] = b"<svg"
    files["openmoji"]["color/svg/1F404.svg"] = b"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'/>"
    files["emoji-datasource-google"]["img/google/64/1f600.png"] = b"no picture"
    files["emoji-datasource-google"]["img/google/64/1f44b.png"] = png((1, 2, 3))[:90]
    pack(registry, files)
    built = build(tmp_path / "out", Options())
    assert built.count("train/") == 12 - 4
    assert built.broken["openmoji: color/svg/1F404.svg"] == "nothing is to be seen"
    assert {name.rpartition("/")[2] for name in built.broken} == {"1F600.svg", "1F404.svg", "1f600.png", "1f44b.png"}
    assert "noto: img/google/64/1f600.png: not a picture" in (tmp_path / "out" / "README.md").read_text()
    assert len(webdataset.Config(shards=[str(tmp_path / "out/train/*.tar")]).build()) == 8


def test_a_build_that_was_cut_short_goes_on_and_ends_the_same(registry: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(emoji, "SHARD", 2)
    build(tmp_path / "whole", Options())
    seen = []

    def interrupt(what: str, done: int, total: int | None) -> None:
        seen.append(done)
        if what.startswith("drawing OpenMoji") and done == 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(out, Options(), interrupt)
    assert not (out / emoji.COMPLETE).exists()
    assert not (out / "README.md").exists()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar") if not path.name.startswith(".")}
    assert len(before) == 2 + 2 + 1
    (registry / "offline").touch()  # nothing is fetched twice
    built = build(out, Options())
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert built == build(out, Options())
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    whole = tmp_path / "whole"
    assert files == {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    (out / "train" / "noto-000001.tar").unlink()
    assert build(out, Options()) == built
    assert (out / "train" / "noto-000001.tar").is_file()


def test_a_folder_of_other_options_or_other_things_is_refused(registry: Path, tmp_path: Path):
    build(tmp_path / "out", Options())
    with pytest.raises(ConfigError, match=r"was built with size 64, seed 0; ask for the same"):
        build(tmp_path / "out", Options(size=32, seed=1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty, and holds no emoji"):
        build(tmp_path / "full", Options())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(vendors=("noto", "tweemoji")), "'tweemoji' is unknown.*did you mean 'twemoji'"),
        (Options(vendors=("noto", "twemoji")), "'fluentui' is not among the vendors"),
        (Options(vendors=("noto",), held_out="noto"), "give two or more"),
        (Options(size=4), "--size: 4 pixels"),
        (Options(unseen=1.0), "--unseen: 1.0"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: Options, message: str):
    with pytest.raises(ConfigError, match=message):
        build(tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_network_failure_shows_what_npm_said_and_leaves_no_half(registry: Path, tmp_path: Path):
    (registry / "offline").touch()
    with pytest.raises(OSError, match="request to the registry failed, reason: no such host\nWhat was fetched"):
        build(tmp_path / "out", Options())
    assert [*(tmp_path / "cache" / "npm").iterdir()] == []
    (registry / "offline").unlink()
    build(tmp_path / "out", Options())
    build(tmp_path / "again", Options())
    assert len((registry / "calls").read_text().split()) == 1 + 4  # each once, after the failure


def test_what_is_missing_says_what_to_install(registry: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match=r"pip install 'openeva\[emoji\]'"):
        build(tmp_path / "out", Options())
    assert not (registry / "calls").exists()
    built = build(tmp_path / "bitmaps", Options(vendors=("noto", "twemoji"), held_out="twemoji"))
    assert (built.count("train/"), built.count("test/")) == (3, 3)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("OPENEVA_CACHE", str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="no `npm` on the PATH; install Node"):
        build(tmp_path / "third", Options(vendors=("noto", "twemoji"), held_out="twemoji"))


def test_packages_that_are_not_what_they_should_be(registry: Path, tmp_path: Path):
    build(tmp_path / "out", Options())
    archive = tmp_path / "cache" / "npm" / "openmoji-17.0.0.tgz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"openmoji-17.0.0.tgz is damaged .*; delete it"):
        build(tmp_path / "two", Options())
    archive.unlink()
    files = packages()
    files["openmoji"]["LICENSE.txt"] = b"All rights reserved"
    pack(registry, files)
    with pytest.raises(ValueError, match=r"its LICENSE.txt does not say .* licence of OpenMoji is not known"):
        build(tmp_path / "three", Options())


def test_names_of_sequences_and_of_fluents_files():
    names = EmojiNames(json.dumps(TABLE).encode())
    assert names.by_code("1f44b-1f3fd") is names.by_file_name("waving-hand-medium")
    assert names.by_file_name("waving-hand-default") is names.by_code("1F44B")
    assert names.by_file_name("waving-hand-medium-dark") is None
    assert names.by_code("0023-20E3") is names.by_file_name("keycap-hashtag")
    assert names.by_code("E001") is None
    table = [
        row("1", "man: light skin tone, curly hair", "people-body"), row("2", "woman: bald", "people-body"),
        row("3", "family: man, woman, boy", "people-body"),
        row("4", "men with bunny ears: dark skin tone", "people-body"),
        row("5", "kiss: man, man, light skin tone, dark skin tone", "people-body"),
    ]  # fmt: skip
    phrases = [one.phrase for one in EmojiNames(json.dumps(table).encode()).all.values()]
    assert phrases == [
        "man with light skin tone and curly hair", "woman, bald", "family of man, woman and boy",
        "men with bunny ears, dark skin tone", "kiss of man and man, light skin tone and dark skin tone",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="is not the table it should be"):
        EmojiNames(b"[{}]")


def test_captions_vary_with_the_seed_and_start_with_the_name():
    cow = EmojiNames(json.dumps(TABLE).encode()).by_code("1F404")
    assert captions_of(cow, random.Random(1)) == captions_of(cow, random.Random(1))
    many = [captions_of(cow, random.Random(seed)) for seed in range(20)]
    assert {captions[0] for captions in many} == {"cow"}
    assert len({text for captions in many for text in captions}) > 8


def test_command_line(registry: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["data", "emoji", "--out", str(out), "--background", "colours"])
    assert done.exit_code == 0, done.output
    assert "Fluent Emoji, flat  MIT           test   5" in done.output
    assert (out / "LICENSES.txt").is_file()
    wrong = CliRunner().invoke(app, ["data", "emoji", "--out", str(out), "--vendors", "noto,apple"])
    assert wrong.exit_code == 2
    assert "'apple' is unknown: noto, twemoji, openmoji, fluentui" in wrong.output
