from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pinaivu_node.protocol.answer import AnswerHash, digest_of_answer
from pinaivu_node.protocol.ids import digest_of
from pinaivu_node.protocol.inference import ToolCall, ToolCallDelta

TEXTS = st.text(max_size=20)
CALLS = st.lists(
    st.builds(
        ToolCall,
        id=st.text(max_size=5),
        name=st.text(min_size=1, max_size=5),
        arguments=st.text(max_size=20),
    ),
    max_size=3,
)


def test_an_answer_of_text_has_the_digest_of_its_text() -> None:
    assert digest_of_answer("hé") == digest_of("hé".encode())


@given(text=TEXTS, calls=CALLS, cuts=st.lists(st.integers(1, 7), min_size=1, max_size=9))
def test_the_digest_does_not_depend_on_the_pieces(text, calls, cuts) -> None:
    answer = AnswerHash()
    for index, call in enumerate(calls):
        answer.add_call(ToolCallDelta(index=index, id=call.id, name=call.name))
        rest = call.arguments
        for cut in cuts:
            answer.add_call(ToolCallDelta(index=index, arguments=rest[:cut]))
            rest = rest[cut:]
        answer.add_call(ToolCallDelta(index=index, arguments=rest))
    answer.add_text(text.encode())
    assert answer.digest == digest_of_answer(text, calls)


@given(TEXTS, CALLS, TEXTS, CALLS)
def test_different_answers_have_different_digests(text, calls, other_text, other_calls) -> None:
    same = (text, calls) == (other_text, other_calls)
    assert (digest_of_answer(text, calls) == digest_of_answer(other_text, other_calls)) is same
