"""Make the images of the README: a sheet of the demo job, and the terminal of a run (`make screenshots`).

Runs `jobs/demo` in a temporary folder, in a terminal of its own that pyte emulates.
"""

import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator, Mapping
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pyte
from PIL import Image, ImageDraw
from rich.console import Console
from rich.style import Style
from rich.text import Text

from tinysd_batch import read_results
from tinysd_batch.report.fonts import choose_font

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
COMMANDS = ("tinysd-batch submit jobs/demo/job.toml", "tinysd-batch status outputs/demo")
COLUMNS, LINES = 100, 18
SHEET_COLUMNS, CELL_PX, GAP_PX, LINE_PX = 6, 128, 12, 17
PROMPT_FONT_PX, SEED_FONT_PX = 13, 12


def run_in_terminal(command: str, folder: Path) -> bytes:
    """Run a command of ours in a terminal of COLUMNS x LINES and return all that it wrote."""
    words = [sys.executable, "-m", *command.replace("-", "_", 1).split()]
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    with subprocess.Popen(words, cwd=folder, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        output = bytearray()
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            output += data
    os.close(master)
    if process.returncode:
        sys.exit(output.decode(errors="replace"))
    return bytes(output)


def read_screen(output: bytes) -> Iterator[Text]:
    """Yield the lines of the terminal as they are in the end, without blank ones after the last."""
    screen = pyte.Screen(COLUMNS, LINES)
    pyte.ByteStream(screen).feed(output)
    last = max((number for number, line in enumerate(screen.display) if line.strip()), default=-1)
    for number in range(last + 1):
        line = Text()
        for column in range(COLUMNS):
            character = screen.buffer[number][column]
            line.append(character.data, style=Style(color=to_color(character.fg), bold=character.bold))
        line.rstrip()
        yield line


def to_color(name: str) -> str | None:
    """Translate pyte's name of a colour to rich's."""
    if name == "default":
        return None
    return (
        f"#{name}"
        if len(name) == 6 and all(digit in "0123456789abcdef" for digit in name)
        else name.replace("brown", "yellow")
    )


def write_terminal(outputs: Mapping[str, bytes], path: Path) -> None:
    """Write commands and what they printed as an SVG without fonts of other servers."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor")
    for command, output in outputs.items():
        console.print(Text(f"$ {command}", style="bold green"))
        for line in read_screen(output):
            console.print(line)
    svg = console.export_svg(title="tinysd-batch", unique_id="tinysd")
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


def write_sheet(job: Path, path: Path) -> None:
    """Write the first image of each row with its prompt and seed."""
    rows: list[dict[str, Any]] = read_results(job, ["row", "sample", "prompt", "seed", "file_name"]).to_pylist()
    rows = sorted((row for row in rows if row["sample"] == 1), key=lambda row: int(row["row"]))
    width, height = CELL_PX + GAP_PX, CELL_PX + 2 * LINE_PX + GAP_PX
    lines = -(-len(rows) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width + GAP_PX, lines * height + GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        x, y = GAP_PX + number % SHEET_COLUMNS * width, GAP_PX + number // SHEET_COLUMNS * height
        with Image.open(job / row["file_name"]) as image:
            sheet.paste(image.convert("RGB").resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS), (x, y))
        center = x + CELL_PX // 2
        prompt, seed = row["prompt"], f"seed {row['seed']}"
        draw.text(
            (center, y + CELL_PX + LINE_PX // 2), prompt, "black", choose_font(prompt, PROMPT_FONT_PX), anchor="mm"
        )
        draw.text(
            (center, y + CELL_PX + LINE_PX * 3 // 2), seed, "#666666", choose_font(seed, SEED_FONT_PX), anchor="mm"
        )
    sheet.save(path, optimize=True)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("jobs", "configs"):
            shutil.copytree(ROOT / part, folder / part)
        outputs = {command: run_in_terminal(command, folder) for command in COMMANDS}
        write_terminal(outputs, IMAGES / "terminal.svg")
        write_sheet(folder / "outputs" / "demo", IMAGES / "demo.png")


if __name__ == "__main__":
    main()
