from __future__ import annotations

import functools
import json
import random

import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from pinaivu_node.engine.chat.dialects import dialect_of
from pinaivu_node.engine.chat.text import ByteDetokenizer
from pinaivu_node.engine.chat.token_bytes import TokenBytes
from pinaivu_node.engine.types import ConstraintKind, Tool, ToolChoice, ToolUse

from .families import FAMILIES
from .test_tool_calls import ANSWERS, TIME, TOOLS, plain, read

NATIVE = [name for name in FAMILIES if name in ANSWERS]
WITH_OPENERS = [name for name in NATIVE if name not in ("llama", "pythonic")]
REQUIRED = ToolUse(TOOLS, ToolChoice.REQUIRED)


@functools.cache
def model(name):
    tokenizer = FAMILIES[name].tokenizer()
    return tokenizer, dialect_of(tokenizer), from_tokenizer(tokenizer)


def matcher_of(name, use):
    _, dialect, vocabulary = model(name)
    constraint = dialect.constraint(use)
    assert constraint.kind is ConstraintKind.LARK
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(constraint.text))
    assert matcher.get_error() == ""
    return matcher


def follows(name, use, text):
    """How much of the text the grammar takes, and whether the answer may end there."""
    tokenizer, *_ = model(name)
    matcher = matcher_of(name, use)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    taken = matcher.try_consume_tokens(token_ids)
    return tokenizer.decode(token_ids[:taken]), matcher.is_accepting()


