"""The figure of what gates weigh."""

import numpy as np
import pytest
from PIL import Image

from mtl_jax.report.gates import plot_gates


def record(*places, members=3):
    gates = {
        "buy/gate": {f"expert {e}": 1 / members for e in range(members)},
        "spend/gate": {f"expert {e}": float(e == 0) for e in range(members - 1)},
    }
    return {"method": {"sharing": "mmoe"}, "diagnostics": {"gate_use": dict.fromkeys(places, gates)}}


@pytest.mark.parametrize(
    ("places", "members"), [(("all",), 3), (("all", "domain=north", "domain=south"), 12), (("all", *"abcdefgh"), 60)]
)
def test_a_heat_map_for_every_place(tmp_path, places, members):
    assert plot_gates(record(*places, members=members), tmp_path / "gates.png")
    picture = np.asarray(Image.open(tmp_path / "gates.png").convert("RGB"))
    assert picture.shape[0] > 100 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_without_gates_there_is_no_file(tmp_path):
    assert not plot_gates({"method": {"sharing": "shared_bottom"}, "diagnostics": {}}, tmp_path / "gates.png")
    assert not list(tmp_path.iterdir())
