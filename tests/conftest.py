"""Options and markers of the whole suite."""

import pytest

from mtl_jax.data import fetch, sources


def pytest_addoption(parser):
    parser.addoption("--download-data", action="store_true", help="fetch the data that tests need, once")


def pytest_configure(config):
    """Fetches once, before tests are handed to several processes."""
    if config.getoption("--download-data") and not hasattr(config, "workerinput"):
        for name in sources.datasets():
            fetch.fetch(sources.source_of(name))


def pytest_collection_modifyitems(items):
    """Tests marked ``data`` need the real tables; without them they are skipped, with the command that fetches them."""
    needing = [item for item in items if item.get_closest_marker("data")]
    if not needing:
        return
    unfetched = [name for name in sources.datasets() if not _present(name)]
    for item in needing if unfetched else ():
        command = f"python -m mtl_jax.data fetch {' '.join(unfetched)}"
        item.add_marker(pytest.mark.skip(reason=f"data not fetched; run: {command}"))


def _present(dataset: str) -> bool:
    cache = fetch.open_cache(sources.source_of(dataset))
    return not cache.missing(cache.choose(None))
