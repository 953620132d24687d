"""The command line: `openeva demo | train | evaluate | report | convert | config | list | data | doctor`.

Those that use a finished model (`predict | search | export | push`) are in `commands.py`, those below `data` in
`data_commands.py`.

arguments -> one function per command -> the library, imported inside that function so that `--help` stays fast.

Exit status: 0 done (or stopped by SIGTERM with everything saved), 1 a required check of `doctor` failed, `data check`
found something missing, or an image of `predict` or `search` was broken, 2 the input is wrong (one message, no
traceback; `--debug` or OPENEVA_DEBUG=1 shows it), 130 interrupted by Ctrl-C (training saves first).
"""

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from openeva import commands, data_commands
from openeva.terminal import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, say, stdout, table

if TYPE_CHECKING:
    from openeva.evaluate import Measurement
    from openeva.train import RunResult


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
app.add_typer(commands.app)
app.add_typer(data_commands.app, name="data")

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
    Sketch and ObjectNet beside the published ones; [bold]openeva evaluate evaluate/zeroshot_suite ...[/] those of a
    CLIP without training, and [bold]evaluate/retrieval[/] its recalls.
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
    for columns, rows in done.tables():
        stdout().print(table(done.weights, list(columns), rows))
    for name, value in done.other_metrics().items():
        say(f"{name}: {value:.4g}")
    for note in done.notes:
        say(f"note: {note}")
    say(f"written: {done.file}", style="dim")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", exists=True, file_okay=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="HTML file.",
            show_default="report.html in the run's folder; of several runs comparison.html beside the first",
        ),
    ] = None,
) -> None:
    """Write the HTML report of a run; of several runs a comparison of their held-out metrics.

    Runs of one recipe with different seeds are one line with its spread. The others are measured by the first run's
    recipe: how good they are at the end, and after how many samples they are as good as it became.
    """
    from openeva.report import group_runs, looking, print_tables, write_comparison, write_report

    if len(runs) > 1:
        file = out or runs[0].resolve().parent / "comparison.html"
        print_tables(write_comparison(group_runs(runs), file), stdout())
    else:
        with looking(stdout()) as progress:
            file = write_report(runs[0], out=out, progress=progress)
    say(str(file))


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Run, openeva model folder, weight file of any known layout, or official name.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for openeva, else a file (.safetensors, .pt).")],
    to: Annotated[
        Literal["openeva", "official", "timm", "open_clip"],
        typer.Option(help="Wanted layout; of a CLIP, timm takes the image tower alone."),
    ],
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Cast the weights.", show_default="as they are")
    ] = None,
    wrapper: Annotated[
        Literal["model", "module", "bare"] | None,
        typer.Option(
            help="Top-level key of an official PyTorch file.", show_default="that of the original file, else model"
        ),
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--raw",
            help="Averaged or raw weights of a training checkpoint.",
            show_default="raw, but averaged for released weights whose published accuracy is theirs",
        ),
    ] = None,
    patch_size: Annotated[int | None, typer.Option(help="Resize the patch kernel to so many pixels.", min=1)] = None,
    grid: Annotated[
        tuple[int, int] | None, typer.Option(help="Resize positions to this grid.", metavar="ROWS COLUMNS")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="Heads, where the weights do not tell.", min=1)] = None,
    text_heads: Annotated[int | None, typer.Option(help="Of the text tower of a CLIP, likewise.", min=1)] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a video model, likewise.", min=1)] = None,
) -> None:
    """Write weights in another layout and account for every tensor.

    An official file that was converted to openeva comes back with --to official as it was, bit for bit.
    """
    from openeva.checkpoints.convert import convert as write
    from openeva.checkpoints.native import model_path

    account = write(
        model_path(source), out, to,
        dtype=dtype, wrapper=wrapper, ema=ema, patch_size=patch_size, grid=grid,
        num_heads=num_heads, text_heads=text_heads, num_frames=num_frames,
    )  # fmt: skip
    for line in account.lines():
        say(line)
    say(f"written: {out}")


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
        console.print(table(*catalogue.table(name, pattern or "*")))


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


if __name__ == "__main__":
    main()
