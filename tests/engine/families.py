"""Chat templates that follow the conventions of the families of models, without their prose."""

from __future__ import annotations

from dataclasses import dataclass

from .conftest import CHAT_TEMPLATE, make_tokenizer


@dataclass(frozen=True)
class Family:
    dialect: str
    template: str | None
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    words: tuple[str, ...] = ()
    """Added tokens that are not special."""
    native: bool = True

    def tokenizer(self):
        return make_tokenizer(self.template, special=self.special, words=self.words)


# Qwen 2.5 and 3, SmolLM 3: JSON in tags, results in the user's turn, arguments as object or text.
QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\n\\n<tool_call>\\n" }}
    {{- "{\\"name\\": <name>, \\"arguments\\": <object>}\\n</tool_call>" }}
    {{- "<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content.split('</think>')[-1] }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}
            {%- else %}{{- call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Hermes 2 Pro: arguments before the name, and a tool's turn without a name is refused.
HERMES = """
{{- bos_token }}
{%- if tools %}
    {{- "<tools> " }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- '{"name": "' + tool.name + '", "description": "' + tool.description + '('}}
        {%- for name, fields in tool.parameters.properties | items %}
            {{- name + ": " + (fields.type or "Any") }}
        {%- endfor %}
        {{- ')", "parameters": ' + tool.parameters | tojson + '}\\n' }}
    {%- endfor %}
    {{- " </tools><|im_end|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if not message.name is defined %}{{- raise_exception("a name is missing") }}{%- endif %}
        {{- '<|im_start|>tool\\n<tool_response>\\n{"name": "' + message.name + '", "content": ' }}
        {{- message.content | tojson + '}\\n</tool_response> <|im_end|>\\n' }}
    {%- elif message.tool_calls is defined %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{ "arguments": ' + call.function.arguments | tojson }}
            {{- ', "name": "' + call.function.name + '"}\\n</tool_call> ' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Qwen's coders: each argument between tags.
QWEN_CODER = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content }}
    {%- set messages = messages[1:] %}
{%- else %}
    {{- '<|im_start|>system\\n' }}
{%- endif %}
{%- if tools %}
    {{- '\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- '<function>\\n<name>' + tool.function.name + '</name>' }}
        {%- for name, fields in tool.function.parameters.properties | items %}
            {{- '\\n<parameter>' + name + ' ' + fields | tojson + '</parameter>' }}
        {%- endfor %}
        {{- '\\n</function>\\n' }}
    {%- endfor %}
    {{- '</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response>\\n<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
            {%- for name, value in call.function.arguments | items %}
                {%- set value = value if value is string else value | tojson %}
                {{- '<parameter=' + name + '>\\n' + value + '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Llama 3.1 and 3.2: a bare object with "parameters", one call a turn, results as ipython's.
LLAMA = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson + "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {{- {"output": message.content} | tojson + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_MISTRAL = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set users = messages | selectattr("role", "equalto", "user") | list %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined %}
        CALLS
        {{- eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id | length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content | string + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_LIST = _MISTRAL.replace("CALLS", """
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}
            {%- if call.id | length != 9 %}{{- raise_exception("id") }}{%- endif %}
            {{- out[:-1] + ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- endif %}
        {%- endfor %}
        {{- ']' }}""")  # fmt: skip
MISTRAL = _MISTRAL.replace("CALLS", """
        {%- for call in message.tool_calls %}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' }}
            {%- if call.function.arguments is string %}{{- call.function.arguments }}
            {%- else %}{{- call.function.arguments | tojson }}{%- endif %}
        {%- endfor %}""")  # fmt: skip

PHI = """
{%- for message in messages %}
    {%- if message.role == 'system' or loop.first and tools %}
        {{- '<|system|>' + (message.content if message.role == 'system' else '') }}
        {%- if tools %}
            {%- for tool in tools %}
                {{- '<|tool|>' + tool.function | tojson + '<|/tool|>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|end|>' }}
    {%- endif %}
    {%- if message.role == 'tool' %}
        {{- '<|tool_response|>' + message.content | tojson + '<|end|>' }}
    {%- elif message.role != 'system' %}
        {{- '<|' + message.role + '|>' + message.content }}
        {%- for call in message.tool_calls %}
            {{- '<|tool_call|>' + call.function | tojson + '<|/tool_call|>' }}
        {%- endfor %}
        {{- '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""

# DeepSeek: the arguments must be text, or the template breaks.
_DEEPSEEK = """
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- if tools %}{{- '## Tools\\n' + tools | tojson }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|User|>' + message.content }}{%- endif %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|Assistant|></think>' + message.content + '<|tool calls begin|>' }}
        {%- for call in message.tool_calls %}
            {{- CALL + '<|tool call end|>' }}
        {%- endfor %}
        {{- '<|tool calls end|><|end of sentence|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|Assistant|></think>' + message.content + '<|end of sentence|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|tool output begin|>' + message.content + '<|tool output end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}
    {{- '<|Assistant|></think>' }}
{%- endif %}
"""


def wide(text: str) -> str:
    """Marks as DeepSeek writes them."""
    import re

    return re.sub(
        r"<\|([A-Za-z ]+)\|>",
        lambda mark: "<\uff5c" + mark[1].replace(" ", "\u2581") + "\uff5c>",
        text,
    )


DEEPSEEK = wide(_DEEPSEEK.replace(
    "CALL +",
    "'<|tool call begin|>' + call.function.name + '<|tool sep|>' + call.function.arguments +",
))  # fmt: skip
DEEPSEEK_FENCED = wide(_DEEPSEEK.replace(
    "CALL +",
    "'<|tool call begin|>' + call.type + '<|tool sep|>' + call.function.name"
    " + '\\n```json\\n' + call.function.arguments + '\\n```' +",
))  # fmt: skip
DEEPSEEK_MARKS = tuple(wide(f"<|{mark}|>") for mark in (
    "User", "Assistant", "end of sentence", "tool calls begin", "tool calls end",
    "tool call begin", "tool call end", "tool sep", "tool output begin", "tool output end",
))  # fmt: skip

# Llama 4 and 3.2 in Python's words.
PYTHONIC = """
{%- if tools is not none %}{{- tools | tojson }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.tool_calls %}
        {{- '[' }}
        {%- for call in message.tool_calls %}
            {{- call.function.name + '(' }}
            {%- for name, value in call.function.arguments | items %}
                {{- name + '=' + value | tojson }}
                {%- if not loop.last %}{{- ', ' }}{%- endif %}
            {%- endfor %}
            {{- ')' }}
            {%- if not loop.last %}{{- ', ' }}{%- endif %}
        {%- endfor %}
        {{- ']' }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LIQUID = PYTHONIC.replace("{{- '[' }}", "{{- '<|tool_call_start|>[' }}").replace(
    "{{- ']' }}", "{{- ']<|tool_call_end|>' }}"
)

# Gemma: neither tools nor a system, and strict turns.
GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""

# Writes an earlier call's arguments as Python does, which no dialect takes for JSON.
CARELESS = QWEN.replace("call.arguments | tojson", "call.arguments").replace(
    "{{- call.arguments }}\n", "{{- 'lost' }}\n"
)

_LLAMA_MARKS = (
    "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|python_tag|>",
)  # fmt: skip
_MISTRAL_MARKS = (
    "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[ARGS]",
    "[CALL_ID]",
)  # fmt: skip
_PHI_MARKS = (
    "<|system|>", "<|end|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>", "<|tool_call|>",
    "<|/tool_call|>", "<|tool_response|>",
)  # fmt: skip
_GEMMA_MARKS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_CHATML = ("<|im_start|>", "<|im_end|>")

FAMILIES = {
    "qwen": Family(
        "hermes", QWEN, words=("<tool_call>", "</tool_call>", "<think>", "</think>")
    ),
    "qwen-coder": Family("qwen-coder", QWEN_CODER, words=("<tool_call>", "</tool_call>")),
    "hermes": Family("hermes", HERMES),
    "llama": Family("llama", LLAMA, _LLAMA_MARKS),
    "mistral": Family("mistral", MISTRAL, _MISTRAL_MARKS),
    "mistral-list": Family("mistral-list", MISTRAL_LIST, _MISTRAL_MARKS),
    "phi": Family("phi", PHI, _PHI_MARKS),
    "deepseek": Family("deepseek", DEEPSEEK, DEEPSEEK_MARKS),
    "deepseek-fenced": Family("deepseek-fenced", DEEPSEEK_FENCED, DEEPSEEK_MARKS),
    "pythonic": Family("pythonic", PYTHONIC),
    "liquid": Family(
        "liquid", LIQUID, (*_CHATML, "<|tool_call_start|>", "<|tool_call_end|>")
    ),
    "smollm2": Family("hermes", CHAT_TEMPLATE, native=False),
    "gemma": Family("hermes", GEMMA, _GEMMA_MARKS, native=False),
    "careless": Family("hermes", CARELESS, native=False),
    "chatml-marks-only": Family("hermes", None, native=False),
}  # fmt: skip
