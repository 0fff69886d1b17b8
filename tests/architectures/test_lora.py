"""Adapters by hand in every room: pictures, rows of several adapters, numbers of merged weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.contexts import TextContext
from mlx_vlm_pipes.errors import InputError, UnknownAdapter
from mlx_vlm_pipes.kv_cache import increment_cache_lengths
from mlx_vlm_pipes.loading import lora_config
from tests.architectures.adapters import write_adapter
from tests.architectures.driving import new_cache, relative
from tests.device import bar
from tests.engine.driving import FAMILIES, Driven, fixture_requests
from tests.fixtures_helper import FIXTURES

STEPS = 3
BAR = bar(1e-4)  # of the largest logit: W x + s B (A x) against (W + s B A) x
# names of the adapters, the last parts of the projections they change, their rank
ADAPTERS = {"a": (("q_proj", "down_proj"), 4), "b": (("v_proj", "o_proj", "up_proj"), 2)}


def adapt(base: Path, root: Path, name: str) -> tuple[Path, Path]:
    """The adapter of this name, and the merged checkpoint."""
    parts, rank = ADAPTERS[name]

    def is_adapted(path: str) -> bool:
        return path.endswith(parts) and "vis" not in path

    folder, merged = root / name, root / f"merged-{name}"
    seed = len(root.name) + ord(name)
    write_adapter(base, folder, merged, is_adapted, rank=rank, spread=0.3, seed=seed)
    return folder, merged


@dataclass
class Adapted:
    """A room's model with both adapters, two prompts, and what merged checkpoints answer."""

    driven: Driven
    prompts: list[dict[str, Any]]
    wanted: dict[str, list[tuple[np.ndarray, list[int]]]]

    def contexts(self, choice: list[tuple[str, int]]) -> list[TextContext]:
        """A row for each pair of an adapter's name and a prompt."""
        return [self._context(name, self.prompts[prompt]) for name, prompt in choice]

    def _context(self, name: str, prompt: dict[str, Any]) -> TextContext:
        context = self.driven.context(prompt["prompt"], prompt["images"])
        context.model_name = name
        return context


def answers(model: Any, contexts: list[TextContext]) -> list[tuple[np.ndarray, list[int]]]:
    """Of each row the last prompt token's logits, and greedy tokens."""
    kv = new_cache(model, len(contexts))
    inputs = model.prepare_initial_token_inputs([contexts], kv)
    out = model.execute(inputs)
    first, chosen = np.array(out.next_token_logits), []
    increment_cache_lengths(kv, [context.tokens.active_length for context in contexts])
    for _ in range(STEPS):
        chosen.append(mx.argmax(out.next_token_logits, axis=-1))
        inputs = model.prepare_next_token_inputs(chosen[-1], inputs)
        out = model.execute(inputs)
        increment_cache_lengths(kv, [1] * len(contexts))
    tokens = np.array(chosen).T.tolist()
    return list(zip(first, tokens, strict=True))


@pytest.fixture(scope="module", params=FAMILIES)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    base, root = FIXTURES / request.param, tmp_path_factory.mktemp(request.param)
    listed = [prompt for prompt in fixture_requests(base).values() if not prompt["videos"]]
    listed.sort(key=lambda prompt: -len(prompt["images"]))
    made = {name: adapt(base, root, name) for name in ADAPTERS}
    driven = Driven(base, lora=lora_config([folder for folder, _ in made.values()]))
    own = Adapted(driven, [listed[0], listed[-1]], {})
    for name, folder in {"": base, **{name: merged for name, (_, merged) in made.items()}}.items():
        rows = own.contexts([("", 0), ("", 1)])
        own.wanted[name] = answers(Driven(folder).model, rows)
    return own


def test_a_batch_of_adapters_and_the_base_equals_merged_weights(adapted: Adapted) -> None:
    choice = [("b", 1), ("", 0), ("a", 0), ("a", 1), ("", 1)]
    found = answers(adapted.driven.model, adapted.contexts(choice))
    for (name, prompt), (logits, tokens) in zip(choice, found, strict=True):
        wanted, greedy = adapted.wanted[name][prompt]
        assert relative(logits, wanted) < BAR, (name, prompt)
        assert tokens == greedy, (name, prompt)
    firsts = [adapted.wanted[name][0][0] for name in ("", *ADAPTERS)]
    assert min(relative(firsts[i], firsts[i - 1]) for i in range(3)) > 0.05


def test_an_adapter_that_is_not_loaded_is_named(adapted: Adapted) -> None:
    model, contexts = adapted.driven.model, adapted.contexts([("a", 1), ("c", 1)])
    with pytest.raises(UnknownAdapter, match="no adapter 'c'; loaded: a, b") as caught:
        model.prepare_initial_token_inputs([contexts], new_cache(model, 2))
    assert isinstance(caught.value, InputError)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("adapted", ["llama-tied"], indirect=True)
def test_buffers_need_the_groups_behind_them(adapted: Adapted) -> None:
    model: Any = adapted.driven.model
    rows = adapted.contexts([("b", 1), ("", 0), ("a", 1)])
    inputs = model.prepare_initial_token_inputs([rows], new_cache(model, 3))
    with pytest.raises(InputError, match=r"adapters \(a, b\) need lora_ids and lora_grouped"):
        model.model(*inputs.buffers)
    out = model.model(*inputs.buffers, inputs.lora_ids, inputs.lora_grouped_offsets)
    for row, (name, prompt) in zip(out.logits, [("b", 1), ("", 0), ("a", 1)], strict=True):
        assert relative(np.array(row), adapted.wanted[name][prompt][0]) < BAR
