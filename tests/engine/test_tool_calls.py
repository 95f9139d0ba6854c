from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pinaivu_node.engine.chat.call_syntax import deepseek_mark
from pinaivu_node.engine.chat.dialects import SYNTAXES, Dialect, dialect_of
from pinaivu_node.engine.chat.tool_calls import call_id
from pinaivu_node.engine.frames import encode
from pinaivu_node.engine.types import (
    StepFrame,
    TokenEvent,
    Tool,
    ToolCallDelta,
    ToolChoice,
    ToolUse,
)

from .conftest import make_tokenizer
from .families import FAMILIES, wide

WEATHER = Tool(
    "get_weather",
    "The weather somewhere.",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"$ref": "#/$defs/unit"},
            },
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "F"]}},
        }
    ),
)
TIME = Tool("time.now", "What time it is.")
TOOLS = (WEATHER, TIME)
BY_NAME = {syntax.name: syntax for syntax in SYNTAXES}
PARIS = {"city": "Paris"}
OSLO = {"city": "Oslo", "days": 2}

# As models of these families answer: the text, and what is in it.
ANSWERS = {
    "hermes": [
        (
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
            "",
            [("get_weather", PARIS)],
        ),
        (
            ("<think>\nParis, so.\n</think>\n\nLet me look.\n\n"
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "time.now", "arguments": {}}\n</tool_call>'),
            "<think>\nParis, so.\n</think>\n\nLet me look.",
            [("get_weather", PARIS), ("time.now", {})],
        ),
        (
            '<tool_call>{ "arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call> ',
            "",
            [("get_weather", PARIS)],
        ),
        # The closing mark is forgotten, or does not come to its end.
        (
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_',
            "",
            [("get_weather", PARIS)],
        ),
        (
            ('<tool_call>\n{"type": "function", "function": {"name": "get_weather",'
            ' "arguments": "{\\"city\\": \\"Paris\\"}"}}\n</tool_call>\nWait.'),
            "\nWait.",
            [("get_weather", PARIS)],
        ),
        (
            ('<tool_call>[{"name": "time.now"}, {"name": "get_weather", "parameters": '
            '{"city": "Oslo", "days": 2}}]</tool_call>'),
            "",
            [("time.now", {}), ("get_weather", OSLO)],
        ),
    ],
    "qwen-coder": [
        (
            (
                "Yes.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
                "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n"
                "<tool_call>\n<function=time.now>\n</function>\n</tool_call>"
            ),
            "Yes.",
            [("get_weather", OSLO), ("time.now", {})],
        ),
        (
            (
                "<tool_call><function=get_weather><parameter=city>\n2\n\n</parameter>"
                "<parameter=days>many</parameter></function></tool_call>"
            ),
            "",
            [("get_weather", {"city": "2\n", "days": "many"})],
        ),
    ],
    "llama": [
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [("get_weather", PARIS)]),
        (
            '\n{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
            "",
            [("get_weather", PARIS)],
        ),
        (
            ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
            '{"name": "time.now", "parameters": {}}'),
            "",
            [("get_weather", PARIS), ("time.now", {})],
        ),
        (
            '{"function": "get_weather", "parameters": {"city": "Paris"}}\nThere.',
            "\nThere.",
            [("get_weather", PARIS)],
        ),
    ],
    "mistral": [
        (
            'Sure.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]time.now[ARGS]{}',
            "Sure.",
            [("get_weather", PARIS), ("time.now", {})],
        ),
        (
            '[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Paris"}',
            "",
            [("get_weather", PARIS)],
        ),
        ('[TOOL_CALLS]get_weather{"city": "Paris"}', "", [("get_weather", PARIS)]),
    ],
    "mistral-list": [
        (
            ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "a"}, '
            '{"name": "time.now", "arguments": {}}]'),
            "",
            [("get_weather", PARIS), ("time.now", {})],
        ),
        ('[TOOL_CALLS]{"name": "time.now", "arguments": null}', "", [("time.now", {})]),
    ],
    "phi": [
        (
            '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|/tool_call|>',
            "",
            [("get_weather", PARIS)],
        ),
        (
            'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
            "",
            [("get_weather", PARIS)],
        ),
    ],
    "deepseek": [
        (
            wide(
                "One moment.\n<|tool calls begin|><|tool call begin|>get_weather<|tool sep|>"
                '{"city": "Paris"}<|tool call end|>\n<|tool call begin|>time.now<|tool sep|>{}'
                "<|tool call end|><|tool calls end|>"
            ),
            "One moment.",
            [("get_weather", PARIS), ("time.now", {})],
        ),
    ],
    "deepseek-fenced": [
        (
            wide(
                "<|tool calls begin|><|tool call begin|>function<|tool sep|>get_weather\n"
                '```json\n{"city": "Paris"}\n```<|tool call end|><|tool calls end|>'
            ),
            "",
            [("get_weather", PARIS)],
        ),
    ],
    "pythonic": [
        (
            "[get_weather(city='Paris'), time.now()]",
            "",
            [("get_weather", PARIS), ("time.now", {})],
        ),
        (
            '[get_weather(city="Oslo", days=2)]\n',
            "",
            [("get_weather", OSLO)],
        ),
    ],
    "liquid": [
        (
            '<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>It is fine.',
            "It is fine.",
            [("get_weather", PARIS)],
        ),
    ],
}  # fmt: skip

