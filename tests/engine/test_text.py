from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from pinaivu_node.engine.chat.text import (
    AnswerText,
    ByteDetokenizer,
    StopStrings,
    WindowDetokenizer,
)
from pinaivu_node.engine.chat.token_bytes import TokenBytes

from .conftest import make_tokenizer


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
    detokenizer = WindowDetokenizer(decode_bytes)
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.flush() == text


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_are_shown_in_the_end_and_never_wait_for_ever(data):
    detokenizer = WindowDetokenizer(decode_bytes)
    waiting = 0
    for byte in data:
        waiting = 0 if detokenizer.push(byte) else waiting + 1
        assert waiting < 8
    detokenizer.flush()


def test_an_emoji_appears_with_its_last_byte():
    detokenizer = WindowDetokenizer(decode_bytes)
    assert [detokenizer.push(byte) for byte in "🙂".encode()] == ["", "", "", "🙂"]


def test_a_broken_character_is_flushed_as_the_replacement_character():
    detokenizer = WindowDetokenizer(decode_bytes)
    assert detokenizer.push("🙂".encode()[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_the_end_of_the_prompt_keeps_the_first_space():
    assert WindowDetokenizer(decode_words).push(1) == "w1"
    assert WindowDetokenizer(decode_words, before=[5]).push(1) == " w1"


def test_tokens_without_text_do_not_pile_up():
    detokenizer = WindowDetokenizer(lambda token_ids: "")
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
    answer = AnswerText(WindowDetokenizer(decode_bytes), stops=["\ufffd"])
    assert shown(answer, [0x61, 0xF0]) == ("a", True)


@given(st.text(alphabet="abc", max_size=40), st.lists(st.text("abc", min_size=1), max_size=3))
def test_the_stop_string_that_is_complete_first_cuts(text, stops):
    complete = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    expected = text[: min(complete)[1]] if complete else text
    assert shown(AnswerText(WindowDetokenizer(decode_bytes), stops=stops), text.encode()) == (
        expected,
        bool(complete),
    )


@given(st.text(max_size=30), st.integers(0, 60), st.sampled_from([[], ["ab"], ["é", "🙂x"]]))
def test_an_answer_that_is_taken_up_elsewhere_goes_on_at_the_same_character(text, at, stops):
    token_ids = text.encode()
    whole, first, second = (
        AnswerText(WindowDetokenizer(decode_bytes), stops=stops) for _ in range(3)
    )
    begun = ""
    for token in token_ids[:at]:
        event = first.push(token)
        begun += event.text
        if event.stopped or second.push(token).stopped:
            return
    assert begun + shown(second, token_ids[at:])[0] == shown(whole, token_ids)[0]


class Bytes:
    """The simplest vocabulary there is: a token is a byte, and 0 is a mark nobody sees."""

    def of(self, token_id):
        return bytes([token_id]) if token_id else b"<mark>"

    def is_special(self, token_id):
        return token_id == 0


def of_bytes(*, stops=(), visible=()):
    return AnswerText(ByteDetokenizer(Bytes(), visible=visible), stops=stops)


@given(st.binary(max_size=60))
def test_tokens_that_are_bytes_become_what_the_bytes_are_as_text(data):
    detokenizer = ByteDetokenizer(Bytes())
    text = "".join(detokenizer.push(byte) for byte in data) + detokenizer.flush()
    assert text == bytes(byte for byte in data if byte).decode(errors="replace")


def test_a_byte_detokenizer_shows_a_character_with_its_last_byte():
    detokenizer = ByteDetokenizer(Bytes())
    assert [detokenizer.push(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert detokenizer.push("🙂".encode()[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_a_mark_is_hidden_unless_it_is_asked_for():
    assert shown(of_bytes(), [65, 0, 66]) == ("AB", False)
    assert shown(of_bytes(visible=[0]), [65, 0, 66]) == ("A<mark>B", False)


STOPS = st.lists(st.text("ab", min_size=1, max_size=8), max_size=4)


@given(st.text("abc", max_size=60), STOPS, st.lists(st.integers(0, 60), max_size=8))
def test_where_a_text_is_cut_into_tokens_changes_nothing(text, stops, cuts):
    at = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(at)]

    def read(pieces):
        stop_strings = StopStrings(stops)
        given_out = ""
        for piece in pieces:
            shown, stopped = stop_strings.push(piece)
            given_out += shown
            if stopped:
                return given_out, True
        return given_out + stop_strings.flush(), False

    assert read(pieces) == read(list(text))


def test_what_is_held_back_is_never_more_than_the_longest_possible_beginning():
    stops = StopStrings(["aab", "abc"])
    assert stops.push("xaa") == ("x", False)
    assert stops.push("a") == ("a", False)
    assert stops.push("c") == ("aac", False)


def test_sixteen_long_stop_strings_that_nearly_match_stay_cheap():
    stops = StopStrings(["a" * 1023 + "b"] * 16)
    for _ in range(2000):
        assert stops.push("aaaa")[1] is False
    steps = sum(len(stop._fallback) for stop in stops._stops)
    assert steps <= 16 * 1024
    assert len(stops._held) == 1023
    assert stops.push("b") == ("", True)


def test_a_token_of_byte_level_bpe_is_its_bytes_and_a_mark_its_name():
    tokenizer = make_tokenizer()
    tokens = TokenBytes(tokenizer)
    assert tokens.composable
    text = "Grüße 🙂\n\t\x00"
    assert b"".join(tokens.of(number) for number in tokenizer.encode(text)) == text.encode()
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokens.of(mark) == b"<|im_end|>"
    assert tokens.is_special(mark)
    assert tokens.of(10**9) == b""


def make_pieces(decoder):
    """A SentencePiece-like vocabulary of a few tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁a", "b▁", "<0x41>", "<0xF0>", "é"]
    model = models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_piece_has_spaces_and_a_byte_token_is_a_byte():
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokens = TokenBytes(make_pieces(decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])))
    assert tokens.composable
    assert [tokens.of(number) for number in (1, 2, 3, 4, 5)] == [
        b" a", b"b ", b"A", b"\xf0", "é".encode(),
    ]  # fmt: skip
    tokens = TokenBytes(make_pieces(decoders.Metaspace()))
    assert [tokens.of(number) for number in (1, 3)] == [b" a", b"<0x41>"]


@pytest.mark.parametrize(
    "decoder", [None, decoders.WordPiece(), decoders.BPEDecoder()], ids=["none", "words", "bpe"]
)
def test_a_vocabulary_whose_tokens_depend_on_their_neighbours_says_so(decoder):
    tokens = TokenBytes(make_pieces(decoder)) if decoder else TokenBytes(make_pieces_bare())
    assert not tokens.composable
    assert tokens.of(3) == b"<0x41>"


def make_pieces_bare():
    tokenizer = make_pieces(decoders.Fuse())
    tokenizer.backend_tokenizer.decoder = None
    return tokenizer
