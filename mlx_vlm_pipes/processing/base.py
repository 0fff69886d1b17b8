"""A request's way to tokens and pixels, the same for every family.

messages -> text by the chat template -> pictures and clips encoded by the family -> placeholders
expanded -> token ids -> the token range of each picture -> a context for the engine.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np

from mlx_vlm_pipes.contexts import (
    EOSTracker,
    ImageMetadata,
    SamplingParams,
    TextAndVisionContext,
    TextContext,
    TokenBuffer,
)
from mlx_vlm_pipes.errors import InputError, ProcessorError, shown
from mlx_vlm_pipes.facts import RoomFacts
from mlx_vlm_pipes.media.previews import KeptPreviews
from mlx_vlm_pipes.media.records import MediaRecord
from mlx_vlm_pipes.options import LogitsProcessor
from mlx_vlm_pipes.processing.images import Picture, load_picture
from mlx_vlm_pipes.processing.messages import (
    KINDS,
    Message,
    as_lists,
    as_texts,
    conversation,
    require_shown,
    user_texts,
)
from mlx_vlm_pipes.processing.pages import spread
from mlx_vlm_pipes.processing.pdf import require_few
from mlx_vlm_pipes.processing.settings import PixelSettings, read_json
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.processing.tool_calls import tool_call_forms
from mlx_vlm_pipes.processing.transforms import image_hash
from mlx_vlm_pipes.processing.types import ProcessedPrompt, PromptRequest
from mlx_vlm_pipes.progress import Watch, noted

MODEL_OPTIONS = ("min_pixels", "max_pixels")  # of a PromptRequest; not every model takes them
MAX_RETRY_SECONDS = 0.5  # a template that fails this slowly gets no second form to try
MAX_MEDIA_TOKENS = 2**18  # of one picture or clip; far beyond any model, short of a flood


class ContextFields(TypedDict):
    """What a family passes on to its context class: the fields that all contexts share."""

    max_length: int
    tokens: TokenBuffer
    sampling_params: SamplingParams
    eos_tracker: EOSTracker
    ignore_eos: bool
    request_id: str
    log_probabilities: int
    log_probabilities_echo: bool
    model_name: str
    logits_processors: Sequence[LogitsProcessor]


@dataclass(frozen=True)
class EncodedMedia:
    """A picture or clip ready for the model.

    replacement: the text that takes the place of its marker. images: what it adds to the context,
    each with the range [0, number of its placeholders) until the tokens are known. token_id: of
    these placeholders. record: what is told of it, its tokens still to be found.
    """

    replacement: str
    token_id: int
    images: Sequence[ImageMetadata]
    record: MediaRecord

    @property
    def kind(self) -> str:
        return self.record.kind

    @property
    def grid(self) -> tuple[int, ...]:
        return self.record.grid


@dataclass(frozen=True)
class MediaTokens:
    """How pictures and clips stand in a prompt.

    markers: texts that stand for one, by kind; the first is what the chat template writes. ids: as
    in TextAndVisionContext.vision_token_ids. text_markers: markers to put into contents that are
    flattened to text, for templates that take no lists.
    """

    markers: Mapping[str, tuple[str, ...]]
    ids: tuple[int, ...]
    text_markers: Mapping[str, str] = field(default_factory=dict)


class TextProcessor:
    """Tokenizer, chat template and end tokens; the processor of a model without vision.

    Args: folder, the checkpoint; config, its parsed config.json; overrides,
    `vision_config_overrides`, which win over config.json.
    Raises: ProcessorError if the tokenizer or generation_config.json cannot be used; ConfigError
    for an override that the architecture does not have.
    """

    facts: ClassVar[RoomFacts]
    accepted_options: ClassVar[tuple[str, ...]] = ()  # which of MODEL_OPTIONS this model takes

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.facts.check_overrides(overrides or {})
        self.folder = folder
        self.tokenizer = Tokenizer(folder)
        self.eos_token_ids = read_eos_token_ids(folder, config, self.tokenizer)
        names = config.get("architectures") or [config.get("model_type")]
        self.architecture = str(names[0] if isinstance(names, list) else names)

    def process(self, request: PromptRequest, watch: Watch | None = None) -> ProcessedPrompt:
        """Tokens of a request.

        Raises: InputError for pictures, clips or malformed messages; ProcessorError for a chat
        template that is missing or fails.
        """
        del watch  # of pictures, which there are none
        chat = None if self.is_raw(request) else conversation(request)
        media = chat or request
        if media.images or media.videos:
            raise InputError(
                f"{self.architecture} reads text only; it cannot take "
                f"{len(media.images)} images and {len(media.videos)} videos"
            )
        self.refuse_options(request)
        if chat is None:
            text = str(request.prompt)
            ids = self.tokenize(text)
        else:
            forms = [*_text_forms(chat.messages), chat.messages]
            text = self.render(forms, request.template_variables)
            # As in tokenizer.apply_chat_template: the template alone decides about BOS.
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ProcessedPrompt(text, ids, [], [])

    def new_context(
        self,
        processed: ProcessedPrompt,
        *,
        max_length: int,
        sampling_params: SamplingParams | None = None,
        request_id: str = "",
        log_probabilities: int = 0,
        log_probabilities_echo: bool = False,
        model_name: str = "",
        logits_processors: Sequence[LogitsProcessor] = (),
    ) -> TextContext:
        """The engine's context of a processed prompt.

        A request that ignores end tokens and lists its own ends at these alone.
        Raises: ContextTooLong if the prompt exceeds max_length; InputError if it is empty.
        """
        params = sampling_params or SamplingParams()
        only_listed = params.ignore_eos and bool(params.stop_token_ids)
        known = frozenset() if only_listed else self.eos_token_ids
        return self.make_context(
            processed,
            {
                "max_length": max_length,
                "tokens": TokenBuffer(np.array(processed.input_ids, np.int64)),
                "sampling_params": params,
                "eos_tracker": EOSTracker(
                    known | frozenset(params.stop_token_ids), (), tuple(params.stop)
                ),
                "ignore_eos": params.ignore_eos and not only_listed,
                "request_id": request_id,
                "log_probabilities": log_probabilities,
                "log_probabilities_echo": log_probabilities_echo,
                "model_name": model_name,
                "logits_processors": logits_processors,
            },
        )

    def make_context(self, processed: ProcessedPrompt, fields: ContextFields) -> TextContext:
        """Build the family's context class from the fields that all contexts share."""
        del processed
        return TextContext(**fields)

    def is_raw(self, request: PromptRequest) -> bool:
        if request.raw and not isinstance(request.prompt, str):
            raise InputError("raw takes a text prompt, not messages")
        if request.raw and request.system is not None:
            raise InputError("raw takes no system prompt; write it into the text")
        if request.raw and request.template_variables:
            raise InputError("raw uses no chat template: no tools, no chat_template_kwargs")
        return request.raw

    def refuse_options(self, request: PromptRequest) -> None:
        """Raises: InputError for options that this model does not take."""
        refused = [name for name in MODEL_OPTIONS if name not in self.accepted_options]
        given = [name for name in refused if getattr(request, name) is not None]
        if given:
            message = f"{' and '.join(given)}: not for {self.architecture}; leave it out"
            raise InputError(message, param=given[0])

    def tokenize(self, text: str) -> list[int]:
        """Token ids with the tokenizer's special tokens, but no second BOS."""
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and text.startswith(str(bos))
        return self.tokenizer.encode(text, add_special_tokens=not has_bos)

    def render(
        self, forms: Sequence[list[Message]], variables: Mapping[str, Any] | None = None
    ) -> str:
        """The prompt text, from the first form of the messages that the template handles.

        Templates differ in whether content is a text or a list of parts: one that is given the
        wrong form fails, or loses the text. Raises: what the first form raised, if all fail.
        """
        failures: list[ProcessorError] = []
        deadline = time.monotonic() + MAX_RETRY_SECONDS
        lossy: str | None = None
        for messages in (form for content in forms for form in tool_call_forms(content)):
            try:
                text = self.tokenizer.apply_chat_template(messages, template_variables=variables)
            except ProcessorError as error:
                failures.append(error)
                if time.monotonic() > deadline:
                    break
                continue
            if all(part in text for part in user_texts(messages)):
                return text
            lossy = text if lossy is None else lossy
        if lossy is None:
            raise failures[0]
        return lossy


