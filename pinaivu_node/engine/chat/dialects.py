"""The families of models by how they call tools, and which of them a model belongs to.

Nobody writes down which family a model is of, but its chat template shows how it was taught to
write a call.  So a template is asked to write one, and the dialect that reads this very call from
what the template wrote is the model's.  A template that shows no tools, or writes calls that no
dialect reads, is not used for tools: such a model is told in its prompt how to call (`prompts.py`),
in the words of Hermes, which most instruct models have met.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pinaivu_node.engine.chat import call_syntax, tagged_calls
from pinaivu_node.engine.chat.call_grammar import AnyForm, Form, PythonForm, TaggedForm, grammar
from pinaivu_node.engine.chat.chat_template import (
    TEMPLATE_FAULTS,
    ArgumentsAs,
    ChatTemplate,
    shared,
)
from pinaivu_node.engine.chat.tool_calls import Opener, ToolCallParser
from pinaivu_node.engine.types import Constraint, Tool, ToolChoice, ToolUse


@dataclass(frozen=True, slots=True)
class Syntax:
    """How one family writes calls."""

    name: str
    openers: tuple[Opener, ...]
    form: AnyForm
    marks: tuple[str, ...] = ()
    """Beside the openers, what stands between the parts of calls and may be a special token."""
    sign: str = ""
    """Tells it from others that read the same."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """One model's way to call tools."""

    syntax: Syntax
    native: bool
    """Whether the model's own template shows tools and writes calls."""
    arguments_as: ArgumentsAs = ArgumentsAs.OBJECT
    """What the template takes the arguments of an earlier call as."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Those of the syntax's marks that are one token of this model."""
    special: frozenset[str] = frozenset()
    """Those of these that a reader of text is not shown."""
    loose: tuple[int, ...] = ()
    """Other tokens that are no ordinary text to a grammar, and that an answer may hold."""

    def visible(self, use: ToolUse | None) -> frozenset[int]:
        """Special tokens that the detokenizer must show to the parser, which hides them."""
        return frozenset(self.tokens[mark] for mark in self.special if _may_call(use))

    def constraint(self, use: ToolUse) -> Constraint | None:
        """A grammar under which every call is one of a tool there is, with arguments of its schema;
        with REQUIRED, under which there is a call.  None where the answer may be anything.

        A schema that no grammar can be made of is found out where the grammar is compiled; with
        AUTO the answer may then go on without one.
        """
        if not _may_call(use):
            return None
        return grammar(self.syntax.form, use, tokens=self.tokens, loose=self.loose)

    def parser(
        self, use: ToolUse | None, *, request_id: str, answer: int = 0
    ) -> ToolCallParser | None:
        """A reader of one answer; None if the answer is text whatever it looks like."""
        if use is None or not _may_call(use):
            return None
        return ToolCallParser(
            self.syntax.openers,
            hidden=tuple(self.special),
            tools=use,
            request_id=request_id,
            answer=answer,
        )


def _may_call(use: ToolUse | None) -> bool:
    return use is not None and use.choice is not ToolChoice.NONE and bool(use.tools)


HERMES: Final = Syntax(
    "hermes",
    (Opener("<tool_call>", call_syntax.in_tags("</tool_call>")),),
    Form(
        "<tool_call>",
        '\n{"name": ',
        ', "arguments": ',
        "}\n</tool_call>",
        between="\n<tool_call>",
    ),
    marks=("</tool_call>",),
)
QWEN_CODER: Final = Syntax(
    "qwen-coder",
    (Opener("<tool_call>", tagged_calls.tagged),),
    TaggedForm(
        "<tool_call>",
        "\n<function=",
        ">\n",
        "</function>\n</tool_call>",
        between="\n<tool_call>",
        quoted=False,
    ),
    marks=("</tool_call>",),
)
PHI: Final = Syntax(
    "phi",
    (
        Opener("<|tool_call|>", call_syntax.in_tags("<|/tool_call|>")),
        Opener("functools[", call_syntax.list_of_objects),
    ),
    Form(
        "<|tool_call|>",
        '{"name": ',
        ', "arguments": ',
        "}<|/tool_call|>",
        between="<|tool_call|>",
    ),
    marks=("<|/tool_call|>",),
)
MISTRAL: Final = Syntax(
    "mistral",
    (Opener("[TOOL_CALLS]", call_syntax.mistral),),
    Form("[TOOL_CALLS]", "", "[ARGS]", "", between="[TOOL_CALLS]", quoted=False),
    marks=("[ARGS]", "[CALL_ID]"),
    sign="[ARGS]",
)
MISTRAL_LIST: Final = Syntax(
    "mistral-list",
    MISTRAL.openers,
    Form("[TOOL_CALLS]", '{"name": ', ', "arguments": ', "}", between=", ", first="[", last="]"),
)
_CALLS, _CALL, _SEP, _CALL_END, _CALLS_END = map(
    call_syntax.deepseek_mark,
    ("tool calls begin", "tool call begin", "tool sep", "tool call end", "tool calls end"),
)
DEEPSEEK_FENCED: Final = Syntax(
    "deepseek-fenced",
    (Opener(_CALLS, call_syntax.deepseek),),
    Form(
        _CALLS,
        f"{_CALL}function{_SEP}",
        "\n```json\n",
        f"\n```{_CALL_END}",
        between="\n",
        last=_CALLS_END,
        quoted=False,
    ),
    marks=(_CALL, _SEP, _CALL_END, _CALLS_END),
    sign="```json",
)
DEEPSEEK: Final = Syntax(
    "deepseek",
    DEEPSEEK_FENCED.openers,
    Form(
        _CALLS,
        _CALL,
        _SEP,
        _CALL_END,
        between="",
        last=_CALLS_END,
        quoted=False,
    ),
    marks=(_CALL, _SEP, _CALL_END, _CALLS_END),
)
_BARE_OPENERS: Final = (
    Opener("<|python_tag|>", call_syntax.after_python_tag),
    Opener("{", call_syntax.bare_object, at_start=True),
)
LLAMA: Final = Syntax(
    "llama",
    _BARE_OPENERS,
    Form("", '{"name": ', ', "parameters": ', "}", between="; "),
    sign='"parameters"',
)
BARE: Final = Syntax(
    "bare", _BARE_OPENERS, Form("", '{"name": ', ', "arguments": ', "}", between="\n")
)
LIQUID: Final = Syntax(
    "liquid",
    (Opener("<|tool_call_start|>", call_syntax.pythonic_within("<|tool_call_end|>")),),
    PythonForm("<|tool_call_start|>", last="<|tool_call_end|>"),
    marks=("<|tool_call_start|>", "<|tool_call_end|>"),
)
PYTHONIC: Final = Syntax(
    "pythonic", (Opener("[", call_syntax.pythonic, at_start=True),), PythonForm()
)
SYNTAXES: Final = (
    HERMES, QWEN_CODER, PHI, MISTRAL, MISTRAL_LIST, DEEPSEEK_FENCED, DEEPSEEK, LLAMA, BARE, LIQUID,
    PYTHONIC,
)  # fmt: skip
"""Tried in this order: those with marks before those that begin with any brace."""

