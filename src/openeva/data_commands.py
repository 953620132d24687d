"""Commands that prepare data: `openeva data check | index | emoji`; `cli.py` makes them part of `openeva`.

arguments -> one function per command -> `data`, imported inside it so that `--help` stays fast
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from openeva.terminal import EXIT_FAILED, say, stdout, table

app = typer.Typer(no_args_is_help=True, help="Prepare data.")


@app.command("check")
def data_check(
    kind: Annotated[Literal["imagenet"], typer.Argument(help="What should be there.")],
    path: Annotated[Path, typer.Argument(help="Folder that holds all sets.")],
) -> None:
    """Look for ImageNet-1K's validation images and the six robustness sets, and count them.

    Each set is looked for under the names of its archive: [bold]imagenet[/] (or imagenet-1k, ILSVRC2012, or the folder
    itself, with val/ in it), [bold]imagenetv2-matched-frequency-format-val[/], [bold]imagenet-a[/],
    [bold]imagenet-r[/], [bold]sketch[/] (or imagenet-sketch), [bold]objectnet-1.0[/]. Exit status 1 when one is missing
    or not complete.
    """
    from openeva.data.imagenet_layout import FACTS, SETS, survey_beneath

    found = {name: survey_beneath(path, name) for name in SETS}
    rows = [
        (
            FACTS[name].title, "ok" if not one.problems else "incomplete" if one.num_images else "missing",
            f"{one.num_classes:,} of {FACTS[name].num_classes:,}", f"{one.num_images:,} of {FACTS[name].num_images:,}",
            str(one.root) if one.num_images else "",
        )
        for name, one in found.items()
    ]  # fmt: skip
    stdout().print(table(f"{kind} in {path}", ["set", "state", "classes", "images", "where"], rows))
    problems = list(dict.fromkeys(problem for one in found.values() for problem in one.problems))
    for problem in problems:
        say(f"- {problem}")
    if problems:
        raise typer.Exit(EXIT_FAILED)


@app.command("index")
def data_index(
    roots: Annotated[list[Path], typer.Argument(help="Folders of images: the recipe's `roots`, in their order.")],
    extensions: Annotated[
        list[str] | None, typer.Option("--extension", help="File name endings to take.", show_default="all known")
    ] = None,
) -> None:
    """Index folders of images before the first run, for example on a machine nearer to the disk; always scans anew."""
    from openeva.config import validate
    from openeva.data.file_index import cache_dir
    from openeva.data.sources.image_folder import Config as ImageFolder
    from openeva.engine.log import scanning

    content: dict[str, Any] = {"roots": roots, "reindex": True}
    if extensions:
        content["extensions"] = extensions
    source = validate(ImageFolder, content)
    with scanning(stdout()) as progress:
        opened = source.build(progress)
    say(f"{len(opened):,} images; the index is in {cache_dir()}")


@app.command("emoji")
def data_emoji(
    out: Annotated[Path, typer.Option(help="Folder for the shards; the same command goes on where one was cut short.")],
    vendors: Annotated[str, typer.Option(help="Which sets, with commas.")] = "noto,twemoji,openmoji,fluentui",
    held_out: Annotated[str, typer.Option(help="The set that is for testing.")] = "fluentui",
    size: Annotated[
        int, typer.Option(help="Side length in pixels; Noto and Twemoji have 64, the other sets are drawn at any size.")
    ] = 64,
    background: Annotated[
        Literal["white", "colours"], typer.Option(help="Behind the drawings: white, or a light colour for each.")
    ] = "white",
    unseen: Annotated[
        float, typer.Option(help="Share of the things to hold out as well, with all their skin tones.")
    ] = 0.0,
    skin_tones: Annotated[bool, typer.Option(help="With the variants in skin tones, more than half of all.")] = True,
    seed: Annotated[int, typer.Option(help="Of phrasings, order, colours and of what is unseen.")] = 0,
) -> None:
    """Build image-text shards of emoji (names, keywords, groups) from four sets of free licences.

    Fetches Noto, Twemoji, OpenMoji and Fluent (flat) as npm packages (165 MB, kept in openeva's cache) and writes
    14,669 pictures with captions (85 MB): one set as [bold]test[/], the others as [bold]train[/]. A minute or two.
    Needs the command [bold]npm[/] and the extra [bold]emoji[/].
    """
    from openeva.data import emoji
    from openeva.engine.log import stages

    names = tuple(name.strip() for name in vendors.split(",") if name.strip())
    options = emoji.Options(names, held_out, size, background, unseen, skin_tones, seed)
    with stages(stdout()) as watch:
        built = emoji.build(out, options, watch)
    columns = ["set", "licence", "part", "pictures", "left out"]
    stdout().print(table(f"emoji in {out}", columns, emoji.rows_of(built)))
    for path, why in list(built.broken.items())[:10]:
        say(f"- skipped {path}: {why}")
    if len(built.broken) > 10:
        say(f"- ... and {len(built.broken) - 10:,} more, listed in {out / 'README.md'}")
    say(f"what it is, and how to train on it: {out / 'README.md'}; licences and credits: {out / 'LICENSES.txt'}")
