"""File systems that lack locks, folder sync or hard links, simulated by a library preloaded into real processes."""

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.files import names_below
from tests.support.jobs import check_whole, draw
from tests.support.paths import ROOT
from tests.support.program import run
from tinysd_batch.errors import StorageError
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.storage.atomic import TEMPORARY_PREFIX, create_folder_atomically, publish, write_atomically
from tinysd_batch.storage.filesystem import NO_FOLDER_SYNC_ERRNOS, NO_LINKS_ERRNOS, NO_LOCKS_ERRNOS
from tinysd_batch.storage.lock import hold_lock

SOURCE = ROOT / "tests" / "support" / "fault_shim.c"
FAST_OPTIONS = ("--inline", "--sampler", "ddim", "--steps", 1, "--scale", 1, "--skip_grid", "--seed", 5)
Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc, clang) to build tests/support/fault_shim.c with")
    library = tmp_path_factory.mktemp("shim") / "fault_shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


@pytest.fixture
def submit(tmp_path: Path, shim: Path, tiny_model: Path) -> Submit:
    (tmp_path / "m.csv").write_text("prompt\napple\npear\n")

    def submit_with_faults(faults: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return run(
            "submit", "m.csv", "--model", tiny_model, *FAST_OPTIONS, *arguments, cwd=tmp_path, LD_PRELOAD=str(shim),
            FAULTS=faults,
        )  # fmt: skip

    return submit_with_faults


def check_no_locks(submit: Submit, faults: str, folder: Path) -> None:
    done = submit(faults, "-o", "a/b/job")
    assert done.returncode == 5
    assert done.stderr == (
        "tinysd-batch: a/b/job/_tinysd: this file system has no locks (Lustre: mount with -o flock; NFS: start lockd); "
        "choose a folder on another one\n"
    )
    assert names_below(folder) == ["m.csv"]


def test_a_job_without_locks_is_refused_and_leaves_no_files(submit: Submit, tmp_path: Path) -> None:
    check_no_locks(submit, f"flock={errno.ENOSYS}", tmp_path)


def test_a_job_without_hard_links_and_folder_sync_is_completed(submit: Submit, tmp_path: Path) -> None:
    faults = f"link={errno.EXDEV},fsync_folder={errno.EINVAL},rename={errno.EXDEV}@images"
    done = submit(faults, "-o", "job")
    assert (done.returncode, done.stderr) == (0, "")
    check_whole(tmp_path / "job", 2)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["flock", "flock_folder"])
