"""Tools and other variables of chat templates, and calls in the history of a conversation."""

import copy
import enum
import json
from pathlib import Path
from typing import Any, List, Literal, Optional  # noqa: UP035

import pytest

from mlx_vlm_pipes.architectures.llama3.processing import Llama3Processor
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.options import PROMPT_OPTIONS
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.tool_schema import tool_schema
from tests.processing import folders
from tests.processing.tool_templates import (
    CALLED,
    DATED,
    QUESTION,
    SWITCHED,
    TEXTS,
    THINKING,
    WEATHER,
)

TOOL_LINE = json.dumps(WEATHER, ensure_ascii=False)
USER = "<|im_start|>user\nParis & Rome?<|im_end|>\n"


def processor(path: Path, template: Any) -> Llama3Processor:
    folder = folders.make_folder(path, [], {}, template, bos="<s>")
    return Llama3Processor(folder, {"architectures": ["Tiny"]})


def rendered(path: Path, template: Any, messages: Any = QUESTION, **options: Any) -> str:
    return processor(path, template).process(PromptRequest(messages, **options)).text


def test_tools_and_thinking(tmp_path: Path) -> None:
    off = {"enable_thinking": False}
    text = rendered(tmp_path, THINKING, tools=[WEATHER], chat_template_kwargs=off)
    assert text == (
        f"<|im_start|>system\nBe brief.\n\n<tools>\n{TOOL_LINE}\n</tools><|im_end|>\n{USER}"
        "<|im_start|>assistant\n<think></think>"
    )
    assert rendered(tmp_path, THINKING).endswith(f"{USER}<|im_start|>assistant\n")
    dated = rendered(tmp_path, DATED, tools=[WEATHER], chat_template_kwargs={"date_string": "x"})
    shown = json.dumps(WEATHER, ensure_ascii=False, indent=4)
    assert dated == f"<s>Today: x\n{shown}\n<|system|>Be brief.<|eot|><|user|>Paris & Rome?<|eot|>"


@pytest.mark.parametrize("template", [THINKING, DATED, TEXTS])
def test_arguments_of_calls_may_be_objects_or_json(tmp_path: Path, template: str) -> None:
    as_json = copy.deepcopy(CALLED)
    as_json[2]["tool_calls"][0]["function"]["arguments"] = '{"city":   "Paris"}'
    texts = [rendered(tmp_path, template, m) for m in (CALLED, as_json)]
    assert '{"city": "Paris"}' in texts[0]
    spaced = texts[1].replace('{"city":   "Paris"}', '{"city": "Paris"}')
    assert spaced == texts[0]
    as_json[2]["tool_calls"][0]["function"]["arguments"] = "no {JSON"  # as a model may write it
    assert "no {JSON" in rendered(tmp_path, template, as_json)
    assert CALLED[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}


def test_what_a_template_does_not_read_is_refused(tmp_path: Path) -> None:
    def refused(template: str, **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            rendered(tmp_path, template, **options)
        return str(caught.value)

    assert "takes none; describe them in the system message" in refused(TEXTS, tools=[WEATHER])
    assert "takes none; it reads enable_thinking, python" in refused(SWITCHED, tools=[WEATHER])
    assert rendered(tmp_path, TEXTS, tools=[]) == rendered(tmp_path, TEXTS)
    wrong = {"thinking": False}
    said = refused(SWITCHED, chat_template_kwargs=wrong)
    assert said.endswith("does not read thinking; it reads enable_thinking, python_tools")
    assert refused(TEXTS, chat_template_kwargs=wrong).endswith("thinking; leave it out")
    for name in ("messages", "tools", "add_generation_prompt"):
        assert f"no {name} there" in refused(DATED, chat_template_kwargs={name: []})
    for options in ({"tools": [WEATHER]}, {"chat_template_kwargs": wrong}):
        with pytest.raises(InputError, match="raw uses no chat template"):
            processor(tmp_path, DATED).process(PromptRequest("x", raw=True, **options))


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": SWITCHED}, {"name": "tool_use", "template": DATED}]
    assert rendered(tmp_path, named).startswith("/think")
    assert rendered(tmp_path, named, tools=[WEATHER]).startswith("<s>Today")
    (tmp_path / "chat_template.jinja").write_text(SWITCHED)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("all {{ tools }}")
    assert rendered(tmp_path, None).startswith("/think")
    assert rendered(tmp_path, None, tools=[WEATHER]).startswith("all [{")


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


def forecast(
    city: str,
    days: int | None = None,
    unit: Unit = Unit.CELSIUS,
    parts: Literal["day", "night", 3] = "day",
    places: Optional[list[dict[str, float]]] = None,  # noqa: UP045  # what older code has
    pair: tuple[int, str] = (1, ""),
    mixed: int | str | bool = 1,
    nested: list[int] | str = "",
    free: Any = None,
    bare: List = [],  # noqa: B006, UP006  # what older code has
    tone: str = "dry",
) -> list[float]:
    """Say how the weather will be.

    Uses a table.

    Args:
        city: The city:
            its name
            note: in English
        days: How many days
        unit: The unit
        parts: Which parts

        places: Where
        pair: Two
        mixed: Any of three
        nested: Either
        free: Anything
        bare: A list
        tone: How it sounds (choices: ["dry", "warm "])

    Returns:
        A number
        for each day
    """
    raise NotImplementedError


def test_a_function_as_a_tool() -> None:
    schema = tool_schema(forecast)["function"]
    assert schema["name"] == "forecast"
    assert schema["description"] == "Say how the weather will be.\n\nUses a table."
    properties = schema["parameters"]["properties"]
    assert schema["parameters"]["required"] == ["city"]
    assert properties["city"] == {
        "type": "string", "description": "The city: its name note: in English",
    }  # fmt: skip
    assert properties["days"] == {
        "type": "integer", "nullable": True, "description": "How many days",
    }  # fmt: skip
    assert properties["unit"]["enum"] == ["C", "F"]
    assert properties["mixed"]["type"] == ["boolean", "integer", "string"]
    assert properties["tone"] == {
        "type": "string", "enum": ["dry", "warm"], "description": "How it sounds",
    }  # fmt: skip
    assert PROMPT_OPTIONS["tools"].read([forecast]) == (tool_schema(forecast),)


def test_wrong_tools_are_named() -> None:
    def silent(x: int) -> int:
        return x

    def vague(x) -> None:
        """Do.

        Args:
            x: it
        """

    def odd(x: Path) -> None:
        """Do.

        Args:
            x: it
        """

    lines = {silent: "silent has no docstring", vague: "no type for x", odd: "without a JSON form"}
    for function, line in lines.items():
        with pytest.raises(InputError, match=line):
            PROMPT_OPTIONS["tools"].read([function])
    loop: dict[str, Any] = {}
    loop["self"] = loop
    for wrong in (5, "weather", {"name": "x"}, [5], [{"a": {1, 2}}], [{1: "a"}], [Path], [loop]):
        with pytest.raises(InputError, match="expected a list of JSON objects and functions"):
            PROMPT_OPTIONS["tools"].read(wrong)
    with pytest.raises(InputError, match="expected names with a JSON value for each"):
        PROMPT_OPTIONS["chat_template_kwargs"].read({"enable_thinking": Path("x")})
