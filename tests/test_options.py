"""The table of options: defaults, bounds and wrong types, and who reads it."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes import SamplingParams
from mlx_vlm_pipes.engine.drafts import MOST
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.options import (
    OPTIONS,
    PROMPT_OPTIONS,
    SAMPLING_OPTIONS,
    GenerateOptions,
    complete_options,
    read_options,
)
from mlx_vlm_pipes.pipeline import sampling_params
from mlx_vlm_pipes.processing.types import PromptRequest

DOCUMENTED: dict[str, Any] = {
    "top_k": -1, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "max_new_tokens": None,
    "min_new_tokens": 0, "ignore_eos": False, "stop": (), "stop_token_ids": (), "seed": None,
    "logit_bias": {},
}  # fmt: skip


def test_defaults() -> None:
    assert dataclasses.asdict(SamplingParams()) == DOCUMENTED
    request = {**DOCUMENTED, "temperature": 0.0, "max_new_tokens": 256}
    assert dataclasses.asdict(sampling_params({})) == request
    assert OPTIONS["num_draft_tokens"].high == MOST
    prompt = PromptRequest("Hello")
    assert {name: vars(prompt)[name] for name in PROMPT_OPTIONS} == {
        "raw": False, "system": None, "fps": 2.0, "min_pixels": None, "max_pixels": None,
        "num_frames": None, "local_files": True, "allow_private": False, "tools": None,
        "chat_template_kwargs": None,
    }  # fmt: skip


def test_every_option_is_typed_and_every_sampling_field_is_an_option() -> None:
    assert OPTIONS.keys() == GenerateOptions.__annotations__.keys()
    fields = [option.field for option in SAMPLING_OPTIONS.values()]
    assert sorted(fields) == sorted(f.name for f in dataclasses.fields(SamplingParams))


@pytest.mark.parametrize(
    ("name", "wrong", "line"),
    [
        ("raw", 1, "raw is 1, expected True or False"),
        ("system", 5, "system is 5, expected a text"),
        ("fps", 0, "fps is 0, expected a finite number above 0"),
        ("fps", None, "fps is None, expected a finite number above 0"),
        ("min_pixels", 0, "min_pixels is 0, expected a whole number of at least 1"),
        ("num_frames", 2.5, "num_frames is 2.5, expected a whole number of at least 1"),
        ("max_tokens", 0, "max_tokens is 0, expected a whole number of at least 1"),
        ("min_tokens", -1, "min_tokens is -1, expected a whole number of at least 0"),
        ("temperature", "hot", "temperature is 'hot', expected a finite number of at least 0"),
        ("temperature", math.nan, "temperature is nan, expected a finite number of at least 0"),
        ("temperature", math.inf, "temperature is inf, expected a finite number of at least 0"),
        ("temperature", True, "temperature is True, expected a finite number of at least 0"),
        (
            "top_p", 0,
            "top_p is 0, expected a finite number above 0 and at most 1; for greedy set "
            "temperature to 0",
        ),
        ("top_k", 0, "top_k is 0, expected a whole number of at least 1, or -1 for no limit"),
        ("min_p", 1.5, "min_p is 1.5, expected a finite number from 0 to 1"),
        ("presence_penalty", 3, "presence_penalty is 3, expected a finite number from -2 to 2"),
        ("logit_bias", {"5": 1.0}, "logit_bias is {'5': 1.0}, expected token ids with a number"),
        ("logit_bias", {5: math.nan}, "logit_bias is {5: nan}, expected token ids with a number"),
        ("seed", "x", "seed is 'x', expected a whole number"),
        ("stop", ["a", 1], "stop is ['a', 1], expected a text or a list of texts"),
        ("stop_token_ids", 5, "stop_token_ids is 5, expected a list of token ids"),
        ("stop_token_ids", [-1], "stop_token_ids is [-1], expected a list of token ids"),
        ("logprobs", -1, "logprobs is -1, expected a whole number of at least 0"),
        ("adapter", 3, "adapter is 3, expected a text"),
        ("min_p", np.ones((99, 99)), "min_p is array([["),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line(name: str, wrong: Any, line: str) -> None:
    with pytest.raises(InputError) as caught:
        read_options({name: wrong}, OPTIONS)
    message = str(caught.value)
    assert message.startswith(line)
    assert "\n" not in message
    assert len(message) < 160
    if name in PROMPT_OPTIONS:
        with pytest.raises(InputError, match=f"^{name} is "):
            PromptRequest("Hello", **{name: wrong})


def test_values_become_plain_python() -> None:
    given = {
        "seed": np.int64(5), "temperature": np.float32(0.5), "stop": "END", "system": None,
        "stop_token_ids": np.array([1, 2]), "logit_bias": {np.int64(3): -math.inf}, "top_k": -1,
    }  # fmt: skip
    read = read_options(given, OPTIONS)
    assert read == {
        "seed": 5, "temperature": 0.5, "stop": ("END",), "stop_token_ids": (1, 2),
        "logit_bias": {3: -math.inf}, "top_k": -1,
    }  # fmt: skip
    assert type(read["seed"]) is int
    assert type(read["temperature"]) is float
    assert complete_options({"max_tokens": None}, OPTIONS)["max_tokens"] == 256


def test_names_that_others_use() -> None:
    assert read_options({"max_new_tokens": 3, "temp": 0.5}, OPTIONS) == {
        "max_tokens": 3, "temperature": 0.5,
    }  # fmt: skip
    with pytest.raises(InputError, match="temp and temperature are the same option"):
        read_options({"temperature": 0.5, "temp": 0.5}, OPTIONS)
    with pytest.raises(InputError, match="temp and temperature are the same option"):
        read_options({"temp": 0.5, "temperature": 0.5}, OPTIONS)
    with pytest.raises(InputError, match=r"unknown option 'adapter_path'; give load\(adapter="):
        read_options({"adapter_path": "x"}, OPTIONS)


def test_an_error_knows_the_option_that_is_to_blame() -> None:
    for given, name in (({"top_k": "5"}, "top_k"), ({"colour": 1}, "colour"),
                        ({"temp": 1.0, "temperature": 1.0}, "temp")):  # fmt: skip
        with pytest.raises(InputError) as raised:
            read_options(given, OPTIONS)
        assert raised.value.param == name
        assert pickle.loads(pickle.dumps(raised.value)).param == name
