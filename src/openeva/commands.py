"""Commands that put a model to use: `openeva predict | search | export | push`; `cli.py` makes them part of `openeva`.

arguments -> one function per command -> `inference`, `export`, `hub`, imported inside it so that `--help` stays fast
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from openeva.terminal import EXIT_FAILED, say, stdout, table

if TYPE_CHECKING:
    from openeva.inference import Index

app = typer.Typer(rich_markup_mode="rich")


@app.command()
def predict(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Files, folders, patterns or URLs; videos for a video model."),
    ],
    weights: Annotated[str, typer.Option(help="Official name, run, model folder or weight file.")],
    text: Annotated[
        list[str] | None, typer.Option(help="What may be seen, for a CLIP; several are ranked.", show_default=False)
    ] = None,
    texts: Annotated[Path | None, typer.Option(metavar="FILE", help="The same from a file, one per line.")] = None,
    templates: Annotated[
        str | None,
        typer.Option(
            help="What texts are put into: 'a photo of a {c}.', a file, or a name such as imagenet.",
            show_default="texts as they are",
        ),
    ] = None,
    topk: Annotated[
        int | None, typer.Option(help="Classes per image or action.", min=1, show_default="5, or 10 texts")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="CSV instead of a table, a row per class.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File for JSON or CSV, whichever it ends in.", show_default="standard output")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw where the model looks: to a file, or a folder for several images. Of a video, frames."),
    ] = None,
    kind: Annotated[
        Literal["attention", "relevance"] | None,
        typer.Option(
            "--map", help="What the picture shows.", show_default="relevance for mean pooling and texts, else attention"
        ),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Write embeddings to a .npz or .parquet file, of videos one per window.")
    ] = None,
    patches: Annotated[bool, typer.Option("--patches", help="With one vector per patch, for --features.")] = False,
    layers: Annotated[
        str | None, typer.Option(help="With the output of blocks such as 3,6,-1, for --features.", show_default=False)
    ] = None,
    window: Annotated[
        float | None, typer.Option(help="Seconds of a video that are answered as one clip.", show_default="10")
    ] = None,
    clips: Annotated[int | None, typer.Option(help="Clips per window, averaged.", min=1, show_default="1")] = None,
    crops: Annotated[
        int | None, typer.Option(help="1 = centre, 3 = left, middle, right too, averaged.", show_default="1")
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Let a model of images look at so many frames of each window.", min=1, show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images, or frames of clips, per forward pass.", min=1)] = 32,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels to look at.", min=1, show_default="the weights' own")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Of the forward pass.")] = "auto",
) -> None:
    """Name what is in images or videos, show where the model looks, write embeddings.

    A classifier knows its classes; a CLIP tells apart what you write: --text "a photo of a cat" --text "a drawing".
    A video model sees videos and names actions with their times; a model of images sees --frames of them.
    Broken images and videos are named and skipped; exit status 1 says that there were some.
    """
    from openeva.engine.log import counting
    from openeva.inference import Predictor, Windows, output
    from openeva.inference.inputs import Media
    from openeva.inference.texts import read_texts

    windows = Windows.asked(seconds=window, num_clips=clips, num_crops=crops, num_frames=frames)
    job = output.Job(Media(images), features, picture, kind, patches=patches, layers=layers or "", windows=windows)
    written_as = output.format_of(out, json=json, csv=csv)
    named = [*(text or []), *(read_texts(texts) if texts else [])]
    predictor = Predictor(
        weights, topk=topk, batch_size=batch_size, device=device, precision=precision, image_size=image_size,
        texts=named, templates=templates,
    )  # fmt: skip
    report = getattr(predictor.model, "load_report", None)
    for line in report.lines() if report else ():
        say(line, error=True, style="dim")
    job.choose(predictor)
    failed = 0
    with counting(Console(stderr=True), job.kind, len(job.inputs)) as progress:

        def finished(done: int, broken: str | None) -> None:
            nonlocal failed
            if broken is not None:
                failed += 1
                say(f"broken {job.kind[:-1]}: {broken}", error=True)
            if progress is not None:
                progress(done)

        predictions = job.answers(predictor, finished)
        if written_as is not None:
            output.write(written_as, predictions, out or sys.stdout, texts=bool(named), kind=job.kind)
        else:
            columns = ["text", "probability", "cosine"] if named else ["class", "probability"]
            answers = table("", [*job.columns, *columns], list(output.as_rows(predictions, topk)))
    if written_as is None and predictor.classes is not None:
        stdout().print(answers)
        softmax = "probabilities: softmax of 100 × cosine over the texts"
        if len(predictor.classes.names) == 1:
            softmax = "one text alone always has 100 %: its cosine says how near it is"
        say(softmax if named else f"class names: {predictor.classes.source}", style="dim")
    for place in (out, features, picture):
        if place is not None and failed < len(job.inputs):
            say(f"written: {place}", error=written_as is not None, style="dim")
    if failed:
        say(f"{failed} of {len(job.inputs)} {job.kind} could not be read", error=True)
        raise typer.Exit(EXIT_FAILED)


@app.command()
def search(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images, searched at any depth.")],
    queries: Annotated[
        list[str] | None, typer.Argument(metavar="QUERY", help="What is looked for.", show_default=False)
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Find what looks like this, alone or with queries.", show_default=False)
    ] = None,
    each: Annotated[bool, typer.Option("--each", help="Each query by itself, not all together.")] = False,
    top: Annotated[int, typer.Option(help="Most images to show.", min=1)] = 20,
    threshold: Annotated[float | None, typer.Option(help="Least score (cosine), such as 0.25.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A CLIP: official name, run, model folder or file.",
            show_default="those of the index, or EVA02_CLIP_B_psz16_s8B",
        ),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of the index.", show_default="in the cache, not in DIR")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update/--no-update", help="Take in new and changed images before searching.")
    ] = True,
    html: Annotated[Path | None, typer.Option(help="Write a page of pictures of what is found.")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="CSV instead of a table.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File for JSON or CSV, whichever it ends in.", show_default="standard output")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 32,
    workers: Annotated[
        int | None, typer.Option(help="Threads that read images.", min=1, show_default="one per processor")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Of the image tower.")] = "auto",
) -> None:
    """Find images of a folder by what a text says, or by what another image shows.

    The first time all images are encoded (an index), later only new and changed ones; what was done before Ctrl-C is
    kept. Without a query the index is made, and that is all. Exit status 1 says that an image could not be read.
    """
    from openeva.inference import Index, contact_sheet, found, output

    query = found.Query(queries or [], image or [], each=each, top=top, threshold=threshold)
    written_as = output.format_of(out, json=json, csv=csv)
    if not query and (written_as is not None or html is not None):
        raise ValueError("--html, --json, --csv and --out tell what is found; give a query or --image too")
    searched = Index(
        folder, weights=weights, place=index, batch_size=batch_size, device=device, precision=precision,
        num_readers=workers,
    )  # fmt: skip
    failed = update and _update(searched)
    answers = query.answers(searched) if query else []
    if answers and written_as is not None:
        found.write(written_as, answers, out or sys.stdout)
    for answer in answers if written_as is None else ():
        if answer.hits:
            stdout().print(table(answer.query, ["rank", "score", "image"], answer.rows()))
        else:
            say(f"{answer.query}: nothing was found")
    if answers and html is not None:
        note = f"{len(searched):,} images searched with {searched.weights}"
        contact_sheet.write_contact_sheet(html, folder.expanduser(), answers, like=image or [], note=note)
    for place in (out, html):
        if answers and place is not None:
            say(f"written: {place}", error=written_as is not None, style="dim")
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _update(index: "Index") -> bool:
    """Bring an index up to date and tell about it; True where an image was found to be broken."""
    from openeva.engine.log import counting

    done_before_stop = 0
    with ExitStack() as stack:
        progress: Callable[[int], None] | None = None

        def finished(done: int, total: int, broken: str | None) -> None:
            nonlocal progress, done_before_stop
            if done == 1:
                progress = stack.enter_context(counting(Console(stderr=True), "indexing", total))
            done_before_stop = done
            if broken is not None:
                say(f"broken image: {broken}", error=True)
            if progress is not None:
                progress(done)

        try:
            done = index.update(finished)
        except KeyboardInterrupt:
            stack.close()
            if done_before_stop:
                kept = f"{done_before_stop:,} images were encoded and are kept; the same command goes on from there"
                say(kept, error=True)
            raise
    for line in done.lines():
        say(line, error=True, style="dim")
    return bool(done.broken)


@app.command()
def export(
    weights: Annotated[str, typer.Argument(metavar="MODEL", help="Official name, run, model folder or weight file.")],
    out: Annotated[
        Path, typer.Argument(help="File ending in .onnx, .pt2 or .safetensors; with --to safetensors also a folder.")
    ],
    to: Annotated[
        Literal["onnx", "torch", "safetensors"] | None, typer.Option(help="Kind.", show_default="by the ending")
    ] = None,
    expects: Annotated[
        Literal["normalised", "unit", "uint8"],
        typer.Option("--input", help="Pixels that the program takes; unit (0..1) and uint8 are normalised inside."),
    ] = "normalised",
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of the exported model.", min=1, show_default="the weights' own")
    ] = None,
) -> None:
    """Write a model as ONNX, torch.export program or safetensors, with a free batch size.

    The program is run on random input and compared with the model; where they differ, nothing is written.
    """
    from openeva.export import export_model

    for line in export_model(weights, out, to, image_size=image_size, expects=expects).lines():
        say(line)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Model folder or run.", exists=True, file_okay=False)],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub: NAME/MODEL.")],
    trained_by: Annotated[str | None, typer.Option(help="Who trained a model of your own, for the card.")] = None,
    data: Annotated[
        str | None, typer.Option(help="What it was trained on.", show_default="the sources of the run")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Of the weights.", show_default="that of converted ones")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[
        Path | None, typer.Option(help="Write card and file list to this folder instead; upload nothing.")
    ] = None,
) -> None:
    """Put a model on the hub, with a card that says what it is: converted or trained, from what, measured how."""
    from openeva.hub import push_to_hub

    pushed = push_to_hub(
        folder, repo, trained_by=trained_by, data=data, licence=licence, private=private, dry_run=dry_run
    )
    for line in pushed.lines():
        say(line)
