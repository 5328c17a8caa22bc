"""Bounds that protect against absurd or hostile input, the same for every way in."""

MAX_STEPS = 1000  # SD v1 has 1000 noise levels
MAX_SIDE_PX = 2048
MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARACTERS = 10_000
MAX_IMAGES_PER_ROW = 100_000
MAX_IMAGES_PER_BATCH = 1024
MAX_GRID_IMAGES = 100
MAX_TOML_BYTES = 1_000_000
