from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.engine.chat.json_scan import JsonScanner, Malformed, written

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)  # fmt: skip


def scan(text):
    """How much of the text is one value, and whether it is whole."""
    scanner = JsonScanner()
    for at, letter in enumerate(text):
        if scanner.done or not scanner.push(letter):
            return at, True
    return len(text), scanner.done or scanner.push(" ") is False


@given(VALUES, st.sampled_from([None, 2]), st.booleans())
def test_every_value_is_followed_to_its_end(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert scan(text + "\n}") == (len(text), True)


@given(VALUES, st.text(alphabet='{}[],:"\\tfn0123456789.eE+-u \n\x01', max_size=3), st.data())
def test_what_is_taken_for_a_whole_value_is_one(value, noise, data):
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + noise + text[at + len(noise) :]
    try:
        length, whole = scan(text.strip(" \n"))
    except Malformed:
        with pytest.raises(ValueError):  # noqa: PT011 - json says no more
            json.loads(text)
        return
    if whole:
        json.loads(text.strip(" \n")[:length])


@pytest.mark.parametrize(
    "text",
    ["}", "{,", '{"a" 1', '{"a":1,}', "[1,]", "[1 2", '"\n', '"\\x', '"\\u12g', "tru3", "01 ",
     "1.e5 ", "- ", "+1", "NaN", "nul]", "{]", "[}", "{'a'", "[" * 129, "1" * 401],
)  # fmt: skip
def test_what_begins_no_value_is_noticed(text):
    scanner = JsonScanner()
    with pytest.raises(Malformed):
        list(map(scanner.push, text))


def test_nothing_follows_a_whole_value():
    scanner = JsonScanner()
    for letter in "{}":
        scanner.push(letter)
    assert scanner.done
    with pytest.raises(Malformed):
        scanner.push(" ")


@given(VALUES)
def test_what_is_written_is_what_was_read_and_has_bytes(value):
    text = written(value)
    text.encode()
    assert json.loads(text) == value


@pytest.mark.parametrize("half", ["\ud800", "a\udfff", "\udc00\ud800"])
def test_half_a_surrogate_pair_is_written_as_an_escape(half):
    text = written({half: [half, "ü"]})
    text.encode()
    assert json.loads(text) == {half: [half, "ü"]}


@pytest.mark.parametrize("value", [float("inf"), [float("nan")], {1, 2}, 1j, {(1, 2): 3}], ids=str)
def test_what_json_has_no_word_for_is_not_written(value):
    with pytest.raises(Malformed):
        written(value)
