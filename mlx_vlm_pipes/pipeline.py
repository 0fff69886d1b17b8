"""Pipeline: what a user holds. Load a checkpoint, ask about pictures, get text."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from mlx_vlm_pipes.contexts import SamplingParams, TextContext
from mlx_vlm_pipes.engine.engine import Engine
from mlx_vlm_pipes.engine.plan import Plan
from mlx_vlm_pipes.engine.requests import Chunk, Handle, Timings, Usage
from mlx_vlm_pipes.errors import ContextTooLong, InputError
from mlx_vlm_pipes.interfaces import LogProbabilities, PipelineModelWithKVCache
from mlx_vlm_pipes.processing.types import ProcessedPrompt, PromptRequest

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mlx_vlm_pipes.processing.base import TextProcessor
    from mlx_vlm_pipes.processing.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]]
DEFAULT_MAX_TOKENS = 256


class PromptOptions(TypedDict, total=False):
    """How a prompt is read.

    raw: the text verbatim, no chat template. system: a system message before the prompt.
    fps: frames a second that a list of frames holds, or that are sampled from a video file.
    min_pixels, max_pixels: limits of one picture, for models that take any size. num_frames:
    instead of fps.
    """

    raw: bool
    system: str | None
    fps: float
    min_pixels: int | None
    max_pixels: int | None
    num_frames: int | None


class GenerateOptions(PromptOptions, total=False):
    """How an answer is made; the defaults are greedy, at most 256 tokens.

    temperature 0 is greedy. stop: strings that end the answer and are not shown. logprobs: how
    many of the best tokens to score at each place; prompt_logprobs: the prompt's tokens too.
    logit_bias: token id -> added to its logit. adapter: the name of a loaded LoRA
    adapter, or "base"; by default the only one that is loaded.
    """

    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: bool
    adapter: str | None


class BatchRequest(GenerateOptions, total=False):
    """One request of `generate_batch`: a prompt or messages, its pictures, any option."""

    prompt: str
    messages: Sequence[Mapping[str, Any]]
    images: Sequence[Any]
    videos: Sequence[Any]


@dataclass(frozen=True)
class GenerationResult:
    """A finished answer. finish_reason: "stop" or "length"; tokens include the end token."""

    text: str
    tokens: list[int]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: list[LogProbabilities] | None = None
    prompt_logprobs: LogProbabilities | None = None


_PROMPT_KEYS = PromptOptions.__annotations__.keys()
_OPTION_KEYS = GenerateOptions.__annotations__.keys() | _PROMPT_KEYS


class Pipeline:
    """A loaded checkpoint: `encode`, `logits`, `generate`, `stream`, `generate_batch`.

    Safe to call from any thread; the model itself runs on one of its own.
    """

    def __init__(
        self, model: PipelineModelWithKVCache, processor: TextProcessor, engine: Engine
    ) -> None:
        self.model = model
        self.processor = processor
        self.engine = engine

    @property
    def config(self) -> Any:
        """The documented architecture config, finalised."""
        return self.model.model_config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer

    @property
    def max_seq_len(self) -> int:
        return self.model.max_seq_len

    def encode(
        self,
        prompt: Prompt,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        **options: Unpack[PromptOptions],
    ) -> ProcessedPrompt:
        """Token ids (.input_ids) and pixels (.pixel_values, .pixel_values_videos) of a prompt.

        prompt: text, wrapped as one user message, or chat messages. images: paths, URLs, PIL
        images, numpy arrays or bytes. videos: paths or lists of frames.
        Raises: InputError for a prompt and media that do not fit each other.
        """
        _check_keys(options, _PROMPT_KEYS)
        return self.processor.process(
            PromptRequest(prompt, tuple(_media(images)), tuple(_clips(videos)), **options)
        )

    def logits(
        self,
        prompt: Prompt,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        *,
        adapter: str | None = None,
        **options: Unpack[PromptOptions],
    ) -> np.ndarray:
        """float32 [n_tokens, vocab_size]: the logits at every position of the prompt.

        adapter: as for `generate`.
        """
        processed = self.encode(prompt, images, videos, **options)
        self._check_length(processed, 0)
        context = self.processor.new_context(
            processed, max_length=self.max_seq_len, model_name=self._adapter(adapter)
        )
        return self.engine.prompt_logits(context)

    def generate(
        self,
        prompt: Prompt,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        **options: Unpack[GenerateOptions],
    ) -> GenerationResult:
        """Answer a prompt. Raises: InputError for anything wrong with the request."""
        return collect(self._submit(prompt, images, videos, options))

    def stream(
        self,
        prompt: Prompt,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Chunk]:
        """The answer as it is made; close the iterator to cancel."""
        return iter(self._submit(prompt, images, videos, options))

    def submit(
        self,
        prompt: Prompt,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        **options: Unpack[GenerateOptions],
    ) -> Handle:
        """Queue a request and return at once; iterate the handle with `for` or `async for`."""
        return self._submit(prompt, images, videos, options)

    def generate_n(
        self,
        prompt: Prompt,
        n: int,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        **options: Unpack[GenerateOptions],
    ) -> list[GenerationResult]:
        """n answers to one prompt, which is read once; they decode together.

        Answer i is the one that `generate` gives with `seed` + i; without a seed, and with a
        temperature, all differ. Raises: InputError for anything wrong with the request.
        """
        if not isinstance(n, int) or n < 1:
            raise InputError(f"n is {n!r}, expected a number of answers, at least 1")
        processed = self._read(prompt, images, videos, options)
        seed = options.get("seed")
        handles: list[Handle] = []
        try:
            for i in range(n):
                own: Any = {**options, "seed": None if seed is None else seed + i}
                handles.append(self._start(processed, own))
            return [collect(handle) for handle in handles]
        finally:
            for handle in handles:
                handle.close()

    def generate_batch(
        self, requests: Sequence[BatchRequest | str], **options: Unpack[GenerateOptions]
    ) -> list[GenerationResult]:
        """Answer several requests together: the same answers as one at a time, in order.

        options hold for all requests; a request's own come first. The first failure is raised,
        and the rest of the batch cancelled.
        """
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(self._submit_request(request, options))
            return [collect(handle) for handle in handles]
        finally:
            for handle in handles:
                handle.close()

    def plan(
        self,
        prompt: Prompt,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        **options: Unpack[GenerateOptions],
    ) -> Plan:
        """What a request needs: exact token counts, cache bytes, predicted peak; runs nothing."""
        processed = self._read(prompt, images, videos, options)
        return self.engine.plan(self._context(processed, options))

    def peak_memory_bytes(self) -> int:
        """The most memory that MLX held at once since the model was loaded."""
        return self.engine.peak_memory_bytes()

    def close(self) -> None:
        """Stop the engine and give its memory back once nothing else holds the pipeline."""
        self.engine.close()

    def _submit_request(self, request: BatchRequest | str, shared: GenerateOptions) -> Handle:
        own: dict[str, Any] = {"prompt": request} if isinstance(request, str) else dict(request)
        prompt, messages = own.pop("prompt", None), own.pop("messages", None)
        if (prompt is None) == (messages is None):
            raise InputError("a request needs either 'prompt' or 'messages'")
        images, videos = own.pop("images", ()), own.pop("videos", ())
        merged: Any = {**shared, **own}
        return self._submit(prompt if messages is None else messages, images, videos, merged)

    def _submit(
        self, prompt: Prompt, images: Sequence[Any], videos: Sequence[Any], options: GenerateOptions
    ) -> Handle:
        return self._start(self._read(prompt, images, videos, options), options)

    def _read(
        self, prompt: Prompt, images: Sequence[Any], videos: Sequence[Any], options: GenerateOptions
    ) -> ProcessedPrompt:
        """Tokens and pixels of a request, with those of its options that concern them."""
        _check_keys(options, _OPTION_KEYS)
        reading: Any = {k: v for k, v in options.items() if k in _PROMPT_KEYS}
        return self.encode(prompt, images or (), videos or (), **reading)

    def _start(self, processed: ProcessedPrompt, options: GenerateOptions) -> Handle:
        """Hand a processed prompt to the engine."""
        context = self._context(processed, options)
        return self.engine.submit(context, self.tokenizer.stream_decoder())

    def _context(self, processed: ProcessedPrompt, options: GenerateOptions) -> TextContext:
        """The engine's context; refuses what is too long before anything is computed."""
        asked = options.get("max_tokens")
        self._check_length(processed, asked or 0)
        return self.processor.new_context(
            processed,
            max_length=self.max_seq_len,
            sampling_params=sampling_params(options),
            request_id=uuid.uuid4().hex,
            log_probabilities=options.get("logprobs", 0),
            log_probabilities_echo=options.get("prompt_logprobs", False),
            model_name=self._adapter(options.get("adapter")),
        )

    def _adapter(self, name: str | None) -> str:
        """The adapter of a request: the one named; the only one loaded; "base" means none."""
        loaded = self.model.adapters
        if name is None:
            return loaded[0] if len(loaded) == 1 else ""
        return "" if name == "base" else name

    def _check_length(self, processed: ProcessedPrompt, new_tokens: int) -> None:
        total = len(processed.input_ids) + new_tokens
        if total > self.max_seq_len:
            raise ContextTooLong(
                f"{len(processed.input_ids)} prompt tokens and {new_tokens} new ones make {total}; "
                f"this model holds {self.max_seq_len}; shorten the prompt or ask for fewer tokens"
            )


