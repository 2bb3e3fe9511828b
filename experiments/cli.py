"""What all command lines share: clear words instead of tracebacks for a user's mistakes."""

import contextlib
import difflib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.extras import missing_launcher
from experiments.signals import StopRequest
from mtl_jax.errors import FULL_DISK, Interrupted, MtlJaxError

FAILURE, USAGE = 1, 2
SWEEPS = ("ablate",)
"""Configurations in which a comma list stands for arms."""
MISTAKES = (HydraException, OmegaConfBaseException, ValueError, OSError)
"""What composing a configuration raises for a user's mistake; Hydra does not keep to its own classes."""


def command_line(main: Callable[[], None], config_name: str) -> None:
    """Runs a Hydra application, after its configuration was composed once to answer mistakes in plain words."""
    arguments = sys.argv[1:]
    if not any(argument.startswith("-") for argument in arguments):
        try:
            config = _compose(config_name, arguments)
            _check_folder(config, arguments)
        except MISTAKES as error:
            stop(_explain(error, config_name, arguments), USAGE)
    main()


def in_plain_words(job: Callable[[DictConfig, StopRequest], None]) -> Callable[[DictConfig], None]:
    """A job whose user's mistakes end it with one message; Hydra would print a traceback around it.

    The job is given the configuration and what tells it to stop; SIGTERM then ends it with 143, Ctrl-C with 130.
    """

    @functools.wraps(job)
    def guarded(config: DictConfig) -> None:
        with StopRequest() as request:
            try:
                job(config, request)
            except Interrupted as reason:
                stop(f"{reason}; the same command goes on from there", request.status)
            except KeyboardInterrupt:
                stop("interrupted; the same command goes on from the last checkpoint", request.status)
            except MtlJaxError as error:
                stop(f"{type(error).__name__}: {error}", FAILURE)
            except OSError as error:
                if error.errno not in FULL_DISK:
                    raise
                stop(
                    f"no space left ({error}); expected room for a few MB. Free space and run the same command", FAILURE
                )

    return guarded


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_module("conf", version_base="1.3"):
        config = hydra.compose(
            config_name, overrides=[_single(o) if config_name in SWEEPS else o for o in overrides if _composes(o)]
        )
    OmegaConf.resolve(config)
    return config


def _composes(override: str) -> bool:
    """Whether the override shapes the configuration and not the launch."""
    return not override.lstrip("+~").startswith("hydra.") or override.startswith("hydra.searchpath=")


def _single(override: str) -> str:
    """The override itself, with the first value of a comma list."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={next(parsed.sweep_string_iterator())}"


def _explain(error: Exception, config_name: str, overrides: list[str]) -> str:
    """The message of a composition error, and for a wrong key the keys that exist."""
    message = str(error).strip()
    if install := missing_launcher(message):
        return install
    for override in overrides if "Could not find" not in message else ():  # that message lists the options of a group
        path = override.split("=")[0].lstrip("+~")
        if f"'{path}'" in message or f"'{path.rsplit('.', 1)[-1]}'" in message:
            valid = _valid_keys(config_name, path)
            if valid:
                near = difflib.get_close_matches(path.rsplit(".", 1)[-1], valid, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                return f"ConfigError: unknown option '{path}'; expected one of {valid}.{hint} See --help"
    return (
        f"ConfigError: '{_culprit(config_name, overrides)}' cannot be composed: {message}\n"
        "expected key=value, group=option, +new.key=value or ~key, as --help shows. Correct it"
    )


def _culprit(config_name: str, overrides: list[str]) -> str:
    """The override without which the others compose; all of them where there is no such one."""
    for place in reversed(range(len(overrides))):
        with contextlib.suppress(*MISTAKES):
            _compose(config_name, overrides[:place] + overrides[place + 1 :])
            return overrides[place]
    return " ".join(overrides)


def _check_folder(config: DictConfig, overrides: list[str]) -> None:
    """Hydra makes the run folder before the job can catch what goes wrong there."""
    given = [o.partition("=")[2] for o in overrides if o.startswith("hydra.run.dir=")] or [str(config.output_dir)]
    folder = Path(given[-1]).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        stop(
            f"ConfigError: '{folder}' cannot be made in '{there}'; expected a folder to write to. Choose another one",
            USAGE,
        )


def _valid_keys(config_name: str, path: str) -> list[str]:
    node = _compose(config_name, [])
    *parents, last = path.split(".")
    for parent in parents:
        node = node.get(parent) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig) or last in node:
        return []
    return sorted(str(key) for key in node)


def stop(message: str, status: int) -> NoReturn:
    """Ends the process with a message."""
    print(message, file=sys.stderr)
    end = SystemExit(status)
    end.add_note(message)
    raise end
