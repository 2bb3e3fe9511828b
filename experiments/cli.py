"""What all command lines share: clear words instead of tracebacks for a user's mistakes."""

import difflib
import sys
from collections.abc import Callable

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl_jax.errors import MtlJaxError

USAGE = 2


def command_line(main: Callable[[], None], config_name: str) -> None:
    """Runs a Hydra application; a mistake of the user's ends it with one message and a non-zero status."""
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    try:
        if not any(argument.startswith("-") for argument in sys.argv[1:]):
            _compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        _stop(_explain(error, config_name, overrides), USAGE)
    try:
        main()
    except MtlJaxError as error:
        _stop(f"{type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        _stop("interrupted; the same command goes on from the last checkpoint", 130)


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_module("conf", version_base="1.3"):
        config = hydra.compose(config_name, overrides=[o for o in overrides if not o.lstrip("+~").startswith("hydra.")])
    OmegaConf.resolve(config)
    return config


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
