"""Tiny real videos whose every frame has a grey level of its own."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np


def write_video(path: Path, greys: Sequence[int], *, size: int = 48, codec: str = "mpeg4") -> None:
    """One frame per grey level, ten a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for grey in greys:
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
