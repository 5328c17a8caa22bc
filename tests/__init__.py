import tinysd_batch  # noqa: F401 - decides how threads wait, which must be before any module here imports torch
