"""How many threads compute by default: the physical performance cores that this process may use."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

_SYS, _PROC = Path("/sys"), Path("/proc")

_CAPACITY_SHARE = 0.5  # of the fastest core: what is slower is an efficiency core, by Linux's cpu_capacity
_CLOCK_SHARE = 0.75  # likewise by clock; turbo clocks of like cores differ by some percent


@dataclass(frozen=True)
class Cores:
    """What this process may use.

    Attributes:
        processors: logical processors, hyperthreads among them.
        physical: cores that these belong to, without the slower ones.
        efficiency: logical processors of slower cores, which are left out.
        quota: processors' worth of time that a control group allows, ``None``: all of it.
    """

    processors: int
    physical: int
    efficiency: int = 0
    quota: float | None = None

    @property
    def threads(self) -> int:
        """Threads to compute with, at least 1."""
        limit = self.physical if self.quota is None else min(self.physical, math.ceil(self.quota))
        return max(limit, 1)

    @property
    def reason(self) -> str:
        """Why so many, in one phrase."""
        kind = "physical performance core" if self.efficiency else "physical core"
        out = f"{_count(self.physical, kind)} of {_count(self.processors, 'usable processor')}"
        if self.efficiency:
            out += f" ({self.efficiency} of them on efficiency cores)"
        if self.quota is not None and math.ceil(self.quota) < self.physical:
            out += f", limited to {self.quota:g} by the control group"
        return out


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def default_threads() -> int:
    """Threads that compute where none are asked for."""
    return usable_cores().threads


def usable_cores(sys: Path = _SYS, proc: Path = _PROC) -> Cores:
    """What this process may use, by its affinity, its control groups and the kinds of cores.

    ``sys``, ``proc``: where Linux shows them.
    """
    allowed = _allowed()
    fast = performance_processors(allowed, sys)
    cores = physical_cores(fast, sys)
    if cores is None:
        n = min(_physical_elsewhere(), len(fast))
        return Cores(len(allowed), n, len(allowed) - len(fast), cpu_quota(proc, sys))
    return Cores(len(allowed), cores, len(allowed) - len(fast), cpu_quota(proc, sys))


def _allowed() -> Set[int]:
    """Logical processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _physical_elsewhere() -> int:
    """Physical cores where there is no ``/sys``; on a Mac its performance cores."""
    if platform.system() == "Darwin":
        n = _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")
        if n:
            return n
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _sysctl(name: str) -> int:
    """A number that a Mac's kernel knows by this name, 0 if it does not."""
    try:
        ask = ctypes.CDLL(None).sysctlbyname
    except (AttributeError, OSError):
        return 0
    value, size = ctypes.c_int32(), ctypes.c_size_t(4)
    failed = ask(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return 0 if failed else int(value.value)


#
# kinds of cores
#


def performance_processors(allowed: Iterable[int], sys: Path = _SYS) -> Set[int]:
    """Those of ``allowed`` that belong to the fast kind of core; all of them where there is one kind, or none is known.

    Known are Intel's hybrid processors by their event counters, ARM's by their capacity, others by their clock.
    """
    allowed = set(allowed)
    if (sys / "devices/cpu_atom").exists():
        named = parse_list(_read(sys / "devices/cpu_core/cpus"))
        slow = parse_list(_read(sys / "devices/cpu_atom/cpus"))
        if named and slow:
            return allowed & named or allowed
    for file, share in (("cpu_capacity", _CAPACITY_SHARE), ("cpufreq/cpuinfo_max_freq", _CLOCK_SHARE)):
        speeds = {cpu: _number(_read(_processor(sys, cpu) / file)) for cpu in allowed}
        if speeds and all(speeds.values()):
            most = max(speeds.values())
            fast = {cpu for cpu, speed in speeds.items() if speed > share * most}
            if len(fast) < len(allowed):
                return fast
    return allowed


def physical_cores(processors: Iterable[int], sys: Path = _SYS) -> int | None:
    """How many cores these logical processors belong to; ``None`` where Linux does not tell."""
    cores = set()
    for cpu in processors:
        topology = _processor(sys, cpu) / "topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        if not siblings:
            return None
        cores.add(frozenset(parse_list(siblings)))
    return len(cores) or None


def _processor(sys: Path, cpu: int) -> Path:
    return sys / f"devices/system/cpu/cpu{cpu}"


def parse_list(text: str) -> set[int]:
    """``0-3,8`` as numbers; what is no such list is empty."""
    out: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or "0").isdecimal():
            return set()
        out.update(range(int(first), int(last or first) + 1))
    return out


#
# control groups
#


def cpu_quota(proc: Path = _PROC, sys: Path = _SYS) -> float | None:
    """Processors' worth of time that this process's control groups allow it, of versions 1 and 2; ``None``: all.

    A group may not use more than any of those it lies in.
    """
    quotas = (_group_quota(folder) for folder in _group_folders(proc, sys))
    return min((quota for quota in quotas if quota is not None), default=None)


def _group_quota(folder: Path) -> float | None:
    both = _read(folder / "cpu.max").split()
    if len(both) == 2:
        quota, period = both
    else:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    # "max" and -1 stand for no quota
    return _number(quota) / _number(period) if _number(quota) and _number(period) else None


def _group_folders(proc: Path, sys: Path) -> Iterator[Path]:
    """Folders of the groups that may limit the processor: this process's own, and those around it."""
    mounts = list(_group_mounts(proc, sys))
    for line in _read(proc / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for version, root, mount in mounts:
            if version != (1 if controllers else 2):
                continue
            # a container may see its own group as the root of the mount, under a path of the host
            group = PurePosixPath(path)
            folder = mount / group.relative_to(root) if group.is_relative_to(root) else mount
            yield folder
            yield from (parent for parent in folder.parents if parent.is_relative_to(mount))


def _group_mounts(proc: Path, sys: Path) -> Iterator[tuple[int, str, Path]]:
    """Version, path of the group at its root, and folder of every mount that can limit the processor."""
    found = False
    for line in _read(proc / "self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        if kind[0] == "cgroup2" or "cpu" in kind[2].split(","):
            found = True
            yield 2 if kind[0] == "cgroup2" else 1, _unescaped(fields[3]), Path(_unescaped(fields[4]))
    if not found:
        folder = sys / "fs/cgroup"
        yield 2, "/", folder
        for name in ("cpu", "cpu,cpuacct", "cpuacct,cpu"):
            yield 1, "/", folder / name


def _unescaped(path: str) -> str:
    """mountinfo writes a space as ``\\040``."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
