"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "0.1.0"
EMBEDDED_MODEL = ROOT / "tinysd_batch" / "embedded" / "model"
