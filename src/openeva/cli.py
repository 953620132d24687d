"""The command line: `openeva demo | train | evaluate | report | convert | predict | export | push | config | list | data | doctor`.

arguments -> one function per command -> the library, imported inside that function so that `--help` stays fast.

Exit status: 0 done (or stopped by SIGTERM with everything saved), 1 a required check of `doctor` failed or
an image of `predict` was broken, 2 the input is wrong (one message, no traceback; `--debug` or OPENEVA_DEBUG=1 shows
it), 130 interrupted by Ctrl-C (training saves first).
"""

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from openeva.evaluate import Measurement
    from openeva.train import RunResult

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
NUMBERS = {"parameters", "pixels", "top-1", "probability", "top-1 %", "top-5 %", "right", "published"}
"""Columns of numbers, which stand to the right."""
PIPE_COLUMNS = 200
"""Width of tables that go to a pipe or a file, where there is no terminal to fit."""


class _Commands(TyperGroup):
    """Turns errors that are meant for users into one message and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            again = shlex.join(["openeva", *sys.argv[1:]])
            text = f"interrupted; continue from the last checkpoint with: {again}"
            say(text if ctx.invoked_subcommand in {"train", "demo"} else "interrupted", error=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            if ctx.params.get("debug") or not _is_for_users(error):
                raise
            hint = "" if _is_ours(error) else "\n(--debug shows where this comes from)"
            say(f"error: {error}{hint}", error=True)
            raise typer.Exit(EXIT_BAD_INPUT) from None


def _is_ours(error: Exception) -> bool:
    """Whether openeva defines this exception: then its message was written to stand alone."""
    return type(error).__module__.partition(".")[0] == "openeva"


def _is_for_users(error: Exception) -> bool:
    if isinstance(error, BrokenPipeError):  # `openeva config x | head`: not an error, left to typer
        return False
    missing_extra = isinstance(error, ImportError) and "pip install" in str(error)
    return _is_ours(error) or missing_extra or isinstance(error, ValueError | OSError)


app = typer.Typer(
    name="openeva",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="EVA as a tool: masked pre-training on real images, evaluation, and the official checkpoints.",
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare data.")
app.add_typer(data_app, name="data")

Recipe = Annotated[str, typer.Argument(help="A shipped recipe (see [bold]openeva list[/]) or a path ending in .yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[a.b=c]...", help="Values to change: dotted path, =, YAML. List items by number.", show_default=False
    ),
]
Run = Annotated[Path, typer.Argument(help="Folder of a run.", exists=True, file_okay=False)]


def main() -> None:
    """Entry point of the command `openeva`."""
    app()


def stdout() -> Console:
    """Console for results; as wide as the terminal, or wide enough for tables where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_COLUMNS)


def say(text: str, *, error: bool = False, style: str | None = None) -> None:
    """Print text as it is: no markup, no wrapping, so that paths can be copied and output can be piped."""
    console = Console(stderr=error)
    console.print(text, markup=False, highlight=False, soft_wrap=True, style="bold red" if error else style)


def _training_console() -> Console | None:
    """Console of the main process; the others stay silent."""
    return stdout() if int(os.environ.get("RANK", "0")) == 0 else None


