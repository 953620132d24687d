"""The npm packages that hold emoji of free licences: fetched by the `npm` command, read without unpacking.

vendor -> `fetch` (`npm pack` into a cache) -> `read_package` (name -> bytes, in memory) -> `drawings_of` -> `Drawing`

Only sets whose art is free are known, and of each package only the vendor's own files are read: the sprite sheets of
`emoji-datasource` fill their gaps with other firms' pictures. What a package says about its licence is looked for
before anything is taken from it. Nothing is unpacked to disk, so that no path in an archive can lead anywhere.
"""

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from openeva.config import ConfigError
from openeva.data.emoji_names import Emoji, EmojiNames
from openeva.registry import did_you_mean

Files = Mapping[str, bytes]
"""What a package holds, by path."""


@dataclass(frozen=True)
class Vendor:
    """Who drew a set of emoji, and where it is.

    Attributes:
        title: What the set is called.
        package: Its npm package.
        version: The one that this reader was made for.
        folder: Where the pictures lie in it.
        licence: Of the pictures, as SPDX has it.
        stated: File of the package that says so, and the words it does it with.
        credit: Whom to name.
        megabytes: Size of the download.
    """

    title: str
    package: str
    version: str
    folder: str
    licence: str
    stated: tuple[str, str]
    credit: str
    megabytes: int

    @property
    def is_drawn(self) -> bool:
        """Whether the pictures are SVG, not PNG of 64 pixels."""
        return not self.package.startswith("emoji-datasource")


VENDORS: MappingProxyType[str, Vendor] = MappingProxyType({
    "noto": Vendor(
        "Noto Emoji", "emoji-datasource-google", "16.0.0", "img/google/64", "Apache-2.0",
        ("README.md", "Noto images, are available under the [Apache License 2.0]"), "Google", 75,
    ),
    "twemoji": Vendor(
        "Twemoji", "emoji-datasource-twitter", "16.0.0", "img/twitter/64", "CC-BY-4.0",
        ("README.md", "Twitter images are available under the [Creative Commons Attribution 4.0 license]"),
        "Twitter and other contributors of Twemoji", 62,
    ),
    "openmoji": Vendor(
        "OpenMoji", "openmoji", "17.0.0", "color/svg", "CC-BY-SA-4.0",
        ("LICENSE.txt", "Attribution-ShareAlike 4.0 International"),
        "OpenMoji, the open-source emoji and icon project (openmoji.org)", 5,
    ),
    "fluentui": Vendor(
        "Fluent Emoji, flat", "fluentui-emoji", "1.3.0", "icons/flat", "MIT", ("LICENSE", "MIT License"),
        "Microsoft; npm package by Mohammad Abu Mattar", 24,
    ),
})  # fmt: skip
"""The sets that can be taken, in the order in which they are built."""


@dataclass(frozen=True)
class Drawing:
    """One picture of a vendor.

    Attributes:
        vendor: A key of `VENDORS`.
        emoji: What it shows.
        path: Of the file in the package, for messages.
        content: PNG or SVG.
        aliases: Other names that the package gives it.
    """

    vendor: str
    emoji: Emoji
    path: str
    content: bytes
    aliases: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------ fetching


def fetch(vendor: Vendor, cache: Path) -> Path:
    """The package's archive, downloaded unless an earlier call did so.

    Raises:
        FileNotFoundError: There is no `npm`.
        OSError: npm failed; the message is npm's own.
    """
    archive = cache / f"{vendor.package}-{vendor.version}.tgz"
    if archive.is_file():
        return archive
    if (npm := shutil.which("npm")) is None:
        raise FileNotFoundError(
            f"{vendor.title} comes as an npm package, but there is no `npm` on the PATH; install Node.js (it brings"
            " npm: `apt install npm`, `brew install node`, or nodejs.org) and run the command again"
        )
    cache.mkdir(parents=True, exist_ok=True)
    # a folder of its own until npm has written and checked the whole archive
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=cache) as folder:
        command = [
            npm,
            "pack",
            f"{vendor.package}@{vendor.version}",
            "--pack-destination",
            folder,
            "--loglevel",
            "error",
        ]
        quiet = {"npm_config_update_notifier": "false", "npm_config_progress": "false"}
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, cwd=folder, env=os.environ | quiet,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        found = [*Path(folder).glob("*.tgz")]
        if done.returncode or len(found) != 1:
            raise OSError(
                f"npm could not fetch {vendor.package}@{vendor.version}: {_last_word(done.stderr)}\nWhat was fetched"
                " before is kept; check the network and npm's registry (`npm ping`), and run the command again"
            )
        found[0].replace(archive)
    return archive


def _last_word(errors: str) -> str:
    """The last line of npm that says what went wrong: not where its log lies."""
    lines = (line.strip().removeprefix("npm error").strip() for line in errors.splitlines())
    said = [line for line in lines if line and "complete log of this run" not in line and not line.startswith(os.sep)]
    return said[-1] if said else "it gave no reason"


# ------------------------------------------------------------------------------------------------------- reading


