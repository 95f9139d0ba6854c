from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.engine.text import AnswerText, Detokenizer, StopStrings


def decode_bytes(token_ids):
    """The simplest tokenizer there is: a token is a byte."""
    return bytes(token_ids).decode(errors="replace")


def decode_words(token_ids):
    """As sentence-piece tokenizers do: the first word of a text loses its space."""
    return "".join(f" w{token}" for token in token_ids).removeprefix(" ")


def shown(answer: AnswerText, token_ids) -> tuple[str, bool]:
    text = ""
    for token in token_ids:
        event = answer.push(token)
        text += event.text
        if event.stopped:
            return text, True
    rest = answer.finish()
    return text + rest.text, rest.stopped


@given(st.text(max_size=60))
def test_the_pieces_are_the_whole_and_no_character_is_ever_broken(text):
    detokenizer = Detokenizer(decode_bytes)
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.flush() == text


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_are_shown_in_the_end_and_never_wait_for_ever(data):
    detokenizer = Detokenizer(decode_bytes)
    waiting = 0
    for byte in data:
        waiting = 0 if detokenizer.push(byte) else waiting + 1
        assert waiting < 8
    detokenizer.flush()


def test_an_emoji_appears_with_its_last_byte():
    detokenizer = Detokenizer(decode_bytes)
    assert [detokenizer.push(byte) for byte in "🙂".encode()] == ["", "", "", "🙂"]


def test_a_broken_character_is_flushed_as_the_replacement_character():
    detokenizer = Detokenizer(decode_bytes)
    assert detokenizer.push("🙂".encode()[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_the_end_of_the_prompt_keeps_the_first_space():
    assert Detokenizer(decode_words).push(1) == "w1"
    assert Detokenizer(decode_words, before=[5]).push(1) == " w1"


def test_tokens_without_text_do_not_pile_up():
    detokenizer = Detokenizer(lambda token_ids: "")
    for _ in range(1000):
        assert detokenizer.push(1) == ""
    assert len(detokenizer._window) <= 16


def test_a_stop_string_across_tokens_is_never_shown():
    stops = StopStrings(["END"])
    assert stops.push("say E") == ("say ", False)
    assert stops.push("N") == ("", False)
    assert stops.push("D and more") == ("", True)


def test_what_was_held_back_in_vain_is_shown():
    stops = StopStrings(["END"])
    assert stops.push("the E") == ("the ", False)
    assert stops.push("xit") == ("Exit", False)
    assert stops.push("EN") == ("", False)
    assert stops.flush() == "EN"


def test_the_first_of_several_stop_strings_wins():
    assert StopStrings(["ccc", "bb"]).push("abbccc") == ("a", True)


def test_a_stop_string_that_only_the_end_completes_still_stops():
    answer = AnswerText(decode_bytes, stops=["\ufffd"])
    assert shown(answer, [0x61, 0xF0]) == ("a", True)


@given(st.text(alphabet="abc", max_size=40), st.lists(st.text("abc", min_size=1), max_size=3))
def test_the_stop_string_that_is_complete_first_cuts(text, stops):
    complete = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    expected = text[: min(complete)[1]] if complete else text
    assert shown(AnswerText(decode_bytes, stops=stops), text.encode()) == (expected, bool(complete))


@given(st.text(max_size=30), st.integers(0, 60), st.sampled_from([[], ["ab"], ["é", "🙂x"]]))
def test_an_answer_that_is_taken_up_elsewhere_goes_on_at_the_same_character(text, at, stops):
    token_ids = text.encode()
    whole, first, second = (AnswerText(decode_bytes, stops=stops) for _ in range(3))
    begun = ""
    for token in token_ids[:at]:
        event = first.push(token)
        begun += event.text
        if event.stopped or second.push(token).stopped:
            return
    assert begun + shown(second, token_ids[at:])[0] == shown(whole, token_ids)[0]
