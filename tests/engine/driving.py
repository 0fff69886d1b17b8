"""Fixtures' prompts as requests, and a scheduler that a test drives step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_vlm_pipes.contexts import TextContext
from mlx_vlm_pipes.engine.requests import Chunk, Handle
from mlx_vlm_pipes.engine.scheduler import Scheduler
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.loading import LoadOptions, load_model
from mlx_vlm_pipes.pipeline import sampling_params
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.registry import find_room
from tests.fixtures_helper import FIXTURES, arguments, reference

FAMILIES = ["llama-tied", "idefics3", "pixtral", "internvl-qwen2", "qwen25vl", "qwen3vl"]
LLAMA, IDEFICS3 = FIXTURES / "llama-tied", FIXTURES / "idefics3"


def fixture_requests(folder: Path) -> dict[str, dict[str, Any]]:
    """Every prompt of a fixture as keyword arguments of `Pipeline.generate`, by name."""
    facts, _ = reference(folder)
    return {fact["name"]: arguments(folder, fact) for fact in facts["prompts"]}


class Driven:
    """A checkpoint's scheduler on this thread."""

    def __init__(self, folder: Path, config: EngineConfig | None = None, **options: Any) -> None:
        hf = read_config(folder)
        room = find_room(hf)
        self.processor = room.processor_class()(folder, hf.to_dict())
        self.model = load_model(room, folder, hf, LoadOptions(dtype="float32", **options))
        self.restart(config or EngineConfig())

    def restart(self, config: EngineConfig) -> None:
        """A new scheduler, with empty caches, over the same model."""
        self.scheduler = Scheduler(self.model, config)

    def context(self, prompt: Any, images: Any = (), **options: Any) -> TextContext:
        processed = self.processor.process(
            PromptRequest(prompt, tuple(images), raw=isinstance(prompt, str))
        )
        return self.processor.new_context(
            processed,
            max_length=self.model.max_seq_len,
            sampling_params=sampling_params(options),  # pyright: ignore[reportArgumentType]  # a test's own keywords
        )

    def submit(self, prompt: Any, images: Any = (), **options: Any) -> Handle:
        context = self.context(prompt, images, **options)
        return self.scheduler.submit(context, self.processor.tokenizer.stream_decoder())

    def step(self, count: int = 1) -> bool:
        return [self.scheduler.step() for _ in range(count)][-1]

    def finish(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.step():
                return
        raise AssertionError("the scheduler does not come to an end")

    def tokens(self, handle: Handle) -> list[int]:
        """All tokens of a request that has ended. Raises: what it failed with."""
        chunks: list[Chunk] = list(handle)
        return [chunk.token for chunk in chunks if chunk.token is not None]

    def generate(self, prompt: Any, images: Any = (), **options: Any) -> list[int]:
        handle = self.submit(prompt, images, **options)
        self.finish()
        return self.tokens(handle)
