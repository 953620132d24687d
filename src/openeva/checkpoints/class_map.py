"""The classifier of some classes from that of others: rows of its matrix, chosen by a map or by the classes' names.

`Weights` with a classifier for S classes, map[i] = the old class of the new class i -> `Weights` with one for V classes

Source: spec section 2.4 of video (K-722 -> K-400, K-600, K-700).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openeva.checkpoints.load import Weights

LINEAR = ("classifier.weight", "classifier.bias", "classifier.1.weight", "classifier.1.bias")


def read_class_map(file: Path) -> list[int]:
    """A map of a `.json` or `.npy` file.

    Raises:
        ValueError: It does not hold a list of numbers from 0; the message starts with the file.
    """
    try:
        found: Any = np.load(file).tolist() if file.suffix == ".npy" else json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"class_map {file} does not exist; `openeva data kinetics722` writes such files") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"class_map {file} cannot be read as {file.suffix or 'JSON'}: {error}") from None
    if not isinstance(found, list) or not all(isinstance(n, int) and n >= 0 for n in found) or not found:
        raise ValueError(f"class_map {file} is not a list of class numbers from 0")
    return found


def map_by_names(theirs: Sequence[str], ours: Sequence[str], aliases: Mapping[str, str] | None = None) -> list[int]:
    """Number of each of our classes among theirs; empty where one of ours is not there, or they are the same.

    Args:
        theirs: Names of the weights' classes.
        ours: Names of the wanted classes.
        aliases: Other name -> name, for either.
    """
    if all(name.isdecimal() for name in ours):  # no names at all
        return []
    aliases = aliases or {}
    number = {aliases.get(name, name): place for place, name in enumerate(theirs)}
    rows = [number.get(aliases.get(name, name), -1) for name in ours]
    return [] if -1 in rows or list(theirs) == list(ours) else rows


def select_classes(weights: Weights, rows: Sequence[int], class_names: Sequence[str], how: str) -> Weights:
    """The weights with the classifier's rows for other classes.

    Args:
        weights: From `read_weights`.
        rows: Old class of each new one.
        class_names: Of the new classes.
        how: For the account.

    Raises:
        ValueError: There is no classifier, or the map does not fit it or the classes.
    """
    keys = [key for key in LINEAR if key in weights.state_dict]
    if not keys:
        raise ValueError(f"{how}: {weights.source} holds no classifier whose classes could be chosen")
    num_classes = weights.state_dict[keys[0]].shape[0]
    if len(rows) != len(class_names):
        raise ValueError(f"{how}: the map has {len(rows)} entries for {len(class_names)} classes")
    if max(rows) >= num_classes:
        raise ValueError(f"{how}: the map names class {max(rows)}, but {weights.source} has {num_classes}")
    index = torch.tensor(list(rows))
    chosen = {key: weights.state_dict[key][index] for key in keys}
    task: Any = weights.config.get("task") or {}
    config = {**weights.config, "task": {**task, "class_names": list(class_names)}} if weights.config else {}
    text = f"{len(rows)} of {num_classes} classes, {how}"
    moved = {**weights.moved, **dict.fromkeys(keys, text)}
    return replace(weights, state_dict={**weights.state_dict, **chosen}, config=config, moved=moved)
