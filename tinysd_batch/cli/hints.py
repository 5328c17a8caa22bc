"""What to type instead, where a command line is a plain misunderstanding."""

import shlex
from pathlib import Path

from tinysd_batch.errors import UsageError

MAX_SHOWN = 80  # characters of a prompt
EXAMPLE = "tinysd-batch txt2img red apple"


def refuse_prompt(manifest: Path) -> None:
    """Raise UsageError for a manifest that is no file and has no manifest's suffix: it may be a prompt."""
    from tinysd_batch.job.formats import READERS
    from tinysd_batch.job.manifest_file import unpacked_name

    if is_there(manifest) or Path(unpacked_name(manifest)).suffix.lower() in (*READERS, ".toml"):
        return
    text = str(manifest)
    what = f"tinysd-batch txt2img {shlex.quote(text)}" if len(text) <= MAX_SHOWN else EXAMPLE
    shown = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
    raise UsageError(
        f"{shown}: no such file; name a manifest (.csv, .jsonl, .parquet, .txt, a prompt for each row) "
        f"or a job folder, or for one prompt type: {what}"
    )


def refuse_no_prompt() -> None:
    """Raise UsageError where a command for one prompt got none."""
    raise UsageError(f"no prompt; type it behind the command, such as: {EXAMPLE}, or name a file with --from-file")


def is_there(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # longer than any file's name, say
        return False
