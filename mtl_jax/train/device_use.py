"""DeviceUse: how full and how busy the devices are, read on the host without waiting for them."""

import contextlib
import importlib
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

GIB = 1024**3


class DeviceUse:
    """Memory of every device and, on NVIDIA, utilisation; sampled at most once in ``seconds``.

    Memory is what JAX's allocator holds for arrays, and the host's resident set where the devices are CPUs. Utilisation
    is the share of the last second or so in which a kernel ran, as NVML counts it, over everything that runs on the
    GPU; it needs the package nvidia-ml-py (``pip install 'mtl_jax[watch]'``) and is left out without it.

    Args:
      seconds: Between two samples; calls in between return the last one.
      devices: JAX devices; the local ones by default.
      clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        seconds: float = 1.0,
        devices: Sequence[Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.seconds, self.devices, self.clock = seconds, devices, clock
        self.sampled: dict[str, Any] = {}
        self.at: float | None = None
        self.gpus: _Gpus | None = None

    def sample(self) -> dict[str, Any]:
        """``{"memory": [{device, in_use, limit}, ...], "utilisation": {GPU number: percent}}``, bytes, plain JSON types.

        One entry for the host where the devices are CPUs, else one a device; ``utilisation`` only where it is known.
        """
        now = self.clock()
        if self.at is None or now - self.at >= self.seconds:
            self.at, self.sampled = now, self._sample()
        return self.sampled

    def line(self) -> str:
        """The sample as a short text: ``gpu:0 12.3/78.0 GiB 97 %``."""
        sample = self.sample()
        busy = list(sample.get("utilisation", {}).values())
        used = [f"{m['device']} {_gib(m['in_use'])}/{_gib(m['limit'])} GiB" for m in sample["memory"]]
        if len(busy) == len(used):
            return "  ".join(f"{memory} {percent} %" for memory, percent in zip(used, busy, strict=True))
        return "  ".join([*used, *(f"{percent} %" for percent in busy)])

    def _sample(self) -> dict[str, Any]:
        devices = jax.local_devices() if self.devices is None else self.devices
        stats = [device.memory_stats() for device in devices]
        if not any(stats):
            return {"memory": [{"device": "host", "in_use": resident_bytes(), "limit": host_bytes()}]}
        memory = [
            {
                "device": f"{device.platform}:{device.id}",
                "in_use": (found or {}).get("bytes_in_use"),
                "limit": (found or {}).get("bytes_limit"),
            }
            for device, found in zip(devices, stats, strict=True)
        ]
        self.gpus = self.gpus or _Gpus(len(devices))
        utilisation = self.gpus.utilisation()
        return {"memory": memory} | ({"utilisation": utilisation} if utilisation else {})


class _Gpus:
    """The GPUs of this process as NVML sees them; none without the package, the driver or a GPU."""

    def __init__(self, count: int):
        self.handles: dict[int, Any] = {}
        try:
            self.nvml = importlib.import_module("pynvml")
            self.nvml.nvmlInit()
            number = self.nvml.nvmlDeviceGetCount()
            handles = {index: self.nvml.nvmlDeviceGetHandleByIndex(index) for index in range(number)}
        except Exception:  # the package has an error class a cause; none of them may end a training run
            return
        # Their order need not be that of JAX, and others' GPUs may be visible: ours are those that list this process.
        # Inside a container process numbers differ, so that all GPUs are taken where they are as many as JAX has.
        ours = {index: handle for index, handle in handles.items() if self._runs_here(handle)}
        self.handles = ours or (handles if number == count else {})

    def utilisation(self) -> dict[str, int]:
        with contextlib.suppress(Exception):
            return {str(i): int(self.nvml.nvmlDeviceGetUtilizationRates(h).gpu) for i, h in self.handles.items()}
        return {}

    def _runs_here(self, handle: Any) -> bool:
        with contextlib.suppress(Exception):
            return os.getpid() in [process.pid for process in self.nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
        return False


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; the most it ever was where the system does not tell."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def host_bytes() -> int | None:
    """RAM of the machine."""
    with contextlib.suppress(OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / GIB:.1f}"
