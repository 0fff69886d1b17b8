"""Pipeline: what a user holds. Load a checkpoint, ask about pictures, get text."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mlx_vlm_pipes.contexts import SamplingParams, TextContext
from mlx_vlm_pipes.conversation import Conversation
from mlx_vlm_pipes.display.view import View
from mlx_vlm_pipes.engine.engine import Engine
from mlx_vlm_pipes.engine.plan import Plan
from mlx_vlm_pipes.engine.requests import ChunkIterator, Handle
from mlx_vlm_pipes.engine.saved_prefixes import SavedPrefix
from mlx_vlm_pipes.errors import ContextTooLong, InputError, shown
from mlx_vlm_pipes.given_media import listed, named_media
from mlx_vlm_pipes.grammar import Grammars
from mlx_vlm_pipes.hf_config import lookup
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.media.places import marked_places
from mlx_vlm_pipes.options import (
    OPTIONS,
    PROMPT_OPTIONS,
    SAMPLING_OPTIONS,
    GenerateOptions,
    Option,
    PromptOptions,
    among,
    complete_options,
    own_names,
    read_options,
    shows,
    unfit,
)
from mlx_vlm_pipes.paths import user_path
from mlx_vlm_pipes.processing.types import ProcessedPrompt, PromptRequest
from mlx_vlm_pipes.progress import Bar, Watch, bar
from mlx_vlm_pipes.result import GenerationResult, collect, collect_all

if TYPE_CHECKING:
    import os

    from typing_extensions import Self, Unpack

    from mlx_vlm_pipes.given_media import Media
    from mlx_vlm_pipes.processing.base import TextProcessor
    from mlx_vlm_pipes.processing.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | ProcessedPrompt


class BatchRequest(GenerateOptions, total=False):
    """One request of `generate_batch`: a prompt or messages, its pictures, any option."""

    prompt: str
    messages: Sequence[Mapping[str, Any]]
    images: Media
    videos: Media


class Pipeline:
    """A loaded checkpoint: `encode`, `logits`, `generate`, `stream`, `generate_batch`.

    Safe to call from any thread; the model itself runs on one of its own. `with load(...) as pipe:`
    closes it at the end.
    """

    def __init__(
        self,
        model: PipelineModelWithKVCache,
        processor: TextProcessor,
        engine: Engine,
        *,
        has_bars: bool = False,
    ) -> None:
        self.model = model
        self.processor = processor
        self.engine = engine
        self.has_bars = has_bars  # whether slow work is shown

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> NoReturn:
        """Says what to write instead of `model, processor = load(...)`, as mlx-vlm is used."""
        raise TypeError(
            "load() gives one pipeline, no pair of model and processor; write "
            "pipe = load(...), then pipe.generate(prompt, images)"
        )

    def __repr__(self) -> str:
        model = self.model
        return (
            f"Pipeline({lookup(model.huggingface_config, 'model_type')}: "
            f"{model.weight_bytes / 1e6:.3g} MB of weights, {model.dtype.name}, {model.device}, "
            f"{self.max_seq_len} tokens, adapters: {', '.join(model.adapters) or 'none'}"
            f"{'' if self.engine.drafter is None else f', drafts: {self.engine.drafter.name}'})"
        )

    def _repr_html_(self) -> str:
        from mlx_vlm_pipes.display.html import said_bytes, table_html
        from mlx_vlm_pipes.processing.base import VisionProcessor

        model, config = self.model, self.engine.config
        rows = {
            "weights": f"{said_bytes(model.weight_bytes)}, computing in {model.dtype.name}",
            "device": str(model.device),
            "context": f"{self.max_seq_len} tokens",
            "KV cache": f"up to {said_bytes(config.kv_bytes)} for all requests",
            "adapters": ", ".join(model.adapters) or "none",
            "drafts": "none" if self.engine.drafter is None else self.engine.drafter.name,
            "checkpoint": str(self.processor.folder),
        }
        if isinstance(self.processor, VisionProcessor):
            rows["boxes"] = f"in {self.processor.facts.coordinates.value}"
        return table_html(lookup(model.huggingface_config, "model_type"), rows)

    @property
    def config(self) -> Any:
        """The architecture's config, finalised."""
        return self.model.model_config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer

    @functools.cached_property
    def grammars(self) -> Grammars:
        """The forms that answers may be asked for."""
        ends = sorted(self.processor.eos_token_ids)
        return Grammars(self.tokenizer, self.model.vocab_size, ends)

    @property
    def max_seq_len(self) -> int:
        return self.model.max_seq_len

    @shows(PROMPT_OPTIONS)
    def encode(
        self,
        prompt: Prompt,
        images: Media = (),
        videos: Media = (),
        **options: Unpack[PromptOptions],
    ) -> ProcessedPrompt:
        """Token ids (.input_ids) and pixels (.pixel_values, .pixel_values_videos) of a prompt.

        prompt: text, wrapped as one user message, chat messages, or what this method has returned
        (as all methods take it: a prompt is then read once for several uses). images: paths, URLs,
        PIL images, arrays or bytes, in a list or one alone; a PDF is its pages, `doc.pdf#page=2-3`
        some of them. videos: a list of paths or lists of frames, or one path or array alone.
        Raises: InputError for a prompt and media that do not fit each other.
        """
        images, videos, given = named_media(images, videos, options)
        reading = read_options(given, PROMPT_OPTIONS)
        if isinstance(prompt, ProcessedPrompt):
            if listed(images) or listed(videos) or reading:
                raise InputError("the prompt is read already; give media and options to encode")
            return prompt
        asked = PromptRequest(prompt, listed(images), listed(videos), **reading)
        with bar(is_on=self.has_bars) as watch:
            return self.processor.process(asked, watch)

    @shows(PROMPT_OPTIONS)
    def show(
        self,
        images: Media = (),
        videos: Media = (),
        prompt: Prompt = "",
        **options: Unpack[PromptOptions],
    ) -> View:
        """What the model would see of pictures and clips; nothing runs. Arguments as `encode`.

        A notebook shows it; `.picture` is a PIL image of it, `.save(path)` writes that.
        """
        return View(self.encode(prompt, images, videos, **options).media)

    @shows(PROMPT_OPTIONS)
    def logits(
        self,
        prompt: Prompt,
        images: Media = (),
        videos: Media = (),
        *,
        adapter: str | None = None,
        **options: Unpack[PromptOptions],
    ) -> np.ndarray:
        """float32 [n_tokens, vocab_size]: the logits at every position of the prompt.

        adapter: as for `generate`.
        """
        name = OPTIONS["adapter"].read(adapter)
        processed = self.encode(prompt, images, videos, **options)
        self._check_length(processed, 0)
        context = self.processor.new_context(
            processed, max_length=self.max_seq_len, model_name=self._adapter(name)
        )
        with bar(is_on=self.has_bars) as watch:
            return self.engine.prompt_logits(context, watch)

    @shows(OPTIONS)
    def generate(
        self,
        prompt: Prompt,
        images: Media = (),
        videos: Media = (),
        **options: Unpack[GenerateOptions],
    ) -> GenerationResult:
        """Answer a prompt. Raises: InputError for anything wrong with the request."""
        return collect(self._submit(prompt, images, videos, options, self._new_watch()))

    @shows(OPTIONS)
    def stream(
        self,
        prompt: Prompt,
        images: Media = (),
        videos: Media = (),
        **options: Unpack[GenerateOptions],
    ) -> ChunkIterator:
        """The answer as it is made; close the iterator to cancel. media: what the model saw."""
        return iter(self._submit(prompt, images, videos, options, self._new_watch()))

    @shows(OPTIONS)
    def submit(
        self,
        prompt: Prompt,
        images: Media = (),
        videos: Media = (),
        **options: Unpack[GenerateOptions],
    ) -> Handle:
        """Queue a request and return at once; iterate the handle with `for` or `async for`."""
        return self._submit(prompt, images, videos, options, self._new_watch())

    @shows(OPTIONS)
    def generate_n(
        self,
        prompt: Prompt,
        n: int,
        images: Media = (),
        videos: Media = (),
        **options: Unpack[GenerateOptions],
    ) -> list[GenerationResult]:
        """n answers to one prompt, which is read once; they decode together.

        Answer i is the one that `generate` gives with `seed` + i; without a seed, and with a
        temperature, all differ. Raises: InputError for anything wrong with the request.
        """
        handles = self.submit_n(prompt, n, images, videos, **options)
        try:
            return collect_all(handles, has_bar=self.has_bars)
        finally:
            for handle in handles:
                handle.close()

    @shows(OPTIONS)
    def submit_n(
        self,
        prompt: Prompt,
        n: int,
        images: Media = (),
        videos: Media = (),
        *,
        keep_tokens: Sequence[str] = (),
        **options: Unpack[GenerateOptions],
    ) -> list[Handle]:
        """Queue a request for n answers, as `generate_n` gives them, and return at once.

        keep_tokens: special tokens that stay in the text, as "[TOOL_CALLS]"; others are left out.
        """
        count = Option("", name="n", kind=int, low=1).read(n)
        images, videos, named = named_media(images, videos, options)
        given = read_options(named, OPTIONS)
        processed = self._read(prompt, images, videos, given)
        seeds = [given["seed"] + i if "seed" in given else None for i in range(count)]
        handles: list[Handle] = []
        try:
            for seed in seeds:
                handles.append(self._start(processed, {**given, "seed": seed}, kept=keep_tokens))
        except BaseException:
            for handle in handles:
                handle.close()
            raise
        return handles

    @shows(OPTIONS)
    def generate_batch(
        self, requests: Sequence[BatchRequest | Prompt], **options: Unpack[GenerateOptions]
    ) -> list[GenerationResult]:
        """Answer several requests together: the same answers as one at a time, in order.

        A request is a prompt, a list of messages, or a dict with either and its own options.
        Where numbers are rounded (kv_bits, a dtype of 16 bits) the two differ by less than the
        rounding itself does, which may exchange tokens that are almost equally likely.
        options hold for all requests; a request's own come first. The first failure is raised,
        and the rest of the batch cancelled.
        """
        if not isinstance(requests, Sequence) or isinstance(requests, (str, bytes)):
            raise unfit("requests", requests, "a list of prompts and of dicts with a prompt")
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(self._submit_request(request, options))
            return collect_all(handles, has_bar=self.has_bars)
        finally:
            for handle in handles:
                handle.close()

    @shows(OPTIONS)
    def plan(
        self,
        prompt: Prompt,
        images: Media = (),
        videos: Media = (),
        **options: Unpack[GenerateOptions],
    ) -> Plan:
        """What a request needs: exact token counts, cache bytes, predicted peak; runs nothing."""
        images, videos, named = named_media(images, videos, options)
        given = read_options(named, OPTIONS)
        processed = self._read(prompt, images, videos, given)
        return self.engine.plan(self._context(processed, given))

    @shows(OPTIONS)
    def chat(self, **options: Unpack[GenerateOptions]) -> Conversation:
        """A conversation, which remembers its turns: `.send(text, images=...)`, `.stream(...)`.

        system stands before its turns, the other options hold for each of them, unless a turn has
        its own. Raises: InputError for options that `generate` refuses too.
        """
        return Conversation(self, options)

    @shows(PROMPT_OPTIONS)
    def save_prefix(
        self,
        path: str | os.PathLike[str],
        prompt: Prompt,
        images: Media = (),
        videos: Media = (),
        *,
        adapter: str | None = None,
        **options: Unpack[PromptOptions],
    ) -> SavedPrefix:
        """Write the cache of a prompt and of its pictures to a file, for `load_prefix`.

        What is not cached is computed first. adapter: as for `generate`.
        Raises: InputError for anything wrong with the request, for a file of another kind in its
        place, and where it cannot be written; OutOfBudget for more than the engine keeps.
        """
        name = OPTIONS["adapter"].read(adapter)
        processed = self.encode(prompt, images, videos, **options)
        context = self._context(processed, {"adapter": name})
        with bar(is_on=self.has_bars) as watch:
            return self.engine.save_prefix(user_path(path), context, watch)

    def load_prefix(self, path: str | os.PathLike[str]) -> SavedPrefix:
        """Read a file of `save_prefix`: requests that begin with its tokens take them from there.

        Raises: PrefixError for a file that is damaged, or of another model, adapter, dtype or
        kv_bits; OutOfBudget for one that is larger than what the engine keeps.
        """
        return self.engine.load_prefix(user_path(path))

    def peak_memory_bytes(self) -> int:
        """The most memory that MLX held at once since the model was loaded."""
        return self.engine.peak_memory_bytes()

    def close(self) -> None:
        """Stop the engine and give its memory back once nothing else holds the pipeline."""
        self.engine.close()

    def _submit_request(self, request: BatchRequest | Prompt, shared: GenerateOptions) -> Handle:
        if not isinstance(request, (str, Mapping, list, tuple)):
            expected = "a prompt, messages, or a dict with 'prompt' or 'messages'"
            raise unfit("a request", request, expected)
        own: dict[str, Any] = dict(request) if isinstance(request, Mapping) else {"prompt": request}
        # a request's own come first, whatever names the two are given by
        kept = {k: v for k, v in own_names(shared).items() if f"{k}s" not in own}
        prompt, messages = own.pop("prompt", None), own.pop("messages", None)
        if (prompt is None) == (messages is None):
            raise InputError("a request needs either 'prompt' or 'messages'")
        images, videos = own.pop("images", ()), own.pop("videos", ())
        asked = prompt if messages is None else messages
        return self._submit(asked, images, videos, {**kept, **own_names(own)})

    def _submit(
        self,
        prompt: Prompt,
        images: Media,
        videos: Media,
        options: Mapping[str, object],
        watch: Watch | None = None,
    ) -> Handle:
        images, videos, named = named_media(images, videos, options)
        given = read_options(named, OPTIONS)
        return self._start(self._read(prompt, images, videos, given), given, watch)

    def _new_watch(self) -> Bar | None:
        return Bar() if self.has_bars else None

    def _read(
        self, prompt: Prompt, images: Media, videos: Media, given: Mapping[str, Any]
    ) -> ProcessedPrompt:
        """Tokens and pixels of a request, with those of its options that concern them."""
        return self.encode(prompt, images, videos, **among(given, PROMPT_OPTIONS))

    def _start(
        self,
        processed: ProcessedPrompt,
        given: Mapping[str, Any],
        watch: Watch | None = None,
        kept: Sequence[str] = (),
    ) -> Handle:
        """Hand a processed prompt to the engine."""
        context = self._context(processed, given)
        places = marked_places(given.get("schema", {}), processed.media)
        decoder = self.tokenizer.stream_decoder(kept=kept)
        handle = self.engine.submit(context, decoder, watch)
        handle.media, handle.places = tuple(processed.media), places
        return handle

    def _context(self, processed: ProcessedPrompt, given: Mapping[str, Any]) -> TextContext:
        """The engine's context; refuses what is too long before anything is computed."""
        self._check_length(processed, given.get("max_tokens", 0))
        options = complete_options(given, OPTIONS)
        constraint = self.grammars.constraint(options, processed.text)
        if constraint is not None and options["ignore_eos"]:
            message = "ignore_eos: an answer of a form ends with the form; leave it out"
            raise InputError(message, param="ignore_eos")
        context = self.processor.new_context(
            processed,
            max_length=self.max_seq_len,
            sampling_params=sampling_params(options),
            request_id=uuid.uuid4().hex,
            log_probabilities=options["logprobs"],
            log_probabilities_echo=options["prompt_logprobs"],
            model_name=self._adapter(options["adapter"]),
            logits_processors=options["logits_processors"] or (),
        )
        context.constraint, context.num_draft_tokens = constraint, options["num_draft_tokens"]
        context.speculative = self._speculative(options["speculative"])
        return context

    def _speculative(self, asked: str | None) -> str | None:
        """Where a request's drafts come from: the draft model, where there is one."""
        has_model = self.engine.drafter is not None
        if asked == "draft" and not has_model:
            message = "speculative is 'draft', but no draft model is loaded; give load(draft=...)"
            raise InputError(f"{message}, or --draft-model to a command", param="speculative")
        return "draft" if asked is None and has_model else asked

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
                f"{len(processed.input_ids)} prompt tokens and {shown(new_tokens)} new ones make "
                f"{shown(total)}; this model holds {self.max_seq_len}; shorten the prompt or ask "
                "for fewer tokens"
            )


def sampling_params(options: Mapping[str, object]) -> SamplingParams:
    """The options that decide the next token, as SamplingParams; other options are left.

    Raises: InputError, as `Option.read`.
    """
    values = complete_options(among(options, SAMPLING_OPTIONS), SAMPLING_OPTIONS)
    return SamplingParams(**{o.field: values[name] for name, o in SAMPLING_OPTIONS.items()})