def sampling_params(options: GenerateOptions) -> SamplingParams:
    """The options that decide the next token, in the documented record."""
    stop = options.get("stop", ())
    asked = options.get("max_tokens")
    return SamplingParams(
        top_k=options.get("top_k", -1),
        top_p=options.get("top_p", 1.0),
        min_p=options.get("min_p", 0.0),
        temperature=options.get("temperature", 0.0),
        repetition_penalty=options.get("repetition_penalty", 1.0),
        presence_penalty=options.get("presence_penalty", 0.0),
        frequency_penalty=options.get("frequency_penalty", 0.0),
        max_new_tokens=DEFAULT_MAX_TOKENS if asked is None else asked,
        min_new_tokens=options.get("min_tokens", 0),
        ignore_eos=options.get("ignore_eos", False),
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        stop_token_ids=tuple(options.get("stop_token_ids", ())),
        seed=options.get("seed"),
        logit_bias=dict(options.get("logit_bias", {})),
    )


def collect(handle: Handle) -> GenerationResult:
    """Read a handle to its end. Raises: whatever the request failed with."""
    texts, tokens, scores = [], [], []
    last: Chunk | None = None
    for chunk in handle:
        texts.append(chunk.text)
        if chunk.token is not None:
            tokens.append(chunk.token)
        if chunk.logprobs is not None:
            scores.append(chunk.logprobs)
        last = chunk
    if last is None or last.usage is None or last.timings is None:
        raise InputError("the request was cancelled before it ended")
    return GenerationResult(
        text="".join(texts),
        tokens=tokens,
        finish_reason=last.finish_reason or "stop",
        usage=last.usage,
        timings=last.timings,
        logprobs=scores or None,
        prompt_logprobs=last.prompt_logprobs,
    )


def _check_keys(options: Mapping[str, Any], known: Any) -> None:
    unknown = sorted(options.keys() - known)
    if unknown:
        raise InputError(f"unknown option {unknown[0]!r}; options: {', '.join(sorted(known))}")


def _media(images: Any) -> Sequence[Any]:
    """A single picture counts as a list of one."""
    return images if isinstance(images, (list, tuple)) else [images]


def _clips(videos: Any) -> Sequence[Any]:
    return videos if isinstance(videos, (list, tuple)) else [videos]
