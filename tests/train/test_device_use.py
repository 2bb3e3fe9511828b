"""What is read about the devices: plausible numbers here, and NVML's arithmetic where there is a GPU."""

import mmap
import os
import sys
import types

import numpy as np

from mtl_jax.train.device_use import GIB, DeviceUse, host_bytes, resident_bytes


class Gpu:
    """A device as JAX describes one."""

    platform = "gpu"

    def __init__(self, number, in_use):
        self.id, self.in_use = number, in_use

    def memory_stats(self):
        return {"bytes_in_use": self.in_use, "bytes_limit": 78 * GIB}


def nvml(monkeypatch, processes):
    """A module with the calls of nvidia-ml-py that are used; GPU i runs ``processes[i]`` and is busy at 10 i percent."""
    made = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(processes),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=lambda index: [types.SimpleNamespace(pid=pid) for pid in processes[index]],
        nvmlDeviceGetUtilizationRates=lambda index: types.SimpleNamespace(gpu=10 * index, memory=0),
    )
    monkeypatch.setitem(sys.modules, "pynvml", made)


def test_the_host_is_measured_where_devices_are_cpus():
    (entry,) = DeviceUse().sample()["memory"]
    assert entry["device"] == "host" and entry["limit"] == host_bytes()
    assert 50 * 1024**2 < entry["in_use"] < entry["limit"]
    assert DeviceUse().line() == f"host {entry['in_use'] / GIB:.1f}/{entry['limit'] / GIB:.1f} GiB"


def test_resident_memory_follows_what_is_allocated():
    pages = mmap.mmap(-1, 40 * 1024**2)  # of the system: an array may lie in what the process had freed and kept
    before = resident_bytes()
    np.frombuffer(pages, np.uint8)[:] = 1
    assert resident_bytes() - before > 0.9 * len(pages)


def test_it_is_sampled_once_an_interval():
    now = iter([0.0, 0.4, 0.99, 1.0, 1.5])
    gpu = Gpu(0, GIB)
    use = DeviceUse(devices=[gpu], clock=lambda: next(now))
    seen = []
    for count in range(1, 6):
        gpu.in_use = count * GIB
        seen.append(use.sample()["memory"][0]["in_use"] // GIB)
    assert seen == [1, 1, 1, 4, 4]


def test_utilisation_is_that_of_the_gpus_this_process_runs_on(monkeypatch):
    nvml(monkeypatch, [[1], [os.getpid(), 1], [2]])
    use = DeviceUse(devices=[Gpu(0, 2 * GIB)])
    assert use.sample()["utilisation"] == {"1": 10}
    assert use.line() == "gpu:0 2.0/78.0 GiB 10 %"


def test_all_gpus_count_where_processes_are_hidden_and_numbers_agree(monkeypatch):
    nvml(monkeypatch, [[7], [8]])
    assert DeviceUse(devices=[Gpu(0, 0), Gpu(1, 0)]).line() == "gpu:0 0.0/78.0 GiB 0 %  gpu:1 0.0/78.0 GiB 10 %"
    assert "utilisation" not in DeviceUse(devices=[Gpu(0, 0)]).sample()


def test_without_the_package_there_is_memory_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert DeviceUse(devices=[Gpu(3, GIB)]).line() == "gpu:3 1.0/78.0 GiB"
