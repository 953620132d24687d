"""What `openeva doctor` checks: this machine, and whether a recipe could run on it. Trains nothing, downloads nothing.

machine, installed packages, recipe -> `Check`s, each with what was found and, where it is not well, the fix.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from openeva import __version__
from openeva.checkpoints.pretrained import PRETRAINED, VARIABLE, find_local, hub_place, known_name, resolve
from openeva.checkpoints.weights import find_weights, is_file_address, open_clip_facts, split_open_clip_name
from openeva.config import ComponentConfig, ConfigError, load_config
from openeva.train import Recipe

LOW_DISK_GIB = 5.0
STARTS = ("init_from", "init_image", "init_text")
"""Keys of tasks that name weights to start from."""
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        status: "ok"; "note": works, but something is worth knowing; "fail": something required is missing.
        name: What was looked at.
        detail: What was found, and the fix.
    """

    status: Literal["ok", "note", "fail"]
    name: str
    detail: str


# ------------------------------------------------------------------------------------------------ machine


def check_machine() -> Iterator[Check]:
    """Python, torch, devices, precision, required packages, extras and free disk."""
    import torch

    from openeva.engine.hardware import cpu_name
    from openeva.engine.precision import resolve_precision

    yield Check("ok", "openeva", f"{__version__} in {Path(__file__).parent}")
    yield Check("ok", "python", f"{platform.python_version()} at {sys.executable}, {platform.platform()}")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    yield Check("ok", "torch", f"{torch.__version__} ({cuda}), {torch.get_num_threads()} threads")
    yield from _required_packages()
    cpu = torch.device("cpu")
    precision = resolve_precision("auto", cpu)
    why = "" if precision == "bf16" else ": no native bf16 on this CPU"
    yield Check("ok", "cpu", f"{cpu_name()}, {_usable_cores()} usable cores; trains in {precision}{why}")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        precision = resolve_precision("auto", torch.device("cuda", number))
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Check("ok", f"cuda:{number}", f"{properties.name}, {memory}; trains in {precision}")
    if torch.cuda.device_count() == 0:
        if shutil.which("nvidia-smi"):
            text = "an NVIDIA driver, but torch sees no GPU: check CUDA_VISIBLE_DEVICES, and that torch is a CUDA build"
        else:
            text = "none; small models train on the CPU, the paper's sizes do not"
        yield Check("note", "gpu", text)
    yield from _extras()
    yield _tried("weights", VARIABLE, _look_at_weights_folders)
    yield _disk("disk", Path.cwd())
    yield _disk("hub cache", _hub_cache())


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _requirements(extra: str) -> list[Requirement]:
    """What openeva requires on this platform: always (no extra), or what an extra adds."""
    found = []
    for text in importlib.metadata.requires("openeva") or []:
        requirement = Requirement(text)
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if always == (extra == "") and (always or requirement.marker.evaluate({"extra": extra})):  # type: ignore[union-attr]
            found.append(requirement)
    return found


def _wrong(requirements: Sequence[Requirement]) -> list[str]:
    """What is missing or too old among requirements, in words."""
    problems = []
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}, needed {requirement.specifier}")
    return problems


def _required_packages() -> Iterator[Check]:
    requirements = _requirements("")
    problems = _wrong(requirements)
    if problems:
        yield Check("fail", "packages", f"{'; '.join(problems)}: pip install --upgrade openeva")
    else:
        yield Check("ok", "packages", f"all {len(requirements)} required ones are installed and new enough")


def _extras() -> Iterator[Check]:
    for extra in importlib.metadata.metadata("openeva").get_all("Provides-Extra") or []:
        problems = _wrong(_requirements(extra))
        if problems:
            yield Check("note", "extra", f"{extra}: {'; '.join(problems)}; get it with: pip install 'openeva[{extra}]'")
        else:
            yield Check("ok", "extra", f"{extra}: installed")


