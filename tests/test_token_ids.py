"""Token ids beyond the embedding are refused wherever tokens come in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.errors import InputError
from tests.architectures import driving
from tests.fixtures_helper import FIXTURES, reference

WORDS = r"token id {}, expected 0 to \d+: the model's embedding has \d+ rows"


@pytest.fixture(scope="module", params=["llama-tied", "idefics3"])
def pipe(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pipeline]:
    """A tokenizer whose letter "z" has the id 90000."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    shutil.copytree(FIXTURES / request.param, folder)
    path: Path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["z"] = 90_000
    path.write_text(json.dumps(values))
    made = load(folder, dtype="float32")
    yield made
    made.close()


def test_a_prompt_with_such_a_token_is_refused_at_once(pipe: Pipeline) -> None:
    for ask in (pipe.generate, pipe.stream, pipe.submit, pipe.logits):
        with pytest.raises(InputError, match=WORDS.format(90000)):
            ask("A z!", raw=True)
    assert pipe.generate("A y!", raw=True, max_tokens=2).tokens


@pytest.mark.parametrize("wrong", [-1, 10**6, 2**40])
def test_the_documented_path_refuses_them(wrong: int) -> None:
    model = driving.load(FIXTURES / "llama-tied")
    rows = model.vocab_size
    assert rows == reference(FIXTURES / "llama-tied")[1]["raw/logits"].shape[-1]
    for token, fits in ((rows - 1, True), (rows, False), (wrong, False)):
        context = TextContext(max_length=64, tokens=TokenBuffer(np.array([5, token, 7])))
        if fits:
            model.prepare_initial_token_inputs([[context]], driving.new_cache(model))
            continue
        with pytest.raises(InputError, match=WORDS.format(token)):
            model.prepare_initial_token_inputs([[context]], driving.new_cache(model))
