"""A forked command behaves as a fresh process does: output, exit code, streams, signals, folder, session."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.fork_server import ForkedProcess, is_forkable
from tests.support.program import command, environment, run, start


@pytest.mark.parametrize("arguments", ["--version", "plan nothing.csv", "draw", "submit m.csv --address nowhere:1"])
def test_forked_and_fresh_commands_have_the_same_output(here: Path, arguments: str) -> None:
    forked, fresh = (run(*arguments.split(), cwd=here, fresh=fresh) for fresh in (False, True))
    assert (forked.returncode, forked.stdout, forked.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)


def test_forked_process_is_a_child_with_its_own_streams_folder_and_session(here: Path, tiny_model: Path) -> None:
    (here / "m.csv").write_text("prompt,n_iter\ncat,100000\n")
    with start(
        "submit", "m.csv", "--model", tiny_model, "--inline", cwd=here, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        assert isinstance(process, ForkedProcess)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"Model: random 16")
        proc = Path(f"/proc/{process.pid}")
        assert (proc / "cwd").resolve() == here
        assert (proc / "fd" / "0").resolve() == Path("/dev/null")
        assert os.getsid(process.pid) == process.pid
        process.send_signal(signal.SIGSTOP)
        stopped = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert stopped is not None
        assert stopped.si_status == signal.SIGSTOP
        assert process.poll() is None
        process.send_signal(signal.SIGCONT)
        process.kill()
        assert process.wait() == -signal.SIGKILL


def test_variables_read_at_import_need_a_fresh_process() -> None:
    assert is_forkable(environment(COLUMNS="40"))
    assert not is_forkable(environment(OMP_NUM_THREADS="3"))
    assert not is_forkable(environment(PYTHONIOENCODING="ascii"))
    with start("--version", env=environment(LC_ALL="C.UTF-8"), stdout=subprocess.PIPE) as process:
        assert not isinstance(process, ForkedProcess)


def test_only_the_program_can_be_forked() -> None:
    with pytest.raises(ValueError, match="can be forked"):
        ForkedProcess(["true"])
    with pytest.raises(ValueError, match="preexec_fn"):
        ForkedProcess(command("--version"), preexec_fn=os.getpid)
