"""Where we and transformers part ways on purpose: the documented limits."""

from collections.abc import Sequence

# A part of the message, and why. Everything else that one side takes and the other does not is a
# failure.
Limits = Sequence[tuple[str, str]]
OURS: Limits = (
    ("; this model holds", "more tokens than config.json gives the model, which we never overrun"),
    (
        "expected a multiple of scale_factor",
        "frames that do not fold: transformers only takes text",
    ),
    ("smaller than a merged patch", "windows that hold no patch: transformers only takes text"),
    (
        "without resizing (do_resize false) frames must have",
        "frames of another size than the tower's: transformers drops what is no whole patch",
    ),
    ("is smaller than one patch", "a picture that transformers makes no token of"),
)
THEIRS: Limits = (
    ("Size must contain 'height' and 'width'", "Pixtral: a side that its ratio rounds to nothing"),
)


def limit_for(message: str, limits: Limits) -> str | None:
    """The reason of the documented limit that a refusal names."""
    return next((reason for part, reason in limits if part in message), None)