_THOUGHTS: Final = re.compile("think|reason", re.IGNORECASE)
"""Marks around thoughts, which are special tokens of some models and come before any call."""

_PROBE_NAME: Final = "look_up"
_PROBE_ARGUMENTS: Final = {"word": "quince"}
_PROBE_RESULT: Final = "Cydonia oblonga"
_PROBE_TOOL: Final = {
    "type": "function",
    "function": {
        "name": _PROBE_NAME,
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}
_QUESTION: Final = {"role": "user", "content": "What is a quince?"}


def dialect_of(tokenizer: Any) -> Dialect:
    """How this model calls tools, found by having its template write a call."""
    template = ChatTemplate(tokenizer)
    syntax, arguments_as = HERMES, None
    if template and _shows_tools(template):
        found = (
            (syntax, arguments_as)
            for arguments_as in ArgumentsAs
            for syntax in SYNTAXES
            if _writes(template, syntax, arguments_as)
        )
        syntax, arguments_as = next(found, (HERMES, None))
    marks = {opener.text for opener in syntax.openers} | set(syntax.marks)
    added = tokenizer.added_tokens_decoder
    return Dialect(
        syntax,
        native=arguments_as is not None,
        arguments_as=arguments_as or ArgumentsAs.OBJECT,
        tokens={token.content: at for at, token in added.items() if token.content in marks},
        special=frozenset(t.content for t in added.values() if t.special and t.content in marks),
        loose=tuple(
            at
            for at, token in added.items()
            if token.content not in marks and _is_loose(token.content, special=token.special)
        ),
    )


def _is_loose(token: str, *, special: bool) -> bool:
    """Whether it is no text to a grammar: to llguidance any token such as `<table>` is special."""
    if special:
        return _THOUGHTS.search(token) is not None
    return token.startswith("<") and token.endswith(">")


def _shows_tools(template: ChatTemplate) -> bool:
    try:
        return _PROBE_NAME in template.render([_QUESTION], tools=[_PROBE_TOOL])
    except TEMPLATE_FAULTS:
        return False


def _writes(template: ChatTemplate, syntax: Syntax, arguments_as: ArgumentsAs) -> bool:
    """Whether the template writes a call that this syntax reads, and shows what came of it."""
    as_text = arguments_as is ArgumentsAs.TEXT
    arguments: object = json.dumps(_PROBE_ARGUMENTS) if as_text else _PROBE_ARGUMENTS
    function = {"name": _PROBE_NAME, "arguments": arguments}
    call = {"id": "quince001", "type": "function", "function": function}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    told = {
        "role": "tool",
        "name": _PROBE_NAME,
        "tool_call_id": "quince001",
        "content": _PROBE_RESULT,
    }
    try:
        before = template.render([_QUESTION], tools=[_PROBE_TOOL])
        after = template.render([_QUESTION, asked, told], tools=[_PROBE_TOOL], generation=False)
    except TEMPLATE_FAULTS:
        return False
    written = after[shared(before, after) :]
    if syntax.sign not in written or _PROBE_RESULT not in written:
        return False
    parser = ToolCallParser(
        syntax.openers, tools=ToolUse((Tool(_PROBE_NAME),)), request_id="", answer=0
    )
    deltas = (*parser.push(written).deltas, *parser.finish().deltas)
    read = "".join(delta.arguments for delta in deltas)
    # Calls in the words of Hermes are an assistant's; the prompt's example is not in `written`.
    return parser.whole_calls == 1 and json.loads(read) == _PROBE_ARGUMENTS
