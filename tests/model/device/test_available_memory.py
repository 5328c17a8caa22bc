"""Memory is told as a process in a container may take it."""

from pathlib import Path

import pytest
import torch

from tinysd_batch.model.device.available_memory import (
    CGROUP_V1_FILES,
    CGROUP_V2_FILES,
    get_available_memory_bytes,
    iter_cgroup_headroom_bytes,
)

HOST_1 = "5:cpu,cpuacct:/job\n4:memory:/job/step\n0::/job\n"
HOST_2 = "0::/job/step\n"


def group(folder: Path, names: tuple[str, str, str], limit: object, used: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(names, (limit, used, f"anon 7\n{names[2]} {files}"), strict=True):
        (folder / ("memory.stat" if name == names[2] else name)).write_text(f"{content}\n")


@pytest.mark.parametrize(("own", "root", "names"), [(HOST_1, "memory", CGROUP_V1_FILES), (HOST_2, "", CGROUP_V2_FILES)])
def test_the_tightest_group_tells_with_files_that_can_be_dropped(
    own: str, root: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own)
    mounted = tmp_path / "groups"
    group(mounted / root / "job", names, 9_000, 8_500, 4_000)
    group(mounted / root / "job" / "step", names, 6_000, 3_000, 500)
    assert sorted(iter_cgroup_headroom_bytes(tmp_path / "own", mounted)) == [3_500, 4_500]


@pytest.mark.parametrize(("own", "root", "names"), [(HOST_1, "memory", CGROUP_V1_FILES), (HOST_2, "", CGROUP_V2_FILES)])
def test_a_container_that_sees_its_group_as_the_root(
    own: str, root: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own)
    group(tmp_path / "groups" / root, names, 6_000, 3_000, 500)
    assert list(iter_cgroup_headroom_bytes(tmp_path / "own", tmp_path / "groups")) == [3_500]


def test_no_limit_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "own").write_text(HOST_2)
    group(tmp_path / "groups" / "job", CGROUP_V2_FILES, "max", 3_000, 500)
    assert not list(iter_cgroup_headroom_bytes(tmp_path / "own", tmp_path / "groups"))
    assert not list(iter_cgroup_headroom_bytes(tmp_path / "nothing", tmp_path / "groups"))


def test_this_machine_says_what_memory_it_has() -> None:
    found = get_available_memory_bytes(torch.device("cpu"))
    assert found is not None
    assert 10**7 < found < 10**14