class VisionProcessor(TextProcessor, ABC):
    """The processor of a model with vision; a family says how its media are encoded."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(folder, config, overrides)
        self.previews = KeptPreviews()
        self.tokens = self.read_settings(config, overrides or {})

    @abstractmethod
    def read_settings(self, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> MediaTokens:
        """Read the family's sizes and files; how media stand in a prompt.

        Raises: ProcessorError for a missing token or file, or settings that contradict config.json.
        """

    @property
    @abstractmethod
    def digest(self) -> str:
        """A text that names every setting which changes pixels."""

    def agreed_token_id(self, token: str, config: Mapping[str, Any], *keys: str) -> int:
        """The token's id. keys: of config.json, which may name it as well.

        Raises: ProcessorError if the tokenizer lacks the token, or config.json names another id.
        """
        number = self.tokenizer.require_token_id(token)
        for key in keys:
            said = config.get(key)
            if said is not None and said != number:
                raise ProcessorError(
                    f"config.json says that {key} is {shown(said)}, the tokenizer has {token!r} "
                    f"at {number}; they are of different models"
                )
        return number

    @abstractmethod
    def encode_image(self, source: Any, request: PromptRequest) -> EncodedMedia:
        """Load and process one picture. Raises: InputError, MediaError."""

    @abstractmethod
    def encode_clip(self, source: Any, request: PromptRequest) -> EncodedMedia:
        """Load and process one clip. Raises: InputError, MediaError."""

    @abstractmethod
    def arrays(self, media: Sequence[EncodedMedia]) -> dict[str, np.ndarray]:
        """All media, in token order, in the layout of the Hugging Face processor."""

    def process(self, request: PromptRequest, watch: Watch | None = None) -> ProcessedPrompt:
        """Tokens and pixels of a request. watch: is told of each picture and clip that is read.

        Raises: InputError when placeholders and media differ in number, or messages are malformed;
        MediaError for a picture that cannot be read; ProcessorError for the chat template.
        """
        if self.is_raw(request):
            text, videos = str(request.prompt), request.videos
            images = [page for image in request.images for page in spread(image, request.access)]
        else:
            chat = conversation(request, self.tokens.markers)
            text = self.render(self.forms(chat.messages), request.template_variables)
            require_shown(chat.messages, text, self.tokens.markers)
            images, videos = chat.images, chat.videos
        require_few(images)
        self.check(request, len(videos))
        order = self.place(text, len(images), len(videos))
        encoded = {
            "image": [
                self.encode_image(source, request)
                for source in noted(images, watch, "reading pictures", "picture")
            ],
            "video": [
                self.encode_clip(source, request)
                for source in noted(videos, watch, "reading clips", "clip")
            ],
        }
        queues = {kind: iter(items) for kind, items in encoded.items()}
        media = [next(queues[kind]) for kind, _, _ in order]
        ids = self.tokenize(expand(text, order, media))
        metadata, records = self.locate(ids, media)
        return ProcessedPrompt(text, ids, metadata, records, lambda: self.arrays(media))

    def check(self, request: PromptRequest, num_videos: int) -> None:
        """Raises: InputError for options, or clips, that the family does not take."""
        del num_videos  # for the families that take none
        self.refuse_options(request)

    def forms(self, messages: list[Message]) -> list[list[Message]]:
        """The messages in the forms that templates may want, best first."""
        flat = as_texts(messages, self.tokens.text_markers)
        if self.tokens.text_markers:
            return [flat, messages, as_lists(messages)]
        return [messages, as_lists(messages), flat]

    def place(self, text: str, num_images: int, num_videos: int) -> list[tuple[str, int, int]]:
        """(kind, start, end) of every marker in the text, in order.

        Raises: InputError if there are more or fewer than pictures and clips. Without media only
        the model's own placeholder token counts, and where a kind's first marker stands for all
        of them, only that one: another marker may be plain text.
        """
        counts = {"image": num_images, "video": num_videos}
        found: list[tuple[str, int, int]] = []
        own = set(self.tokens.ids)
        for kind in KINDS:
            markers = self.tokens.markers.get(kind, ())
            if not counts[kind]:
                markers = [m for m in markers if self.tokenizer.token_id(m) in own]
            spots = _spots(kind, markers, text)
            if len(spots) != counts[kind] and len(markers) > 1:
                alone = _spots(kind, markers[:1], text)
                spots = alone if len(alone) == counts[kind] else spots
            if len(spots) != counts[kind]:
                raise InputError(
                    f"{counts[kind]} {kind}s for {len(spots)} placeholders "
                    f"({' or '.join(markers) or 'none known'}) in the prompt; "
                    f"give one {kind} for each"
                )
            found += spots
        return sorted(found, key=lambda spot: spot[1])

    def locate(
        self, ids: list[int], media: Sequence[EncodedMedia]
    ) -> tuple[list[ImageMetadata], list[MediaRecord]]:
        """The token range of every image. Raises: InputError for placeholders without a picture."""
        tokens = np.array(ids, np.int64)
        kinds = {item.token_id for item in media} | {self.tokens.ids[0]}
        spots = {kind: np.flatnonzero(tokens == kind) for kind in kinds}
        used = dict.fromkeys(kinds, 0)
        metadata, records = [], []
        for item in media:
            first, kind = len(metadata), item.token_id
            for image in item.images:
                run = spots[kind][used[kind] : used[kind] + image.end_idx]
                if len(run) < image.end_idx:
                    raise InputError(
                        f"the prompt holds {len(spots[kind])} image tokens, fewer than "
                        "its pictures need; the tokenizer splits the placeholder"
                    )
                used[kind] += len(run)
                metadata.append(replace(image, start_idx=int(run[0]), end_idx=int(run[-1]) + 1))
            records.append(self._located(item, metadata[first:]))
        for kind, spot in spots.items():
            if len(spot) != used[kind]:
                raise InputError(
                    f"the prompt holds {len(spot)} image tokens (id {kind}) but its pictures fill "
                    f"{used[kind]}; remove the placeholder from the text"
                )
        return metadata, records

    def _located(self, item: EncodedMedia, images: Sequence[ImageMetadata]) -> MediaRecord:
        """Its record, with its tokens."""
        parts = item.record.num_parts // len(images)
        self.previews.add(item.record.preview)
        return replace(
            item.record,
            coordinates=self.facts.coordinates,
            num_tokens=sum(image.end_idx for image in item.images),
            start_idx=images[0].start_idx,
            end_idx=images[-1].end_idx,
            tile_spans=tuple(span for image in images for span in _parts_of(image, parts)),
        )

    def new_image(self, pixels: np.ndarray, num_tokens: int) -> ImageMetadata:
        """Hashed pixels that fill num_tokens placeholders, before these are found."""
        return ImageMetadata(0, num_tokens, pixels, image_hash(pixels, self.digest))

    def make_context(self, processed: ProcessedPrompt, fields: ContextFields) -> TextContext:
        return TextAndVisionContext(
            **fields, vision_token_ids=list(self.tokens.ids), images=processed.images
        )

    def load(self, source: Any, request: PromptRequest, pixels: PixelSettings) -> Picture:
        return load_picture(source, request.access, convert=pixels.convert_rgb)


def _parts_of(image: ImageMetadata, count: int) -> list[tuple[int, int]]:
    """The token range of each of an image's parts, which are equal and follow one another."""
    if count == 1:
        return [(image.start_idx, image.end_idx)]
    step = (image.end_idx - image.start_idx) // count
    return [(image.start_idx + i * step, image.start_idx + (i + 1) * step) for i in range(count)]


