"""Commands that prepare data, `openeva data check | index | emoji | kinetics722 | clips | videos`.

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


@app.command("kinetics722")
def data_kinetics722(
    out: Annotated[Path, typer.Option(help="Folder for the lists.")],
    root: Annotated[
        Path | None,
        typer.Argument(
            help="Folder with k400, k600 and k700; paths in the lists are relative to it.",
            show_default="the common parent folder of the three",
        ),
    ] = None,
    k400: Annotated[Path | None, typer.Option(help="Kinetics-400.", show_default="k400 in ROOT")] = None,
    k600: Annotated[Path | None, typer.Option(help="Kinetics-600.", show_default="k600 in ROOT")] = None,
    k700: Annotated[Path | None, typer.Option(help="Kinetics-700.", show_default="k700 in ROOT")] = None,
    filter_k400: Annotated[
        bool,
        typer.Option(
            "--filter-k400",
            help="Take out of K-400's training list what its validation list holds; EVA's own list has it. K-722's"
            " training list never has videos of any validation set.",
        ),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Open every file once, and leave out those that do not open.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that open files; 0 = work in this one.", min=0, show_default="one per core"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other lists in the folder.")] = False,
) -> None:
    """Merge Kinetics-400, -600 and -700 into the lists of Kinetics-722, as EVA did.

    Each set is [bold]train/CLASS/ID_START_END.mp4[/] and [bold]val/...[/], where ID is the YouTube id (11 characters).
    K-722's training list takes each id once and none that is in any validation set. Also written: the lists of the
    three sets, names of labels, arrays from their labels to K-722's, and report.csv with every file that was dropped
    and why. Downloads nothing.
    """
    from openeva.data import kinetics722
    from openeva.data.building import num_cores
    from openeva.data.kinetics_classes import locate
    from openeva.engine.log import stages

    start, folders = locate(root, {"k400": k400, "k600": k600, "k700": k700})
    options = kinetics722.Options(filter_k400, check, num_cores() if workers is None else workers, overwrite)
    try:
        with stages(stdout()) as watch:
            built = kinetics722.build(out, start, folders, options, watch)
    except KeyboardInterrupt:
        if (out / kinetics722.REPORT).is_file():
            say(f"the lists in {out} are whole; {kinetics722.REPORT} says how many files were opened")
        raise
    stdout().print(table(f"Kinetics-722 in {out}", kinetics722.COLUMNS, kinetics722.rows_of(built)))
    for note in built.notes:
        say(f"- {note}")
    say(f"what the files are, and the same table: {out / kinetics722.REPORT}")


@app.command("clips")
def data_clips(
    out: Annotated[
        Path, typer.Argument(help="Folder for the videos; the same command goes on where one was cut short.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images for a window to move over, or [bold]skimage[/]: the photographs that come with"
            " scikit-image.",
            show_default="drawn objects that move",
        ),
    ] = None,
    num: Annotated[int, typer.Option(help="Videos, training and validation together.")] = 1200,
    frames: Annotated[int, typer.Option(help="Frames of each.")] = 32,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 16,
    size: Annotated[int, typer.Option(help="Side length in pixels.")] = 96,
    actions: Annotated[
        str | None, typer.Option(help="The classes, with commas.", show_default="all 12, or 16 of images")
    ] = None,
    val_share: Annotated[
        float, typer.Option(help="Share of the videos, and of the images, that are for validation.")
    ] = 0.2,
    drift: Annotated[bool, typer.Option("--drift", help="Let the other drawn objects move as well, slowly.")] = False,
    easy: Annotated[
        bool,
        typer.Option("--easy", help="Draw plain grounds, large objects, long paths: a small model learns them."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Another one, other videos.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Processes; 0 = work in this one.", min=0, show_default="one per core")
    ] = None,
) -> None:
    """Make short videos whose class is what happens in them, and nothing that a single picture shows.

    Drawn objects move in four directions, grow, shrink, turn, appear, disappear, collide, pass. Over images
    (--images) a window pans, zooms, rotates, or does two such things one after the other, where their order is the
    class: any two, such as [bold]zoom_in_then_pan_up[/], can be named in --actions. No image is in both parts.

    Written: OUT/train/CLASS/NAME.mp4 and OUT/val/..., lists (train.txt, val.txt), labels.csv, README.md.
    Exit status 1 when an image is broken. Needs the extra [bold]video[/].
    """
    from openeva.data import motion_clips
    from openeva.data.building import num_cores
    from openeva.engine.log import counting

    names = tuple(name.strip() for name in (actions or "").split(",") if name.strip())
    options = motion_clips.Options(images, num, frames, fps, size, names, val_share, drift, easy, seed)
    with counting(stdout(), "writing videos", num) as watch:
        built = motion_clips.build(out, options, num_workers=num_cores() if workers is None else workers, watch=watch)
    stdout().print(table(f"videos in {out}", ["label", "class", "train", "val"], motion_clips.rows_of(built)))
    for path, why in list(built.broken.items())[:10]:
        say(f"- skipped {path}: {why}")
    if len(built.broken) > 10:
        say(f"- ... and {len(built.broken) - 10:,} more")
    say(f"{built.made:,} made now; what it is, and how to train on it: {out / 'README.md'}")
    if built.broken:
        raise typer.Exit(EXIT_FAILED)


@app.command("videos")
def data_videos(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of videos, in folders of any depth.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the small ones, under the same names.")],
    resize: Annotated[
        str,
        typer.Option(
            metavar="N|WxH",
            help="256: the shorter side in pixels, ratio kept, which is what the official transform begins with."
            " 340x256: just this width and height, exchanged for portrait videos.",
        ),
    ] = "256",
    fps: Annotated[
        float | None,
        typer.Option(help="At most so many frames per second; none is doubled.", show_default="all, at their times"),
    ] = None,
    keyframe_every: Annotated[
        int, typer.Option(metavar="FRAMES", help="A frame that needs no other at least so often: seeking is cheap.")
    ] = 12,
    crf: Annotated[int, typer.Option(help="Quality, 0 (lossless) to 51; 6 more is about half the size.")] = 23,
    upscale: Annotated[
        bool,
        typer.Option(
            "--upscale",
            help="Enlarge small videos. Without it they keep their size; of 340x256 they get the ratio, as large as"
            " they fill it.",
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes; 0 = work in this one.", min=0, show_default="one per core")
    ] = None,
) -> None:
    """Re-encode a folder of videos in small, so that training reads them cheaply.

    OUT gets the same folders and names, ending in .mp4 (h264, yuv420p, even sides): upright, without sound, each frame
    at its time. The same command goes on where one was cut short; Ctrl-C keeps what is finished. Files that cannot be
    read are named, and listed in OUT/broken.txt; exit status 1 says that there were some. Lists beside the videos are
    neither copied nor changed. Needs the extra [bold]video[/].
    """
    from openeva.data import video_resize
    from openeva.data.building import num_cores
    from openeva.engine.log import counting

    options = video_resize.Options(resize, fps, keyframe_every, crf, upscale)
    num_workers = num_cores() if workers is None else workers
    with counting(stdout(), "re-encoding", len(video_resize.find_videos(source))) as watch:
        resized = video_resize.resize_folder(source, out, options, num_workers=num_workers, watch=watch)
    for path, why in list(resized.broken.items())[:10]:
        say(f"- skipped {path}: {why}")
    if len(resized.broken) > 10:
        say(f"- ... and {len(resized.broken) - 10:,} more")
    say(video_resize.summary_of(resized))
    if resized.broken:
        say(f"all files without a result, and why: {out / video_resize.BROKEN}")
        raise typer.Exit(EXIT_FAILED)
