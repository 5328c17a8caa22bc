"""What `plan` takes for a long CSV manifest: wall and CPU seconds, and peak resident memory.

python -m benchmarks.job.plan_rows
    a million rows, each with a prompt of its own
python -m benchmarks.job.plan_rows --rows 100000 --prompts 1000
    100,000 rows, 1,000 different prompts
"""

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SUBJECTS = "cat", "dog", "lighthouse", "old bicycle", "bowl of cherries", "mountain lake", "paper boat"
STYLES = "watercolour", "oil painting", "studio photo", "pencil drawing", "in the rain", "at night"


def write_manifest(path: Path, rows: int, prompts: int) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "negative_prompt", "seed"])
        for row in range(rows):
            number = row % prompts
            subject, style = SUBJECTS[number % len(SUBJECTS)], STYLES[number % len(STYLES)]
            prompt = f"a {subject}, {style}, highly detailed, number {number}"
            writer.writerow([f"r{row}", prompt, "blurry, low quality", row if row % 2 else ""])


def measure(manifest: Path, *options: str) -> None:
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "tinysd_batch", "plan", manifest.name, *options]
    done = subprocess.run(command, cwd=manifest.parent, stdout=subprocess.PIPE, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall_s = time.monotonic() - started
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    images = next((line for line in done.stdout.splitlines() if line.startswith("Images")), done.stdout[-500:])
    print(f"exit code {done.returncode}; {images}")
    print(f"{wall_s:.1f} s wall, {cpu_s:.1f} CPU seconds, {after.ru_maxrss / 1024:.0f} MiB peak", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--prompts", type=int, help="number of different prompts (default: as many as rows)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "rows.csv"
        write_manifest(manifest, options.rows, options.prompts or options.rows)
        print(f"{options.rows:,} rows, {manifest.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores")
        measure(manifest)
        (manifest.parent / "many.csv").write_text("prompt\n" + "red apple\n" * 1000)
        print("1,000 rows of 100,000 images each")
        measure(manifest.parent / "many.csv", "--n_iter", "100000")


if __name__ == "__main__":
    main()
