"""The commands as users run them: real processes, exit codes, messages."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.support.files import write_csv
from tests.support.jobs import check_whole, read_results
from tests.support.program import Capture, call, check_refused, command, environment, run, run_here
from tinysd_batch.cli import app

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = dict(GROUP.commands)
HEAVY = ("torch", "ray", "diffusers", "transformers", "pyarrow", "PIL", "numpy")


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"], ["--version"]])
def test_help_imports_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys, tinysd_batch.cli as cli\n"
        f"sys.argv = ['tinysd-batch', *{arguments!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    ).stdout
    assert "HEAVY: []" in out


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, tinysd_batch; assert not {'torch', 'ray', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_plan_accepts_the_options_of_submit() -> None:
    """plan has its own `--json`, and a `--verbose` of the same name."""
    options = {
        name: {parameter.name: (*parameter.opts, *parameter.secondary_opts) for parameter in COMMANDS[name].params}
        for name in ("submit", "plan")
    }
    assert options["plan"].pop("as_json") == ("--json",)
    assert options["plan"] == options["submit"]


@pytest.mark.parametrize("name", ["", *(str(command.name) for command in COMMANDS.values())])
def test_short_help_option(name: str, capsys: Capture) -> None:
    code, out, _ = call(capsys, *name.split(), "-h")
    assert code == 0
    assert out.startswith("Usage: ")
    assert "[]" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["txt2img"], "tinysd-batch txt2img red apple"),
        (["txt2img", "--prompt", " "], "tinysd-batch txt2img red apple"),
        (["submit", "red apple"], "type: tinysd-batch txt2img 'red apple'"),
        (["submit", "red", "apple,", "-n", "4"], "No such option: -n"),
        (["submit", "red", "apple", "--steps", "4"], "type: tinysd-batch txt2img 'red apple'"),
        (["submit", "m.csv", "other.csv"], "other.csv: a job has one manifest, m.csv"),
        (["plan", "red", "apple"], "type: tinysd-batch txt2img 'red apple'"),
        (["submit", "apple"], "type: tinysd-batch txt2img apple"),
        (["plan", "red apple, 4k. v1.5"], "type: tinysd-batch txt2img 'red apple, 4k. v1.5'"),
        (["submit", "apple " * 60], "type: tinysd-batch txt2img red apple"),
        (["submit"], "name a manifest"),
    ],
)
def test_misunderstood_command_line_gets_a_hint(
    arguments: list[str], message: str, here: Path, capsys: Capture
) -> None:
    check_refused(capsys, here, list(arguments), 2, message)


def test_shell_completion(tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'tinysd-batch'; from tinysd_batch.cli import main; main()"

    def run_program(*words: str, **env: str) -> str:
        arguments = [sys.executable, "-c", code, *words]
        return subprocess.run(
            arguments, capture_output=True, text=True, env=environment(HOME=str(tmp_path), **env), check=True
        ).stdout

    run_program("--install-completion", "bash")
    script = (tmp_path / ".bash_completions" / "tinysd-batch.sh").read_text()
    assert "_TINYSD_BATCH_COMPLETE=complete_bash" in script
    completions = run_program(
        COMP_WORDS="tinysd-batch submit --num", COMP_CWORD="2", _TINYSD_BATCH_COMPLETE="complete_bash"
    )
    assert completions.split() == ["--num-inference-steps"]


@pytest.mark.slow
def test_tinysd_attribute_imports_torch() -> None:
    code = "import sys, tinysd_batch; tinysd_batch.TinySD; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


@pytest.mark.alone
@pytest.mark.slow
def test_submit_with_ray_then_status_then_again(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "red apple", "n_samples": 2}, {"prompt": "cat", "n_samples": 1}])
    first = run("submit", "m.csv", "--model", tiny_model, "--verbose", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Model: random 16, native size 16x16")
    assert "outputs/m/images" in first.stdout
    check_whole(tmp_path / "outputs" / "m", 3)
    for row in read_results(tmp_path / "outputs" / "m"):
        assert f"{row['file_name']}  seed {row['seed']}" in first.stdout
    status = run("status", "outputs/m", cwd=tmp_path)
    assert status.returncode == 0
    assert "finished" in status.stdout
    assert "ok  3" in status.stdout
    again = run("submit", "m.csv", "--model", tiny_model, cwd=tmp_path)
    assert again.returncode == 0
    assert "3 of 3 images are already generated" in again.stdout


def test_invalid_rows_end_in_exit_code_3_and_are_listed(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "red apple", "seed": 1}, {"prompt": "cat", "seed": "x"}])
    done = run("submit", "m.csv", "--model", tiny_model, "--inline", "-o", "job", cwd=tmp_path)
    assert done.returncode == 3
    assert "row 2 (line 3): column seed = 'x': a whole number was expected" in done.stdout
    check_whole(tmp_path / "job", 1)
    again = run("submit", "m.csv", "--model", tiny_model, "--inline", "-o", "job", cwd=tmp_path)
    assert again.returncode == 3
    assert "row 2 (line 3): invalid: column seed" in run("status", "job", cwd=tmp_path).stdout


def test_folder_that_cannot_be_written(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    done = run("submit", "m.csv", "--model", tiny_model, "--inline", "-o", "/proc/job", cwd=tmp_path)
    assert done.returncode == 5
    assert "/proc/job" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_txt2img_continues_file_numbers(tmp_path: Path, tiny_model: Path) -> None:
    first = run_here(
        "txt2img",
        "red",
        "apple",
        "--model",
        tiny_model,
        "--seed",
        "27",
        "--n_samples",
        "2",
        "-o",
        "images",
        cwd=tmp_path,
    )
    assert first.returncode == 0, first.stderr
    second = run_here(
        "txt2img", "--prompt", "red apple", "--model", tiny_model, "--seed", "27", "-o", "images", cwd=tmp_path
    )
    assert second.returncode == 0
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["grid_00001.png", "seed_27_00001.png", "seed_27_00003.png", "seed_28_00002.png"]
    assert "images/seed_27_00003.png  seed 27" in second.stdout


def test_flags_override_the_job_file_which_overrides_presets(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "preset.toml").write_text(f'model = "{tiny_model}"\nsteps = 3\nscale = 3.0\ninline = true\n')
    (tmp_path / "mine.toml").write_text('manifest = "m.csv"\npreset = ["preset.toml"]\nsteps = 4\nsampler = "ddim"\n')
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    done = run("submit", "mine.toml", "--sampler", "euler", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 steps of euler, scale 3" in done.stdout
    (row,) = read_results(tmp_path / "outputs" / "mine")
    assert (row["steps"], row["sampler"], row["scale"]) == (4, "euler", 3.0)


def test_warning_before_many_images_by_the_embedded_model(tmp_path: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "n_iter": 101}])
    process = subprocess.Popen(
        command("submit", "m.csv", "--inline"),
        cwd=tmp_path,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    process.kill()
    process.wait()
    process.stdout.close()
    assert lines[0].startswith("Model: ")
    assert "101 images will be generated by the small model" in lines[2]
