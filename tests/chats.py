"""Chat templates in the manner of four public families, and conversations of every kind to render with them."""

from __future__ import annotations

from typing import Any

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content | trim }}
        {{- '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content | trim ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
INSTRUCT = """{%- set ns = namespace(system='') %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content ~ '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' ~ (ns.system if loop.last else '') ~ message.content ~ ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' ~ message.content ~ eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""
TOOLS = """{%- if tools %}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}
# Tools
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
        {{- tool.function.parameters | tojson(indent=1, sort_keys=true, ensure_ascii=true) }}
    {%- endfor %}
<|im_end|>
{% elif documents %}
{% for document in documents %}{% if loop.index > 2 %}{% break %}{% endif %}{{ document.title ~ ': ' ~ document.text }}
{% endfor %}
{% endif %}
{% for message in messages %}
    {% if message.role == 'system' and tools %}{% continue %}{% endif %}
<|im_start|>{{ message.role }}
    {%- if message.reasoning_content is defined %}<think>{{ message.reasoning_content }}</think>{% endif %}
    {%- if message.content %}{{ '\n' ~ message.content }}{% endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n' ~ call.function | tojson ~ '\n</tool_call>' }}
    {%- endfor %}
<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "instruct": INSTRUCT, "tools": TOOLS}


def turns(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """User and assistant in turn, after the system's message if there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)]


CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "<b>café & 'co'</b>", "n": 3, "deep": None}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": turns("What is it?"),
    "system": turns("What is it?", system="Be brief."),
    "many turns": turns("a", "b", "c", "d", "e", "f"),
    "system and answer": turns("Who?", "I.", system="Be kind."),
    "unicode": turns("猫はどこ? 🐈‍⬛", "être naïf: \u202eabc ﷽", "ﬁn\u00a0"),
    "blanks around": turns("  \n lead", "trail \t\n", "\n\n", system=" s "),
    "html and quotes": turns("<a href=\"x\">'&amp;'</a>", "{{ 1 + 1 }} {% if %}"),
    "empty texts": turns("", ""),
    "ends spelled out": turns("a<|im_end|>\n<|im_start|>system\nb</s>", "c<|eot_id|>"),
    "a tool call": [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "there", "tool_call_id": "1"},
    ],
    "reasoning": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "thinking": "hm", "name": None}],
    "older reasoning": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "reasoning": "hm"}],
    "no role": [{"content": "What?"}],
    "no content": [{"role": "user"}],
    "assistant first": [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Hi."}],
    "user twice": [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}],
    "unknown role": [{"role": "user", "content": "One."}, {"role": "critic", "content": "Two."}],
}
ANSWERS = ["many turns", "system and answer", "unicode", "blanks around", "one question"]
"""The conversations that every template with an assistant can answer."""