def _disk(name: str, folder: Path) -> Check:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    text = f"{free:.0f} GiB free at {folder}"
    if free >= LOW_DISK_GIB:
        return Check("ok", name, text)
    return Check("note", name, f"{text}: checkpoints and weights of large models may not fit")


# ------------------------------------------------------------------------------------------------ recipe


def check_recipe(recipe: str, overrides: Sequence[str] = ()) -> Iterator[Check]:
    """Whether a recipe is valid, its data can be read, its weights reached, and its output written."""
    try:
        config = load_config(Recipe, recipe, overrides)
    except ConfigError as error:
        yield from (Check("fail", "recipe", problem) for problem in error.problems)
        return
    yield Check("ok", "recipe", f"{recipe} is valid")
    yield _tried("device", config.run.device, lambda: _look_at_device(config.run.device))
    if config.run.wandb is not None:
        yield _tried("wandb", config.run.wandb, _look_at_wandb)
    for part, sources in (("train", config.data.train), ("val", config.data.val)):
        for number, source in enumerate(sources):
            yield _tried(f"data.{part}.{number}", source.name, partial(_look_at_source, source))
    for path, component in _components(config.task, "task"):
        address = getattr(component, "weights", None) or getattr(component, "pretrained", None)
        if isinstance(address, str) or hasattr(component, "hub_repository"):
            yield _tried(
                "weights", f"{path}: {address or component.name}", partial(_look_at_weights, component, address)
            )
        for key in STARTS:
            start = getattr(component, key, None)
            if isinstance(start, str):
                yield _tried("weights", f"{path}.{key}: {start}", partial(_look_at_start, start))
    yield _tried("output", str(config.run.out), lambda: _look_at_output(config.run.out))


def _tried(name: str, what: str, look: Callable[[], str]) -> Check:
    """The result of a look as a check; errors that are meant for users become failures."""
    try:
        return Check("ok", name, f"{what}: {look()}")
    except ConfigError as error:
        return Check("fail", name, f"{what}: {'; '.join(error.problems)}")
    except (ValueError, OSError, ImportError) as error:
        return Check("fail", name, f"{what}: {error}")


def _look_at_device(device: str) -> str:
    from openeva.engine.distributed import find_device

    return f"{find_device(device)} is there"


def _look_at_wandb() -> str:
    if problems := _wrong(_requirements("wandb")):
        raise ValueError(f"{'; '.join(problems)}: pip install 'openeva[wandb]'")
    return "installed"


def _look_at_source(config: ComponentConfig) -> str:
    """Open a source and decode its first sample.

    Raises:
        ValueError: It is empty or not usable.
        OSError: It, or its first sample, cannot be read.
    """
    from openeva.data.batches import pixels_of_sample
    from openeva.data.labels import has_captions

    source = config.build()
    if not hasattr(source, "read"):
        return "a stream; what it holds is only seen when it is read"
    if len(source) == 0:
        raise ValueError("is empty")
    sample = source.read(0)
    pixels = pixels_of_sample(sample)
    labels = f"{source.num_classes} classes" if source.num_classes else "no labels"
    size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
    texts = (sample.extra or {}).get("captions")
    said = f" and the caption {texts[0][:60]!r}" if texts else " and no caption" if has_captions(source) else ""
    return f"{len(source):,} samples, {labels}; the first, {sample.name}, has {size}{said}"


def _components(config: Any, path: str) -> Iterator[tuple[str, ComponentConfig]]:
    """A component and all components inside it, with their dotted paths."""
    if isinstance(config, ComponentConfig):
        yield path, config
        for key in type(config).model_fields:
            yield from _components(getattr(config, key), f"{path}.{key}")