# What looks like calls and is none.
TEXTS = {
    "hermes": [
        "No tools here.",
        "a < b <tool",
        "<tool_call>",
        "<tool_call>\nI think so",
        '<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": 5}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_weather"',
        '<tool_call>{"name": "get_weather", "arguments": "{"}</tool_call>',
        '<tool_call>{"surprise": {"name": "get_weather"}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": "[1]"}</tool_call>',
        "<tool_call><tool_cal",
        '<tool_call>{"' + "x" * 5000 + '": 1}',
    ],
    "llama": [
        '{"city": "Paris"}',
        '{"name": "Ada", "arguments": {}}',
        'Here: {"name": "get_weather", "parameters": {"city": "Paris"}}',
        "{}",
        "{",
    ],
    "qwen-coder": [
        "<tool_call>\n<function=rm_rf>\n</function>\n</tool_call>",
        "<tool_call>\n<function=get_weather>\n<other=city>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo",
        '<tool_call>{"name": "get_weather", "arguments": {}}',
    ],
    "mistral": ["[TOOL_CALL]", "a [b]", "[ARG"],
    "pythonic": [
        "[1] says so",
        "[]",
        "[get_weather('Paris')]",
        "[get_weather(city=open('x'))]",
        "[get_weather(**{'city': 'Paris'})]",
        "[time.now(), rm_rf()]",
        "[get_weather(city=x)]",
        "[get_weather(city={1})]",
        "[get_weather(city='\\d",
        "[f(a=" + "-" * 3000 + "1)]",
        "[" * 200,
    ],
    "deepseek": [wide("<|tool calls begi")],
}

EVERY_ANSWER = [(name, text) for name, found in ANSWERS.items() for text, *_ in found]
EVERY_TEXT = [(name, text) for name, texts in TEXTS.items() for text in texts]


def parser_of(name, *, tools=TOOLS, special=(), **use):
    tokens = {mark: at for at, mark in enumerate(special)}
    dialect = Dialect(BY_NAME[name], native=True, tokens=tokens, special=frozenset(tokens))
    return dialect.parser(ToolUse(tools, **use), request_id="r")


def read(parser, pieces):
    """The text and the calls, put together as a client does it."""
    text, calls = "", []
    for parsed in (*map(parser.push, pieces), parser.finish()):
        text += parsed.text
        for delta in parsed.deltas:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append([delta.id, delta.name, ""])
            else:
                assert delta.id is None
                assert delta.arguments
            calls[delta.index][2] += delta.arguments
    return text, calls


def plain(calls):
    return [(name, json.loads(arguments)) for _, name, arguments in calls]


