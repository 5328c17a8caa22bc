"""Untrusted names, links, text and models do not lead outside the job folder, and none of their code is executed."""

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.security.conftest import ESCAPES, is_harmless, submit
from tests.support.files import Change, instead, put, set_json, snapshot
from tests.support.jobs import check_whole, draw
from tests.support.program import Capture, call, check_refused, command, environment
from tinysd_batch.export.table import export_table
from tinysd_batch.text import normalize_text

pytestmark = pytest.mark.timeout(60)


# File names


@pytest.mark.parametrize(
    "name", ["../x.csv", "./a/../../x.csv", "new\nline.csv", f"{ESCAPES}.csv", " .csv", "a\\b.csv"]
)
def test_the_name_of_a_manifest_does_not_lead_outside_the_outputs_folder(here: Path, capfd: Capture, name: str) -> None:
    (here / "a").mkdir()
    (here / name).write_text("prompt\ncat\n")
    outside = snapshot(here.parent / "outside")
    code, stdout, stderr = submit(capfd, name)
    assert code == 0, stderr
    assert is_harmless(stdout + stderr)
    assert [folder.name for folder in (here / "outputs").iterdir()] == [Path(name).stem]
    assert sorted(path.name for path in here.parent.iterdir() if path.name != "x.csv") == ["here", "model", "outside"]
    assert snapshot(here.parent / "outside") == outside


@pytest.mark.parametrize("name", ["...toml", "..toml", "-x.toml"])
def test_the_name_of_a_job_file_does_not_lead_outside_the_outputs_folder(here: Path, capfd: Capture, name: str) -> None:
    (here / name).write_text('manifest = "m.csv"\n')
    check_refused(capfd, here, ["submit", "--", name], 2, "no folder can be named after it")


HOSTILE_CELLS = [
    "../../../outside/precious",
    "/etc/passwd",
    "a\nb",
    "-rf",
    "..",
    "{0.__class__}",
    "%s",
    "$(id)",
    ESCAPES,
]


