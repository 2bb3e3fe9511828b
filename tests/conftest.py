"""Options and markers of the whole suite."""

import pytest

from mtl_jax.data import fetch, sources


def pytest_addoption(parser):
    parser.addoption("--download-data", action="store_true", help="fetch the data that tests need, once")


def pytest_collection_modifyitems(config, items):
    """Tests marked ``data`` need the real tables; without them they are skipped, with the command that fetches them."""
    needing = [item for item in items if item.get_closest_marker("data")]
    if not needing:
        return
    unfetched = [name for name in sources.datasets() if not _present(name, config.getoption("--download-data"))]
    for item in needing if unfetched else ():
        command = f"python -m mtl_jax.data fetch {' '.join(unfetched)}"
        item.add_marker(pytest.mark.skip(reason=f"data not fetched; run: {command}"))


def _present(dataset: str, download: bool) -> bool:
    cache = fetch.open_cache(sources.source_of(dataset))
    if download:
        fetch.fetch(cache.source)
    return not cache.missing(cache.choose(None))
