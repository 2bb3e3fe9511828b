"""Which extra of this package installs a launcher that Hydra does not find."""

import re

LAUNCHERS = {
    "joblib": "joblib",
    "ray": "ray",
    "submitit_local": "slurm",
    "submitit_slurm": "slurm",
}
"""Launcher -> extra."""


def missing_launcher(message: str) -> str | None:
    """What to install, from Hydra's message about a launcher; None for every other message.

    Example:
      >>> from experiments.extras import missing_launcher
      >>> missing_launcher("Could not find 'hydra/launcher/ray'")
      "ConfigError: hydra/launcher=ray is not installed; expected its package. Run: pip install 'mtl_jax[ray]'"
    """
    found = re.search(r"Could not find 'hydra/launcher/(\w+)'", message)
    extra = LAUNCHERS.get(found[1]) if found else None
    if extra is None:
        return None
    return (
        f"ConfigError: hydra/launcher={found[1]} is not installed; expected its package. "
        f"Run: pip install 'mtl_jax[{extra}]'"
    )
