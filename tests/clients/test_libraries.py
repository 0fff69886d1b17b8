"""Libraries and a command on top of OpenAI's client, against a server of ours.

Each asks for a text, about a picture, streamed, for a tool or a schema, and for what is refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.clients.conftest import ASK, CHAT, CITIES, IMAGE, WHO, from_guide

pytestmark = pytest.mark.slow  # their imports alone take seconds
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": list(CITIES)}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_litellm(port: int, answer: str, text_answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch a list of prices
    litellm = pytest.importorskip("litellm")
    at: Any = {"api_base": f"http://127.0.0.1:{port}/v1", "api_key": "x", "max_retries": 0}
    seeing: Any = {"model": "openai/shapes", "messages": CHAT, **at}
    told = litellm.completion(model="openai/shapes", messages=WHO, max_tokens=20, **at)
    assert told.choices[0].message.content.strip() == text_answer
    assert litellm.completion(**seeing).choices[0].message.content == answer
    parts = litellm.completion(stream=True, **seeing)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer
    told = litellm.completion(
        model="openai/calling", messages=WHO, max_tokens=200, **at,
        tools=[{"type": "function", "function": WEATHER}], tool_choice="required",
    )  # fmt: skip
    (call,) = told.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in CITIES
    with pytest.raises(litellm.exceptions.NotFoundError, match="no model 'none' here"):
        litellm.completion(model="openai/none", messages=WHO, **at)
    with pytest.raises(litellm.exceptions.BadRequestError, match="temperature"):
        litellm.completion(temperature=-1, **seeing)


def test_langchain(port: int, answer: str, text_answer: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    openai = pytest.importorskip("openai")
    at: Any = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "x", "max_retries": 0}
    seeing = langchain.ChatOpenAI(model="shapes", **at)
    assert seeing.invoke("Who?", max_tokens=20).text.strip() == text_answer
    assert seeing.invoke(CHAT).content == answer
    assert "".join(part.text for part in seeing.stream(CHAT)) == answer
    calling = langchain.ChatOpenAI(model="calling", max_tokens=200, **at)
    told = calling.bind_tools([WEATHER], tool_choice="weather").invoke("Who?")
    assert told.tool_calls[0]["args"]["city"] in CITIES
    schema = {**WEATHER["parameters"], "title": "weather"}
    bound = seeing.with_structured_output(schema, method="json_schema")
    assert bound.invoke("Who?", max_tokens=60)["city"] in CITIES
    with pytest.raises(openai.NotFoundError, match="no model 'none' here"):
        langchain.ChatOpenAI(model="none", **at).invoke("Who?")


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS"])
def test_instructor_with_a_pydantic_class(port: int, mode: str) -> None:
    instructor, pydantic = pytest.importorskip("instructor"), pytest.importorskip("pydantic")
    openai = pytest.importorskip("openai")
    city: Any = (Literal[CITIES], ...)
    person = pydantic.create_model(
        "Person", age=(int, pydantic.Field(ge=0, le=99)), city=city,
        __config__=pydantic.ConfigDict(extra="forbid"),
    )  # fmt: skip
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0),
        mode=instructor.Mode[mode],
    )
    model, asked = ("calling", WHO) if mode == "TOOLS" else ("shapes", CHAT)
    told = client.chat.completions.create(
        model=model, messages=asked, response_model=person, max_tokens=600, max_retries=1
    )
    assert told.city in CITIES
    assert 0 <= told.age <= 99
    parts = client.chat.completions.create_partial(
        model=model, messages=asked, response_model=person, max_tokens=600, max_retries=1
    )
    assert list(parts)[-1].model_dump() == told.model_dump()


def test_llm(port: int, answer: str, text_answer: str, tmp_path: Path) -> None:
    """Its own configuration file names the server; nothing is read from or left in the home."""
    pytest.importorskip("llm")
    known = from_guide("extra-openai-models.yaml", port)
    known += known.replace("local", "none").replace("shapes", "none")
    (tmp_path / "extra-openai-models.yaml").write_text(known)

    def llm(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llm", *words], capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        )  # fmt: skip

    told = llm("-m", "local", "-o", "max_tokens", "20", "Who?")
    assert (told.stdout.strip(), told.stderr) == (text_answer, "")
    assert llm("-m", "local", "-a", str(IMAGE), "--no-stream", ASK).stdout.strip() == answer
    schema = json.dumps(WEATHER["parameters"])
    told = llm("-m", "local", "--schema", schema, "-o", "max_tokens", "60", "Who?")
    assert json.loads(told.stdout)["city"] in CITIES
    refused = llm("-m", "none", "Who?")
    assert refused.returncode == 1
    assert "no model 'none' here" in refused.stderr
