"""What a measurement was made on: machine, versions, commit, matrix multiplication rate and memory of the process.

    python benchmarks/machine.py        # prints all of it as JSON

Imports the standard library and NumPy only, so that every competitor's interpreter can use it.
"""

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

STATUS = Path("/proc/self/status")
STAT = Path("/proc/stat")


def describe() -> dict[str, str | int | None]:
    """CPU model, usable cores, memory in bytes, operating system and Python version."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages; one that is not installed is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: str | Path) -> str | None:
    """The commit checked out in ``folder``, with ``+changes`` where the tree differs from it; None without one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def gemm_gflops(size: int = 1024, *, seconds: float = 1.0) -> float:
    """Rate of NumPy's float32 matrix product: the best of repeated products, in GFLOP/s.

    Args:
      size: Rows and columns of the square factors.
      seconds: How long to repeat; the best time is the one least disturbed by other processes.
    """
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((2, size, size), dtype=np.float32)
    out = np.empty_like(left)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        np.matmul(left, right, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def peak_resident_bytes() -> int:
    """The most memory this process has had resident."""
    if STATUS.exists():
        # Not ru_maxrss: on Linux it outlives exec, so that a child would report its parent's peak.
        (kilobytes,) = (line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kilobytes) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def busy_seconds() -> float | None:
    """Seconds that the usable cores have worked since boot, for anyone, stolen ones included; None where unknown."""
    if not STAT.exists():
        return None
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in STAT.read_text().splitlines():
        name, *fields = line.split()
        if name in cores:
            user, nice, system, _idle, _iowait, interrupts, soft_interrupts, stolen = map(int, fields[:8])
            ticks += user + nice + system + interrupts + soft_interrupts + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    """Seconds that this process's ended children have worked."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name, as the kernel gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    facts = {"machine": describe(), "commit": commit(Path(__file__).parent), "gemm_gflops": round(gemm_gflops(), 1)}
    print(json.dumps(facts, indent=2))
