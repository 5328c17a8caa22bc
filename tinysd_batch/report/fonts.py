"""The font of captions: a subset of DejaVu Sans that ships with us, and the system's fonts for what it lacks.

The subset covers Latin, Greek, Cyrillic, Armenian, Hebrew, Georgian, punctuation and common symbols. For Chinese,
Japanese, Korean and others fontconfig is asked; where it knows no font either, such characters stay boxes.
"""

import io
import shutil
import subprocess
from functools import lru_cache
from importlib.resources import files

from PIL import ImageFont

BUNDLED_FONT_FILE = "DejaVuSans-subset.ttf"
UNASSIGNED_CHARACTER = "\U0010fffe"  # no font has it: it is drawn as what stands for missing ones
FONTCONFIG_TIMEOUT_S = 10.0
Font = ImageFont.FreeTypeFont


def choose_font(text: str, size: int) -> Font:
    """A font that has every character of the text, else ours."""
    own = load_bundled_font(size)
    missing = next((character for character in text if not has_character(own, character)), None)
    if missing is None or (path := find_system_font(missing)) is None:
        return own
    found = load_font_file(path, size)
    return found if found is not None and has_character(found, missing) else own


@lru_cache
def load_bundled_font(size: int) -> Font:
    return ImageFont.truetype(
        io.BytesIO((files("tinysd_batch.report") / "data" / BUNDLED_FONT_FILE).read_bytes()), size
    )


@lru_cache(maxsize=16)
def load_font_file(path: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(path, size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def has_character(font: Font, character: str) -> bool:
    """Whether it is drawn as itself; blanks and marks that join others have nothing to draw."""
    if not character.isprintable() or character.isspace():
        return True
    return bytes(font.getmask(character)) != bytes(font.getmask(UNASSIGNED_CHARACTER))


@lru_cache(maxsize=256)
def find_system_font(character: str) -> str | None:
    """The file of the font that fontconfig would take for a character."""
    program = shutil.which("fc-match")
    if program is None:
        return None
    pattern = f"sans:charset={ord(character):x}"
    try:
        done = subprocess.run(  # noqa: S603 - the program of the system, and a number
            [program, "--format=%{file}", pattern],
            capture_output=True,
            text=True,
            timeout=FONTCONFIG_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
