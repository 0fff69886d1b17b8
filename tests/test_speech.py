"""What an answer says, wherever its text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_vlm_pipes.speech import FORMS, Kind, Piece, Speech, call_form

HERMES = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "P}a\\"{ris", "days": [1, 2]}}\n'
    "</tool_call>"
)
TIME = '<tool_call>\n{"arguments": {}, "name": "time"}\n</tool_call>'
# form, thinks, answer -> text, reasoning, calls
CASES: list[tuple[str | None, bool, str, str, str, list[tuple[str, Any]]]] = [
    (None, False, "a < b <tool_call>", "a < b <tool_call>", "", []),
    ("hermes", False, "Just {text} <tool", "Just {text} <tool", "", []),
    ("hermes", False, HERMES, "", "", [("weather", {"city": 'P}a"{ris', "days": [1, 2]})]),
    ("hermes", False, f"Let me look.\n{HERMES}\n{TIME} Done.", "Let me look.Done.", "",
     [("weather", {"city": 'P}a"{ris', "days": [1, 2]}), ("time", {})]),
    ("hermes", False, '<tool_call>{"name": "time"}</tool_call>', "", "", [("time", {})]),
    ("hermes", False, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", "",
     [("f", {"a": 1})]),
    ("hermes", False, "<tool_call>no JSON", "<tool_call>no JSON", "", []),
    ("hermes", False, '<tool_call>{"colour": 1}', '<tool_call>{"colour": 1}', "", []),
    ("hermes", True, f"<think>\nHm, <b>.\n</think>\n\n{TIME}", "", "Hm, <b>.\n", [("time", {})]),
    (None, True, "<think>Hm.</think>Yes.", "Yes.", "Hm.", []),
    (None, True, "<b>Yes.", "<b>Yes.", "", []),
    (None, True, "<think>cut", "", "cut", []),
    ("mistral", False,
     '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "", "",
     [("f", {"a": 1}), ("g", {})]),
    ("mistral", False, '[TOOL_CALLS]f[ARGS]{"a": {"b": ","}, "c": 2}', "", "",
     [("f", {"a": {"b": ","}, "c": 2})]),
    ("mistral", False, '[TOOL_CALLS]f{"a": 1}', "", "", [("f", {"a": 1})]),
    ("llama3", False, ' {"name": "f", "parameters": {"a": 1}}', "", "", [("f", {"a": 1})]),
    ("llama3", False, '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": null}}',
     "", "", [("f", {}), ("g", {"x": None})]),
    ("llama3", False, '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}',
     "", "", [("f", {"a": 1})]),
    ("llama3", False, '{"name": "Ann", "age": 5}', '{"name": "Ann", "age": 5}', "", []),
    ("llama3", False, '{"name": "Ann"}', '{"name": "Ann"}', "", []),
    ("llama3", False, '{"a": 1} text', '{"a": 1} text', "", []),
    ("llama3", False, "Plain.", "Plain.", "", []),
]  # fmt: skip


def spoken(form: str | None, thinks: bool, parts: list[str]) -> list[Piece]:
    speech = Speech(FORMS[form] if form else None, thinks=thinks)
    return [piece for part in parts for piece in speech.add(part)] + speech.finish()


def read(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, Any]]]:
    told = {kind: "".join(p.text for p in pieces if p.kind is kind) for kind in Kind}
    names = [piece.text for piece in pieces if piece.kind is Kind.CALL]
    texts = [""] * len(names)
    for piece in pieces:
        if piece.kind is Kind.ARGUMENTS:
            texts[piece.call] += piece.text
    calls = [(name, json.loads(text)) for name, text in zip(names, texts, strict=True)]
    return told[Kind.TEXT], told[Kind.REASONING], calls


@pytest.mark.parametrize(("form", "thinks", "answer", "text", "reasoning", "calls"), CASES)
def test_an_answer_says_the_same_however_it_is_cut(
    form: str, thinks: bool, answer: str, text: str, reasoning: str, calls: list[Any]
) -> None:
    cuts = [[answer[:i], answer[i:]] for i in range(len(answer) + 1)]
    for parts in [*cuts, list(answer)]:
        assert read(spoken(form, thinks, parts)) == (text, reasoning, calls), parts


def test_arguments_come_as_they_are_made() -> None:
    speech = Speech(FORMS["hermes"])
    assert speech.add('<tool_call>{"name": "f", "argu') == []
    assert speech.add('ments": {"a": "lo') == [
        Piece(Kind.CALL, "f", 0), Piece(Kind.ARGUMENTS, '{"a": "lo', 0)
    ]  # fmt: skip
    assert speech.add('ng"') == [Piece(Kind.ARGUMENTS, 'ng"', 0)]


def test_a_prompt_may_have_opened_the_thought() -> None:
    speech = Speech(thinks=True, is_thinking=True)
    assert speech.add("Hm.</think>Yes") == [Piece(Kind.REASONING, "Hm."), Piece(Kind.TEXT, "Yes")]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% for m in messages %}<tool_call>{% endfor %}", "hermes"),
        ("[AVAILABLE_TOOLS]...[TOOL_CALLS]", "mistral"),
        ('Respond in the format {"name": function name, "parameters": dictionary of ...', "llama3"),
        ("{{ tools }}", None),
    ],
)
def test_the_template_says_which_form(template: str, name: str | None) -> None:
    assert call_form(template) == (FORMS[name] if name else None)
