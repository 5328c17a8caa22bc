"""Real Ray with logical GPUs: placement, one call at a time, and the user's CUDA_VISIBLE_DEVICES."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.files import write_csv
from tests.support.program import environment, run
from tinysd_batch.job.ray_workers.cluster import summarize_ray_error

pytestmark = pytest.mark.timeout(200)

PLACEMENT = """
    import platform
    import sys
    from pathlib import Path
    from tinysd_batch.job.workers.pool import WorkerReady
    from tinysd_batch.job.ray_workers.pool import RayPool
    from tinysd_batch.job.workers.worker import WorkerSetup
    from tinysd_batch.job.state.open_job import resolve_settings
    from tinysd_batch.model.checkpoint.info import read_model_info

    if __name__ == "__main__":
        info = read_model_info(sys.argv[1])
        settings = resolve_settings({}, info)
        folder = Path(sys.argv[2])
        setup = WorkerSetup.from_settings(settings, info, job_folder=folder, scratch=folder)
        with RayPool(setup, None, 1, ray_init={"num_gpus": 3}) as pool:
            devices = {}
            while len(devices) < 3:
                for event in pool.wait_for_events(1.0):
                    assert isinstance(event, WorkerReady), event
                    devices[event.worker] = event.description["cuda_visible_devices"]
            names = [f"{platform.node()}/cuda-{number}" for number in range(3)]
            assert sorted(pool.idle_workers()) == names
            pool.submit(names[1], [])
            assert sorted(pool.idle_workers()) == names[::2]
            print("DEVICES", sorted(devices.values()))
"""


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize(("visible", "expected"), [(None, "['0', '1', '2']"), ("5,6,7", "['5', '6', '7']")])
def test_three_gpus_get_an_actor_each(tmp_path: Path, tiny_model: Path, visible: str | None, expected: str) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(PLACEMENT))
    env = environment(**({"CUDA_VISIBLE_DEVICES": visible} if visible else {}))
    if visible is None:
        env.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tiny_model, tmp_path / "job"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"DEVICES {expected}" in done.stdout


def test_if_ray_cannot_start_the_message_names_inline(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    (tmp_path / "file").touch()
    done = run("submit", "m.csv", "--model", tiny_model, cwd=tmp_path, RAY_TMPDIR=str(tmp_path / "file"))
    assert done.returncode == 6
    assert "Ray could not start" in done.stderr
    assert "--inline" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.alone
@pytest.mark.slow
def test_ray_may_be_imported_before(tmp_path: Path) -> None:
    """Ray reads its authentication mode on import, and a caller of ours may have imported it."""
    script = (
        "import ray; from tinysd_batch.job.ray_workers.cluster import start_ray; "
        "start_ray({'num_cpus': 1}).stop(); print('END')"
    )
    env = {name: value for name, value in environment().items() if name != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "END" in done.stdout, done.stderr


def test_without_a_gpu_device_cuda_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat"}])
    done = run(
        "submit", "m.csv", "--model", tiny_model, "--device", "cuda", "--inline", cwd=tmp_path, CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 2
    assert "torch sees no GPU here" in done.stderr


def test_a_ray_error_is_summarized_in_one_line() -> None:
    error = RuntimeError(
        'The actor died\n\tclass_name: Worker\nTraceback:\n  File "x.py", line 3\nValueError: the real cause\n'
    )
    assert summarize_ray_error(error) == "ValueError: the real cause"
    error = RuntimeError(
        "The actor died unexpectedly before finishing this task.\n\tpid: 3\n\tip: 192.0.2.2\n"
        "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. "
        "End of file. Some common causes include: (1) the process was killed by the OOM killer\n\tip: 192.0.2.2"
    )
    assert summarize_ray_error(error) == (
        "its process died: Worker unexpectedly exits with a connection error code 2. End of file"
    )
