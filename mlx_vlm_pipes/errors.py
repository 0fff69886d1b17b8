"""Every exception the package raises on purpose, in one tree.

    PipesError
    ├── CheckpointError (ValueError)      the model folder is wrong
    │   ├── CheckpointNotFound            nothing there, or not downloadable
    │   ├── ConfigError                   config.json: missing, broken, contradictory
    │   │   └── RanksDiffer               the processes of one model do not meet, or do not agree
    │   ├── UnsupportedModel              well formed, but not something we run
    │   ├── WeightsError                  safetensors: truncated, lying, missing, mis-shaped
    │   └── ProcessorError                tokenizer, chat template, processor files
    ├── InputError (ValueError)           the request is wrong
    │   ├── UnknownAdapter (RuntimeError) a request names a LoRA adapter that is not loaded
    │   ├── MediaError                    an image or a clip cannot be read or used
    │   ├── PrefixError                   a saved prefix is damaged, or another model's
    │   ├── ContextTooLong                more tokens than the model can hold
    │   └── OutOfBudget                   more memory than the engine may ever use
    ├── EngineClosed (RuntimeError)       the pipeline was closed before the answer was complete
    │   └── RankLost                      one of the processes that run the model has gone
    └── ImageTokenMismatch (ValueError)   vision rows and placeholders differ in number

`PipesWarning` is the category of our warnings. Each message is one line: what was wrong, what was
expected, what to do.
"""


class PipesError(Exception):
    """Base of everything raised on purpose."""


class CheckpointError(PipesError, ValueError):
    """A model folder cannot be used."""


class CheckpointNotFound(CheckpointError):
    """No such folder or hub id."""


class ConfigError(CheckpointError):
    """A configuration is missing, broken or contradicts itself."""


class RanksDiffer(ConfigError):
    """The processes that are to run one model do not reach each other, or have not the same."""


class UnsupportedModel(CheckpointError):
    """A well-formed checkpoint of a kind that this package does not run."""


class WeightsError(CheckpointError):
    """Weight files are damaged, or do not fit the configuration."""


class ProcessorError(CheckpointError):
    """Tokenizer, chat template or processor files are missing or unusable."""


class InputError(PipesError, ValueError):
    """A request cannot be answered as it stands. param: the option that is to blame, if one is."""

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownAdapter(InputError, RuntimeError):
    """A request names a LoRA adapter that is not loaded."""


class MediaError(InputError):
    """An image or a clip cannot be read or used."""


class PrefixError(InputError):
    """A file is no saved prefix, is damaged, or does not fit the loaded model."""


class ContextTooLong(InputError):
    """A prompt plus the tokens asked for exceed what the model can hold."""


class OutOfBudget(InputError):
    """A request needs more memory than the engine may ever use."""


class EngineClosed(PipesError, RuntimeError):
    """The pipeline was closed; nothing runs any more."""


class RankLost(EngineClosed):
    """One of the processes that run the model together has gone; the others cannot go on."""


class PipesWarning(UserWarning):
    """Something works, but less well than the user may think; said once, in one line."""


class ImageTokenMismatch(PipesError, ValueError):
    """The number of vision rows differs from the number of placeholder tokens."""


def shown(value: object, limit: int = 60) -> str:
    """A value as Python writes it, on one line of at most `limit` characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an int of thousands of digits
        text = f"{type(value).__name__} that cannot be written"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def clip(text: object, limit: int = 80) -> str:
    """A printable, one-line form of an untrusted string, at most `limit` characters long."""
    shown = repr(str(text)[: limit + 1])[1:-1]
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def one_line(text: object, limit: int = 120) -> str:
    """What another library says, as the first `limit` characters of one line."""
    return " ".join(str(text).split())[:limit]
