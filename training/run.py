"""Make the embedded model, from art to packed folder. Stopped at any point, the same command goes on.

    python -m training.run --processes 2

Every stage leaves a file in `training/build/`; a stage whose file is there is not run again.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from training import captions, data, pack, repack, unet, vae
from training.repack import EMBEDDED, HERE, WEIGHTS

CARD = "README.md"  # the model card: written by hand, kept when weights are replaced


def stage(done: Path, work: Callable[[], None]) -> None:
    if done.exists():
        print(f"{done.name}: there already", flush=True)
    else:
        print(f"making {done.name}", flush=True)
        work()


def write_folders(build: Path) -> None:
    """Replace the shipped model and the float weights by what `build` holds."""
    fresh = build / "model"
    shutil.rmtree(fresh, ignore_errors=True)
    pack.write_shared_parts(build, fresh)
    for old in EMBEDDED.glob("*") if EMBEDDED.exists() else ():
        if old.name != CARD:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copytree(fresh, EMBEDDED, dirs_exist_ok=True)
    shutil.rmtree(WEIGHTS, ignore_errors=True)
    pack.write_float_parts(build, WEIGHTS)
    repack.repack(build)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE / "build", help="where the work is kept")
    parser.add_argument("--processes", type=int, default=1, help="single-threaded processes to train with")
    parser.add_argument("--vae-minutes", type=float, default=7)
    parser.add_argument("--unet-samples", type=int, default=150_000, help="pictures the UNet sees")
    parser.add_argument("--decoder-minutes", type=float, default=16)
    arguments = parser.parse_args()
    build = arguments.build
    torch.set_num_threads(arguments.processes)
    stage(build / "pictures.npz", lambda: data.build(build, build / "packages"))
    stage(build / "tokenizer", lambda: captions.train_tokenizer(data.read(build)[1], build / "tokenizer"))
    stage(build / "vae_frozen.pt", lambda: vae.train(build, arguments.vae_minutes))
    stage(build / "unet_done.pt", lambda: unet.train(build, arguments.unet_samples, arguments.processes))
    stage(build / "decoder_done.pt", lambda: vae.finish_decoder(build, arguments.decoder_minutes))
    write_folders(build)


if __name__ == "__main__":
    main()