@pytest.mark.parametrize("cell", HOSTILE_CELLS)
def test_prompts_and_ids_are_not_used_as_file_names(here: Path, capfd: Capture, cell: str) -> None:
    with (here / "m.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "id", cell], [cell, cell, cell]])
    code, stdout, stderr = submit(capfd, "m.csv", "--verbose", "--prompt-syntax", "none")
    assert code == 0, stderr
    assert is_harmless(stdout + stderr)
    (row,) = check_whole(here / "outputs" / "m", 1)
    expected = normalize_text(cell)
    assert (row["id"], row["prompt"], row["file_name"]) == (expected, expected, "images/00000/seed_5_00001.png")


# Symbolic links


@pytest.mark.parametrize("path_in_job", ["images", "_tinysd", "_tinysd/tmp", "_tinysd/journal", "results"])
def test_folders_that_are_symbolic_links_are_refused(here: Path, capfd: Capture, path_in_job: str) -> None:
    assert submit(capfd)[0] == 0
    job = here / "outputs" / "m"
    instead(path_in_job, lambda path: path.symlink_to(here.parent / "outside"))(job)
    check_refused(capfd, here.parent, ["submit", "m.csv", "--inline", "--model", "../model"], 2, "is a symbolic link")


@pytest.mark.parametrize(
    ("path_in_job", "code"),
    [("images/00000", 5), ("_tinysd/lock", 5), ("_tinysd/stop", 0), ("contact_sheet.png", 0),
     ("images/00000/seed_5_00001.png", 0)],
)  # fmt: skip
def test_nothing_is_written_through_a_symbolic_link(here: Path, capfd: Capture, path_in_job: str, code: int) -> None:
    (here / "outputs" / "m" / path_in_job).parent.mkdir(parents=True)
    target = here.parent / "outside" / ("" if path_in_job == "images/00000" else "precious")
    (here / "outputs" / "m" / path_in_job).symlink_to(target)
    outside = snapshot(here.parent / "outside")
    assert submit(capfd)[0] == code
    assert snapshot(here.parent / "outside") == outside
    if code == 0:
        check_whole(here / "outputs" / "m", 1)


@pytest.mark.parametrize("path_in_job", ["job.json", "results.parquet"])
def test_files_of_a_job_that_are_symbolic_links_are_replaced(here: Path, capfd: Capture, path_in_job: str) -> None:
    (here / "m.csv").write_text("prompt\ncat\ndog\n")
    assert submit(capfd, "m.csv", "--limit", 1)[0] == 0
    job = here / "outputs" / "m"
    shutil.move(job / path_in_job, here.parent / "outside" / path_in_job)
    (job / path_in_job).symlink_to(here.parent / "outside" / path_in_job)
    outside = snapshot(here.parent / "outside")
    assert submit(capfd)[0] == 0
    assert snapshot(here.parent / "outside") == outside
    assert not (job / path_in_job).is_symlink()
    check_whole(job, 2)


def test_a_job_folder_may_be_a_link_to_a_larger_disk(here: Path, capfd: Capture) -> None:
    (here.parent / "large").mkdir()
    (here / "outputs").mkdir()
    (here / "outputs" / "m").symlink_to(here.parent / "large")
    assert submit(capfd)[0] == 0
    assert submit(capfd)[0] == 0
    check_whole(here.parent / "large", 1)
    assert (here / "outputs" / "m").is_symlink()
    assert call(capfd, "status", "outputs/m")[0] == 0


def test_txt2img_replaces_symbolic_links_and_not_their_targets(here: Path, capfd: Capture) -> None:
    (here / "out").mkdir()
    for name in ("seed_5_00001.png", "grid_00002.png"):
        (here / "out" / name).symlink_to(here.parent / "outside" / "precious")
    (here / "out" / f"seed_1_{'9' * 200}.png").touch()  # its number is too large to continue from
    outside = snapshot(here.parent / "outside")
    code, _, stderr = call(capfd, "txt2img", "cat", "--model", "../model", "--seed", 5, "--n_samples", 2, "-o", "out")
    assert code == 0, stderr
    assert snapshot(here.parent / "outside") == outside
    assert not (here / "out" / "grid_00002.png").is_symlink()


# Spreadsheets


def test_exported_text_is_not_read_as_a_formula(here: Path, capfd: Capture) -> None:
    formulas = ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1", '=HYPERLINK("http://x","y")']  # noqa: RUF001
    pq.write_table(
        pa.table({"prompt": formulas, "id": formulas, "=cmd|' /C calc'!A0": formulas, "loss": [-1.5] * len(formulas)}),
        here / "m.parquet",
    )
    code, _, stderr = submit(capfd, "m.parquet", "--prompt-syntax", "none", "--n_iter", 1)
    assert code == 0, stderr
    for name, separator in (("x.csv", ","), ("x.tsv", "\t")):
        assert export_table(here / "outputs" / "m", here / name) == len(formulas)
        with (here / name).open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file, delimiter=separator)
        assert header[-2:] == ["'=cmd|' /C calc'!A0", "loss"]
        for formula, row in zip(formulas, rows, strict=True):
            cells = dict(zip(header, row, strict=True))
            assert [cells[column] for column in ("prompt", "id", header[-2])] == [f"'{formula}"] * 3
            assert cells["loss"] == "-1.5"
    assert export_table(here / "outputs" / "m", here / "x.jsonl") == len(formulas)
    lines = (here / "x.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == formulas


# Terminals


def test_no_command_prints_escape_sequences(here: Path, capfd: Capture) -> None:
    name = f"m{ESCAPES}.jsonl"
    good = {"prompt": f"cat {ESCAPES} {'dog ' * 40}", "id": ESCAPES, f"note{ESCAPES}": ESCAPES}
    weighted = {"prompt": f"cat{ESCAPES}:0.5 dog:0.5"}
    bad = {"prompt": f"cat{ESCAPES}", "seed": ESCAPES, "sampler": ESCAPES}
    (here / name).write_text("".join(json.dumps(row) + "\n" for row in (good, weighted, bad)))
    shutil.copytree(here.parent / "model", here / f"model{ESCAPES}")
    set_json("tinysd.json", name=f"model{ESCAPES}")(here / f"model{ESCAPES}")
    options = ["--model", f"model{ESCAPES}"]
    job = f"job{ESCAPES}"
    runs = [
        call(capfd, "plan", name, *options, "--verbose"),
        call(capfd, "plan", name, *options, "--json"),
        call(capfd, "submit", name, *options, "--inline", "--verbose", "-o", job),
        call(capfd, "submit", name, *options, "--inline", "-o", job),
        call(capfd, "submit", name, *options, "--inline", "-o", job, "--steps", 9),
        call(capfd, "status", job),
        call(capfd, "export", job, f"x{ESCAPES}.csv"),
        call(capfd, "txt2img", "--from-file", name, *options, "--n_samples", 2, "-o", f"out{ESCAPES}"),
        call(capfd, "txt2img", f"cat {ESCAPES}", *options, "-o", f"out{ESCAPES}"),
        call(capfd, "status", "--image", next((here / job).rglob("seed_*.png"))),
    ]
    for number, (code, stdout, stderr) in enumerate(runs):
        assert code in ((2,) if number == 4 else (0, 3)), (number, stderr)
        assert is_harmless(stdout + stderr), number


@pytest.mark.parametrize(
    "arguments",
    [
        ("submit", f"{ESCAPES}.csv"),
        ("submit", f"{ESCAPES}"),
        ("submit", "m.csv", "--model", ESCAPES),
        ("submit", "m.csv", "--sampler", ESCAPES),
        ("submit", "m.csv", "--preset", ESCAPES),
        ("submit", "m.csv", "--preset", "keys.toml"),
        ("submit", "m.csv", "-o", f"{ESCAPES}{'x' * 300}"),
        ("submit", "header.csv", "--strict"),
        ("txt2img", "--negative-prompt", f"{ESCAPES}:0 b:0 ", "cat"),
        ("status", ESCAPES),
        ("status", "--image", ESCAPES),
        ("export", ESCAPES, "x.csv"),
    ],
    ids=lambda words: " ".join(words).encode("unicode_escape").decode()[:40],
)
def test_error_messages_contain_no_escape_sequences(here: Path, capfd: Capture, arguments: tuple[str, ...]) -> None:
    (here / "keys.toml").write_text(f"{json.dumps(ESCAPES)} = {json.dumps(ESCAPES)}\n")
    (here / "header.csv").write_bytes(f'"prompt","{ESCAPES}"\ncat,x\n'.encode())
    code, stdout, stderr = call(capfd, *arguments)
    assert code in (2, 5)
    assert stderr.startswith("tinysd-batch: ")
    assert is_harmless(stdout + stderr)


@pytest.mark.slow
def test_a_terminal_that_cannot_display_a_prompt_does_not_end_the_job(here: Path) -> None:
    (here / "m.csv").write_text("prompt\ncat \N{SNOWMAN}\n", encoding="utf-8")
    name = os.fsdecode(b"m\xff.csv")  # not UTF-8
    (here / "m.csv").rename(here / name)
    done = subprocess.run(
        [*command("submit"), name, "--inline", "--verbose", "--model", "../model"],
        env=environment(PYTHONIOENCODING="ascii", LC_ALL="C"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cat \\u2603" in done.stdout


# Models

MARKER_FILE = "executed"
MARKER_CODE = f"import pathlib; pathlib.Path({MARKER_FILE!r}).touch()"


def plant_code(model: Path) -> None:
    """Add everything that could run code from a model folder: pickles, modules, and configurations that name them."""
    pickle = b"cpathlib\nPath\n(S'" + MARKER_FILE.encode() + b"'\ntR(dS'x'\nS'y'\nsb."
    for component, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        for name in (f"{stem}.bin", f"{stem}.ckpt", "pytorch_model.bin", f"{stem}.pt"):
            (model / component / name).write_bytes(pickle)
    for folder in (model, *(path for path in model.iterdir() if path.is_dir())):
        for name in ("modeling.py", "pipeline.py", "__init__.py", "conftest.py", "kernel.py"):
            (folder / name).write_text(MARKER_CODE)
    classes = {"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config", "AutoTokenizer": ["modeling.T", None]}
    code_settings = {"auto_map": classes, "custom_pipeline": "pipeline", "trust_remote_code": True}
    set_json("unet/config.json", **code_settings)(model)  # a different class is refused in both files
    set_json("vae/config.json", **code_settings)(model)
    code_settings["_class_name"] = "os"
    set_json(
        "text_encoder/config.json", **code_settings, _attn_implementation="somebody/kernel", attn_implementation="a/b",
        architectures=["modeling.Model"], quantization_config={"quant_method": "bitsandbytes"},
    )(model)  # fmt: skip
    set_json("tokenizer/tokenizer_config.json", **code_settings, chat_template="{{ 1.__class__.__mro__ }}")(model)
    set_json("scheduler/scheduler_config.json", **code_settings)(model)
    put("model_index.json", json.dumps({"_class_name": ["pipeline", "P"], "unet": ["os", "system"]}).encode())(model)


@pytest.mark.slow
def test_no_code_in_a_model_folder_is_executed(here: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Runs in a new process, which must import nothing from the folder and open no connection."""
    shutil.copytree(tiny_model, here / "planted")
    plant_code(here / "planted")
    code = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise SystemExit('a connection was opened')\n"
        "socket.socket.connect = refuse\n"
        "import tinysd_batch.cli as cli\n"
        "sys.argv = ['x', 'submit', 'm.csv', '--inline', '--model', 'planted', '--seed', '5', '-o', 'job']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    print('code', end.code)\n"
        "print('planted', [m for m in sys.modules.values() if 'planted' in str(getattr(m, '__file__', ''))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(PYTHONPATH=os.pathsep.join(sys.path)), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "code 0" in done.stdout, done.stdout + done.stderr
    assert "planted []" in done.stdout
    assert not list(tmp_path.rglob(MARKER_FILE))
    draw(here / "m.csv", here / "plain", tiny_model, seed=5)
    images = [Image.open(next((here / job).rglob("seed_*.png"))) for job in ("job", "plain")]
    assert images[0].tobytes() == images[1].tobytes()


@pytest.mark.parametrize(
    "change",
    [
        set_json("unet/config.json", in_channels=4, cross_attention_dim=10**9),
        set_json("unet/config.json", block_out_channels=[10**6, 10**6]),
        set_json("vae/config.json", block_out_channels=[10**6, 10**6]),
        set_json("text_encoder/config.json", vocab_size=10**9, hidden_size=10**6),
        set_json("text_encoder/config.json", max_position_embeddings=10_000),
        set_json("scheduler/scheduler_config.json", num_train_timesteps=10**12),
        put("unet/diffusion_pytorch_model.safetensors", (2**40).to_bytes(8, "little") + b"{}"),
        put(
            "vae/diffusion_pytorch_model.safetensors",
            (lambda head: len(head).to_bytes(8, "little") + head)(
                b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
            ),
        ),
        put("tinysd.json", json.dumps({"name": "x" * 10_000_000}).encode()),
    ],
)
def test_a_model_with_huge_sizes_is_refused_without_allocating_memory(
    here: Path, capfd: Capture, tiny_model: Path, change: Change
) -> None:
    shutil.copytree(tiny_model, here / "huge")
    change(here / "huge")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, stdout, stderr = call(capfd, "submit", "m.csv", "--inline", "--model", "huge")
    assert code in (0, 2), stderr
    assert len(stdout + stderr) < 5000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000
    assert (here / "outputs").exists() == (code == 0)
