"""Where refusing is right although transformers goes on: the documented limits."""

# A part of the message, and why we stop there. Everything else that transformers takes and we do
# not is a failure.
LIMITS: tuple[tuple[str, str], ...] = (
    ("divide no matrix", "convert: no matrix of this checkpoint has columns in such groups"),
    ("; this model holds", "more tokens than config.json gives the model, which we never overrun"),
)


def limit_for(message: str) -> str | None:
    """The reason of the documented limit that a refusal names."""
    return next((reason for part, reason in LIMITS if part in message), None)
