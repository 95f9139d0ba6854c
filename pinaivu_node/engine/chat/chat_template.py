"""A model's chat template: code that came with the weights, run in a sandbox and on a leash.

transformers renders it in jinja's immutable sandbox, on plain data: a template cannot reach files,
modules or our objects, and what it raises ends one request.  A sandbox does not end a loop, so the
lines a template runs are counted.  What is not bounded is a single step that is huge by itself
(`"x" * 10**10`): it costs the engine's process, which the daemon restarts, and as templates are
rendered while a model is loaded, such a model is never ready.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from types import FrameType
from typing import Any, Final

import jinja2

from pinaivu_node.engine.types import PromptRefused

TEMPLATE_FAULTS: Final = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise: its own errors, and any mistake an expression can make."""

_LINES: Final = 500_000
"""A short chat takes a few hundred; so many are over in a tenth of a second."""
_LINES_PER_PART: Final = 2_000
"""For each message and tool: the longest known templates run some dozens."""

_CHATML: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CHATML_MARKS: Final = frozenset({"<|im_start|>", "<|im_end|>"})

Turn = dict[str, Any]


class TemplateEndless(ValueError):
    """The template ran more lines than any honest one."""


class ArgumentsAs(Enum):
    """What a template takes the arguments of an earlier call as."""

    OBJECT = "object"
    TEXT = "text"


class ChatTemplate:
    """The template of one tokenizer.

    A model without one does not chat, unless its vocabulary has the marks of ChatML: they are there
    for nothing else.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        vocabulary = tokenizer.added_tokens_encoder
        if not template and vocabulary.keys() >= _CHATML_MARKS:
            template = _CHATML
        self._template = template
        self.source: Final = (
            "\n".join(map(str, template.values())) if isinstance(template, dict) else template or ""
        )

    def __bool__(self) -> bool:
        return bool(self._template)

    def render(
        self, turns: Sequence[Turn], *, tools: Sequence[Turn] = (), generation: bool = True
    ) -> str:
        """The chat as the model is to read it; raises one of TEMPLATE_FAULTS."""
        if not self._template:
            raise PromptRefused(
                "This model has no chat template; it continues text. Use /v1/completions."
            )
        # A template may come as several with names; transformers then chooses.
        chosen = None if isinstance(self._template, dict) else self._template
        with _counted(_LINES + _LINES_PER_PART * (len(turns) + len(tools))):
            rendered = self._tokenizer.apply_chat_template(
                list(turns),
                tools=list(tools) or None,
                chat_template=chosen,
                tokenize=False,
                add_generation_prompt=generation,
            )
        return str(rendered)


def shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@contextmanager
def _counted(lines: int) -> Iterator[None]:
    """Raise TemplateEndless in whatever template this thread runs for more lines than these."""
    left = lines

    def in_template(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left < 0:
                raise TemplateEndless("it does not end")
        return in_template

    def on_call(frame: FrameType, _event: str, _argument: object) -> Any:
        # jinja compiles a template that came as text under this name.
        return in_template if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)
