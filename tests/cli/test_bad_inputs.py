"""Invalid input: the program reports it in one line and by its exit code, and writes no files.

Options, arguments, manifests, job files and presets are tested here; models and job folders in
`test_damaged_folders.py`.
"""

import gzip
import os
import resource
import subprocess
from pathlib import Path

import pytest

from tests.support.files import Change, parquet_bytes
from tests.support.jobs import check_whole, draw
from tests.support.program import Capture, call, check_refused, command, environment
from tinysd_batch.job.manifest.snapshot import ROWS_FILE
from tinysd_batch.job.state.precision_record import PRECISION_FILE

pytestmark = pytest.mark.timeout(60)

SETTINGS = [
    ("--height 100", "height = 100: must be a multiple of 16"),
    ("--height 4096", "settings: height = 4096"),
    ("--width 0", "settings: width = 0"),
    ("--steps 0", "settings: steps = 0"),
    ("--steps 1000000000", "settings: steps = 1000000000"),
    ("--steps many", "Invalid value for '--steps'"),
    ("--sampler karras", "settings: sampler = 'karras'"),
    ("--scale -1", "settings: scale = -1.0"),
    ("--scale 1e999", "settings: scale = inf"),
    ("--eta 1.5", "settings: eta = 1.5"),
    ("--seed -2", "settings: seed = -2"),
    ("--seed 9223372036854775808", "settings: seed = 9223372036854775808"),
    ("--n_samples 0", "settings: n_samples = 0"),
    ("--n_iter 0", "settings: n_iter = 0"),
    ("--n_iter 100000 --n_samples 2", "n_iter x n_samples = 200000: at most 100000 images a row"),
    ("--n_rows -1", "settings: n_rows = -1"),
    ("--quality 0", "settings: quality = 0"),
    ("--quality 101", "settings: quality = 101"),
    ("--format bmp", "settings: format = 'bmp'"),
    ("--prompt-syntax comfy", "settings: prompt_syntax = 'comfy'"),
    ("--precision half", "settings: precision = 'half'"),
    ("--device tpu", "settings: device = 'tpu'"),
    ("--C 5", "C = 5: it is 4 with this model, and cannot be chosen (tinysd emoji 64)"),
    ("--f 3", "f = 3: it is 4 with this model, and cannot be chosen (tinysd emoji 64)"),
    ("--unet_bs 0", "settings: unet_bs = 0"),
    ("--max-batch 0", "settings: max_batch = 0"),
    ("--vram-budget much", "vram_budget = 'much'"),
    ("--vram-budget=", "vram_budget = ''"),  # an unset variable must not lift the limit
    ("--vram-budget nan", "vram_budget = 'nan'"),
    ("--sampler=", "settings: sampler = ''"),
    ("--device none", "settings: device = 'none'"),
    ("--vram-budget 5XB", "vram_budget = '5XB'"),
    ("--negative-prompt a:0--b:0", "negative_prompt: "),
    ("--model nowhere", "nowhere: no such model"),
    (f"--model {'x' * 300}", "file name too long"),
    ("--model m.csv", "m.csv: this is a single checkpoint file"),
    ("--model .", ".: not a model folder, it has no text_encoder, unet, vae, scheduler, tokenizer"),
    ("--preset none.toml", "none.toml: no such file"),
    ("--preset .", "is a directory"),
    ("--preset /dev/zero", "/dev/zero: not a regular file"),
    ("--preset m.csv", "m.csv: not valid TOML"),
    ("--stepps 3", "No such option: --stepps"),
    ("--steps", "'--steps' requires an argument"),
]


