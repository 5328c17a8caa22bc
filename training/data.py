"""Fetch the pinned emoji art, check its digests, and render it to 64x64 pictures with words.

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
PICTURE_PX = 64
RENDER_PX = 256  # four times the picture: area-averaging then gives better edges than resvg at 64 px


@dataclass(frozen=True, slots=True)
class Picture:
    """One drawing of one concept: its CLDR name, the extra words for it, and the style word."""

    concept: str
    style: str
    tags: tuple[str, ...]
    held_out: bool


def read_concepts() -> list[str]:
    lines = (HERE / "concepts.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def fetch_package(name: str, version: str, integrity: str, cache: Path) -> tarfile.TarFile:
    """Open the package's tarball, downloading it once; raise ValueError when its digest is not the pinned one."""
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


def normal_hexcode(hexcode: str) -> str:
    """The code points without the variation selector, which the packages write differently."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def render(icons: dict, name: str) -> npt.NDArray[np.uint8]:
    """The icon on white, [64, 64, 3]."""
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_PX, height=RENDER_PX))
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    page = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")
    return np.asarray(page.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS))


def build(out: Path, cache: Path) -> None:
    """Write `pictures.npz` (images [N, 64, 64, 3] uint8) and `pictures.json` (their words) into `out`."""
    sources = json.loads((HERE / "sources.json").read_text())
    packages = {
        name: fetch_package(name, p["version"], p["integrity"], cache) for name, p in sources["packages"].items()
    }
    words = {e["label"]: e for e in read_json(packages[sources["words"]], "en/data.json")}
    concepts = read_concepts()
    unknown = [c for c in concepts if c not in words]
    if unknown:
        raise ValueError(f"concepts.txt: no such CLDR name: {', '.join(unknown)}")

    images, pictures = [], []
    styles = list(sources["styles"])
    for style, source in sources["styles"].items():
        icons = read_json(packages[source["package"]], "icons.json")
        names = {normal_hexcode(k): v for k, v in read_json(packages[source["names"]], "chars.json").items()}
        for number, concept in enumerate(concepts):
            name = names.get(normal_hexcode(words[concept]["hexcode"]))
            if name is None or (name not in icons["icons"] and name not in icons["aliases"]):
                continue
            # Every tenth concept is shown to the model in all styles but one, so that a score on unseen pairs exists.
            held_out = number % 10 == 0 and styles[(number // 10) % len(styles)] == style
            images.append(render(icons, name))
            pictures.append(Picture(concept, style, tuple(words[concept].get("tags", ())), held_out))
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "pictures.npz", images=np.stack(images))
    rows = [{"concept": p.concept, "style": p.style, "tags": p.tags, "held_out": p.held_out} for p in pictures]
    (out / "pictures.json").write_text(json.dumps(rows, indent=0))


def read(folder: Path) -> tuple[npt.NDArray[np.uint8], list[Picture]]:
    """The images [N, 64, 64, 3] and their words, in the same order."""
    rows = json.loads((folder / "pictures.json").read_text())
    pictures = [Picture(r["concept"], r["style"], tuple(r["tags"]), r["held_out"]) for r in rows]
    return np.load(folder / "pictures.npz")["images"], pictures