@pytest.mark.parametrize(
    ("name", "text", "shown", "calls"),
    [(name, *answer) for name, answers in ANSWERS.items() for answer in answers],
)
def test_the_calls_of_each_family_are_read(name, text, shown, calls):
    parser = parser_of(name)
    got_text, got_calls = read(parser, [text])
    assert plain(got_calls) == calls
    assert got_text == shown
    assert parser.whole_calls == len(calls)


@pytest.mark.parametrize(("name", "text"), EVERY_TEXT)
def test_what_is_no_call_is_text_to_its_last_character(name, text):
    parser = parser_of(name)
    assert read(parser, [text]) == (text, [])
    assert parser.whole_calls == 0
    assert read(parser_of(name), text) == (text, [])


@pytest.mark.parametrize(("name", "text"), EVERY_ANSWER)
def test_letter_by_letter_is_the_same(name, text):
    assert read(parser_of(name), text) == read(parser_of(name), [text])


SCRAPS = st.sampled_from([
    "<tool_call>", "</tool_call>", "\n", " ", '{"name": ', '"get_weather"', '"rm"',
    ', "arguments": ', '{"city": "Paris"}', "}", "{", "[", "]", ",", ";", "text", "[TOOL_CALLS]",
    "[ARGS]", "get_weather", "functools[", "<|tool_call|>", "<|/tool_call|>", "(city='x')",
    "time.now()", "```json\n", "\n```", "<|tool_call_start|>", "<|tool_call_end|>",
    "<|python_tag|>", "\\", '"', "<function=", "get_weather>", "<parameter=city>", "</parameter>",
    "</function>",
    *map(deepseek_mark, ("tool calls begin", "tool call begin", "tool sep", "tool call end",
                         "tool calls end")),
])  # fmt: skip


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
def test_no_mark_is_the_beginning_of_another(syntax):
    # Else where the text is cut would decide which of the two is read.
    marks = [*(opener.text for opener in syntax.openers), *syntax.marks]
    assert not [(a, b) for a in marks for b in marks if a != b and b.startswith(a)]


@given(
    st.sampled_from(sorted(BY_NAME)),
    st.lists(SCRAPS, max_size=14).map("".join)
    | st.sampled_from([text for _, text in EVERY_ANSWER]),
    st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from(["shown", "hidden"]),
)
@example("hermes", '<tool_call>{"name": "get_weather", "arguments": {"a": x', [30, 40], "shown")
def test_where_an_answer_is_cut_into_pieces_changes_nothing(name, text, cuts, marked):
    at = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(at)]
    syntax = BY_NAME[name]
    marks = [*(opener.text for opener in syntax.openers), *syntax.marks]
    special = marks if marked == "hidden" else ()
    whole = read(parser_of(name, special=special), [text])
    assert read(parser_of(name, special=special), pieces) == whole
    assert read(parser_of(name, special=special), text) == whole


@given(st.sampled_from(EVERY_ANSWER), st.integers(0, 400))
def test_an_answer_that_is_taken_up_elsewhere_has_the_same_calls(answer, at):
    name, text = answer
    first, second = parser_of(name), parser_of(name)
    begun, replayed = first.push(text[:at]), second.push(text[:at])
    assert begun == replayed
    assert second.push(text[at:]) == first.push(text[at:])
    assert second.finish() == first.finish()


def test_arguments_go_out_as_they_come():
    parser = parser_of("hermes")
    pieces = [
        "<tool_",
        'call>\n{"name": "get_',
        'weather", "arguments": ',
        '{"ci',
        'ty": "Pa',
        'ris"}',
    ]
    told = [
        [(delta.name, delta.arguments) for delta in parser.push(piece).deltas] for piece in pieces
    ]
    assert told == [
        [], [], [], [("get_weather", ""), (None, '{"ci')], [(None, 'ty": "Pa')], [(None, 'ris"}')],
    ]  # fmt: skip


def test_what_goes_wrong_within_the_arguments_is_text_from_there():
    text, calls = read(
        parser_of("hermes"), ['<tool_call>{"name": "get_weather", "arguments": {"city": oops}}']
    )
    assert calls == [[call_id("r", answer=0, call=0), "get_weather", '{"city": ']]
    assert text == "oops}}"


