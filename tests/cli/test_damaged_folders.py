"""Damaged models, job folders and images are reported in one line, and nothing in them is changed."""

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.files import Change, instead, parquet_bytes, put, remove, set_json
from tests.support.jobs import draw
from tests.support.program import Capture, call, check_refused
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE

pytestmark = pytest.mark.timeout(60)


# Models


def set_tensors(part: str, **tensors: torch.Tensor | None) -> Change:
    """Change tensors of a component; None removes one. Two underscores stand for a dot."""

    def change(model: Path) -> None:
        changed = load_file(model / part / WEIGHTS_FILE) | {
            name.replace("__", "."): value for name, value in tensors.items()
        }
        save_file({name: value for name, value in changed.items() if value is not None}, model / part / WEIGHTS_FILE)

    return change


def cut(file: str, size: int) -> Change:
    return lambda model: os.truncate(model / file, size)


def drop(file: str) -> Change:
    return lambda model: remove(model / file)


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
    (drop(f"unet/{WEIGHTS_FILE}"), f"unet/{WEIGHTS_FILE}: missing; the model folder is not complete"),
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
    (set_json(TOKENIZER, **{"cat</w>": 10**6}), "token 'cat</w>' is number 1000000, the text encoder has only"),
    (pipe(UNET), "unet/config.json: cannot be read: not a regular file"),
    (pipe(f"vae/{WEIGHTS_FILE}"), "not a readable safetensors file"),
    (set_json(UNET, block_out_channels=None), "block_out_channels = 'None': a list of 1 to 8 was expected"),
    (set_json(UNET, block_out_channels=[32] * 99), "a list of 1 to 8 was expected"),
    (set_json(UNET, sample_size=[8, 8]), "sample_size = '[8, 8]': a number was expected"),
    (set_json(UNET, sample_size=-8), "sample_size = '-8': must be between 1"),
    (
        set_json(UNET, in_channels=10**9),
        "in_channels = 1000000000: not supported; a whole number from 1 to 1,024 was expected",
    ),
    (set_json(UNET, block_out_channels=[10**9, 10**9]), "unet/config.json: no model can be built from it"),
    (set_json(UNET, block_out_channels=[10**30, 10**30]), "unet/config.json: no model can be built from it"),
    (set_json(UNET, layers_per_block=10**9), "layers_per_block = 1000000000: at most 100 were expected"),
    (set_json(UNET, transformer_layers_per_block=[1, 10**9]), "at most 100 were expected"),
    (
        set_json(UNET, down_block_types=["os.system"] * 2),
        'down_block_types = ["os.system", "os.system"]',
    ),
    (set_json(UNET, norm_num_groups=7), "unet/config.json: no model can be built from it"),
    (set_json(UNET, quantization_config="none"), 'quantization_config = "none": an object was expected'),
    (set_json(UNET, quantization_config={"quant_method": "gptq"}), "quantized by 'gptq'"),
    (set_json(TEXT, num_hidden_layers=10**9), "num_hidden_layers = 1000000000: at most 100 were expected"),
    (set_json(TEXT, hidden_size="wide"), "text_encoder/config.json: no model can be built from it"),
    (set_json(TEXT, max_position_embeddings=0), "max_position_embeddings = '0': must be between 3"),
    (set_json(VAE, block_out_channels=3), "block_out_channels = '3': a list of 1 to 8 was expected"),
    (set_json(VAE, latent_channels="four"), "vae/config.json: no model can be built from it"),
    (
        set_json(SCHEDULER, prediction_type="v_prediction"),
        "a model that predicts v: prediction_type is",
    ),
    (set_json(SCHEDULER, beta_start="x"), 'beta_start = "x": a number between 0 and 1 was expected'),
    (
        set_json(SCHEDULER, beta_schedule="sigmoid"),
        'beta_schedule = "sigmoid": not supported; SD v1',
    ),
    (set_json("tinysd.json", steps=-1), "tinysd.json: steps = '-1': must be between 1 and 1000"),
    (set_json("tinysd.json", scale="x"), "tinysd.json: scale = 'x': a number was expected"),
    (put("tinysd.json", b'{"scale": NaN}'), "tinysd.json: scale = 'nan': a number was expected"),
    (cut(f"unet/{WEIGHTS_FILE}", 1000), "not a readable safetensors file"),
    (cut(f"vae/{WEIGHTS_FILE}", 0), "not a readable safetensors file"),
    (put(f"unet/{WEIGHTS_FILE}", (2**63).to_bytes(8, "little") + b"{}"), "not a readable safetensors file"),
    (put(f"unet/{WEIGHTS_FILE}", b"\x80\x04c__builtin__\nprint\n"), "not a readable safetensors file"),
    (set_tensors("unet", conv_in__bias=None), "1 tensors are missing, the first is conv_in.bias"),
    (set_tensors("unet", conv_in__bias=torch.zeros(5)), "conv_in.bias has shape [5], [32] was expected"),
    (set_tensors("unet", stray=torch.zeros(1)), "1 unexpected tensors, the first is stray"),
]


