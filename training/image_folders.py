"""Images of a user's folders, and what is said when they are not what is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageOps

from . import settings

ENDINGS = (".png", ".webp", ".jpg", ".jpeg")


def images(folder: Path, option: str) -> dict[str, Path]:
    """The images of a folder and of those inside it, by their names without the ending. option: the one that named the
    folder. Raises TrainingError.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in ENDINGS)
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    if not found:
        raise settings.TrainingError(f"--{option}: {folder} has no PNG, WebP or JPEG files; give another folder.")
    return found


def header(path: Path) -> Image.Image:
    """The image, opened; its pixels are read when they are asked for. Raises TrainingError."""
    try:
        return Image.open(path)
    except OSError as error:
        raise settings.TrainingError(f"{path} cannot be read ({error}); take it away or save it again.") from error


def read(path: Path, mode: str) -> Image.Image:
    """The image, turned as its EXIF data say. mode: Pillow's. Raises TrainingError."""
    return ImageOps.exif_transpose(header(path)).convert(mode)


def check_sizes(paths: Iterable[Path], option: str) -> None:
    """Raises TrainingError for images that belong together and have not one size."""
    sizes = {path: header(path).size for path in paths}
    if len(set(sizes.values())) > 1:
        words = ", ".join(f"{path} has {width}×{height}" for path, (width, height) in sizes.items())
        raise settings.TrainingError(f"--{option}: images of one name need one size, and {words}; scale one of them.")


def caption(path: Path) -> str:
    """The .txt file beside the image, or else the image's name. Raises TrainingError for names that say nothing."""
    beside = path.with_suffix(".txt")
    found = beside.read_text(encoding="utf-8") if beside.exists() else re.sub(r"[_\W]+", " ", path.stem)
    if not any(character.isalpha() for character in found):
        raise settings.TrainingError(
            f"{path} has no caption; write one into {beside.name} beside it, or name the image after what it shows."
        )
    return found.strip()


def learnt(count: int, held_out: int, what: str = "images") -> int:
    """How many of `count` are left to learn from. Raises TrainingError."""
    if count <= held_out:
        raise settings.TrainingError(
            f"there are {count} {what} and {held_out} of them are kept for validation; give more, or set held_out "
            "lower."
        )
    return count - held_out
