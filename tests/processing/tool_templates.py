"""Chat templates in the manner of model families that call tools or think; none is theirs."""

from typing import Any

# tools in a system turn, thinking that can be switched off, calls printed as JSON
THINKING = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}"
    "{{- '<tools>' }}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}"
    "{{- '\\n</tools><|im_end|>\\n' }}{% endif %}"
    "{%- for m in messages if not (tools and m.role == 'system') %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{%- if m.reasoning_content is defined %}{{ '<think>' + m.reasoning_content }}{% endif %}"
    "{%- for call in m.tool_calls or [] %}{%- set call = call.function or call %}"
    "{{- '<call>' + call.name + ' ' }}{% if call.arguments is string %}{{ call.arguments }}"
    "{%- else %}{{ call.arguments | tojson }}{% endif %}{{ '</call>' }}{% endfor %}"
    "{{- '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}"
    "{%- endif %}{% endif %}"
)
# tools before the user's turn, indented; a date that the caller may set; arguments as objects only
DATED = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{{- 'Today: ' + date_string + '\\n' }}{%- if tools is not none %}{%- for t in tools %}"
    "{{- t | tojson(indent=4) }}{{ '\\n' }}{%- endfor %}{%- endif %}{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' }}{%- if 'tool_calls' in message %}"
    "{%- set called = message.tool_calls[0].function %}"
    "{{- called.name + ' <- ' + (called.arguments | tojson) }}"
    "{%- else %}{{- message['content'] | trim }}{%- endif %}{{ '<|eot|>' }}{%- endfor %}"
)
# a variable that is set where nobody gives it
SWITCHED = (
    "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}"
    "{%- set mode = '/think' if enable_thinking else '/no_think' -%}"
    "{{ mode }}{% if python_tools %}{%- set ns = namespace(shown='') -%}"
    "{% for tool in python_tools[:] %}{% set ns.shown = ns.shown ~ (tool | string) ~ '\n' %}"
    "{% endfor %}{{ ns.shown + messages[0].content.rstrip() }}{% endif %}"
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
)
# arguments as texts only
TEXTS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endfor %}"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look up the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "é.g. <Paris>"}},
            "required": ["city"],
        },
    },
}
QUESTION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Paris & Rome?"},
]
CALLED = [
    *QUESTION,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Paris"}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": '{"celsius": 20}'},
]
REASONED = [
    *QUESTION,
    {"role": "assistant", "reasoning": "Hm.", "content": "20 degrees."},
    {"role": "user", "content": "And now?"},
]
# each: a template, messages, the tools, other variables
CASES: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]] = [
    (THINKING, QUESTION, [WEATHER], {}),
    (THINKING, QUESTION, None, {"enable_thinking": False}),
    (THINKING, QUESTION, None, {"enable_thinking": True}),
    (THINKING, CALLED, [WEATHER], {"enable_thinking": False}),
    (THINKING, REASONED, None, {}),
    (DATED, QUESTION, [WEATHER], {"date_string": "1 May 2026"}),
    (DATED, CALLED, [WEATHER, WEATHER], {}),
    (DATED, QUESTION, [], {}),
    (SWITCHED, QUESTION, None, {}),
    (SWITCHED, QUESTION, None, {"enable_thinking": False, "python_tools": ["a", WEATHER]}),
]
