"""One scheduler on every rank, all in step: rank 0 announces what comes from outside, the others do
as it does.

Each rank has the same scheduler over its own part of the model, and gets the same requests, tokens
and limits, so all of them decide alike. Before a step, rank 0 sends one message: the requests that
are new (without pixels, texts and sampling options: it alone encodes pictures and chooses tokens),
those that end for a reason that only it knows (their requester has gone, a stop string has come, a
sampler has failed), and the paces that it has measured. Nobody answers, and most messages are
empty, so the step in flight stays in flight. The others wait for the message, and idle without one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_vlm_pipes.contexts import (
    EOSTracker,
    ImageMetadata,
    SamplingParams,
    TextContext,
    TokenBuffer,
)
from mlx_vlm_pipes.distributed.codec import Malformed, class_name, pack, unpack
from mlx_vlm_pipes.distributed.team import Team
from mlx_vlm_pipes.engine.memory import machine_memory
from mlx_vlm_pipes.engine.requests import Job
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.errors import InputError, RankLost
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache

Leaving = Sequence[tuple[Job, bool]]  # jobs that end, and whether their prefixes are kept
Paces = tuple[float | None, ...]

FORGET, DIGEST, END = "forget", "digest", "end"  # what is announced beside steps
_PIXELS = frozenset(["pixel_values"])
# what of a request the other ranks need not know, or get in another form
_PRIVATE = (
    "tokens", "sampling_params", "eos_tracker", "constraint", "logits_processors", "json_schema",
    "request_id", "log_probabilities", "extra_model_args", "status",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What an announcement says of the step behind it."""

    jobs: Sequence[Mapping[str, Any]] = ()
    leaving: Sequence[tuple[int, bool]] = ()
    paces: Paces | None = None


class OthersConstraint:
    """Stands for the form of an answer on ranks that choose no tokens: that there is one decides
    when a step's tokens are chosen (`decode.Flight`)."""

    def allowed(self) -> np.ndarray:
        raise RuntimeError("rank 0 alone chooses tokens")

    def accept(self, token: int) -> None:
        del token

    def forced(self) -> list[int]:
        return []


class Leader:
    """Rank 0's side."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self._number = 0
        self._new: list[Mapping[str, Any]] = []
        self._paces: Paces | None = None

    def take(self, job: Job) -> None:
        """A request has been queued: the others hear of it before the next step."""
        self._number += 1
        job.number = self._number
        self._new.append(_described(job))

    def announce(self, leaving: Leaving, paces: Paces) -> None:
        """Say what is new, before the step that it concerns. Raises: RankLost."""
        changed = None if paces == self._paces else paces
        self._paces = paces
        ends = [(job.number, is_kept) for job, is_kept in leaving]
        jobs, self._new = self._new, []
        is_quiet = not (jobs or ends) and changed is None
        self.team.announce(b"" if is_quiet else pack([jobs, ends, changed], _PIXELS))

    def order(self, word: str) -> None:
        """Say something else than a step. Raises: RankLost."""
        self.team.announce(pack(word))


def read_step(message: bytes, classes: Mapping[str, type]) -> Step | str:
    """What rank 0 has announced: a step, or a word. Raises: RankLost for what it cannot have."""
    if not message:
        return Step()
    try:
        said = unpack(message, classes)
        return said if isinstance(said, str) else Step(*said)
    except (Malformed, TypeError, ValueError) as error:
        raise RankLost(f"rank 0 has announced what this rank does not know: {error}") from None


# ---- requests


def name_pictures(context: TextContext) -> None:
    """Give every picture a hash: all ranks must know which are equal."""
    if any(image.image_hash is None for image in context.images):
        context.images = [
            replace(image, image_hash=secrets.randbits(63)) if image.image_hash is None else image
            for image in context.images
        ]


def _described(job: Job) -> dict[str, Any]:
    """A request for the other ranks."""
    context, params = job.context, job.context.sampling_params
    shown = [f.name for f in dataclasses.fields(context) if f.init and f.name not in _PRIVATE]
    fields = {name: vars(context)[name] for name in shown}
    eos = context.eos_tracker
    return {
        "number": job.number,
        "capacity": job.capacity,
        "wants": job.wants,
        "class": class_name(type(context)),
        "fields": fields,
        "tokens": context.tokens.all,
        "ends": [eos.eos_token_ids, eos.eos_sequences],
        "limits": [params.max_new_tokens, params.min_new_tokens, params.ignore_eos],
        "has_form": context.constraint is not None,
    }


def followed_context(said: Mapping[str, Any], classes: Mapping[str, type]) -> TextContext:
    """The context of a request that rank 0 has described."""
    most, least, ignores = said["limits"]
    ids, sequences = said["ends"]
    context: TextContext = classes[said["class"]](
        **said["fields"],
        tokens=TokenBuffer(said["tokens"]),
        eos_tracker=EOSTracker(ids, sequences),
        sampling_params=SamplingParams(
            temperature=0.0, max_new_tokens=most, min_new_tokens=least, ignore_eos=ignores
        ),
    )
    context.constraint = OthersConstraint() if said["has_form"] else None
    return context


def context_classes() -> dict[str, type]:
    """The classes that requests of the loaded architectures are made of, by full name."""
    roots = [*_descendants(TextContext), *_descendants(ImageMetadata)]
    known = (value for root in roots for value in vars(sys.modules[root.__module__]).values())
    made = {value for value in known if isinstance(value, type) and dataclasses.is_dataclass(value)}
    return {class_name(value): value for value in made.union(roots)}


def _descendants(root: type) -> Iterator[type]:
    yield root
    for child in root.__subclasses__():
        yield from _descendants(child)


# ---- limits


def shared_limits(
    team: Team, model: PipelineModelWithKVCache, config: EngineConfig
) -> tuple[EngineConfig, int, int]:
    """The smallest rank's limits, in this rank's bytes; the memory that requests may count on, and
    what rank 0 has for pictures encoded together. All ranks call it. Raises: RankLost.

    A token takes other bytes on ranks with more heads, so tokens are what is compared.
    """
    token = model.kv_params.bytes_per_token
    free = machine_memory(model.device) - model.weight_bytes
    everybody = team.gather(
        {
            "token": token,
            "kv": config.kv_bytes // token,
            "prefix": config.prefix_bytes // token,
            "image": config.image_bytes,
            "free": free,
        }
    )
    kv, prefix, image, least_free = (
        min(own[name] for own in everybody) for name in ("kv", "prefix", "image", "free")
    )
    limits = replace(config, kv_bytes=kv * token, prefix_bytes=prefix * token, image_bytes=image)
    first = everybody[0]
    room = first["free"] - (kv + prefix) * first["token"] - image
    return limits, least_free + model.weight_bytes, max(0, room)


def require_alone(team: Team | None, what: str) -> None:
    """Raises: InputError for what several ranks cannot do."""
    if team is not None:
        raise InputError(f"{what}: not with several ranks; load the model in one process for it")


# ---- comparing


def digest(parts: Sequence[Any]) -> str:
    """sha256 of values as `pack` writes them."""
    return hashlib.sha256(pack(list(parts))).hexdigest()