@pytest.mark.parametrize("command", ["submit m.csv", "plan m.csv", "txt2img cat"])
@pytest.mark.parametrize(("options", "message"), SETTINGS)
def test_settings(here: Path, capfd: Capture, command: str, options: str, message: str) -> None:
    words: list[object] = [word.replace("--", " ") if ":" in word else word for word in options.split()]
    check_refused(capfd, here, [*command.split(), *words], 2, message)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("submit", 2, "name a manifest"),
        ("plan", 2, "name a manifest"),
        ("submit m.csv --from-file m.csv", 2, "m.csv and --from-file m.csv: use only one of them"),
        ("submit m.csv --workers 0", 2, "settings: workers = 0"),
        ("submit m.csv --workers two", 2, "Invalid value for '--workers'"),
        ("submit m.csv --limit 0", 2, "Invalid value for '--limit'"),
        ("submit m.csv more.csv", 2, "a job has one manifest, m.csv"),
        ("txt2img", 2, "no prompt; type it after the command, such as: tinysd-batch txt2img red apple"),
        ("txt2img cat --from-file m.csv", 2, "a prompt and --from-file: use only one of them"),
        ("txt2img --prompt a:0 b:0", 2, "weights sum to 0"),
        ("txt2img cat --workers 2", 2, "No such option: --workers"),
        ("txt2img cat -o m.csv", 2, "m.csv: is a file"),
        ("txt2img cat -o m.csv/below", 5, "m.csv/below"),
        ("submit m.csv -o m.csv", 2, "m.csv: is a file"),
        ("submit m.csv --inline -o m.csv/below", 5, "Not a directory"),
        ("submit m.csv --inline -o /dev/full/job", 5, "/dev/full/job"),
        ("submit m.csv --inline -o /proc/job", 5, "/proc/job"),
        ("txt2img cat -o /proc/images", 5, "/proc/images"),
        (f"submit m.csv -o {'x' * 300}", 5, "File name too long"),
        (f"plan m.csv -o {'x' * 300}", 5, "File name too long"),
        (f"txt2img cat -o {'x' * 300}", 5, "File name too long"),
        (f"status {'x' * 300}", 5, "File name too long"),
        ("status", 2, "name a job folder, or an image with --image"),
        ("status .", 2, "not a job folder"),
        ("status nowhere", 2, "not a job folder"),
        ("status m.csv", 2, "not a job folder"),
        ("export . x.csv", 2, "not a job folder"),
        ("export nowhere x.csv", 2, "not a job folder"),
        ("export nowhere", 2, "Missing argument"),
        ("draw cat", 2, "No such command 'draw'"),
    ],
)
def test_arguments_and_paths(here: Path, capfd: Capture, arguments: str, code: int, message: str) -> None:
    check_refused(capfd, here, list(arguments.split()), code, message)


@pytest.mark.parametrize("command", ["submit m.csv --inline", "txt2img cat -o outputs/images"])
def test_file_at_the_path_of_the_output_folder(here: Path, capfd: Capture, tiny_model: Path, command: str) -> None:
    (here / "outputs").touch()
    check_refused(capfd, here, [*command.split(), "--model", tiny_model], 5, "outputs")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 3000])
