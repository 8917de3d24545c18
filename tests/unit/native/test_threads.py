"""How many threads compute by default, on machines that are made up as Linux would show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from kvlocal.native import threads
from kvlocal.native.threads import Cores, cpu_quota, parse_list, performance_processors, physical_cores, usable_cores


def write(folder: Path, files: Mapping[str, object]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    return folder


def processors(folder: Path, cores: Sequence[str], file: str = "core_cpus_list", **kinds: Sequence[int]) -> Path:
    """``cores``: the processors of each core, as Linux lists them; ``kinds``: a number per core, by file."""
    for i, siblings in enumerate(cores):
        for cpu in parse_list(siblings):
            home = folder / f"devices/system/cpu/cpu{cpu}"
            write(home / "topology", {file: siblings})
            for name, numbers in kinds.items():
                write(home, {name.replace("__", "/"): numbers[i]})
    return folder


def test_lists_of_processors() -> None:
    assert parse_list("0-3,8, 10-11") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_list("5") == {5}
    for text in ("", "none", "0-", "0-x"):
        assert parse_list(text) <= {0}


@pytest.mark.parametrize("file", ["core_cpus_list", "thread_siblings_list"])
def test_hyperthreads_are_one_core(tmp_path: Path, file: str) -> None:
    sys = processors(tmp_path, ["0,4", "1,5", "2,6", "3,7"], file)
    assert physical_cores(range(8), sys) == 4
    assert physical_cores([0, 4], sys) == 1
    assert physical_cores([4, 5, 2], sys) == 3


def test_without_a_topology_the_cores_are_unknown(tmp_path: Path) -> None:
    assert physical_cores(range(4), tmp_path) is None
    assert physical_cores([], tmp_path) is None


def test_efficiency_cores_of_intel(tmp_path: Path) -> None:
    # two fast cores with two threads each, four slow ones
    sys = processors(tmp_path, ["0-1", "2-3", "4", "5", "6", "7"])
    write(sys / "devices", {"cpu_core/cpus": "0-3", "cpu_atom/cpus": "4-7"})
    fast = performance_processors(range(8), sys)
    assert fast == {0, 1, 2, 3} and physical_cores(fast, sys) == 2
    assert performance_processors([3, 5], sys) == {3}
    # who may use slow cores only uses those
    assert performance_processors([5, 6], sys) == {5, 6}


def test_efficiency_cores_of_arm(tmp_path: Path) -> None:
    sys = processors(tmp_path, [str(i) for i in range(8)], cpu_capacity=[250] * 4 + [870] * 3 + [1024])
    assert performance_processors(range(8), sys) == {4, 5, 6, 7}
    assert performance_processors([0, 1], sys) == {0, 1}


def test_efficiency_cores_by_their_clock(tmp_path: Path) -> None:
    # what differs by its turbo only is of one kind
    clocks = [5_100_000, 4_900_000, 3_300_000, 3_300_000]
    sys = processors(tmp_path, ["0,4", "1,5", "2,6", "3,7"], cpufreq__cpuinfo_max_freq=clocks)
    assert performance_processors(range(8), sys) == {0, 1, 4, 5}


def test_a_machine_of_one_kind_has_no_efficiency_cores(tmp_path: Path) -> None:
    sys = processors(tmp_path, ["0", "1"], cpu_capacity=[1024, 1024], cpufreq__cpuinfo_max_freq=[3_000_000] * 2)
    assert performance_processors([0, 1], sys) == {0, 1}
    assert performance_processors([0, 1], tmp_path / "nothing") == {0, 1}


def groups(tmp_path: Path, cgroup: str, mountinfo: Sequence[str] = ()) -> tuple[Path, Path]:
    proc = write(tmp_path / "proc/self", {"cgroup": cgroup, "mountinfo": "\n".join(mountinfo)}).parent
    return proc, tmp_path / "sys"


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000", None), ("200000 100000", 2.0), ("150000 100000", 1.5), ("5000 10000", 0.5)]
)
def test_quota_of_version_2(tmp_path: Path, text: str, quota: float | None) -> None:
    proc, sys = groups(tmp_path, "0::/")
    write(sys / "fs/cgroup", {"cpu.max": text})
    assert cpu_quota(proc, sys) == quota


def test_the_tightest_of_the_groups_around_counts(tmp_path: Path) -> None:
    proc, sys = groups(tmp_path, "0::/user.slice/job/step")
    root = sys / "fs/cgroup"
    write(root, {"user.slice/cpu.max": "300000 100000", "user.slice/job/step/cpu.max": "max 100000"})
    assert cpu_quota(proc, sys) == 3
    write(root, {"user.slice/job/cpu.max": "100000 100000"})
    assert cpu_quota(proc, sys) == 1


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("250000", 2.5)])
def test_quota_of_version_1(tmp_path: Path, folder: str, quota: str, expected: float | None) -> None:
    proc, sys = groups(tmp_path, f"5:memory:/other\n4:{folder}:/docker/abc\n0::/")
    home = sys / "fs/cgroup" / folder / "docker/abc"
    write(home, {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"})
    write(sys / "fs/cgroup/cpuset/docker/abc", {"cpu.cfs_quota_us": "1", "cpu.cfs_period_us": "100000"})
    assert cpu_quota(proc, sys) == expected


def test_a_container_sees_its_group_as_the_root_of_the_mount(tmp_path: Path) -> None:
    mount = tmp_path / "my mount"
    name = str(mount).replace(" ", "\\040")
    line = f"31 23 0:26 /docker/abc {name} ro,nosuid - cgroup cgroup rw,cpu,cpuacct"
    proc, sys = groups(tmp_path, "4:cpu,cpuacct:/docker/abc/inner", [line])
    write(mount, {"cpu.cfs_quota_us": "400000", "cpu.cfs_period_us": "100000"})
    assert cpu_quota(proc, sys) == 4
    write(mount / "inner", {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"})
    assert cpu_quota(proc, sys) == 0.5


def test_a_path_of_the_host_that_is_not_there_is_the_mount_itself(tmp_path: Path) -> None:
    mount = tmp_path / "cgroup"
    line = f"31 23 0:26 / {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw"
    proc, sys = groups(tmp_path, "0::/system.slice/docker-abc.scope", [line])
    write(mount, {"cpu.max": "200000 100000"})
    assert cpu_quota(proc, sys) == 2


def test_no_control_groups_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path) is None
    proc, sys = groups(tmp_path, "nonsense\n0::/")
    write(sys / "fs/cgroup", {"cpu.max": "a b"})
    assert cpu_quota(proc, sys) is None


@pytest.mark.parametrize(
    ("cores", "n"),
    [
        (Cores(8, 4), 4),
        (Cores(64, 32, 0, 2.0), 2),
        (Cores(8, 4, 0, 1.5), 2),
        (Cores(8, 4, 0, 0.25), 1),
        (Cores(8, 4, 0, 16.0), 4),
        (Cores(1, 0), 1),
    ],
)
def test_threads_are_the_cores_within_the_quota_rounded_up(cores: Cores, n: int) -> None:
    assert cores.threads == n


def test_the_reason_names_what_counts() -> None:
    assert Cores(8, 4).reason == "4 physical cores of 8 usable processors"
    assert Cores(1, 1, 0, 4.0).reason == "1 physical core of 1 usable processor"
    assert Cores(12, 4, 4, 1.5).reason == (
        "4 physical performance cores of 12 usable processors (4 of them on efficiency cores), limited to 1.5 by the "
        "control group"
    )


def test_affinity_kinds_and_quota_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, sys = groups(tmp_path, "0::/")
    processors(sys, ["0-1", "2-3", "4-5", "6", "7"])
    write(sys / "devices", {"cpu_core/cpus": "0-5", "cpu_atom/cpus": "6-7"})
    monkeypatch.setattr(threads, "_allowed", lambda: {0, 1, 2, 3, 6})
    assert usable_cores(sys, proc) == Cores(5, 2, 1, None)
    write(sys / "fs/cgroup", {"cpu.max": "110000 100000"})
    assert usable_cores(sys, proc).threads == 2
    write(sys / "fs/cgroup", {"cpu.max": "90000 100000"})
    assert usable_cores(sys, proc).threads == 1


@pytest.mark.parametrize(("system", "known", "n"), [("Darwin", {"hw.perflevel0.physicalcpu": 4}, 4),
                                                    ("Darwin", {"hw.physicalcpu": 6}, 6),
                                                    ("Darwin", {}, 3), ("Windows", {}, 3)])  # fmt: skip
def test_elsewhere_the_system_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, known: dict[str, int], n: int
) -> None:
    monkeypatch.setattr(threads.platform, "system", lambda: system)
    monkeypatch.setattr(threads, "_sysctl", lambda name: known.get(name, 0))
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: None if logical else 3)
    monkeypatch.setattr(threads, "_allowed", lambda: set(range(8)))
    assert usable_cores(tmp_path, tmp_path) == Cores(8, n)
    # never more than this process may use
    monkeypatch.setattr(threads, "_allowed", lambda: {0, 1})
    assert usable_cores(tmp_path, tmp_path) == Cores(2, 2)


def test_this_machine_has_cores() -> None:
    here = usable_cores()
    assert 1 <= here.threads <= here.processors
