"""The mistakes a user can make, one class per place where they are found.

The message of a `UserError` is complete on its own: it names the file or key, the value and the remedy. The
command line prints it after "error: " without a traceback and exits with status 2.
"""


class UserError(ValueError):
    """A mistake the user can fix; base class of all the others."""


class ConfigError(UserError):
    """A recipe or a flag is not valid."""


class InstallError(UserError):
    """A required package is not installed."""


class ModelError(UserError):
    """The model is missing, unreadable, or not one that can be trained here."""


class RunDirError(UserError):
    """The run directory cannot be used that way."""


class JournalError(UserError):
    """The journal is damaged or belongs to another run."""


class CheckpointError(UserError):
    """A checkpoint is damaged, incomplete, or could not be written."""


class SamplesError(UserError):
    """A file of graded completions is damaged, belongs to another evaluation, or cannot be written."""


class EngineError(UserError):
    """The inference engine did not start or failed; `__cause__` is what vLLM raised."""


class TrainingError(UserError):
    """Training cannot continue; the progress so far is on disk."""


class TaskError(UserError):
    """A task's data, options or file cannot be used."""


class PopulationError(UserError):
    """A batch, fitness or state does not fit the population of a module."""
