"""What all command lines share: clear words instead of tracebacks for a user's mistakes."""

import difflib
import functools
import sys
from collections.abc import Callable

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl_jax.errors import MtlJaxError

USAGE = 2
INTERRUPTED = 130


def command_line(main: Callable[[], None], config_name: str) -> None:
    """Runs a Hydra application, after its configuration was composed once to answer mistakes in plain words."""
    arguments = sys.argv[1:]
    if not any(argument.startswith("-") for argument in arguments):
        try:
            _compose(config_name, arguments)
        except (HydraException, OmegaConfBaseException) as error:
            _stop(_explain(error, config_name, arguments), USAGE)
    main()


def in_plain_words(job: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """A job whose user's mistakes end it with one message; Hydra would print a traceback around it."""

    @functools.wraps(job)
    def guarded(config: DictConfig) -> None:
        try:
            job(config)
        except MtlJaxError as error:
            _stop(f"{type(error).__name__}: {error}", 1)
        except KeyboardInterrupt:
            _stop("interrupted; the same command goes on from the last checkpoint", INTERRUPTED)

    return guarded


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_module("conf", version_base="1.3"):
        config = hydra.compose(config_name, overrides=[o for o in overrides if _composes(o)])
    OmegaConf.resolve(config)
    return config


def _composes(override: str) -> bool:
    """Whether the override shapes the configuration and not the launch."""
    return not override.lstrip("+~").startswith("hydra.") or override.startswith("hydra.searchpath=")


def _explain(error: Exception, config_name: str, overrides: list[str]) -> str:
    """The message of a composition error, and for a wrong key the keys that exist."""
    message = str(error).strip()
    for override in overrides:
        path = override.split("=")[0].lstrip("+~")
        if f"'{path}'" in message or f"'{path.rsplit('.', 1)[-1]}'" in message:
            valid = _valid_keys(config_name, path)
            if valid:
                near = difflib.get_close_matches(path.rsplit(".", 1)[-1], valid, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                return f"ConfigError: unknown option '{path}'; expected one of {valid}.{hint} See --help"
    return f"ConfigError: {message}"


def _valid_keys(config_name: str, path: str) -> list[str]:
    node = _compose(config_name, [])
    *parents, last = path.split(".")
    for parent in parents:
        node = node.get(parent) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig) or last in node:
        return []
    return sorted(str(key) for key in node)


def _stop(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)