def random_answer(name, use, *, seed):
    """What a model that knows nothing writes under the grammar."""
    tokenizer, dialect, _ = model(name)
    matcher = matcher_of(name, use)
    dice = random.Random(seed)
    ends = [tokenizer.convert_tokens_to_ids(letter) for letter in '"}])']
    token_ids = []
    while not matcher.is_stopped() and not (matcher.is_accepting() and dice.random() < 0.5):
        mask = matcher.compute_bitmask()
        allowed = [at for at in range(len(tokenizer)) if mask[at // 8] >> at % 8 & 1]
        allowed = [at for at in allowed if at != tokenizer.eos_token_id]
        closing = [at for at in ends if at in allowed]
        end = tokenizer.encode("\n</parameter>", add_special_tokens=False)
        if len(token_ids) % 20 == 19 and matcher.validate_tokens(end) == len(end):
            matcher.consume_tokens(end)
            token_ids += end
            continue
        hurry = closing and (dice.random() < 0.3 or len(token_ids) > 300)
        token_ids.append(dice.choice(closing if hurry else allowed))
        assert matcher.consume_token(token_ids[-1])
    detokenizer = ByteDetokenizer(TokenBytes(tokenizer), visible=dialect.visible(use))
    text = "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()
    return read(dialect.parser(use, request_id="r"), text)


@pytest.mark.parametrize("name", [*NATIVE, "smollm2"])
def test_whatever_is_written_under_the_grammar_is_read_as_calls_of_the_tools(name):
    for seed in range(12):
        text, calls = random_answer(name, REQUIRED, seed=seed)
        assert text == ""
        assert calls
        for tool, arguments in plain(calls):
            assert tool in ("get_weather", "time.now")
            assert isinstance(arguments, dict)
            if tool == "get_weather":
                assert arguments.keys() <= {"city", "days", "unit"}
                assert isinstance(arguments["city"], str)
                assert isinstance(arguments.get("days", 0), int)
                assert arguments.get("unit", "C") in ("C", "F")


@pytest.mark.parametrize("name", NATIVE)
def test_one_call_of_the_named_tool_is_all_there_is(name):
    use = ToolUse(TOOLS, ToolChoice.REQUIRED, named="time.now", parallel=False)
    for seed in range(4):
        _, calls = random_answer(name, use, seed=seed)
        assert [tool for tool, _ in plain(calls)] == ["time.now"]


HERMES_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.mark.parametrize("name", ["hermes", "qwen", "smollm2"])
def test_a_required_call_begins_at_once_and_may_be_followed_by_another(name):
    assert follows(name, REQUIRED, "Sure") == ("", False)
    assert follows(name, REQUIRED, HERMES_CALL) == (HERMES_CALL, True)
    two = HERMES_CALL + "\n" + HERMES_CALL
    assert follows(name, REQUIRED, two) == (two, True)
    single = ToolUse(TOOLS, ToolChoice.REQUIRED, parallel=False)
    assert follows(name, single, two) == (HERMES_CALL, True)


@pytest.mark.parametrize("name", ["hermes", "qwen", "smollm2"])
def test_an_automatic_answer_is_free_until_a_call_opens(name):
    use = ToolUse(TOOLS)
    free = "Sure. <tool </tools> {} 🙂\n"
    assert follows(name, use, free) == (free, True)
    called = free + HERMES_CALL + " and " + HERMES_CALL + "."
    assert follows(name, use, called) == (called, True)
    taken, may_end = follows(name, use, free + '<tool_call>\n{"name": "rm_rf"')
    assert (taken.endswith('{"name": "'), may_end) == (True, False)
    once = ToolUse(TOOLS, parallel=False)
    assert follows(name, once, free + HERMES_CALL + " ok") == (free + HERMES_CALL + " ok", True)
    # A second opener is text by now, and read as such; where it is a token, it is forbidden.
    taken, may_end = follows(name, once, HERMES_CALL + '<tool_call>{"name": "rm_rf"')
    assert (taken.removeprefix(HERMES_CALL) == "") is (name == "qwen")
    assert may_end


@pytest.mark.parametrize("name", WITH_OPENERS)
def test_after_an_opener_an_automatic_answer_is_a_call(name):
    _, dialect, _ = model(name)
    opener = dialect.syntax.form.opener
    taken, may_end = follows(name, ToolUse(TOOLS), f"Well {opener}~~~")
    assert not may_end
    assert "~" not in taken


@pytest.mark.parametrize("name", ["llama", "pythonic"])
def test_where_a_call_opens_with_any_bracket_nothing_is_enforced(name):
    _, dialect, _ = model(name)
    assert dialect.constraint(ToolUse(TOOLS)) is None


def test_thoughts_and_tags_that_are_tokens_may_stand_in_an_automatic_answer():
    text = "<think>hm</think>Sure.\n" + HERMES_CALL + "<think></think>"
    for use in (ToolUse(TOOLS), ToolUse(TOOLS, parallel=False)):
        assert follows("qwen", use, text) == (text, True)


@pytest.mark.parametrize(
    "schema",
    [
        "{}",
        '{"type": "object", "properties": {"a": {"type": "string", "format": "odd", "not": {}}}}',
        (
            '{"properties": {"a-b": {}, "a": true, "": {"$ref": "#/definitions/x"}},'
            ' "definitions": {"x": {"type": "null"}}, "required": ["a-b"]}'
        ),
        '{"type": "object", "x-guidance": {"whitespace_pattern": "("}}',
        '{"type": "object", "properties": {"q": {"enum": ["/* \\" */", "\\n\\u2028"]}}}',
        '{"type": "object", "properties": 5, "required": 6}',
        '{"properties": {"\\u007f\\u0085": {"enum": ["\\u007f"]}}, "required": ["\\u007f\\u0085"]}',
    ],
)
@pytest.mark.parametrize("name", NATIVE)
def test_odd_schemas_make_no_broken_grammar_of_ours(name, schema):
    use = ToolUse((Tool("f", "", schema), TIME), ToolChoice.REQUIRED)
    _, dialect, vocabulary = model(name)
    text = dialect.constraint(use).text
    alone = json.dumps(json.loads(schema) | {"x-guidance": {"lenient": True}})
    if not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(alone)):
        assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(text), vocabulary) == ""


def test_words_to_readers_make_no_grammar_longer_and_data_is_left_alone():
    properties = {
        "description": {"type": "string", "description": "x" * 5000},
        "title": {"enum": [{"title": "T", "description": "D"}]},
    }
    schema = json.dumps({"type": "object", "title": "y" * 5000, "properties": properties})
    use = ToolUse((Tool("f", "", schema),), ToolChoice.REQUIRED)
    _, dialect, _ = model("hermes")
    assert len(dialect.constraint(use).text) < 1000
    call = (
        '<tool_call>\n{"name": "f", "arguments": {"description": "a", "title": %s}}\n</tool_call>'
    )
    good = call % '{"title": "T", "description": "D"}'
    assert follows("hermes", use, good) == (good, True)
    assert not follows("hermes", use, call % '{"title": "U"}')[1]
