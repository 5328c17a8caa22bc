"""Fetch the pinned emoji art, check its digests, and render it to images of 64x64 pixels with words.

Needs `npm` on the path; every tarball is checked against the sha512 in `sources.json` before it is opened.
"""

import base64
import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image

HERE = Path(__file__).parent
IMAGE_PX = 64
RENDER_PX = 256  # larger than the image, as downscaling gives better edges than resvg at 64 px


@dataclass(frozen=True, slots=True)
class Emoji:
    """A concept in one style."""

    concept: str  # its CLDR name
    style: str
    tags: tuple[str, ...]  # more words for the concept
    held_out: bool  # never used for training


def read_concepts() -> list[str]:
    lines = (HERE / "concepts.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def fetch_package(name: str, version: str, integrity: str, cache: Path) -> tarfile.TarFile:
    """Open the package's tarball, downloading it once. Raises ValueError if its digest is not the pinned one."""
    path = cache / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=cache, check=True)
    digest = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != integrity:
        raise ValueError(f"{path}: digest {digest} is not the pinned {integrity}; delete the file to fetch it again")
    return tarfile.open(path)


def read_json(package: tarfile.TarFile, member: str) -> dict:
    file = package.extractfile(f"package/{member}")
    assert file is not None, member
    return json.load(file)


def normalize_hexcode(hexcode: str) -> str:
    """Remove the variation selector from code points, as not all packages write it."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def render_icon(icons: dict, name: str) -> npt.NDArray[np.uint8]:
    """Render an icon on a white background, [64, 64, 3]."""
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_PX, height=RENDER_PX))
    foreground = Image.open(io.BytesIO(png)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", foreground.size, "white"), foreground).convert("RGB")
    return np.asarray(image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS))


def build_dataset(out: Path, cache: Path) -> None:
    """Write `pictures.npz` (images [N, 64, 64, 3] uint8) and `pictures.json` (their words) into `out`."""
    sources = json.loads((HERE / "sources.json").read_text())
    packages = {
        name: fetch_package(name, package["version"], package["integrity"], cache)
        for name, package in sources["packages"].items()
    }
    entries = {entry["label"]: entry for entry in read_json(packages[sources["words"]], "en/data.json")}
    concepts = read_concepts()
    unknown = [concept for concept in concepts if concept not in entries]
    if unknown:
        raise ValueError(f"concepts.txt: no such CLDR name: {', '.join(unknown)}")

    images, emojis = [], []
    styles = list(sources["styles"])
    for style, source in sources["styles"].items():
        icons = read_json(packages[source["package"]], "icons.json")
        characters = read_json(packages[source["names"]], "chars.json")
        names = {normalize_hexcode(hexcode): name for hexcode, name in characters.items()}
        for number, concept in enumerate(concepts):
            name = names.get(normalize_hexcode(entries[concept]["hexcode"]))
            if name is None or (name not in icons["icons"] and name not in icons["aliases"]):
                continue
            # Hold out one style of every tenth concept, to score pairs of concept and style that were never seen.
            held_out = number % 10 == 0 and styles[(number // 10) % len(styles)] == style
            images.append(render_icon(icons, name))
            emojis.append(Emoji(concept, style, tuple(entries[concept].get("tags", ())), held_out))
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "pictures.npz", images=np.stack(images))
    rows = [
        {"concept": emoji.concept, "style": emoji.style, "tags": emoji.tags, "held_out": emoji.held_out}
        for emoji in emojis
    ]
    (out / "pictures.json").write_text(json.dumps(rows, indent=0))


def read_dataset(folder: Path) -> tuple[npt.NDArray[np.uint8], list[Emoji]]:
    """Read the images [N, 64, 64, 3] and their words, in the same order."""
    rows = json.loads((folder / "pictures.json").read_text())
    emojis = [Emoji(row["concept"], row["style"], tuple(row["tags"]), row["held_out"]) for row in rows]
    return np.load(folder / "pictures.npz")["images"], emojis
