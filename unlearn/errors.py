"""What can go wrong for a user. Every message says what is wrong, where, and what to do.

The command line prints these without a traceback and exits with 2; any other exception is a bug.
"""


class UnlearnError(Exception):
    """A mistake, or a state of the world, that the user can mend."""


class ConfigError(UnlearnError):
    """The configuration is wrong, or does not fit the data or the model."""


class DataError(UnlearnError):
    """A shard, a manifest, an image or a selection is wrong."""


class ImageError(DataError, ValueError):
    """An encoded image is damaged, too large, or of a format that is not read."""


class StorageError(UnlearnError):
    """A file or an object cannot be reached, read or written."""


class ReplacedError(StorageError):
    """An object is not the one that was opened: it was replaced meanwhile."""


class WeightsError(UnlearnError):
    """A file of weights is missing, unreadable, or of another shape than the model."""


class LeaseError(UnlearnError):
    """The run folder belongs to another process, or does so by now."""


class CheckpointError(UnlearnError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


class ClusterError(UnlearnError):
    """The cluster cannot give what the run asks for."""


class WorkerDied(ClusterError):
    """The workers of a piece of work died again and again."""


class TrainingError(UnlearnError):
    """Training had to stop, for example at a loss that is not finite."""


class LedgerError(UnlearnError):
    """The ledger of deletion requests is out of reach, refuses a change, or does not hold what was written to it."""


class CertificateError(UnlearnError):
    """A key or a certificate cannot be used, or a signature does not fit."""


class ReleaseError(UnlearnError):
    """A release cannot be published, found, promoted or brought back, or is not what its certificate says."""


class CycleError(UnlearnError):
    """A cycle that serves deletion requests cannot go on as it is."""


class MissingExtra(UnlearnError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        self._asked = package, extra, purpose
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'unlearn[{extra}]'")

    def __reduce__(self) -> tuple:
        return type(self), self._asked