def _show_version(value: bool) -> bool:
    if value:
        from openeva import __version__

        say(f"openeva {__version__}")
        raise typer.Exit
    return value


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="OPENEVA_DEBUG", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of all commands; typer hands them to `_Commands` through the context."""


# ------------------------------------------------------------------------------------------------ training


@app.command()
def demo(
    fast: Annotated[bool, typer.Option("--fast", help="Tiny sizes, under a minute: shows that all works.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/demo, or runs/demo-fast")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start afresh; what is there is moved aside, not deleted.")
    ] = False,
) -> None:
    """Pre-train, evaluate and report a small EVA on real photographs.

    Nothing else is needed: photographs and teacher come with installed packages. The same command continues an
    interrupted demo, and shows a finished one again.
    """
    folder = out or Path("runs/demo-fast" if fast else "runs/demo")
    if restart and folder.exists():
        aside = _unused_name(folder)
        folder.rename(aside)
        say(f"{folder} moved to {aside}")
    from openeva.demo import run_demo

    stopped = run_demo(folder, fast=fast, console=stdout())
    if stopped is not None:
        _end(stopped)


def _unused_name(folder: Path) -> Path:
    number = 1
    while (name := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return name


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Open the data and build the model, say what would run, stop.")
    ] = False,
) -> None:
    """Do the run that a recipe describes, or continue it where its folder holds one.

    On several devices: [bold]torchrun --nproc-per-node 8 -m openeva train RECIPE[/].
    """
    from openeva import train as training
    from openeva.config import load_config

    config = load_config(training.Recipe, recipe, overrides or [])
    if dry_run:
        for line in training.dry_run(config):
            say(line)
        return
    result = training.train(config, console=_training_console())
    _end(result, quiet=_training_console() is None)


def _end(result: "RunResult", *, quiet: bool = False) -> None:
    """Say how a run ended, and exit with 130 where that was a Ctrl-C."""
    if not quiet:
        _say_outcome(result)
    if result.signal == signal.SIGINT:
        raise typer.Exit(EXIT_INTERRUPTED)


def _say_outcome(result: "RunResult") -> None:
    if result.status == "finished":
        say(f"finished after step {result.step}; look at it with: openeva report {shlex.quote(str(result.out))}")
    else:
        again = shlex.join(["openeva", *sys.argv[1:]])
        say(f"stopped after step {result.step} of {result.total_steps}, everything is saved; continue with: {again}")


# ------------------------------------------------------------------------------------------------ after a run


@app.command()
def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|RECIPE",
            help="Folder of a run, or an evaluation recipe; with --weights, evaluate/imagenet_robustness by default.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    evals: Annotated[
        list[str] | None,
        typer.Option("--eval", help="Evaluation of a run; may be given several times.", show_default="its recipe's"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Official name, run, model folder or file.", show_default="the recipe's")
    ] = None,
    imagenet: Annotated[
        Path | None,
        typer.Option(help="Folder with ImageNet-1K and the robustness sets.", show_default="the recipe's"),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Measure without training: a finished run on its held-out images, or weights on ImageNet and beyond.

    [bold]openeva evaluate --weights NAME --imagenet FOLDER[/] prints the accuracies on ImageNet-1K, V2, ReaL, A, R,
    Sketch and ObjectNet beside the published ones.
    """
    from openeva import evaluate as evaluation

    given = [*([target] if target and "=" in target else []), *(overrides or [])]
    target = None if target and "=" in target else target
    if target is not None and Path(target).is_dir() and weights is None and imagenet is None:
        if given:
            raise ValueError(f"a run is measured as its recipe says, not with {given[0]}; use --eval to choose what")
        done = evaluation.measure_run(Path(target), evals or None, console=_training_console())
    else:
        if evals:
            raise ValueError("--eval chooses among what a run can be measured on; a recipe lists its evals itself")
        recipe = evaluation.load_recipe(target, given, weights=weights, imagenet=imagenet)
        done = evaluation.measure(recipe, console=_training_console())
    if json_file is not None and done.file is not None:
        done.write(json_file)
    if _training_console() is not None:
        _show_measurement(done)


def _show_measurement(done: "Measurement") -> None:
    if done.rows:
        columns = ["set", "top-1 %", "top-5 %", "right", "published", "against it"]
        stdout().print(_table(done.weights, columns, [row.cells() for row in done.rows]))
    for name, value in done.other_metrics().items():
        say(f"{name}: {value:.4g}")
    for note in done.notes:
        say(f"note: {note}")
    say(f"written: {done.file}", style="dim")