def test_a_call_that_fails_does_not_hide_the_next_one():
    good = '<tool_call>{"name": "time.now", "arguments": {}}</tool_call>'
    text, calls = read(parser_of("hermes"), ["<tool_call>hm" + good])
    assert (text, plain(calls)) == ("<tool_call>hm", [("time.now", {})])
    text, calls = read(parser_of("hermes"), ["<tool_call>" + good])
    assert (text, plain(calls)) == ("<tool_call>", [("time.now", {})])


def test_marks_that_are_special_tokens_are_never_shown():
    parser = parser_of("mistral", special=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"))
    assert read(parser, ["a[ARGS]b [TOOL_CALLS]rm[ARGS]{}"])[0] == "ab rm{}"


def test_a_name_is_one_of_the_tools():
    parser = parser_of("hermes", tools=(TIME,))
    text = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    assert read(parser, [text]) == (text, [])


def test_ids_are_the_requests_own_and_the_same_anywhere():
    ids = {call_id("r", answer=answer, call=call) for answer in range(3) for call in range(3)}
    assert len(ids) == 9
    assert call_id("r", answer=0, call=1) == "call_b13e2d876460f190671e7897"
    assert call_id("r1", answer=0, call=0) != call_id("r", answer=10, call=0)


def test_where_no_call_is_wanted_nothing_is_parsed():
    dialect = Dialect(BY_NAME["hermes"], native=True)
    for use in (None, ToolUse(TOOLS, ToolChoice.NONE), ToolUse(())):
        assert dialect.parser(use, request_id="r") is None
    assert dialect.constraint(ToolUse(TOOLS, ToolChoice.NONE)) is None


def test_a_long_answer_is_held_back_no_more_than_it_must():
    parser = parser_of("hermes")
    for _ in range(1000):
        assert parser.push("no marks here. ").text
    parser.push("<tool_call>" + '{"name":' + " " * 200_000)
    assert parser.push("x").text


def test_where_one_call_was_asked_for_a_second_is_text():
    call = '<tool_call>{"name": "time.now", "arguments": {}}</tool_call>'
    text, calls = read(parser_of("hermes", parallel=False), [call + call])
    assert (text, plain(calls)) == (call, [("time.now", {})])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_of_the_family_whose_calls_its_template_writes(name):
    family = FAMILIES[name]
    dialect = dialect_of(family.tokenizer())
    assert (dialect.syntax.name, dialect.native) == (family.dialect, family.native)


def test_special_tokens_of_a_family_are_made_visible_to_the_parser_and_to_nobody_else():
    tokenizer = FAMILIES["mistral"].tokenizer()
    dialect = dialect_of(tokenizer)
    marks = tokenizer.convert_tokens_to_ids(["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"])
    assert dialect.visible(ToolUse(TOOLS)) == frozenset(marks)
    for use in (None, ToolUse(TOOLS, ToolChoice.NONE), ToolUse(())):
        assert dialect.visible(use) == frozenset()
    assert dialect_of(make_tokenizer()).visible(ToolUse(TOOLS)) == frozenset()


STRANGE = [
    ("hermes", '<tool_call>{"arguments": {"city": %s}, "name": "get_weather"}</tool_call>'),
    ("pythonic", "[get_weather(city=%s)]"),
    (
        "qwen-coder",
        "<tool_call><function=get_weather><parameter=days>%s</parameter></function></tool_call>",
    ),
]


@pytest.mark.parametrize(("name", "form"), STRANGE, ids=str)
@pytest.mark.parametrize("value", [r'"\ud800"', r'"\ud83d\ude00"', "1e999", "NaN"])
def test_whatever_a_model_writes_goes_over_the_pipe_as_json(name, form, value):
    text, calls = read(parser_of(name), [form % value])
    frame = StepFrame((TokenEvent("r", (1,), text, 1, tool_calls=_deltas(calls)),))
    encode(frame)
    for _, _, arguments in calls:
        json.loads(arguments, parse_constant=pytest.fail)


def _deltas(calls):
    return tuple(ToolCallDelta(at, *call) for at, call in enumerate(calls))
