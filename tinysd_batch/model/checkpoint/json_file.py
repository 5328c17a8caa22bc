"""Read JSON files of a model folder, up to a maximum size."""

import json
from pathlib import Path
from typing import Any

from tinysd_batch.errors import ModelError
from tinysd_batch.storage.atomic import read_file

MAX_JSON_BYTES = 50_000_000


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises ModelError if it is missing, too large or not one."""
    try:
        loaded = json.loads(read_file(path, MAX_JSON_BYTES).decode("utf-8-sig"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; the model folder is not complete") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise ModelError(f"{path}: an object was expected")
    return loaded
