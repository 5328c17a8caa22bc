"""Suggest the right command when a command line is a common misunderstanding."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tinysd_batch.errors import UsageError

MAX_SHOWN_PROMPT_CHARACTERS = 80
EXAMPLE_COMMAND = "tinysd-batch txt2img red apple"


def check_manifest_argument(manifest: Path, extra_words: Sequence[str] = ()) -> None:
    """Check that the argument names a manifest and not a prompt.

    Raises:
        UsageError: The path does not exist and has no manifest suffix, so that it may be a prompt; or there are more
            words after a manifest.
    """
    from tinysd_batch.job.manifest.files import remove_gz_suffix
    from tinysd_batch.job.manifest.readers import READERS_BY_SUFFIX

    if is_existing_path(manifest) or Path(remove_gz_suffix(manifest)).suffix.lower() in (*READERS_BY_SUFFIX, ".toml"):
        if extra_words:
            raise UsageError(
                f"{extra_words[0]}: a job has one manifest, {manifest}; run a separate command for each other manifest"
            )
        return
    text = " ".join([str(manifest), *extra_words])
    suggestion = f"tinysd-batch txt2img {shlex.quote(text)}"
    if len(text) > MAX_SHOWN_PROMPT_CHARACTERS:
        text, suggestion = f"{text[: MAX_SHOWN_PROMPT_CHARACTERS - 1]}…", EXAMPLE_COMMAND
    raise UsageError(
        f"{text}: no such file; name a manifest (.csv, .jsonl, .parquet, .txt, one prompt per row) or a job folder, "
        f"or for a single prompt type: {suggestion}"
    )


def raise_missing_prompt() -> NoReturn:
    """Raise UsageError: txt2img got no prompt."""
    raise UsageError(
        f"no prompt; type it after the command, such as: {EXAMPLE_COMMAND}, or name a file with --from-file"
    )


def is_existing_path(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # for example, longer than a file name can be
        return False
