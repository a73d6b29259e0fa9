"""Pictures beside each other in one, each with its name below."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, TEXT = 320, 12, 28  # pixels: the longer side of a picture, what is between two, and the letters
COLUMNS = 4
BACK, INK = "#202024", "#e8e8ec"


def contact_sheet(pictures: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """[H,W,3] bytes: the pictures [N,h,w,3] row by row, as square a sheet as up to four columns allow. Pictures larger
    than a cell are made smaller, and smaller ones enlarged by whole numbers, so that names fit below them; a name that
    is too long ends in an ellipsis.
    """
    factor = CELL / max(pictures.shape[1:3])
    factor, filter = (int(factor), Image.Resampling.NEAREST) if factor >= 1 else (factor, Image.Resampling.BOX)
    height, width = (max(1, round(side * factor)) for side in pictures.shape[1:3])
    row = height + TEXT + 2 * GAP
    columns = min(COLUMNS, math.ceil(math.sqrt(len(pictures))))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * row + GAP), BACK)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for number, (pixels, name) in enumerate(zip(pictures, names, strict=True)):
        left, top = GAP + number % columns * (CELL + GAP), GAP + number // columns * row
        picture = Image.fromarray(pixels).resize((width, height), filter)
        sheet.paste(picture, (left + (CELL - width) // 2, top))
        draw.text((left + CELL / 2, top + height + GAP / 2), _fitting(name, font, CELL), INK, font, "ma")
    return np.asarray(sheet)


def _fitting(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The name, or as much of its beginning as is at most so many pixels wide."""
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(f"{name}…") > width:
        name = name[:-1]
    return f"{name}…"