@app.command()
def report(run: Run) -> None:
    """Write the HTML report of a run."""
    from openeva.report import looking, write_report

    with looking(stdout()) as progress:
        file = write_report(run, progress=progress)
    say(str(file))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of an openeva model, or a weight file of any known layout.")],
    out: Annotated[Path, typer.Argument(help="Folder for openeva, else a file (.safetensors, .pt).")],
    to: Annotated[Literal["openeva", "official", "timm"], typer.Option(help="Wanted layout.")],
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Cast the weights.", show_default="as they are")
    ] = None,
    wrapper: Annotated[
        Literal["model", "module", "bare"], typer.Option(help="Top-level key of an official PyTorch file.")
    ] = "model",
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged weights of a training checkpoint.")] = False,
    patch_size: Annotated[int | None, typer.Option(help="Resize the patch kernel to so many pixels.", min=1)] = None,
    grid: Annotated[
        tuple[int, int] | None, typer.Option(help="Resize positions to this grid.", metavar="ROWS COLUMNS")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="Heads, where the weights do not tell.", min=1)] = None,
) -> None:
    """Write weights in another layout and account for every tensor."""
    from openeva.checkpoints.convert import convert as write

    account = write(
        source, out, to, dtype=dtype, wrapper=wrapper, ema=ema, patch_size=patch_size, grid=grid, num_heads=num_heads
    )
    for line in account.lines():
        say(line)
    say(f"written: {out}")


# ------------------------------------------------------------------------------------------------ using a model


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files, folders, patterns or URLs.")],
    weights: Annotated[str, typer.Option(help="Official name, run, model folder or weight file.")],
    topk: Annotated[int, typer.Option(help="Classes per image.", min=1)] = 5,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="CSV instead of a table, a row per class.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File for JSON or CSV, whichever it ends in.", show_default="standard output")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw where the model looks: to a file, or a folder for several images.")
    ] = None,
    kind: Annotated[
        Literal["attention", "relevance"] | None,
        typer.Option(
            "--map", help="What the picture shows.", show_default="relevance for mean pooling, else attention"
        ),
    ] = None,
    features: Annotated[Path | None, typer.Option(help="Write embeddings to a .npz or .parquet file.")] = None,
    patches: Annotated[bool, typer.Option("--patches", help="With one vector per patch, for --features.")] = False,
    layers: Annotated[
        str | None, typer.Option(help="With the output of blocks such as 3,6,-1, for --features.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 32,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels to look at.", min=1, show_default="the weights' own")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Of the forward pass.")] = "auto",
) -> None:
    """Name what is in images, show where the model looks, write embeddings.

    Broken images are named and skipped; exit status 1 says that there were some.
    """
    from openeva.engine.log import counting
    from openeva.inference import Predictor, find_images, output

    job = output.Job(list(find_images(images)), features, picture, kind, patches=patches, layers=layers or "")
    written_as = output.format_of(out, json=json, csv=csv)
    predictor = Predictor(
        weights, topk=topk, batch_size=batch_size, device=device, precision=precision, image_size=image_size
    )
    failed = 0
    with counting(Console(stderr=True), "images", len(job.images)) as progress:

        def finished(done: int, broken: str | None) -> None:
            nonlocal failed
            if broken is not None:
                failed += 1
                say(f"broken image: {broken}", error=True)
            if progress is not None:
                progress(done)

        predictions = job.answers(predictor, finished)
        if written_as is not None:
            output.write(written_as, predictions, out or sys.stdout)
        else:
            rows = output.as_rows(predictions)
            table = _table("", ["image", "class", "probability"], list(rows))
    if written_as is None and predictor.classes is not None:
        stdout().print(table)
        say(f"class names: {predictor.classes.source}", style="dim")
    for place in (out, features, picture):
        if place is not None and failed < len(job.images):
            say(f"written: {place}", error=written_as is not None)
    if failed:
        say(f"{failed} of {len(job.images)} images could not be read", error=True)
        raise typer.Exit(EXIT_FAILED)


