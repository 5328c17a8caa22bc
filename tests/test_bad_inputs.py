"""Whatever is wrong with its input, the program says so in a line and by its exit code, and leaves nothing behind."""

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.job.test_driver import draw
from tests.tools import check_whole, command, environment
from tinysd_batch.cli import main
from tinysd_batch.job.rows import ROWS_FILE
from tinysd_batch.model.info import WEIGHTS

pytestmark = pytest.mark.timeout(60)
Capture = pytest.CaptureFixture[str]
Change = Callable[[Path], object]


def call(capture: Capture, *arguments: object) -> tuple[int, str, str]:
    """Run the program in this process: exit code, stdout, stderr."""
    capture.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tinysd-batch", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as end:
            main()
    return (end.value.code or 0, *capture.readouterr())  # type: ignore[return-value]


def snapshot(folder: Path) -> dict[str, object]:
    """Every file below with its bytes. The lock holds the number of the last process and may change."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() and path.name != "lock" else None
        for path in folder.rglob("*")
    }


def check_refused(capture: Capture, folder: Path, arguments: list[object], code: int, message: str) -> None:
    """One line on stderr (the parser's own complaints are longer), the right exit code, no file more or less."""
    before = snapshot(folder)
    found, _, stderr = call(capture, *arguments)
    assert (found, message in stderr) == (code, True), f"exit code {found}, stderr: {stderr}"
    assert "Traceback" not in stderr
    if not stderr.startswith(("Usage: ", "Error: ")):
        assert stderr.startswith("tinysd-batch: ")
        assert len(stderr.splitlines()) == 1, stderr
    assert snapshot(folder) == before


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, besides a good manifest."""
    (tmp_path / "m.csv").write_text("prompt\ncat\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SETTINGS = [
    ("--height 100", "height = 100: must be a multiple of 16"),
    ("--height 4096", "settings: height = '4096'"),
    ("--width 0", "settings: width = '0'"),
    ("--steps 0", "settings: steps = '0'"),
    ("--steps 1000000000", "settings: steps = '1000000000'"),
    ("--steps many", "Invalid value for '--steps'"),
    ("--sampler karras", "settings: sampler = 'karras'"),
    ("--scale nan", "settings: scale = 'nan'"),
    ("--scale -1", "settings: scale = '-1.0'"),
    ("--scale 1e999", "settings: scale = 'inf'"),
    ("--eta 1.5", "settings: eta = '1.5'"),
    ("--seed -1", "settings: seed = '-1'"),
    ("--seed 9223372036854775808", "settings: seed = '9223372036854775808'"),
    ("--n_samples 0", "settings: n_samples = '0'"),
    ("--n_iter 0", "settings: n_iter = '0'"),
    ("--n_iter 100000 --n_samples 2", "n_iter x n_samples: at most 100000 images a row"),
    ("--n_rows -1", "settings: n_rows = '-1'"),
    ("--quality 0", "settings: quality = '0'"),
    ("--quality 101", "settings: quality = '101'"),
    ("--format bmp", "settings: format = 'bmp'"),
    ("--prompt-syntax comfy", "settings: prompt_syntax = 'comfy'"),
    ("--precision half", "settings: precision = 'half'"),
    ("--device tpu", "settings: device = 'tpu'"),
    ("--C 5", "C = 5: with the model tinysd emoji 64 it is 4, and cannot be chosen"),
    ("--f 3", "f = 3: with the model tinysd emoji 64 it is 4, and cannot be chosen"),
    ("--unet_bs 0", "settings: unet_bs = '0'"),
    ("--max-batch 0", "settings: max_batch = '0'"),
    ("--vram-budget much", "vram_budget = 'much'"),
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
        ("submit m.csv --from-file m.csv", 2, "m.csv and --from-file m.csv: give one of the two"),
        ("submit m.csv --workers 0", 2, "settings: workers = '0'"),
        ("submit m.csv --workers two", 2, "Invalid value for '--workers'"),
        ("submit m.csv --limit 0", 2, "Invalid value for '--limit'"),
        ("submit m.csv more.csv", 2, "unexpected extra argument"),
        ("txt2img", 2, "the prompt cannot be drawn: column prompt is empty"),
        ("txt2img cat --from-file m.csv", 2, "a prompt and --from-file: give one of the two"),
        ("txt2img --prompt a:0 b:0", 2, "weights sum to 0"),
        ("txt2img cat --workers 2", 2, "No such option: --workers"),
        ("txt2img cat -o m.csv", 2, "m.csv: is a file"),
        ("txt2img cat -o m.csv/below", 5, "m.csv/below"),
        ("submit m.csv -o m.csv", 2, "m.csv: is a file"),
        ("submit m.csv --inline -o m.csv/below", 5, "Not a directory"),
        ("submit m.csv --inline -o /dev/full/job", 5, "/dev/full/job"),
        ("submit m.csv --inline -o /proc/job", 5, "/proc/job"),
        ("txt2img cat -o /proc/pictures", 5, "/proc/pictures"),
        (f"submit m.csv -o {'x' * 300}", 5, "File name too long"),
        (f"plan m.csv -o {'x' * 300}", 5, "File name too long"),
        (f"txt2img cat -o {'x' * 300}", 5, "File name too long"),
        (f"status {'x' * 300}", 5, "File name too long"),
        ("status", 2, "name a job folder, or a picture with --image"),
        ("status .", 2, "not a job folder"),
        ("status nowhere", 2, "not a job folder"),
        ("status m.csv", 2, "not a job folder"),
        ("export . x.csv", 2, "not a job folder"),
        ("export nowhere x.csv", 2, "not a job folder"),
        ("export nowhere", 2, "Missing argument"),
        ("draw cat", 2, "No such command 'draw'"),
    ],
)
def test_arguments_and_places(here: Path, capfd: Capture, arguments: str, code: int, message: str) -> None:
    check_refused(capfd, here, list(arguments.split()), code, message)


@pytest.mark.parametrize("command", ["submit m.csv --inline", "txt2img cat -o outputs/pictures"])
def test_a_file_where_the_folder_of_folders_would_be(
    here: Path, capfd: Capture, tiny_model: Path, command: str
) -> None:
    (here / "outputs").touch()
    check_refused(capfd, here, [*command.split(), "--model", tiny_model], 5, "outputs")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 3000])
def test_a_disk_without_room(here: Path, tiny_model: Path, limit: int) -> None:
    """The lock meets it, or the picture; the job goes on when there is room."""
    arguments = ["m.csv", "--inline", "-o", "job", "--model", str(tiny_model), "--height", "64", "--width", "64"]
    done = subprocess.run(
        command("submit", *arguments), env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (5, 1), done.stderr
    assert "File too large; make room or choose another folder" in done.stderr
    left = {path.name for path in (here / "job").rglob("*") if path.is_file()}
    assert left <= {"lock", "job.json", ROWS_FILE}
    draw(here / "m.csv", here / "job", tiny_model, height=64, width=64)
    check_whole(here / "job", 1)


# Manifests


def packed(data: bytes) -> bytes:
    return gzip.compress(data)


def table(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


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
    ("folder.parquet", Path.mkdir, "folder.parquet: cannot be read: is a directory"),
    ("loop.csv", lambda path: path.symlink_to(path), "loop.csv: cannot be read: too many levels of symbolic links"),
    ("empty.csv", b"", "empty.csv: the file is empty"),
    ("empty.tsv", b"\n\n", "empty.tsv: the file is empty"),
    ("empty.jsonl", b"", "empty.jsonl: the file is empty"),
    ("empty.txt", b" \n", "empty.txt: the file is empty"),
    ("empty.parquet", b"", "empty.parquet: not a readable Parquet file"),
    ("empty.csv.gz", packed(b""), "empty.csv.gz: the file is empty"),
    ("header.csv", b"prompt,seed\n", "header.csv: no rows"),
    ("header.parquet", table(prompt=[]), "header.parquet: no rows"),
    ("utf16.csv", "prompt\ncat\n".encode("utf-16"), "utf16.csv: not UTF-8"),
    ("latin.csv", "größe,prompt\n1,cat\n".encode("latin-1"), "latin.csv: header: not UTF-8"),
    ("cut.csv.gz", packed(b"prompt\ncat\n")[:-4], "cut.csv.gz: damaged or cut off gzip"),
    ("cut.parquet", table(prompt=["cat"])[:-9], "cut.parquet: not a readable Parquet file"),
    ("plain.jsonl.gz", b'{"prompt": "cat"}\n', "plain.jsonl.gz: damaged or cut off gzip"),
    ("text.parquet", b"prompt\ncat\n", "text.parquet: not a readable Parquet file"),
    ("words.csv", b"words\ncat\n", "words.csv: header: no column named prompt; found 'words'"),
    ("words.parquet", table(words=["cat"]), "words.parquet: header: no column named prompt; found 'words'"),
    ("words.jsonl", b'{"words": "cat"}\n', "words.jsonl: no object with a key named prompt"),
    ("semicolons.csv", b"prompt;seed\ncat;1\n", "save it with commas"),
    ("twice.csv", b"prompt,a,a\ncat,1,2\n", "column 'a' stands there twice"),
    ("clash.csv", b"prompt,steps,ddim_steps\ncat,1,2\n", "both mean steps"),
    (
        "wide.csv",
        ("prompt," + ",".join(map(str, range(1000))) + "\n").encode(),
        "wide.csv: header: 1001 columns, at most",
    ),
    ("wide.parquet", table(prompt=["cat"], **{str(n): [1] for n in range(1000)}), "header: 1001 columns, at most"),
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


def test_a_manifest_that_may_not_be_read(here: Path, capfd: Capture) -> None:
    (here / "m.csv").chmod(0)
    if os.access("m.csv", os.R_OK):
        pytest.skip("this user may read everything")
    check_refused(capfd, here, ["submit", "m.csv"], 2, "m.csv: cannot be read: permission denied")


@pytest.mark.parametrize("command", ["submit", "plan"])
def test_unknown_columns_where_that_is_strict(here: Path, capfd: Capture, command: str) -> None:
    (here / "typo.csv").write_text("prompt,negatve_prompt\ncat,dog\n")
    message = "unknown column 'negatve_prompt' (did you mean negative_prompt?)"
    check_refused(capfd, here, [command, "typo.csv", "--strict"], 2, message)


def test_columns_that_meet_in_the_results(here: Path, capfd: Capture, tiny_model: Path) -> None:
    """Found once the folder is locked, and still nothing of it stays."""
    (here / "clash.csv").write_text("prompt,status,manifest_status\ncat,1,2\n")
    arguments: list[object] = ["submit", "clash.csv", "--inline", "--model", tiny_model, "-o", "new/job"]
    check_refused(capfd, here, arguments, 2, "becomes manifest_status in the results, which is taken")


@pytest.mark.parametrize("name", ["..csv", "...csv", "-x.csv"])
def test_names_that_no_folder_can_bear(here: Path, capfd: Capture, name: str) -> None:
    (here / name).write_text("prompt\ncat\n")
    check_refused(capfd, here, ["submit", "--", name], 2, f"{name}: no folder can be named after it")


@pytest.mark.parametrize("command", ["plan m.csv", "txt2img --from-file m.csv", "submit m.csv --inline"])
def test_only_bad_rows(here: Path, capfd: Capture, tiny_model: Path, command: str) -> None:
    """Submit's table names them, so there it is written."""
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
        ("", "job.toml: manifest = '{}': Field required"),
        ("manifest = 3", "job.toml: manifest = '3': "),
        ('manifest = ""', "manifests are .csv"),
        ('manifest = "none.csv"', "none.csv: no such file"),
        ('manifest = "job.toml"', "job.toml: manifests are .csv"),
        ('manifest = "a\\u0000.csv"', "a path holds no NUL"),
        ('manifest = "m.csv"\noutput = "a\\u0000"', "a path holds no NUL"),
        ('manifest = "m.csv"\noutput = "m.csv"', "m.csv: is a file"),
        ('manifest = "m.csv"\nstepps = 3', "job.toml: stepps = '3': "),
        ('manifest = "m.csv"\nsteps = "many"', "job.toml: steps = 'many': "),
        ('manifest = "m.csv"\nsteps = true', "job.toml: steps = 'True': "),
        ('manifest = "m.csv"\nsteps = 2.5', "job.toml: steps = '2.5': "),
        ('manifest = "m.csv"\nscale = nan', "job.toml: scale = 'nan': "),
        ('manifest = "m.csv"\nseed = [1]', "job.toml: seed = '[1]': "),
        ('manifest = "m.csv"\ninline = 3', "job.toml: inline = '3': "),
        ('manifest = "m.csv"\nvram_budget = 5', "job.toml: vram_budget = '5': "),
        ('manifest = "m.csv"\nmodel = "nowhere"', "nowhere: no such model"),
        ('manifest = "m.csv"\nmodel = "a\\u0000"', "a path holds no NUL"),
        ('manifest = "m.csv"\npreset = "none.toml"', "job.toml: preset = 'none.toml': "),
        ('manifest = "m.csv"\npreset = ["none.toml"]', "none.toml: no such file"),
        ('manifest = "m.csv"\npreset = ["job.toml"]', "job.toml: manifest = 'm.csv': Extra inputs are not permitted"),
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


def test_job_files_that_are_no_text(here: Path, capfd: Capture) -> None:
    (here / "binary.toml").write_bytes(b"\xff\xfe\x00")
    os.mkfifo(here / "pipe.toml")
    check_refused(capfd, here, ["submit", "binary.toml"], 2, "binary.toml: not valid TOML")
    check_refused(capfd, here, ["submit", "pipe.toml"], 2, "pipe.toml: not a regular file")
    check_refused(capfd, here, ["submit", "none.toml"], 2, "none.toml: no such file")


def test_a_job_file_is_no_list_of_prompts(here: Path, capfd: Capture) -> None:
    (here / "job.toml").write_text('manifest = "m.csv"\n')
    check_refused(capfd, here, ["txt2img", "--from-file", "job.toml"], 2, "job.toml: manifests are .csv")


# Models


def set_json(file: str, **values: object) -> Change:
    """Change entries of one of the model's files; None removes."""

    def change(model: Path) -> None:
        content = json.loads((model / file).read_text()) | values
        (model / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return change


def set_tensors(part: str, **tensors: torch.Tensor | None) -> Change:
    """Change tensors of a part; None removes. Two underscores stand for a dot."""

    def change(model: Path) -> None:
        found = load_file(model / part / WEIGHTS) | {name.replace("__", "."): value for name, value in tensors.items()}
        save_file({name: value for name, value in found.items() if value is not None}, model / part / WEIGHTS)

    return change


def put(file: str, data: bytes) -> Change:
    return lambda model: (model / file).write_bytes(data)


def cut(file: str, size: int) -> Change:
    return lambda model: os.truncate(model / file, size)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def drop(file: str) -> Change:
    return lambda model: remove(model / file)


def instead(file: str, make: Change) -> Change:
    """Put something else in a file's place."""

    def change(model: Path) -> None:
        remove(model / file)
        make(model / file)

    return change


def pipe(file: str) -> Change:
    return instead(file, os.mkfifo)


def no_tokenizer(model: Path) -> None:
    for file in (model / "tokenizer").iterdir():
        file.unlink()


UNET, VAE, TEXT = (f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/vocab.json"

MODELS: list[tuple[Change, str]] = [
    (drop("vae"), "not a model folder, it has no vae"),
    (drop(UNET), "unet/config.json: missing; the model folder is not complete"),
    (drop(f"unet/{WEIGHTS}"), f"unet/{WEIGHTS}: missing; the model folder is not complete"),
    (drop("text_encoder/model.safetensors"), "text_encoder/model.safetensors: missing"),
    (drop(SCHEDULER), "scheduler_config.json: missing"),
    (drop(TOKENIZER), "tokenizer/vocab.json: missing"),
    (no_tokenizer, "tokenizer/vocab.json: missing"),
    (put(UNET, b"{"), "unet/config.json: not valid JSON"),
    (put(UNET, b"\xff"), "unet/config.json: not valid JSON"),
    (put(UNET, b"[]"), "unet/config.json: an object was expected"),
    (put(TEXT, b'{"a": ' + b"[" * 100_000), "text_encoder/config.json: not valid JSON"),
    (put(TOKENIZER, b"{"), "not a readable CLIP tokenizer"),
    (put(TOKENIZER, b'{"a": "b"}'), "not a readable CLIP tokenizer"),
    (put("tokenizer/tokenizer.json", b"{}"), "not a readable CLIP tokenizer"),
    (put("tokenizer/tokenizer_config.json", b"3"), "not a readable CLIP tokenizer"),
    (put("tokenizer/merges.txt", b"a b c\n"), "not a readable CLIP tokenizer"),
    (set_json("tokenizer/tokenizer_config.json", model_max_length="x"), "not a readable CLIP tokenizer"),
    (set_json("tokenizer/tokenizer_config.json", bos_token=["a"]), "not a readable CLIP tokenizer"),
    (set_json(TOKENIZER, **{"cat</w>": 10**6}), "token 'cat</w>' is number 1000000, the text encoder knows"),
    (pipe(UNET), "unet/config.json: cannot be read: not a regular file"),
    (pipe(f"vae/{WEIGHTS}"), "not a readable safetensors file"),
    (set_json(UNET, block_out_channels=None), "block_out_channels = 'None': a list of 1 to 8 was expected"),
    (set_json(UNET, block_out_channels=[32] * 99), "a list of 1 to 8 was expected"),
    (set_json(UNET, sample_size=[8, 8]), "sample_size = '[8, 8]': a number was expected"),
    (set_json(UNET, sample_size=-8), "sample_size = '-8': must be between 1"),
    (set_json(UNET, in_channels=10**9), "in_channels = '1000000000': must be between 1"),
    (set_json(UNET, block_out_channels=[10**9, 10**9]), "unet/config.json: no model can be built from it"),
    (set_json(UNET, block_out_channels=[10**30, 10**30]), "unet/config.json: no model can be built from it"),
    (set_json(UNET, layers_per_block=10**9), "layers_per_block = '1000000000': at most 100 were expected"),
    (set_json(UNET, transformer_layers_per_block=[1, 10**9]), "at most 100 were expected"),
    (set_json(UNET, down_block_types=["os.system"] * 2), "unet/config.json: no model can be built from it"),
    (set_json(UNET, norm_num_groups=7), "unet/config.json: no model can be built from it"),
    (set_json(UNET, quantization_config="none"), "unet/config.json: no model can be built from it"),
    (set_json(UNET, quantization_config={"quant_method": "gptq"}), "quantized by 'gptq'"),
    (set_json(TEXT, num_hidden_layers=10**9), "num_hidden_layers = '1000000000': at most 100 were expected"),
    (set_json(TEXT, hidden_size="wide"), "text_encoder/config.json: no model can be built from it"),
    (set_json(TEXT, max_position_embeddings=0), "max_position_embeddings = '0': must be between 3"),
    (set_json(VAE, block_out_channels=3), "block_out_channels = '3': a list of 1 to 8 was expected"),
    (set_json(VAE, latent_channels="four"), "vae/config.json: no model can be built from it"),
    (set_json(SCHEDULER, prediction_type="v_prediction"), "prediction_type 'v_prediction'"),
    (set_json(SCHEDULER, beta_start="x"), "beta_start = 'x': a number between 0 and 1 was expected"),
    (set_json(SCHEDULER, beta_schedule="sigmoid"), "beta_schedule = 'sigmoid'"),
    (set_json("tinysd.json", steps=-1), "tinysd.json: steps = '-1': must be between 1 and 1000"),
    (set_json("tinysd.json", scale="x"), "tinysd.json: scale = 'x': a number was expected"),
    (put("tinysd.json", b'{"scale": NaN}'), "tinysd.json: scale = 'nan': a number was expected"),
    (cut(f"unet/{WEIGHTS}", 1000), "not a readable safetensors file"),
    (cut(f"vae/{WEIGHTS}", 0), "not a readable safetensors file"),
    (put(f"unet/{WEIGHTS}", (2**63).to_bytes(8, "little") + b"{}"), "not a readable safetensors file"),
    (put(f"unet/{WEIGHTS}", b"\x80\x04c__builtin__\nprint\n"), "not a readable safetensors file"),
    (set_tensors("unet", conv_in__bias=None), "1 tensors are missing, the first is conv_in.bias"),
    (set_tensors("unet", conv_in__bias=torch.zeros(5)), "conv_in.bias has shape [5], [32] was expected"),
    (set_tensors("unet", stray=torch.zeros(1)), "1 unexpected tensors, the first is stray"),
]


@pytest.mark.parametrize("command", ["submit m.csv --inline -o new/job", "txt2img cat -o pictures"])
@pytest.mark.parametrize(("change", "message"), MODELS)
def test_models(here: Path, capfd: Capture, tiny_model: Path, change: Change, message: str, command: str) -> None:
    """A job that its model stops leaves no folder that another model would not be let into."""
    shutil.copytree(tiny_model, here / "model")
    change(here / "model")
    check_refused(capfd, here, [*command.split(), "--model", "model"], 2, message)


def test_weights_that_are_no_numbers_cost_the_pictures(here: Path, capfd: Capture, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, here / "model")
    set_tensors("unet", conv_out__bias=torch.full((4,), float("nan")))(here / "model")
    code, _, _ = call(capfd, "submit", "m.csv", "--inline", "--model", "model", "-o", "job")
    assert code == 3
    (row,) = pq.read_table(here / "job" / "results.parquet").to_pylist()
    assert (row["status"], row["error_class"]) == ("failed", "not_finite")
    assert not (here / "job" / "images").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_card_that_is_not_there(here: Path, capfd: Capture, tiny_model: Path) -> None:
    check_refused(capfd, here, ["txt2img", "cat", "--device", "cuda", "--model", tiny_model], 2, "torch sees no GPU")
    arguments: list[object] = ["submit", "m.csv", "--inline", "--device", "cuda", "--model", tiny_model]
    check_refused(capfd, here, arguments, 2, "torch sees no GPU")


# Job folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a manifest and its job, which is done."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "m.csv").write_text("prompt\ncat\ndog\n")
    draw(folder / "m.csv", folder / "job", tiny_model, seed=5, limit=1)
    return folder


@pytest.fixture
def job(here: Path, finished: Path, tiny_model: Path) -> Path:
    shutil.copytree(finished, here, dirs_exist_ok=True)
    (here / "model").symlink_to(tiny_model)
    content = json.loads((here / "job" / "job.json").read_text())
    content["manifest"]["path"] = str(here / "m.csv")
    (here / "job" / "job.json").write_text(json.dumps(content))
    return here / "job"


def table_of(**columns: object) -> bytes:
    return table(**{name: [value] for name, value in columns.items()})


SUBMIT = "submit m.csv --model model --inline -o job"

JOBS: list[tuple[str, Change, int, str]] = [
    (SUBMIT, put("job.json", b""), 2, "job/job.json: damaged"),
    (SUBMIT, put("job.json", b"{"), 2, "job/job.json: damaged"),
    (SUBMIT, put("job.json", b"[]"), 2, "job/job.json: damaged"),
    (SUBMIT, put("job.json", b"\xff"), 2, "job/job.json: damaged"),
    (SUBMIT, put("job.json", b"[" * 100_000), 2, "job/job.json: damaged"),
    (SUBMIT, set_json("job.json", created_at=None), 2, "job/job.json: damaged: KeyError: 'created_at'"),
    (SUBMIT, set_json("job.json", seed="5"), 2, "job/job.json: damaged"),
    (SUBMIT, set_json("job.json", seed=-5), 2, "job/job.json: damaged"),
    (SUBMIT, set_json("job.json", seed=10**300), 2, "job/job.json: damaged"),
    (SUBMIT, set_json("job.json", settings=3), 2, "job/job.json: damaged"),
    (SUBMIT, set_json("job.json", model="x"), 2, "job/job.json: damaged"),
    (SUBMIT, set_json("job.json", manifest={"path": 3, "fingerprint": "x"}), 2, "job/job.json: damaged"),
    (SUBMIT, set_json("job.json", manifest={"path": "m.csv", "fingerprint": "x"}), 2, "damaged: KeyError: 'rows'"),
    (SUBMIT, set_json("job.json", manifest={"path": "m.csv", "fingerprint": "x", "rows": 99}), 5, "whole rows of 99"),
    (
        SUBMIT,
        set_json("job.json", manifest={"path": "m.txt", "fingerprint": "x", "rows": 2}),
        2,
        "belongs to the manif",
    ),
    (SUBMIT, set_json("job.json", reuse=3), 2, "job/job.json: damaged"),
    (
        SUBMIT,
        set_json("job.json", manifest={"path": "m.csv", "fingerprint": "x", "rows": 2, "columns": [3]}),
        2,
        "job/job.json: damaged: TypeError: columns are no names",
    ),
    (SUBMIT, set_json("job.json", reuse="gone"), 5, "_tinysd/seeds.json.gz: cannot be read"),
    (SUBMIT, pipe("job.json"), 2, "job/job.json: damaged: OSError"),
    (SUBMIT, instead("job.json", Path.mkdir), 2, "job/job.json: damaged"),
    (SUBMIT, drop("job.json"), 2, "holds results but no job.json"),
    (SUBMIT, cut("results.parquet", 50), 5, "job/results.parquet: cannot be read"),
    (SUBMIT, pipe("results.parquet"), 5, "job/results.parquet: cannot be read: [Errno 22] Not a regular file"),
    (SUBMIT, put("results.parquet", table_of(index=1)), 5, "column row is not the int64"),
    (SUBMIT, put("results.parquet", table_of(index="1", row="1", status=1)), 5, "column index is not the int64"),
    (SUBMIT, put("_tinysd/journal/00000009.parquet", b"PAR1"), 5, "journal/00000009.parquet: cannot be read"),
    (SUBMIT, instead("_tinysd/journal/00000009.parquet", Path.mkdir), 5, "00000009.parquet: cannot be read"),
    (SUBMIT, instead("_tinysd/lock", Path.mkdir), 5, "job/_tinysd/lock: Is a directory"),
    (SUBMIT, pipe("_tinysd/lock"), 5, "job/_tinysd/lock: Invalid argument"),
    (SUBMIT, instead("images", Path.touch), 2, "job/images: is a file"),
    (SUBMIT, instead("_tinysd", Path.touch), 2, "job/_tinysd: is a file"),
    (SUBMIT, instead("results", Path.touch), 2, "job/results: is a file"),
    (f"{SUBMIT} --steps 9", lambda _: None, 2, "steps: 2 in the job, 9 now"),
    (f"{SUBMIT} --seed 6", lambda _: None, 2, "seed: 5 in the job, 6 now"),
    (f"{SUBMIT} --format jpg", lambda _: None, 2, "format: png in the job, jpg now"),
    (f"{SUBMIT} --no-metadata", lambda _: None, 2, "no_metadata: False in the job, True now"),
    ("submit m.csv --inline -o job", lambda _: None, 2, "(the weights differ)"),
    ("submit job/m.csv --model model -o job", put("m.csv", b"prompt\nfox\n"), 2, "is now 'fox'"),
    ("plan m.csv --model model -o job", put("results.parquet", b"PAR1"), 5, "job/results.parquet: cannot be read"),
    ("plan m.csv --model model -o job", put("job.json", b"{"), 2, "job/job.json: damaged"),
    ("status job", put("job.json", b"{"), 2, "job/job.json: damaged"),
    ("status job", set_json("job.json", images="many"), 2, "job/job.json: damaged"),
    ("status job", pipe("job.json"), 2, "job/job.json: damaged"),
    ("status job", put("results.parquet", b"PAR1"), 5, "job/results.parquet: cannot be read"),
    ("status job", put("results.parquet", table_of(index=1)), 5, "job/results.parquet: cannot be read"),
    ("status job", pipe("_tinysd/lock"), 5, "job/_tinysd/lock: Not a regular file"),
    ("export job x.csv", put("job.json", b"{"), 2, "job/job.json: damaged"),
    ("export job x.csv", put("results.parquet", b"PAR1"), 5, "job/results.parquet: cannot be read"),
    ("export job x.csv", put("results.parquet", table_of(status="ok")), 5, "job/results.parquet: cannot be read"),
    ("export job x.xlsx", lambda _: None, 2, "x.xlsx: the table is written as .csv, .tsv or .jsonl"),
    ("export job x.parquet", lambda _: None, 2, "x.parquet: the table is written as .csv, .tsv or .jsonl"),
    ("export job folder.csv", instead("../folder.csv", Path.mkdir), 5, "folder.csv: Is a directory"),
    ("export job m.csv/x.csv", lambda _: None, 5, "m.csv/x.csv: File exists"),
    (f"export job {'x' * 300}.csv", lambda _: None, 5, "File name too long"),
    ("export job /proc/x.csv", lambda _: None, 5, "/proc/x.csv"),
]


@pytest.mark.parametrize(("command", "change", "code", "message"), JOBS)
def test_job_folders(job: Path, capfd: Capture, command: str, change: Change, code: int, message: str) -> None:
    change(job)
    check_refused(capfd, job.parent, list(command.split()), code, message)


# Pictures


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.png", None, "none.png: no such file"),
        ("x" * 300, None, "file name too long"),
        ("m.csv", None, "m.csv: no settings are written in it"),
        ("folder.png", Path.mkdir, "folder.png: is a directory"),
        ("pipe.png", os.mkfifo, "pipe.png: not a regular file"),
        ("/dev/zero", None, "/dev/zero: not a regular file"),
        ("empty.png", b"", "empty.png: no settings are written in it"),
        ("plain.png", lambda path: Image.new("RGB", (8, 8)).save(path), "plain.png: no settings are written in it"),
        ("plain.gif", lambda path: Image.new("RGB", (8, 8)).save(path), "plain.gif: no settings are written in it"),
        ("large.png", lambda path: path.open("wb").truncate(2**30), "large.png: over 100,000,000 bytes"),
    ],
)
def test_pictures(here: Path, capfd: Capture, name: str, content: bytes | Change | None, message: str) -> None:
    if isinstance(content, bytes):
        (here / name).write_bytes(content)
    elif content is not None:
        content(here / name)
    before = sorted(here.iterdir())
    code, _, stderr = call(capfd, "status", "--image", name)
    assert (code, len(stderr.splitlines())) == (2, 1), stderr
    assert message in stderr
    assert sorted(here.iterdir()) == before


def test_a_picture_that_is_cut_off(job: Path, capfd: Capture) -> None:
    (picture,) = job.rglob("seed_*.png")
    assert call(capfd, "status", "--image", picture)[0] == 0
    os.truncate(picture, picture.stat().st_size * 2 // 3)
    check_refused(capfd, job, ["status", "--image", picture], 2, "no settings are written in it")