def read_package(vendor: Vendor, archive: Path) -> Files:
    """All files of a package that are of use, by path.

    Raises:
        ValueError: The archive is damaged, is laid out otherwise, or does not state the licence that is expected.
    """
    wanted = (f"{vendor.folder}/", "LICENSE", "README", "emoji.json", "data/openmoji.json")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = member.name.partition("/")[2]  # without the folder "package"
                if member.isreg() and path.startswith(wanted) and (file := tar.extractfile(member)):
                    files[path] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{archive} is damaged ({error}); delete it, and it is fetched again") from None
    where, words = vendor.stated
    if words not in files.get(where, b"").decode("utf-8", "replace"):
        raise ValueError(
            f"{archive}: its {where} does not say {words!r} as it did when this was written, so that the licence of"
            f" {vendor.title} is not known; leave it out (--vendors), or delete the archive if it is not the true one"
        )
    if not any(path.startswith(f"{vendor.folder}/") for path in files):
        raise ValueError(f"{archive} has no {vendor.folder}: not the package it should be; delete it")
    return files


def drawings_of(name: str, files: Files, names: EmojiNames) -> tuple[list[Drawing], list[str]]:
    """The pictures of a vendor in the order of their code points, and the files that show no sequence that is known.

    Raises:
        ValueError: The package's table cannot be read.
    """
    vendor = VENDORS[name]
    read: Mapping[str, Callable[[Files, EmojiNames, str], dict[str, tuple[Emoji, tuple[str, ...]]]]] = {
        "noto": _datasource, "twemoji": _datasource, "openmoji": _openmoji, "fluentui": _fluent,
    }  # fmt: skip
    known = read[name](files, names, vendor.folder)
    found: dict[str, Drawing] = {}
    unknown = []
    for path in sorted(path for path in files if path.startswith(f"{vendor.folder}/")):
        if path not in known or known[path][0].code in found:
            unknown.append(path)
            continue
        emoji, aliases = known[path]
        found[emoji.code] = Drawing(name, emoji, path, files[path], aliases)
    return [found[code] for code in sorted(found)], unknown


def _datasource(files: Files, names: EmojiNames, folder: str) -> dict[str, tuple[Emoji, tuple[str, ...]]]:
    """Files of emoji-datasource, of those only that are the vendor's own."""
    own = f"has_img_{folder.split('/')[1]}"
    known = {}
    try:
        for row in json.loads(files["emoji.json"]):
            aliases = [row["name"].lower(), *(short.replace("_", " ") for short in row["short_names"])]
            for one in (row, *row.get("skin_variations", {}).values()):
                emoji = names.by_code(one["unified"])
                if one[own] and emoji is not None:
                    readable = (
                        alias for alias in aliases if alias.replace(" ", "").isalpha() and alias != emoji.phrase
                    )
                    known[f"{folder}/{one['image']}"] = emoji, () if emoji.tones else tuple(dict.fromkeys(readable))[:2]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"emoji.json of the package is not the table it should be ({error!r})") from None
    return known


def _openmoji(files: Files, names: EmojiNames, folder: str) -> dict[str, tuple[Emoji, tuple[str, ...]]]:
    found = ((path, names.by_code(Path(path).stem)) for path in files if path.startswith(folder))
    return {path: (emoji, ()) for path, emoji in found if emoji is not None}


def _fluent(files: Files, names: EmojiNames, folder: str) -> dict[str, tuple[Emoji, tuple[str, ...]]]:
    found = ((path, names.by_file_name(Path(path).stem)) for path in files if path.startswith(folder))
    return {path: (emoji, ()) for path, emoji in found if emoji is not None}


def licence_texts(name: str, files: Files) -> str:
    """Who drew a set, under which licence, and all that the package itself says about it."""
    vendor = VENDORS[name]
    texts = [
        f"{vendor.title}: {vendor.licence}\nCredit: {vendor.credit}\nnpm package: {vendor.package} {vendor.version}"
    ]
    if vendor.stated[0] == "README.md":  # the licence file of the package is that of its tables
        readme = files["README.md"].decode("utf-8", "replace")
        said = [line for line in readme.splitlines() if vendor.stated[1] in line]
        texts.append("What its README.md says of these pictures:\n" + "\n".join(said))
    for path in sorted(path for path in files if path.upper().startswith("LICENSE")):
        texts.append(f"Its {path}:\n\n{files[path].decode('utf-8', 'replace').strip()}")
    return "\n\n".join(texts)


def check_vendors(vendors: list[str], held_out: str) -> None:
    """See that all names are known.

    Raises:
        ConfigError: One is not, or nothing would be left to train on.
    """
    known = list(VENDORS)
    problems = [f"--vendors: {name!r} is unknown: {', '.join(known)}{did_you_mean(name, known)}"
                for name in vendors if name not in known]  # fmt: skip
    if not problems and held_out not in vendors:
        problems.append(f"--held-out: {held_out!r} is not among the vendors to build ({', '.join(vendors)})")
    elif not problems and len(vendors) < 2:
        problems.append("--vendors: give two or more: one is held out, and the others are to train on")
    if problems:
        raise ConfigError(problems)
