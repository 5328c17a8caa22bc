"""Choose the font of a caption: the bundled subset of DejaVu Sans, or a system font for characters it lacks.

The subset covers Latin, Greek, Cyrillic, Armenian, Hebrew, Georgian, punctuation and common symbols. For Chinese,
Japanese, Korean and others fontconfig finds a font. If it finds none, such characters appear as boxes.
"""

import io
import shutil
import subprocess
from functools import lru_cache
from importlib.resources import files

from PIL import ImageFont

BUNDLED_FONT_FILE = "DejaVuSans-subset.ttf"
UNASSIGNED_CHARACTER = "\U0010fffe"  # no font has it, so it shows the font's box for missing characters
FONTCONFIG_TIMEOUT_S = 10.0
Font = ImageFont.FreeTypeFont


def choose_font(text: str, size: int) -> Font:
    """Return the bundled font, or a system font that has the first character that the bundled one lacks."""
    bundled = load_bundled_font(size)
    missing = next((character for character in text if not has_character(bundled, character)), None)
    if missing is None or (path := find_system_font(missing)) is None:
        return bundled
    system_font = load_font_file(path, size)
    return system_font if system_font is not None and has_character(system_font, missing) else bundled


@lru_cache
def load_bundled_font(size: int) -> Font:
    data = (files("tinysd_batch.report") / "data" / BUNDLED_FONT_FILE).read_bytes()
    return ImageFont.truetype(io.BytesIO(data), size)


@lru_cache(maxsize=16)
def load_font_file(path: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(path, size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def has_character(font: Font, character: str) -> bool:
    """Whether the font has a glyph for it; blanks and combining marks need none."""
    if not character.isprintable() or character.isspace():
        return True
    return bytes(font.getmask(character)) != bytes(font.getmask(UNASSIGNED_CHARACTER))


@lru_cache(maxsize=256)
def find_system_font(character: str) -> str | None:
    """Return the file of the font that fontconfig chooses for a character."""
    program = shutil.which("fc-match")
    if program is None:
        return None
    pattern = f"sans:charset={ord(character):x}"
    try:
        process = subprocess.run(  # noqa: S603 - a system program, and a number
            [program, "--format=%{file}", pattern],
            capture_output=True,
            text=True,
            timeout=FONTCONFIG_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None
