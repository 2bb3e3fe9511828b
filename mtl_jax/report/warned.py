"""Warnings of a run: what the library logs as one reaches the person who watches, and the log that is read later."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from mtl_jax.errors import RunFolderError
from mtl_jax.report.folder import RunFolder


@contextlib.contextmanager
def warnings_kept(home: RunFolder) -> Iterator[None]:
    """Inside the ``with`` block every warning of the library goes to standard error and into ``run.log``."""
    handler, logger = _Kept(home), logging.getLogger("mtl_jax")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Kept(logging.Handler):
    def __init__(self, home: RunFolder):
        super().__init__(logging.WARNING)
        self.home = home

    def emit(self, record: logging.LogRecord) -> None:
        text = f"warning: {record.getMessage()}"
        print(text, file=sys.stderr)
        with contextlib.suppress(RunFolderError):  # a full disk must not turn a warning into the end of a run
            self.home.log(text)