@app.command()
def export(
    weights: Annotated[str, typer.Argument(metavar="MODEL", help="Official name, run, model folder or weight file.")],
    out: Annotated[Path, typer.Argument(help="File ending in .onnx, .pt2 or .safetensors, or a model folder.")],
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
    licence: Annotated[str | None, typer.Option(help="Of the weights.", show_default="that of converted ones")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[
        Path | None, typer.Option(help="Write card and file list to this folder instead; upload nothing.")
    ] = None,
) -> None:
    """Put a model on the hub, with a card that says what it is: converted or trained, from what, measured how."""
    from openeva.hub import push_to_hub

    pushed = push_to_hub(folder, repo, trained_by=trained_by, licence=licence, private=private, dry_run=dry_run)
    for line in pushed.lines():
        say(line)


# ------------------------------------------------------------------------------------------------ looking around


@app.command()
def config(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print the resolved config of a recipe as YAML, ready to be saved as a recipe."""
    from openeva.config import dump_yaml, load_config
    from openeva.evaluate import recipe_type

    text = dump_yaml(load_config(recipe_type(recipe), recipe, overrides or []))
    if sys.stdout.isatty():
        from rich.syntax import Syntax

        Console().print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        sys.stdout.write(text)


@app.command("list")
def list_command(
    pattern: Annotated[
        str | None, typer.Argument(help="Which released weights: a word or wildcard.", show_default="all of them")
    ] = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="Only recipes.")] = False,
    variants: Annotated[bool, typer.Option("--variants", help="Only model variants.")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Only released weights.")] = False,
    components: Annotated[bool, typer.Option("--components", help="Only components.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known, as JSON.")] = False,
) -> None:
    """Show what can be named: recipes, model variants, released weights, components."""
    from openeva import catalogue

    if pattern is not None and (recipes or variants or components):
        raise ValueError(f"{pattern!r} narrows released weights; give it with --weights, or alone")
    weights = weights or pattern is not None
    chosen = {"recipes": recipes, "variants": variants, "weights": weights, "components": components}
    sections = [name for name, asked in chosen.items() if asked] or list(chosen)
    if as_json:
        import json

        sys.stdout.write(json.dumps(catalogue.as_json(sections, pattern or "*"), indent=1, ensure_ascii=False) + "\n")
        return
    console = stdout()
    for name in sections:
        console.print(_table(*catalogue.table(name, pattern or "*")))


def _table(title: str, columns: list[str], rows: Sequence[tuple[str, ...]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        number = column in NUMBERS
        fixed = number or column in {"weights", "recipe"}
        table.add_column(column, style=None, header_style="dim", justify="right" if number else "left", no_wrap=fixed)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


@app.command()
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="Also check the data, teacher and output of this recipe.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine, and whether a recipe could run on it; downloads nothing.

    Exit status 1 when something that is required fails.
    """
    from openeva.doctor import Check, check_machine, check_recipe

    styles = {"ok": "green", "note": "yellow", "fail": "bold red"}
    failed = 0

    def show(check: Check) -> None:
        nonlocal failed
        failed += check.status == "fail"
        console = Console()
        console.print(f"{check.status:<5}", style=styles[check.status], end="", highlight=False)
        console.print(f"{check.name:<12} {check.detail}", markup=False, highlight=False, soft_wrap=True)

    for check in check_machine():
        show(check)
    if recipe is not None:
        for check in check_recipe(recipe, overrides or []):
            show(check)
    if failed:
        raise typer.Exit(EXIT_FAILED)


@data_app.command("check")
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
    stdout().print(_table(f"{kind} in {path}", ["set", "state", "classes", "images", "where"], rows))
    problems = list(dict.fromkeys(problem for one in found.values() for problem in one.problems))
    for problem in problems:
        say(f"- {problem}")
    if problems:
        raise typer.Exit(EXIT_FAILED)


@data_app.command("index")
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


if __name__ == "__main__":
    main()
