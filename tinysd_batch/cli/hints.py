"""What to type instead, where a command line is a plain misunderstanding."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from tinysd_batch.errors import UsageError

MAX_SHOWN_PROMPT_CHARACTERS = 80  # characters of a prompt
EXAMPLE_COMMAND = "tinysd-batch txt2img red apple"


class ManifestCommand(TyperCommand):
    """A command whose usage does not show the words that it takes only to say what to type instead."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece for piece in super().collect_usage_pieces(ctx) if piece != "[]..."]


def check_manifest_argument(manifest: Path, more_words: Sequence[str] = ()) -> None:
    """Raise UsageError for a manifest that is no file and has no manifest's suffix, as it may be a prompt.

    And for what stands behind a manifest that is one.
    """
    from tinysd_batch.job.manifest.files import remove_gz_suffix
    from tinysd_batch.job.manifest.readers import READERS_BY_SUFFIX

    if is_existing_path(manifest) or Path(remove_gz_suffix(manifest)).suffix.lower() in (*READERS_BY_SUFFIX, ".toml"):
        if more_words:
            raise UsageError(
                f"{more_words[0]}: a job has one manifest, {manifest}; give each other one its own command"
            )
        return
    text = " ".join([str(manifest), *more_words])
    what = f"tinysd-batch txt2img {shlex.quote(text)}" if len(text) <= MAX_SHOWN_PROMPT_CHARACTERS else EXAMPLE_COMMAND
    shown = text if len(text) <= MAX_SHOWN_PROMPT_CHARACTERS else f"{text[: MAX_SHOWN_PROMPT_CHARACTERS - 1]}…"
    raise UsageError(
        f"{shown}: no such file; name a manifest (.csv, .jsonl, .parquet, .txt, a prompt for each row) "
        f"or a job folder, or for one prompt type: {what}"
    )


def raise_missing_prompt() -> None:
    """Raise UsageError where a command for one prompt got none."""
    raise UsageError(
        f"no prompt; type it behind the command, such as: {EXAMPLE_COMMAND}, or name a file with --from-file"
    )


def is_existing_path(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # longer than any file's name, say
        return False
