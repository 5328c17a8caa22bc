"""Available memory, as a process in a container sees it."""

from pathlib import Path

import pytest
import torch

from tinysd_batch.model.device.available_memory import (
    CGROUP_V1_FILES,
    CGROUP_V2_FILES,
    get_available_memory_bytes,
    iter_cgroup_headroom_bytes,
)

CGROUP_V1_HOST = "5:cpu,cpuacct:/job\n4:memory:/job/step\n0::/job\n"
CGROUP_V2_HOST = "0::/job/step\n"
VERSIONS = [(CGROUP_V1_HOST, "memory", CGROUP_V1_FILES), (CGROUP_V2_HOST, "", CGROUP_V2_FILES)]


def write_cgroup(folder: Path, names: tuple[str, str, str], limit: object, used_bytes: int, file_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(names, (limit, used_bytes, f"anon 7\n{names[2]} {file_bytes}"), strict=True):
        (folder / ("memory.stat" if name == names[2] else name)).write_text(f"{content}\n")


@pytest.mark.parametrize(("own", "root", "names"), VERSIONS)
def test_every_limited_group_counts_and_file_pages_are_free(
    own: str, root: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own)
    cgroups = tmp_path / "groups"
    write_cgroup(cgroups / root / "job", names, 9_000, 8_500, 4_000)
    write_cgroup(cgroups / root / "job" / "step", names, 6_000, 3_000, 500)
    assert sorted(iter_cgroup_headroom_bytes(tmp_path / "own", cgroups)) == [3_500, 4_500]


@pytest.mark.parametrize(("own", "root", "names"), VERSIONS)
def test_container_that_sees_its_group_as_the_root(
    own: str, root: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own)
    write_cgroup(tmp_path / "groups" / root, names, 6_000, 3_000, 500)
    assert list(iter_cgroup_headroom_bytes(tmp_path / "own", tmp_path / "groups")) == [3_500]


def test_group_without_a_limit_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "own").write_text(CGROUP_V2_HOST)
    write_cgroup(tmp_path / "groups" / "job", CGROUP_V2_FILES, "max", 3_000, 500)
    assert not list(iter_cgroup_headroom_bytes(tmp_path / "own", tmp_path / "groups"))
    assert not list(iter_cgroup_headroom_bytes(tmp_path / "nothing", tmp_path / "groups"))


def test_this_machine_has_available_memory() -> None:
    available = get_available_memory_bytes(torch.device("cpu"))
    assert available is not None
    assert 10**7 < available < 10**14