def test_full_disk(here: Path, tiny_model: Path, limit: int) -> None:
    """The lock or the image cannot be written; the job can be resumed when there is space."""
    arguments = ["m.csv", "--inline", "-o", "job", "--model", str(tiny_model), "--height", "64", "--width", "64"]
    done = subprocess.run(
        command("submit", *arguments), env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (5, 1), done.stderr
    assert "File too large; make room or choose another folder" in done.stderr
    files = {path.name for path in (here / "job").rglob("*") if path.is_file()}
    assert files <= {"lock", "job.log", "job.json", ROWS_FILE, PRECISION_FILE}
    draw(here / "m.csv", here / "job", tiny_model, height=64, width=64)
    check_whole(here / "job", 1)


# Manifests


def compress(data: bytes) -> bytes:
    return gzip.compress(data)


MANIFESTS: list[tuple[str, bytes | Change | None, str]] = [
    ("none.csv", None, "none.csv: no such file"),
    ("none.parquet", None, "none.parquet: no such file"),
    ("x" * 300 + ".csv", None, "file name too long"),
    ("job.cfg", b"prompt\ncat\n", "job.cfg: manifests are .csv"),
    ("nosuffix", b"prompt\ncat\n", "nosuffix: manifests are .csv"),
    ("m.csv.bz2", b"prompt\ncat\n", "m.csv.bz2: manifests are .csv"),
    ("/dev/null", None, "/dev/null: manifests are .csv"),
    ("/dev/zero", None, "/dev/zero: manifests are .csv"),
    ("zero.csv", lambda path: path.symlink_to("/dev/zero"), "zero.csv: cannot be read: not a regular file"),
    ("null.jsonl", lambda path: path.symlink_to("/dev/null"), "null.jsonl: cannot be read: not a regular file"),
    ("pipe.csv", os.mkfifo, "pipe.csv: cannot be read: not a regular file"),
    ("pipe.parquet", os.mkfifo, "pipe.parquet: cannot be read: not a regular file"),
    ("folder.csv", Path.mkdir, "folder.csv: cannot be read: is a directory"),
    ("folder", Path.mkdir, "this is a folder, neither a job (no job.json) nor a table in Parquet files"),
    (".", None, "this is a folder, neither a job (no job.json) nor a table in Parquet files"),
    ("folder.parquet", Path.mkdir, "folder.parquet: cannot be read: is a directory"),
    ("loop.csv", lambda path: path.symlink_to(path), "loop.csv: cannot be read: too many levels of symbolic links"),
    ("empty.csv", b"", "empty.csv: the file is empty"),
    ("empty.tsv", b"\n\n", "empty.tsv: the file is empty"),
    ("empty.jsonl", b"", "empty.jsonl: the file is empty"),
    ("empty.txt", b" \n", "empty.txt: the file is empty"),
    ("empty.parquet", b"", "empty.parquet: not a readable Parquet file"),
    ("empty.csv.gz", compress(b""), "empty.csv.gz: the file is empty"),
    ("header.csv", b"prompt,seed\n", "header.csv: no rows"),
    ("header.parquet", parquet_bytes(prompt=[]), "header.parquet: no rows"),
    ("utf16.csv", "prompt\ncat\n".encode("utf-16-le"), "utf16.csv: not UTF-8"),
    ("utf32.csv", "prompt\ncat\n".encode("utf-32"), "utf32.csv: not UTF-8 (it looks like UTF-32)"),
    ("latin.csv", "größe,prompt\n1,cat\n".encode("latin-1"), "latin.csv: header: not UTF-8"),
    ("cut.csv.gz", compress(b"prompt\ncat\n")[:-4], "cut.csv.gz: damaged or truncated gzip"),
    ("cut.parquet", parquet_bytes(prompt=["cat"])[:-9], "cut.parquet: not a readable Parquet file"),
    ("plain.jsonl.gz", b'{"prompt": "cat"}\n', "plain.jsonl.gz: damaged or truncated gzip"),
    ("text.parquet", b"prompt\ncat\n", "text.parquet: not a readable Parquet file"),
    ("words.csv", b"words\ncat\n", "words.csv: header: no column named prompt; found 'words'"),
    ("words.parquet", parquet_bytes(words=["cat"]), "words.parquet: header: no column named prompt; found 'words'"),
    ("words.jsonl", b'{"words": "cat"}\n', "words.jsonl: no object with a key named prompt"),
    ("quoted.csv", b'"prompt;seed"\n"cat;1"\n', "without quotes around its lines"),
    ("empty.json", b"[]", "empty.json: no rows"),
    ("cut.json", b'[{"prompt": "cat"}, {"prom', "cut.json: line 1: not a JSON object: Unterminated string"),
    ("blank.csv", b"prompt,seed\n,\n,\n", "blank.csv: no rows except 2 blank ones"),
    ("notes.json", b'{"prompt": "cat"} and more', "notes.json: line 1: not a JSON object: Expecting value"),
    ("twice.csv", b"prompt,a,a\ncat,1,2\n", "column 'a' appears twice"),
    ("clash.csv", b"prompt,steps,ddim_steps\ncat,1,2\n", "both mean steps"),
    (
        "wide.csv",
        ("prompt," + ",".join(map(str, range(1000))) + "\n").encode(),
        "wide.csv: header: 1001 columns, at most",
    ),
    (
        "wide.parquet",
        parquet_bytes(prompt=["cat"], **{str(n): [1] for n in range(1000)}),
        "header: 1001 columns, at most",
    ),
    ("quotes.csv", b'"prompt\ncat\n', "quotes.csv: header: "),
]


@pytest.mark.parametrize("command", ["submit", "plan", "txt2img --from-file"])
@pytest.mark.parametrize(("name", "content", "message"), MANIFESTS, ids=[name[:20] for name, *_ in MANIFESTS])
def test_manifests(
    here: Path, capfd: Capture, command: str, name: str, content: bytes | Change | None, message: str
) -> None:
    if isinstance(content, bytes):
        (here / name).write_bytes(content)
    elif content is not None:
        content(here / name)
    check_refused(capfd, here, [*command.split(), name], 2, message)


def test_manifest_without_read_permission(here: Path, capfd: Capture) -> None:
    (here / "m.csv").chmod(0)
    if os.access("m.csv", os.R_OK):
        pytest.skip("this user can read all files")
    check_refused(capfd, here, ["submit", "m.csv"], 2, "m.csv: cannot be read: permission denied")


@pytest.mark.parametrize("command", ["submit", "plan"])
def test_strict_rejects_unknown_columns(here: Path, capfd: Capture, command: str) -> None:
    (here / "typo.csv").write_text("prompt,negatve_prompt\ncat,dog\n")
    message = "unknown column 'negatve_prompt' (did you mean negative_prompt?)"
    check_refused(capfd, here, [command, "typo.csv", "--strict"], 2, message)


def test_columns_that_collide_in_the_results(here: Path, capfd: Capture, tiny_model: Path) -> None:
    """This is detected after the folder was locked, and it is still removed."""
    (here / "clash.csv").write_text("prompt,status,manifest_status\ncat,1,2\n")
    arguments: list[object] = ["submit", "clash.csv", "--inline", "--model", tiny_model, "-o", "new/job"]
    check_refused(capfd, here, arguments, 2, "becomes manifest_status in the results, which is taken")


@pytest.mark.parametrize("name", ["..csv", "...csv", "-x.csv"])
def test_manifest_names_that_cannot_name_a_folder(here: Path, capfd: Capture, name: str) -> None:
    (here / name).write_text("prompt\ncat\n")
    check_refused(capfd, here, ["submit", "--", name], 2, f"{name}: no folder can be named after it")


@pytest.mark.parametrize("command", ["plan m.csv", "txt2img --from-file m.csv", "submit m.csv --inline"])
def test_manifest_with_only_invalid_rows(here: Path, capfd: Capture, tiny_model: Path, command: str) -> None:
    """submit writes a table, which lists the invalid rows."""
    (here / "m.csv").write_text("prompt,seed\n,1\ncat,x\n")
    code, stdout, stderr = call(capfd, *command.split(), "--model", tiny_model)
    assert code == (2 if command.startswith("txt2img") else 3)
    assert "column prompt is empty" in stdout + stderr
    assert (here / "outputs").exists() == command.startswith("submit")


# Job files and presets


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("= 3", "job.toml: not valid TOML"),
        ("", "job.toml: manifest = 'None': name the table of prompts"),
        ("manifest = 3", "job.toml: manifest = '3': "),
        ('manifest = ""', "manifests are .csv"),
        ('manifest = "none.csv"', "none.csv: no such file"),
        ('manifest = "job.toml"', "job.toml: manifests are .csv"),
        ('manifest = "a\\u0000.csv"', "a path cannot contain NUL"),
        ('manifest = "m.csv"\noutput = "a\\u0000"', "a path cannot contain NUL"),
        ('manifest = "m.csv"\noutput = "m.csv"', "m.csv: is a file"),
        ('manifest = "m.csv"\nstepps = 3', "job.toml: 'stepps': no such setting; did you mean steps?"),
        ('manifest = "m.csv"\nsteps = "many"', "job.toml: steps = 'many': "),
        ('manifest = "m.csv"\nsteps = true', "job.toml: steps = 'True': "),
        ('manifest = "m.csv"\nsteps = 2.5', "job.toml: steps = 2.5: "),
        ('manifest = "m.csv"\nscale = inf', "job.toml: scale = inf: "),
        ('manifest = "m.csv"\nseed = [1]', "job.toml: seed = '[1]': "),
        ('manifest = "m.csv"\ninline = 3', "job.toml: inline = 3: "),
        ('manifest = "m.csv"\nvram_budget = 5', "job.toml: vram_budget = 5: give a number with a unit"),
        ('manifest = "m.csv"\nmodel = "nowhere"', "nowhere: no such model"),
        ('manifest = "m.csv"\nmodel = "a\\u0000"', "a path cannot contain NUL"),
        ('manifest = "m.csv"\npreset = 3', "job.toml: preset = '3': "),
        ('manifest = "m.csv"\npreset = ["none.toml"]', "none.toml: no such file"),
        ('manifest = "m.csv"\npreset = ["job.toml"]', "job.toml: 'manifest': no such setting"),
        ('manifest = "m.csv"\npreset = ["."]', "is a directory"),
        ('manifest = "m.csv"\n[steps]\nx = 1', "job.toml: steps = "),
        ('manifest = "m.csv"\nseed = ' + "9" * 5000, "job.toml: not valid TOML"),
        ("manifest = " + "[" * 50_000, "job.toml: not valid TOML: nested too deep"),
        ("a = 1\n" * 300_000, "job.toml: over 1,000,000 bytes"),
    ],
    ids=lambda value: value[:40],
)
def test_job_files(here: Path, capfd: Capture, content: str, message: str) -> None:
    (here / "job.toml").write_text(content)
    check_refused(capfd, here, ["submit", "job.toml"], 2, message)


def test_job_files_that_are_not_text(here: Path, capfd: Capture) -> None:
    (here / "binary.toml").write_bytes(b"\xff\xfe\x00")
    os.mkfifo(here / "pipe.toml")
    check_refused(capfd, here, ["submit", "binary.toml"], 2, "binary.toml: not valid TOML")
    check_refused(capfd, here, ["submit", "pipe.toml"], 2, "pipe.toml: not a regular file")
    check_refused(capfd, here, ["submit", "none.toml"], 2, "none.toml: no such file")


def test_job_file_is_not_a_manifest(here: Path, capfd: Capture) -> None:
    (here / "job.toml").write_text('manifest = "m.csv"\n')
    check_refused(capfd, here, ["txt2img", "--from-file", "job.toml"], 2, "job.toml: manifests are .csv")
