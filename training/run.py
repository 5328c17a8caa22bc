"""Train and pack the embedded model, starting from the art. After a stop the same command resumes.

    python -m training.run --processes 2

Every stage leaves a file in `training/build/`; a stage whose file exists is skipped.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from training import captions, data, pack, repack, unet, vae
from training.repack import EMBEDDED, HERE, WEIGHTS

MODEL_CARD = "README.md"  # written by hand, kept when weights are replaced


def run_stage(result: Path, run: Callable[[], None]) -> None:
    if result.exists():
        print(f"{result.name}: exists already", flush=True)
    else:
        print(f"building {result.name}", flush=True)
        run()


def write_folders(build: Path) -> None:
    """Replace the shipped model and the float weights with those in `build`."""
    fresh = build / "model"
    shutil.rmtree(fresh, ignore_errors=True)
    pack.write_shared_components(build, fresh)
    for old in EMBEDDED.glob("*") if EMBEDDED.exists() else ():
        if old.name != MODEL_CARD:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copytree(fresh, EMBEDDED, dirs_exist_ok=True)
    shutil.rmtree(WEIGHTS, ignore_errors=True)
    pack.write_float_weights(build, WEIGHTS)
    repack.repack(build)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder for intermediate results")
    parser.add_argument("--processes", type=int, default=1, help="single-threaded processes to train with")
    parser.add_argument("--vae-minutes", type=float, default=7)
    parser.add_argument("--unet-samples", type=int, default=150_000, help="images that the UNet is trained on")
    parser.add_argument("--decoder-minutes", type=float, default=16)
    arguments = parser.parse_args()
    build = arguments.build
    torch.set_num_threads(arguments.processes)
    run_stage(build / "pictures.npz", lambda: data.build_dataset(build, build / "packages"))
    run_stage(build / "tokenizer", lambda: captions.train_tokenizer(data.read_dataset(build)[1], build / "tokenizer"))
    run_stage(build / "vae_frozen.pt", lambda: vae.train(build, arguments.vae_minutes))
    run_stage(build / "unet_done.pt", lambda: unet.train(build, arguments.unet_samples, arguments.processes))
    run_stage(build / "decoder_done.pt", lambda: vae.finish_decoder(build, arguments.decoder_minutes))
    write_folders(build)


if __name__ == "__main__":
    main()