@pytest.mark.parametrize("command", ["submit m.csv --inline -o new/job", "txt2img cat -o images"])
@pytest.mark.parametrize(("change", "message"), MODELS)
def test_models(here: Path, capfd: Capture, tiny_model: Path, change: Change, message: str, command: str) -> None:
    """No job folder is left behind: it would refuse to work with another model."""
    shutil.copytree(tiny_model, here / "model")
    change(here / "model")
    check_refused(capfd, here, [*command.split(), "--model", "model"], 2, message)


def test_images_from_nan_weights_fail(here: Path, capfd: Capture, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, here / "model")
    set_tensors("unet", conv_out__bias=torch.full((4,), float("nan")))(here / "model")
    code, _, _ = call(capfd, "submit", "m.csv", "--inline", "--model", "model", "-o", "job")
    assert code == 3
    (row,) = pq.read_table(here / "job" / "results.parquet").to_pylist()
    assert (row["status"], row["error_class"]) == ("failed", "not_finite")
    assert not (here / "job" / "images").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(here: Path, capfd: Capture, tiny_model: Path) -> None:
    check_refused(capfd, here, ["txt2img", "cat", "--device", "cuda", "--model", tiny_model], 2, "torch sees no GPU")
    arguments: list[object] = ["submit", "m.csv", "--inline", "--device", "cuda", "--model", tiny_model]
    check_refused(capfd, here, arguments, 2, "torch sees no GPU")


# Job folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a manifest and its finished job."""
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
    return parquet_bytes(**{name: [value] for name, value in columns.items()})


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
        'job/job.json: damaged: TypeError: "columns" must be a list of strings',
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
    (SUBMIT, pipe("_tinysd/lock"), 5, "job/_tinysd/lock: Not a regular file"),
    (SUBMIT, instead("images", Path.touch), 2, "job/images: is a file"),
    (SUBMIT, instead("_tinysd", Path.touch), 2, "job/_tinysd: is a file"),
    (SUBMIT, instead("results", Path.touch), 2, "job/results: is a file"),
    (f"{SUBMIT} --steps 9", lambda _: None, 2, "steps: 2 in the job, 9 now"),
    (f"{SUBMIT} --seed 6", lambda _: None, 2, "seed: 5 in the job, 6 now"),
    (f"{SUBMIT} --format jpg", lambda _: None, 2, "format: png in the job, jpg now"),
    (f"{SUBMIT} --no-metadata", lambda _: None, 2, "no_metadata: False in the job, True now"),
    ("submit m.csv --inline -o job --model embedded", lambda _: None, 2, "(the weights differ)"),
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
    ("export job x.xlsx", lambda _: None, 2, "x.xlsx: unknown suffix; use .csv, .tsv or .jsonl"),
    ("export job x.parquet", lambda _: None, 2, "x.parquet: unknown suffix; use .csv, .tsv or .jsonl"),
    ("export job folder.csv", instead("../folder.csv", Path.mkdir), 5, "folder.csv: Is a directory"),
    ("export job m.csv/x.csv", lambda _: None, 5, "m.csv/x.csv: File exists"),
    (f"export job {'x' * 300}.csv", lambda _: None, 5, "File name too long"),
    ("export job /proc/x.csv", lambda _: None, 5, "/proc/x.csv"),
]


@pytest.mark.parametrize(("command", "change", "code", "message"), JOBS)
def test_job_folders(job: Path, capfd: Capture, command: str, change: Change, code: int, message: str) -> None:
    change(job)
    check_refused(capfd, job.parent, list(command.split()), code, message)


# Images


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.png", None, "none.png: no such file"),
        ("x" * 300, None, "file name too long"),
        ("m.csv", None, "m.csv: has no stored settings"),
        ("folder.png", Path.mkdir, "folder.png: is a directory"),
        ("pipe.png", os.mkfifo, "pipe.png: not a regular file"),
        ("/dev/zero", None, "/dev/zero: not a regular file"),
        ("empty.png", b"", "empty.png: has no stored settings"),
        ("plain.png", lambda path: Image.new("RGB", (8, 8)).save(path), "plain.png: has no stored settings"),
        ("plain.gif", lambda path: Image.new("RGB", (8, 8)).save(path), "plain.gif: has no stored settings"),
        ("large.png", lambda path: path.open("wb").truncate(2**30), "large.png: over 100,000,000 bytes"),
    ],
)
def test_images(here: Path, capfd: Capture, name: str, content: bytes | Change | None, message: str) -> None:
    if isinstance(content, bytes):
        (here / name).write_bytes(content)
    elif content is not None:
        content(here / name)
    before = sorted(here.iterdir())
    code, _, stderr = call(capfd, "status", "--image", name)
    assert (code, len(stderr.splitlines())) == (2, 1), stderr
    assert message in stderr
    assert sorted(here.iterdir()) == before


def test_a_truncated_image(job: Path, capfd: Capture) -> None:
    (image,) = job.rglob("seed_*.png")
    assert call(capfd, "status", "--image", image)[0] == 0
    os.truncate(image, image.stat().st_size * 2 // 3)
    check_refused(capfd, job, ["status", "--image", image], 2, "has no stored settings")