def _spots(kind: str, markers: Sequence[str], text: str) -> list[tuple[str, int, int]]:
    """(kind, start, end) of every marker in the text."""
    pattern = "|".join(map(re.escape, markers)) or r"(?!)"
    return [(kind, match.start(), match.end()) for match in re.finditer(pattern, text)]


def check_num_tokens(count: int, size: tuple[int, int]) -> None:
    """Raises: InputError if a picture of this (width, height) would become absurdly many tokens."""
    if count > MAX_MEDIA_TOKENS:
        raise InputError(
            f"a picture or clip of {size[0]}x{size[1]} pixels becomes {count} tokens; "
            f"the limit is {MAX_MEDIA_TOKENS}, make it smaller"
        )


def expand(text: str, order: Sequence[tuple[str, int, int]], media: Sequence[EncodedMedia]) -> str:
    """The text with each marker replaced by its picture's placeholder run."""
    pieces, end = [], 0
    for (_, start, stop), item in zip(order, media, strict=True):
        pieces += [text[end:start], item.replacement]
        end = stop
    return "".join([*pieces, text[end:]])


def read_eos_token_ids(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer
) -> frozenset[int]:
    """End tokens: generation_config.json, else config.json (or its text part), else the tokenizer.

    Raises: ProcessorError if a value is neither a whole number nor a list of them.
    """
    generation = read_json(folder / "generation_config.json") or {}
    sections = [config.get(key) for key in ("text_config", "llm_config")]
    places = [generation, config, *[s for s in sections if isinstance(s, Mapping)]]
    for place in places:
        value = place.get("eos_token_id")
        if value is None:
            continue
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(type(n) is int and n >= 0 for n in numbers):
            raise ProcessorError(f"{folder}: eos_token_id is {shown(value)}; expected token ids")
        return frozenset(numbers)
    return frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})


def _text_forms(messages: list[Message]) -> list[list[Message]]:
    """Contents as texts; lists of several parts first as they are, for templates that trim each."""
    single = [m for m in messages if len(m["content"]) < 2 or isinstance(m["content"], str)]
    flat = as_texts(messages, {})
    return [flat] if len(single) == len(messages) else [messages, flat]