@pytest.mark.parametrize("error_number", sorted(NO_LOCKS_ERRNOS))
def test_every_errno_that_means_no_locks(submit: Submit, tmp_path: Path, call: str, error_number: int) -> None:
    check_no_locks(submit, f"{call}={error_number}", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("faults", [
    f"link={errno.EMLINK}", f"link={errno.EPERM}", f"fsync_folder={errno.EOPNOTSUPP}", f"fsync_folder={errno.EBADF}",
])  # fmt: skip
def test_jobs_are_reused_without_links_or_folder_sync(submit: Submit, tmp_path: Path, faults: str) -> None:
    assert submit(faults, "-o", "job").returncode == 0
    check_whole(tmp_path / "job", 2)
    assert submit(faults, "-o", "new", "--reuse", "job").returncode == 0
    rows = check_whole(tmp_path / "new", 2)
    assert [row["reused"] for row in rows] == [str(tmp_path / "job")] * 2


@pytest.mark.slow
def test_a_file_that_cannot_be_synced_is_an_error(submit: Submit, tmp_path: Path) -> None:
    done = submit(f"fsync={errno.EINVAL}", "-o", "job")
    assert done.returncode == 5
    assert "Invalid argument" in done.stderr
    assert submit("", "-o", "job").returncode == 0
    check_whole(tmp_path / "job", 2)


@pytest.mark.slow
def test_images_are_recorded_only_after_their_folder_was_synced(submit: Submit, tmp_path: Path) -> None:
    """EIO may be transient, so each write is retried for some seconds. The second attempt must not count as synced."""
    faults = f"fsync_folder={errno.EIO}@images"
    for _ in range(2):
        assert submit(faults, "-o", "job").returncode == 5
        assert list(ResultsTable(tmp_path / "job").read_rows(["status"])) == []
    assert submit("", "-o", "job").returncode == 0
    check_whole(tmp_path / "job", 2)


@pytest.mark.slow
def test_ray_workers_without_hard_links_and_folder_sync(shim: Path, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "m.csv").write_text("prompt\napple\npear\n")
    faults = f"link={errno.EMLINK},fsync_folder={errno.ENOTSUP}"
    options = FAST_OPTIONS[1:]  # without --inline
    done = run(
        "submit", "m.csv", "--model", tiny_model, *options, "--workers", 1, "-o", "job", cwd=tmp_path,
        LD_PRELOAD=str(shim), FAULTS=faults,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_whole(tmp_path / "job", 2)


# Tests that need no separate process


def fail_with(monkeypatch: pytest.MonkeyPatch, module: object, name: str, error_number: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(error_number, os.strerror(error_number))

    monkeypatch.setattr(module, name, fail)


def test_an_image_file_without_a_row_is_synced_before_its_row_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    """The worker that wrote it may have died before it synced the folder."""
    manifest, job = tmp_path / "m.csv", tmp_path / "job"
    manifest.write_text("prompt\napple\npear\n")
    draw(manifest, job, tiny_model)
    (job / "results.parquet").unlink()
    with monkeypatch.context() as patch:
        original = os.fsync

        def fail_for_image_folder(handle: int) -> None:
            if Path(f"/proc/self/fd/{handle}").readlink() == job / "images" / "00000":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(handle)

        patch.setattr(os, "fsync", fail_for_image_folder)
        for _ in range(2):
            with pytest.raises(StorageError, match=r"images/00000/.*: No space left on device"):
                draw(manifest, job, tiny_model)
            assert list(ResultsTable(job).read_rows(["row", "status"])) == []
    draw(manifest, job, tiny_model)
    check_whole(job, 2)


@pytest.mark.parametrize("error_number", sorted(NO_LOCKS_ERRNOS))
def test_a_failed_lock_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_number: int
) -> None:  # fmt: skip
    fail_with(monkeypatch, fcntl, "flock", error_number)
    with pytest.raises(StorageError, match=r"a/job/_tinysd: this file system has no locks"):
        hold_lock(tmp_path / "a" / "job" / "_tinysd" / "lock").__enter__()
    assert names_below(tmp_path) == []


def test_a_failed_lock_leaves_an_existing_job_folder_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "job" / "_tinysd" / "lock"
    with hold_lock(path):
        pass
    before = path.read_bytes()
    fail_with(monkeypatch, fcntl, "flock", errno.ENOLCK)
    with pytest.raises(StorageError, match="no locks"):
        hold_lock(path).__enter__()
    assert path.read_bytes() == before


def test_a_folder_is_created_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock only keeps other processes from removing the folder, which they cannot do without locks, either."""
    (tmp_path / f"{TEMPORARY_PREFIX}model-0").mkdir()
    fail_with(monkeypatch, fcntl, "flock", errno.ENOSYS)
    with create_folder_atomically(tmp_path / "model") as folder:
        (folder / "x").touch()
    assert names_below(tmp_path) == [f"{TEMPORARY_PREFIX}model-0", "model", "model/x"]


def test_any_other_lock_error_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, fcntl, "flock", errno.EIO)
    with pytest.raises(StorageError, match="_tinysd: Input/output error"):
        hold_lock(tmp_path / "_tinysd" / "lock").__enter__()


@pytest.mark.parametrize("error_number", sorted(NO_LINKS_ERRNOS))
@pytest.mark.parametrize("existing", [None, b"same", b"other"])
def test_publish_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_number: int, existing: bytes | None
) -> None:
    fail_with(monkeypatch, os, "link", error_number)
    path = tmp_path / "x"
    if existing is not None:
        path.write_bytes(existing)
    content = publish(b"new", path, tmp_path / "tmp", lambda data: data == b"same")
    assert content == path.read_bytes() == (b"same" if existing == b"same" else b"new")
    assert names_below(tmp_path) == ["tmp", "x"]


@pytest.mark.parametrize("error_number", sorted(NO_FOLDER_SYNC_ERRNOS))
def test_unsupported_folder_sync_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_number: int) -> None:
    original = os.fsync

    def sync_files_only(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(error_number, os.strerror(error_number))
        original(handle)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    write_atomically(b"data", tmp_path / "x")
    publish(b"data", tmp_path / "images" / "x", tmp_path / "tmp", lambda _: False)
    with create_folder_atomically(tmp_path / "model") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").touch()
    assert names_below(tmp_path) == ["images", "images/x", "model", "model/sub", "model/sub/x", "tmp", "x"]


def test_an_existing_file_is_synced_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"same")
    synced: list[str] = []
    original = os.fsync

    def record_sync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        original(handle)

    monkeypatch.setattr(os, "fsync", record_sync)
    assert publish(b"late", tmp_path / "x", tmp_path / "tmp", lambda data: data == b"same") == b"same"
    assert synced[-2:] == ["x", tmp_path.name]