def _look_at_weights(component: ComponentConfig, address: str | None) -> str:
    """Where the weights that a component names are, without loading them.

    Raises:
        ConfigError: Neither on this machine nor reachable.
    """
    if address is None:
        return _look_at_hub(component)
    if address == "random":
        return "drawn from a seed, nothing to fetch"
    if hasattr(component, "hub_repository"):
        here = is_file_address(address) or Path(address).expanduser().is_dir()
        return _look_at_file(address) if here else _look_at_hub(component)
    return _look_at_start(address)


def _look_at_start(address: str) -> str:
    """Where weights are that training starts from, without loading or fetching them.

    Raises:
        ConfigError: Neither on this machine nor reachable.
    """
    name = None if Path(address).expanduser().exists() else known_name(address)
    other = split_open_clip_name(address)
    if other is not None and (name is None or find_local(name) is None):
        facts = open_clip_facts(*other)
        repository, fix = str(facts.get("hf_hub", "")).strip("/"), "download its file elsewhere and give the path"
        if not repository:
            return f"open_clip has it, and fetches it from {facts.get('url')}"
        return _look_at_repository(repository, fix, lambda cached: cached.name.startswith("open_clip"))
    return _look_at_file(str(resolve(address))) if name is None else _look_at_known(name)


def _look_at_file(address: str) -> str:
    path = Path(address).expanduser()
    if path.is_dir():
        return "folder exists"
    path = find_weights(address)
    return f"{path} ({path.stat().st_size / 2**20:.0f} MiB)"


def _look_at_weights_folders() -> str:
    """How many released weights the local folders hold.

    Raises:
        ConfigError: A folder does not exist.
    """
    found = [name for name in PRETRAINED if find_local(name) is not None]
    if VARIABLE not in os.environ:
        return "not set; released weights come from the hub"
    names = f" ({', '.join(found)})" if found else ", whose files would be called as `openeva list --weights` shows"
    return f"{os.environ[VARIABLE]} holds {len(found)} of {len(PRETRAINED)} released weights{names}"


def _look_at_known(name: str) -> str:
    """Where released weights are.

    Raises:
        ConfigError: Neither on this machine nor reachable.
    """
    path = find_local(name)
    if path is not None:
        return str(path)
    repository, file = hub_place(name)
    if repository is None:
        raise ConfigError([f"not published on a hub; put {file} into a folder and set {VARIABLE} to it"])
    return _look_at_repository(
        repository, f"bring {file} here and set {VARIABLE} to its folder", lambda cached: cached.match(f"*/{file}")
    )


def _look_at_hub(component: ComponentConfig) -> str:
    """Whether the repository that `component.hub_repository()` names is cached, or else answers.

    Raises:
        ConfigError: Neither.
    """
    key = "weights: /path/to/file"
    if hasattr(component, "pretrained"):
        key = "model: local-dir:/path/to/folder" if component.pretrained is None else "pretrained: /path/to/file"
    locate = getattr(component, "hub_repository", None)
    repository = locate() if callable(locate) else None
    if repository is None:
        return "not on a hub that can be asked; the run will tell"
    return _look_at_repository(
        repository, f"bring them here and set `{key}` in the recipe", lambda cached: cached.suffix in WEIGHT_SUFFIXES
    )


def _look_at_repository(repository: str, fix: str, wanted: Callable[[Path], bool]) -> str:
    """Whether a repository of the hub has a wanted file in the local cache, or else answers.

    Raises:
        ConfigError: Neither; the message ends with the fix.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    from openeva.checkpoints.weights import PROBE_TIMEOUT_SECONDS, fetch

    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    if any(wanted(file) for file in cached.glob("snapshots/*/**/*")):
        return f"{repository} is in the local cache"
    fetch(lambda: HfApi().model_info(repository, timeout=PROBE_TIMEOUT_SECONDS), repository, fix)
    return f"{repository} can be reached; the first run downloads it"


def _look_at_output(out: Path) -> str:
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{existing} cannot be written to; set run.out to another folder")
    checkpoints = out / "checkpoints"
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        return "holds a run, which would be continued"
    return "can be written to"
