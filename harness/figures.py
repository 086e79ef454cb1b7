"""The PNG files of a results folder, small enough to be part of a page."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# What a file's name says, as (pattern, caption); a group is one part of the name.
_CAPTIONS = (
    (r"parity_matrix", "Worst error over the allowed one, by implementation, tensor and precision; 1 is the limit"),
    (r"speedup_(\w+?)_(\w+)", "Speed-up over the baseline, case by case: TTT {}, {}"),
    (r"time_vs_tokens_(\w+?)_(\w+)", "Time against sequence length: TTT {}, {}"),
    (r"throughput_vs_tokens_(\w+?)_(\w+)", "Tokens a second against sequence length: TTT {}, {}"),
    (r"error_vs_time", "Error against time, of what passed its parity check"),
    (r"roofline_(\w+)", "Roofline: attained rate against arithmetic intensity, under measured ceilings: TTT {}"),
    (r"bounds_(\w+)", "What bounds each case: time over the larger of roofline time and latency floor: TTT {}"),
)


@dataclass(frozen=True)
class Picture:
    """An image to embed, with its size in pixels."""

    name: str
    caption: str
    uri: str
    width: int
    height: int


def pictures(folder: Path) -> list[Picture]:
    """Every PNG file of the folder, by name, the parity matrix first.

    Raises:
        ValueError: a file is not an image that can be read.
    """
    paths = sorted(folder.glob("*.png"), key=lambda path: (path.name != "parity_matrix.png", path.name))
    return [_picture(path) for path in paths]


def _picture(path: Path) -> Picture:
    try:
        with Image.open(path) as image:
            flat = image.convert("RGBA")
    except OSError as error:
        raise ValueError(f"{path}: expected a PNG image: {error}") from None
    page = Image.new("RGBA", flat.size, "white")
    page.alpha_composite(flat)
    data = io.BytesIO()
    page.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)  # a third of the size
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return Picture(path.name, caption(path.stem), uri, *flat.size)


def caption(stem: str) -> str:
    """What the file is, in a sentence; its name in words where it is not one of ours."""
    for pattern, text in _CAPTIONS:
        if found := re.fullmatch(pattern, stem):
            return text.format(*(part.replace("forward_backward", "forward and backward") for part in found.groups()))
    return stem.replace("_", " ")
