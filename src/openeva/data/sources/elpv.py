"""2,624 photographs of solar cells with defect labels, carried by the package `elpv-dataset` (extra `demo`).

labels.csv + images/*.png of the installed package -> `Sample` (300 x 300 grey PNG, label 1 = defective).

An expert gave each cell a probability of being defective: 0, 1/3, 2/3 or 1. Label 1 means a probability of at least
1/2, as the authors' own two-class benchmark does; the probability itself is in `Sample.extra`.
Source: Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
Imagery" (EU PVSEC 2018); https://github.com/zae-bayern/elpv-dataset.
"""

import importlib.util
import zlib
from collections import defaultdict
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from openeva.data.sources.base import Sample, SourceConfig

LICENCE = (
    "ELPV photographs of solar cells: Buerhop-Lutz et al., ZAE Bayern; CC BY-NC-SA 4.0 "
    "(https://creativecommons.org/licenses/by-nc-sa/4.0/): not for commercial use"
)


class Config(SourceConfig):
    """The ELPV photographs.

    Attributes:
        split: "train", "val" or "all".
        val_fraction: Share of the cells in "val". A cell is always on the same side: the order is a hash of its name,
            and the shares hold within every cell type and defect probability.
    """

    name: Literal["elpv"] = "elpv"
    split: Literal["train", "val", "all"] = "all"
    val_fraction: float = Field(0.2, gt=0, lt=1)

    def build(self) -> "Elpv":
        """Open the data set.

        Raises:
            FileNotFoundError: The package is not installed.
        """
        return Elpv(_folder(), self)


class Elpv:
    """The photographs of one split, in the order of their names."""

    class_names: ClassVar[list[str]] = ["functional", "defective"]
    num_classes = 2

    def __init__(self, folder: Path, config: Config) -> None:
        rows = [
            line.split() for line in (folder / "labels.csv").read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        val = _val_names(rows, config.val_fraction)
        self._folder = folder
        self._cells = [
            (name, float(probability), kind)
            for name, probability, kind in rows
            if config.split == "all" or (name in val) == (config.split == "val")
        ]

    def __len__(self) -> int:
        return len(self._cells)

    def read(self, index: int) -> Sample:
        """The photograph of one cell, with `extra = {"probability": 0..1, "type": "mono" | "poly"}`."""
        name, probability, kind = self._cells[index]
        image = (self._folder / name).read_bytes()
        return Sample(image, self.name_of(index), _label(probability), {"probability": probability, "type": kind})

    def name_of(self, index: int) -> str:
        """Its name, without reading it."""
        return f"elpv/{self._cells[index][0]}"

    def labels(self) -> npt.NDArray[np.int64]:
        """Class of every cell."""
        return np.array([_label(probability) for _, probability, _ in self._cells], np.int64)


def _label(probability: float) -> int:
    return int(probability >= 0.5)


def _folder() -> Path:
    spec = importlib.util.find_spec("elpv_dataset")  # found, not imported: its code needs nothing but the files does
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the ELPV photographs are not installed: pip install 'openeva[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    if not (folder / "labels.csv").is_file():
        raise FileNotFoundError(
            f"{folder} has no labels.csv: reinstall with pip install --force-reinstall elpv-dataset"
        )
    return folder


def _val_names(rows: list[list[str]], fraction: float) -> set[str]:
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, probability, kind in rows:
        strata[probability, kind].append(name)
    val: set[str] = set()
    for names in strata.values():
        names.sort(key=lambda name: (zlib.crc32(name.encode()), name))
        val.update(names[: round(fraction * len(names))])
    return val
