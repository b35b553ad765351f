"""The errors `mmdd` raises on purpose: each message says what was wrong, where, and what to do."""


class MmddError(Exception):
    """Base class of every error that `mmdd` raises on purpose."""


class DataError(MmddError):
    """A dataset, an image or a caption file cannot be used as it is."""


class DownloadError(MmddError):
    """A public source could not be fetched, or what came is not what was expected."""


class ConfigError(MmddError):
    """A configuration asks for something impossible or contradictory."""


class NonFiniteError(MmddError):
    """A loss or a gradient stopped being a finite number during a loop."""


class StoreError(MmddError):
    """The results store holds something that cannot be read, or does not fit the question."""


class DiskError(MmddError):
    """A file could not be written: the disk is full, or the folder may not be written."""


class ArtefactError(MmddError):
    """A saved distilled set, checkpoint or weights file is damaged or of an unknown kind."""
