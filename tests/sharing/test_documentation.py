"""docs/sharing.md names what there is, and nothing else."""

import re
from pathlib import Path

import yaml

import conf
from mtl_jax import sharing

ROOT = Path(conf.__file__).parent
ROWS = dict(
    re.findall(
        r"^\| `(\w+)` \| (\w+) \|", (ROOT.parent / "docs" / "sharing.md").read_text(encoding="utf-8"), re.MULTILINE
    )
)


def test_every_configuration_is_in_a_table_with_its_class():
    targets = {
        path.stem: yaml.safe_load(path.read_text())["_target_"].removeprefix("mtl_jax.sharing.")
        for group in ("sharing", "link")
        for path in (ROOT / group).glob("*.yaml")
    }
    assert ROWS == targets


def test_every_strategy_and_link_has_a_configuration():
    classes = {
        name
        for name in sharing.__all__
        if isinstance(made := getattr(sharing, name), type)
        and issubclass(made, sharing.Strategy | sharing.Link)
        and made is not sharing.Strategy
    }
    assert classes - {"FallingChances"} == set(ROWS.values())  # which comes with AITM
