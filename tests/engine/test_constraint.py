from __future__ import annotations

import json
import random
import re
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinaivu_node.engine.frames import RefusalKind, Refused
from pinaivu_node.engine.sampling import constraint as constraints
from pinaivu_node.engine.types import Constraint, ConstraintKind, FinishReason, PromptRefused

from .conftest import CHAT_TEMPLATE, SPECIAL
from .solo import Solo, request
from .walks import CHOICES, REGEXES, SCHEMAS, Walker, choice, lark, regex, schema, struct

AN_OBJECT = Constraint(ConstraintKind.JSON_OBJECT)


@pytest.fixture(scope="module")
def walker() -> Walker:
    """With some hundreds of tokens that are several letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        json.dumps(each, separators=(",", ":"), ensure_ascii=False) for each in SCHEMAS.values()
    ]
    tokenizer.train_from_iterator(
        texts * 3,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[1])
    fast.chat_template = CHAT_TEMPLATE
    return Walker(fast, vocabulary=len(fast))


# --- what an answer is ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_written_under_a_schema_validates(walker, name):
    ended = 0
    for seed in range(8):
        text, end = walker.walk(schema(SCHEMAS[name]), random.Random(seed))
        ended += end
        if end and list(SCHEMAS[name].get("properties", ())):
            declared = list(SCHEMAS[name]["properties"])
            said = [key for key in json.loads(text) if key in declared]
            assert said == [key for key in declared if key in said]
    assert ended


def test_any_object_is_an_object(walker):
    for seed in range(20):
        walker.walk(AN_OBJECT, random.Random(seed))


@pytest.mark.parametrize("text", REGEXES)
def test_a_regex_is_of_the_whole_answer(walker, text):
    for seed in range(10):
        walker.walk(regex(text), random.Random(seed))


@pytest.mark.parametrize("words", CHOICES)
def test_a_choice_is_one_of_its_words_to_the_letter(walker, words):
    said = set()
    for seed in range(40):
        text, end = walker.walk(choice(*words), random.Random(seed), steps=5000)
        assert end
        said.add(text)
    assert said <= set(words)
    assert len(said) > 1 or len(set(words)) == 1


def test_ten_thousand_words_are_a_choice(walker):
    words = [f"word{number}" for number in range(10_000)]
    text, _ = walker.walk(choice(*words), random.Random(3))
    assert text in words


names = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=5)
scalars = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={"minLength": st.integers(0, 3), "maxLength": st.integers(3, 8)},
    ),
    st.fixed_dictionaries(
        {"type": st.just("integer")},
        optional={"minimum": st.integers(-999, 5), "maximum": st.integers(5, 12345)},
    ),
    st.fixed_dictionaries({"type": st.sampled_from(["boolean", "null", "number"])}),
    st.fixed_dictionaries({"const": st.one_of(names, st.integers(-99, 99), st.none())}),
    st.fixed_dictionaries({"enum": st.lists(names, min_size=1, max_size=4)}),
)


def containers(inner):
    return st.one_of(
        st.fixed_dictionaries(
            {"type": st.just("array"), "items": inner},
            optional={"minItems": st.integers(0, 2), "maxItems": st.integers(2, 4)},
        ),
        st.dictionaries(names, inner, max_size=4).flatmap(
            lambda properties: (
                st.sets(st.sampled_from(sorted(properties))).map(
                    lambda required: struct(properties, sorted(required))
                )
                if properties
                else st.just(struct({}))
            )
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
    )


@settings(max_examples=150)
@given(st.recursive(scalars, containers, max_leaves=8), st.integers(0, 2**32))
def test_whatever_is_written_under_any_schema_validates(walker, document, seed):
    walker.walk(schema(document), random.Random(seed), steps=120)


pieces = st.one_of(
    st.text("abc-é", min_size=1, max_size=3), st.sampled_from(["[a-c]", "[^a]", ".", "[0-9]"])
)


def compounds(inner):
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "{1,}"])).map(
            # A quantifier of a quantified part would keep the reader busy, which backtracks.
            lambda two: f"({two[0]})" + ("" if set(two[0]) & set("*+?{") else two[1])
        ),
    )


@settings(max_examples=150)
@given(st.recursive(pieces, compounds, max_leaves=6), st.integers(0, 2**32))
def test_any_regex_is_of_the_whole_answer(walker, text, seed):
    walker.walk(regex(text), random.Random(seed), steps=60)


# --- what is refused ------------------------------------------------------------------------------


def doubled(keyword, depth=40):
    """References that double at every level."""
    link = "#/$defs/d{}".format
    definitions = {
        f"d{at}": {keyword: [{"$ref": link(at - 1)}, {"$ref": link(at - 1)}]}
        for at in range(1, depth)
    }
    return {"$defs": definitions | {"d0": {"type": "string"}}, "$ref": link(depth - 1)}


def each(count, make):
    return [make(number) for number in range(count)]


def properties(count, **more):
    return {"type": "object", "properties": {f"p{at}": {} for at in range(count)}} | more


HUGE = "((a{1,1000}){1,1000}){1,1000}"
PATTERNS = each(200, lambda at: {"type": "string", "pattern": f"^.*{at}.*$"})
UNIONS = each(7, lambda at: {"anyOf": each(5, lambda to: properties(1 + at) | {"title": f"{to}"})})
BOMBS = {
    "deep": (Constraint(ConstraintKind.JSON_SCHEMA, '{"items":' * 20_000 + "{}" + "}" * 20_000),
             "levels deep"),
    "deep list": (Constraint(ConstraintKind.JSON_SCHEMA, "[" * 100_000), "levels deep"),
    "properties": (schema(properties(9000, required=each(9000, "p{}".format))), "properties"),
    "optional": (schema(properties(2000)), "optional properties"),
    "enum": (schema({"enum": each(20_000, str)}), "enum"),
    "branches": (schema({"anyOf": each(5000, lambda at: {"const": at})}), "anyOf"),
    "literal": (schema({"const": "x" * 200_000}), "characters"),
    "name": (schema(properties(1) | {"properties": {"x" * 9000: {}}}), "characters"),
    "itself": (schema({"$ref": "#"}), "no text matches"),
    "each other": (schema(doubled("allOf") | {"$defs": {"d39": {"$ref": "#"}}}), "no text matches"),
    "elsewhere": (schema({"$ref": "https://example.com/schema"}), "example.com"),
    "all patterns": (schema({"allOf": PATTERNS}), "patterns"),
    "pattern": (schema({"type": "string", "pattern": "a?" * 9000}), "pattern"),
    "patterns of names": (
        schema({"patternProperties": {f"^(a|.*c)*{at}$": {} for at in range(99)}}),
        "patternProperties",
    ),
    "multiples": (schema({"anyOf": each(9, lambda at: {"multipleOf": 9973 - at})}), "multipleOf"),
    "a multiple": (schema({"type": "number", "multipleOf": 1.2345678901}), "multipleOf"),
    "length": (schema({"type": "string", "maxLength": 10**30}), "maxLength"),
    "characters": (schema({"enum": ["x" * 1000] * 400}), "characters"),
    "regex": (regex("a?" * 30_000 + "a" * 30_000), "characters"),
    "parentheses": (regex("(" * 4000 + ")" * 4000), "regex"),
    "choices": (choice(*each(30_000, str)), "choices"),
    "long choice": (choice("x" * 100_000), "characters"),
    "words": (lark("start: " + " | ".join(each(4000, '"{}"'.format))), "characters"),
    "doubling": (lark("start: T0\n" + "".join(each(60, lambda at: f"T{at}: T{at + 1} T{at + 1}\n"))
                      + 'T60: "a"'), "too big"),
    "endless": (lark("start: a\na: b\nb: a"), "no text matches"),
    "brackets": (lark("start: " + "(" * 3000 + '"a"' + ")" * 3000), "nested"),
    "no such token": (lark("start: <[99999999]>"), "large"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_within_a_second(walker, name):
    bomb, reason = BOMBS[name]
    walker.compiler.warm_up()
    began = time.monotonic()
    with pytest.raises(PromptRefused, match="The constraint cannot be used") as refused:
        walker.compiler.compile(bomb)
    assert time.monotonic() - began < 1
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 400


WEIGHTS = {
    "doubled objects": schema(doubled("anyOf")),
    "items": schema({"type": "array", "minItems": 10**9}),
    "lengths": schema({"type": "string", "minLength": 10**9, "maxLength": 2 * 10**9}),
    "counts": schema({"type": "string", "pattern": HUGE}),
    "nested counts": regex(HUGE),
    "maybes": regex("a?" * 2700 + "a" * 2700),
    "nested pluses": regex("((a+)+)+b"),
    "states": regex("(.|\n)*a(.|\n){200}"),
    "many": schema(properties(4999, required=each(4999, "p{}".format))),
    "any of many": schema(properties(500)),
    "unions": schema({"allOf": UNIONS[:3]}),
    "ambiguous": lark('start: e\ne: e e e | e e | "a" | ""'),
    "left": lark('start: start start | "a"'),
    "doubling": lark("start: r0\n" + "".join(each(40, lambda at: f"r{at}: r{at + 1} r{at + 1}\n"))
                     + 'r40: "a"'),
    "no end": schema({"$ref": "#/$defs/a", "$defs": {"a": struct({"a": {"$ref": "#/$defs/a"}})}}),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_heavy_and_taken_stalls_nobody(walker, name):
    """It fails at some point, or goes on; no step of it takes long."""
    began = time.monotonic()
    matcher = walker.compiler.compile(WEIGHTS[name])
    assert time.monotonic() - began < 1
    dice = random.Random(1)
    for _ in range(200):
        began = time.thread_time()
        allowed = sorted(walker.allowed(matcher) - {walker.eos})
        going_on = bool(allowed) and matcher.accept(dice.choice(allowed))
        assert time.thread_time() - began < 0.3
        if not going_on or matcher.is_finished:
            break
    if not going_on:
        assert matcher.error is not None or matcher.is_finished or not allowed


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"type": "string", "not": {"const": "a"}}, '"not"'),
        ({"if": {}, "then": {}}, '"then"'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "object", "propertyNames": {}}, "propertyNames"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "format": "odd"}, "odd"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "strin"}, "strin"),
        ({"enum": []}, "Unsatisfiable"),
        (False, "object"),
        (5, "object"),
        ([], "object"),
        (None, "object"),
        ({"const": "\ud800"}, "surrogate"),
    ],
)
def test_what_cannot_be_held_is_refused_by_its_name(walker, wrong, reason):
    with pytest.raises(PromptRefused) as refused:
        walker.compiler.compile(schema(wrong))
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "{", "nul", "{'a': 1}", "NaN", '{"minimum": Infinity}', "\ud800"]
)
def test_what_is_no_json_is_refused(walker, text):
    with pytest.raises(PromptRefused, match="cannot be used"):
        walker.compiler.compile(Constraint(ConstraintKind.JSON_SCHEMA, text))


@pytest.mark.parametrize(
    "text", ["", "5", '"a"', "[]", "[1]", '["a", null]', "[" * 9999, '["\\ud800"]']
)
def test_what_is_no_choice_is_refused(walker, text):
    with pytest.raises(PromptRefused, match="cannot be used"):
        walker.compiler.compile(Constraint(ConstraintKind.CHOICE, text))


@pytest.mark.parametrize("text", ["(", "[z-a]", "a{3,1}", "(a)\\1", "[^\\s\\S]", "\ud800"])
def test_what_is_no_regex_is_refused(walker, text):
    with pytest.raises(PromptRefused, match="cannot be used"):
        walker.compiler.compile(regex(text))


def test_words_to_readers_and_unknown_ones_are_let_be(walker):
    document = {"type": "string", "x-odd": 3, "readOnly": True, "$comment": "c", "nullable": True}
    walker.walk(schema(document), random.Random(1))
    sneaky = struct({"a": TEXT_SPACE}) | {"x-guidance": {"whitespace_pattern": HUGE}}
    text, _ = walker.walk(schema(sneaky), random.Random(2))
    assert text.startswith('{"a":')


TEXT_SPACE = {"type": "string", "maxLength": 3}


def test_a_refusal_is_remembered(walker, monkeypatch):
    bomb = regex("a(b(c")
    for _ in range(2):
        with pytest.raises(PromptRefused, match="cannot be used"):
            walker.compiler.compile(bomb)
        monkeypatch.setattr(constraints, "LLMatcher", None)


def test_what_takes_too_long_is_in_nobodys_way_and_is_there_when_it_is_made(solo, monkeypatch):
    """No constraint is known that takes so long: one that waits stands for it."""
    compiler, asked, goes_on = solo.preparation._compiler, threading.Event(), threading.Event()
    slow, other = regex("slow|slower"), regex("other|others")
    make = compiler._new

    def waits(constraint, ours):
        if constraint == slow:
            asked.set()
            goes_on.wait(20)
        return make(constraint, ours)

    known = solo.preparation.prepare(wild(id="known", constraint=PERSON))
    monkeypatch.setattr(compiler, "_new", waits)
    monkeypatch.setattr(constraints, "_COMPILE_S", 0.01)
    refused = solo.preparation.prepare(wild(id="slow", constraint=slow))
    assert asked.is_set()
    assert refused == Refused("slow", "The constraint takes too long to make a grammar of.")
    monkeypatch.setattr(constraints, "_COMPILE_S", 20)
    began = time.monotonic()
    assert solo.preparation.prepare(wild(id="slow", constraint=slow)) == refused
    busy = solo.preparation.prepare(wild(id="other", constraint=other))
    assert busy == Refused("other", "The engine is busy with another constraint.", RefusalKind.FULL)
    assert isinstance(solo.preparation.prepare(wild(id="known", constraint=PERSON)), type(known))
    assert time.monotonic() - began < 10
    goes_on.set()
    compiler._making.join(20)
    for constraint in (slow, other):
        (said,) = solo.run(wild(constraint=constraint, max_tokens=100))
        assert re.fullmatch(constraint.text, said.text)


def test_what_is_kept_is_bounded(walker):
    for number in range(200):
        walker.compiler.compile(regex(f"a{number}"))
    assert len(walker.compiler._compiled) <= 64
    for number in range(10):
        words = [f"{number}-{word:099}" for word in range(2000)]
        walker.compiler.compile(choice(*words))
    assert sum(len(source.text) for source, _ in walker.compiler._compiled) <= 1 << 20


# --- in a batch -----------------------------------------------------------------------------------

PERSON = schema(struct({"name": {"type": "string", "maxLength": 9}, "age": {"enum": [1, 22]}}))


@pytest.fixture(scope="module")
def solo(tiny_model) -> Solo:
    return Solo(tiny_model, prefill_chunk=16)


def wild(**more):
    return request((3, 1, 4), **({"temperature": 1.0, "seed": 5, "max_tokens": 120} | more))


def test_an_answer_under_a_schema_validates_and_ends_by_itself(solo):
    (said,) = solo.run(wild(constraint=PERSON, ignore_eos=True))
    assert said.finish is FinishReason.STOP
    assert list(json.loads(said.text)) == ["name", "age"]


def test_an_answer_that_is_cut_says_so(solo):
    (whole,) = solo.run(wild(constraint=PERSON))
    (said,) = solo.run(wild(constraint=PERSON, max_tokens=9))
    assert (said.finish, len(said.token_ids)) == (FinishReason.LENGTH, 9)
    assert whole.token_ids[:9] == said.token_ids


def test_an_answer_goes_on_where_it_was_with_its_constraint(solo):
    (whole,) = solo.run(wild(constraint=PERSON))
    for at in range(len(whole.token_ids)):
        (rest,) = solo.run(wild(constraint=PERSON, resume=whole.token_ids[:at]))
        assert rest.token_ids == whole.token_ids[at:]
        assert whole.text.endswith(rest.text)
        assert rest.finish is FinishReason.STOP


def test_an_answer_that_is_not_in_the_language_cannot_be_gone_on_with(solo):
    with pytest.raises(PromptRefused, match="gone on"):
        solo.run(wild(constraint=PERSON, resume=(77, 78)))
    (said,) = solo.run(wild(constraint=PERSON))
    assert said.finish is FinishReason.STOP


def test_answers_to_one_prompt_share_the_grammar(solo):
    compiled = solo.preparation._compiler._compiled
    compiled.clear()
    solo.run(wild(constraint=PERSON, n=5))
    assert len(compiled) == 1
    texts = {solo.answers["r", index].text for index in range(5)}
    assert len(texts) > 1
    assert all(json.loads(text) for text in texts)


def test_stop_strings_and_tokens_end_it_too(solo):
    hello = choice("hello world")
    (said,) = solo.run(wild(constraint=hello, stop=("lo",)))
    assert (said.text, said.finish) == ("hel", FinishReason.STOP)
    w = solo.model.tokenizer.convert_tokens_to_ids("w")
    (said,) = solo.run(wild(constraint=hello, stop_token_ids=(w,)))
    assert (said.text, said.finish) == ("hello ", FinishReason.STOP)


def test_marks_in_a_constraint_are_text(solo):
    (said,) = solo.run(wild(constraint=choice("<|im_end|>!<|im_start|>")))
    assert said.text == "<|im_end|>!<|im_start|>"
    assert said.finish is FinishReason.STOP
    (said,) = solo.run(wild(constraint=schema({"const": "<|im_end|>"})))
    assert said.text == '"<|im_end|>"'


FAILING = {
    "a mask": lark('start: e\ne: e e e | e e | "a" | "b" | ""'),
    "a token": WEIGHTS["doubling"],
    "from the start": WEIGHTS["no end"],
}


@pytest.mark.parametrize("name", FAILING)
def test_a_grammar_that_fails_ends_its_answer_alone(solo, name):
    mates = [wild(id="json", constraint=PERSON), wild(id="free", max_tokens=60)]
    alone = [solo.run(mate)[0] for mate in mates]
    eos = solo.model.tokenizer.eos_token_id
    failing = wild(id="failing", constraint=FAILING[name], logit_bias={eos: -100.0}, max_tokens=250)
    together = solo.run(failing, *mates)
    failed = together[0]
    assert failed.finish is FinishReason.ERROR
    assert failed.last.error.startswith("The constraint ")
    for one, other in zip(alone, together[1:], strict=True):
        assert (one.token_ids, one.text, one.finish) == (other.token_ids, other.text, other.finish)
    assert solo.model.pool.statistics(now=0.0).in_use == 0


def test_masks_that_take_too_long_end_their_answer_alone(solo, monkeypatch):
    monkeypatch.setattr(constraints, "_PER_TOKEN_S", -0.1)
    mate, slow = wild(id="mate", max_tokens=60), wild(id="slow", constraint=PERSON)
    said, slow_said = solo.run(mate, slow)
    assert slow_said.finish is FinishReason.ERROR
    assert slow_said.last.error == "The constraint takes too long to follow."
    assert slow_said.token_ids
    assert said.finish in (FinishReason.STOP, FinishReason.LENGTH)
