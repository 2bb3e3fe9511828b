"""Arms side by side: what other processes need to be told, and what they send back (see docs/ablations.md)."""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from experiments.cli import FAILURE, stop
from experiments.signals import STATUS


class Ended(NamedTuple):
    """What ended a job in another process: the status that it would have left there, and what it said."""

    status: int
    message: str


def sends_back(job: Callable[[DictConfig], None]) -> Callable[[DictConfig], Ended | None]:
    """A job that can run in another process.

    There, an exit would be lost or be taken for a crash of the worker, and the jobs beside it would be killed. So the
    job returns its status, and the process that launched it ends with that (see :func:`launch`).
    """

    @functools.wraps(job)
    def sending(config: DictConfig) -> Ended | None:
        try:
            return job(config)
        except SystemExit as end:
            if HydraConfig.get().launcher["_target_"].endswith(".BasicLauncher"):
                raise  # the same process: nothing after this job may start
            status = end.code if isinstance(end.code, int) else FAILURE
            return Ended(status, "\n".join(getattr(end, "__notes__", ())))

    return sending


def launch(launcher: Launcher, jobs: Sequence[Sequence[str]]) -> None:
    """Runs the jobs to their end. When all have ended, the first that did not come to its end gives the exit status.

    A worker that vanishes (out of memory, out of time) ends the command with a sentence: what its runs had finished
    stays, and the same command goes on.
    """
    if not jobs:
        return
    if not _elsewhere(launcher):
        for result in launcher.launch(jobs, initial_job_idx=0):
            _ = result.return_value  # raises what ended the job
        return
    with _sigterm_interrupts() as received:
        try:
            results = launcher.launch(jobs, initial_job_idx=0)
        except KeyboardInterrupt:
            stop(
                "interrupted; the same command goes on from the last checkpoints. Jobs that submitit has handed to a "
                "queue or started by itself go on: wait for them or cancel them first"
                if _apart(launcher)
                else "interrupted; the same command goes on from the last checkpoints",
                STATUS + (received[0] if received else signal.SIGINT),
            )
        except Exception as error:  # every launcher has its own classes for a worker that is gone
            stop(
                f"{type(error).__name__}: {error}\na job ended without a result; expected its process to live to the "
                "end. See above for the reason (memory and hydra.launcher.timeout_min are common ones) and run the "
                "same command, which goes on with what is unfinished",
                FAILURE,
            )
    ended = [result.return_value for result in results]
    for end in ended:
        if isinstance(end, Ended):
            if _apart(launcher):
                stop(end.message, end.status)
            sys.exit(end.status)  # its words came through already


def _elsewhere(launcher: Launcher) -> bool:
    return type(launcher).__name__ != "BasicLauncher"


def _apart(launcher: Launcher) -> bool:
    """Whether jobs write to logs of their own and outlive the command."""
    return "submitit" in type(launcher).__module__


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[list[int]]:
    """SIGTERM as Ctrl-C, on which launchers take down their workers; by default they would be left behind."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> Any:
        received.append(number)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
