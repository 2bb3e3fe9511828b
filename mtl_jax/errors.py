"""What a user can get wrong. Every message names the value, the expectation and the fix.

The command line prints the message of an ``MtlJaxError`` alone; anything else is a defect of ours and keeps its traceback.
"""

import errno

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Numbers by which the operating system says that there is no room: the disk, the quota, the size of one file."""


class MtlJaxError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(MtlJaxError):
    """A configuration names something that does not exist, or combines what cannot work together."""


class DataError(MtlJaxError):
    """Base of the errors about data."""


class SchemaError(DataError):
    """Columns, features, tasks or splits do not fit the table."""


class LabelError(DataError):
    """Label values contradict the task's declaration."""


class LeakageError(DataError):
    """A feature or a split would give the answer away."""


class NotCached(DataError):
    """The data set has not been fetched."""


class NoNetwork(DataError):
    """No package index could be reached."""


class HashMismatch(DataError):
    """A downloaded file is not the pinned one; it was not opened."""


class MemberMismatch(DataError):
    """An archive member is absent or not the pinned one."""


class UnsafePickle(DataError):
    """A pickle names something else than the parts of a table; it was refused and nothing of it was called."""


class NoSpace(DataError):
    """Too little free disk."""


class NoPip(DataError):
    """The interpreter has no pip."""


class CacheBusy(DataError):
    """Another process holds the cache."""


class MissingFile(DataError):
    """A file that the user brings is not where it was said to be."""


class TrainingError(MtlJaxError):
    """Training cannot go on; the run folder keeps the last good checkpoint."""


class RunFolderError(MtlJaxError):
    """The run folder is in use, or holds something else."""


class RunFolderFull(RunFolderError, NoSpace):
    """No room for the run's files; what was there stays as it was."""


class DamagedCheckpoint(RunFolderError):
    """A file of a checkpoint is missing, or is not what was written."""


class Interrupted(MtlJaxError):
    """The run was told to stop; its checkpoint is written, and the same command goes on from there."""
