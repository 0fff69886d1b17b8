"""How much a model is to think before it answers, as far as the families here can be told.

A template may read `enable_thinking` or `reasoning_effort`; what a model writes between `<think>`
and `</think>` a budget closes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_vlm_pipes.options import OPTIONS
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.server.errors import bad_request
from mlx_vlm_pipes.server.fields import Given, read
from mlx_vlm_pipes.speech import THINK, THOUGHT

SWITCH, EFFORT = "enable_thinking", "reasoning_effort"
# Tokens of reasoning; None: no bound. Those of low and medium are litellm's.
BUDGETS: dict[str, int | None] = {
    "none": 0, "minimal": 0, "low": 1024, "medium": 2048, "high": None, "xhigh": None,
    "max": None,
}  # fmt: skip


def add_effort(given: Given, effort: Any, param: str, tokenizer: Tokenizer) -> None:
    """OpenAI's effort: "none" to "xhigh". To a model that never thinks it says nothing.

    Raises: ApiError 400 for another word, and for a model that thinks however little it is to.
    """
    if effort is None:
        return
    if not isinstance(effort, str) or effort not in BUDGETS:
        raise bad_request(f"{param}: expected one of {', '.join(BUDGETS)}", param)
    names, thinks, can_close = _abilities(tokenizer)
    budget = BUDGETS[effort]
    if EFFORT in names:
        given.add(param, chat_template_kwargs={EFFORT: effort})
    elif SWITCH in names:
        given.add(param, chat_template_kwargs={SWITCH: budget != 0})
        if budget and can_close:
            given.add(param, thinking_budget=budget)
    elif thinks and can_close and budget is not None:
        given.add(param, thinking_budget=budget)
    elif thinks and budget == 0:
        raise bad_request(f"{param}: this model always thinks; leave it out", param)


def add_thinking(given: Given, thinking: Any, param: str, tokenizer: Tokenizer) -> None:
    """Anthropic's {"type": "enabled", "budget_tokens": n}, "adaptive" or "disabled".

    Raises: ApiError 400 for anything else, and for a model that cannot be told so.
    """
    if thinking is None:
        return
    kind = thinking.get("type") if isinstance(thinking, Mapping) else None
    if kind not in ("enabled", "adaptive", "disabled"):
        message = f'{param}: expected a type "enabled", "adaptive" or "disabled"'
        raise bad_request(message, param)
    names, thinks, can_close = _abilities(tokenizer)
    if SWITCH in names:
        given.add(param, chat_template_kwargs={SWITCH: kind != "disabled"})
    elif kind == "disabled" and thinks:
        if not can_close:
            raise bad_request(f"{param}: this model always thinks; leave it out", param)
        given.add(param, thinking_budget=0)
    elif kind != "disabled" and not thinks:
        message = f"{param}: this model does not think before it answers; leave it out"
        raise bad_request(message, param)
    budget = thinking.get("budget_tokens")
    if kind == "enabled" and budget is not None:
        count = replace(OPTIONS["thinking_budget"], name=param, low=1)
        given.add(param, thinking_budget=read(count, budget))


def _abilities(tokenizer: Tokenizer) -> tuple[frozenset[str], bool, bool]:
    """What the chat template reads; whether it knows reasoning, and whether that can be closed."""
    template = tokenizer.chat_template
    if template is None:
        return frozenset(), False, False
    thinks = THINK in template.source
    return template.names, thinks, tokenizer.token_id(THOUGHT) is not None
