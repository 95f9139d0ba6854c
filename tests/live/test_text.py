"""The detokenizer and real vocabularies: byte-level BPE and SentencePiece with byte fallback."""

from __future__ import annotations

import random

import pytest
from real_models import installed

from pinaivu_node.engine.chat.text import ByteDetokenizer
from pinaivu_node.engine.chat.token_bytes import TokenBytes

pytestmark = pytest.mark.live


@pytest.fixture(scope="module", params=["smollm2:135m", "gemma3:270m"])
def tokenizer(request):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(installed(request.param).folder)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return TokenBytes(tokenizer)


def read(tokens, token_ids):
    detokenizer = ByteDetokenizer(tokens)
    return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()


def test_every_single_token_is_what_the_decoder_says(tokenizer, tokens):
    wrong = [
        number
        for number in range(len(tokenizer))
        if not tokens.is_special(number)
        and tokens.of(number).decode(errors="replace") != tokenizer.decode([number])
    ]
    assert wrong == []


def test_random_tokens_are_the_text_that_the_decoder_makes_of_them_all(tokenizer, tokens):
    # A broken character next to a whole one makes the byte fallback's decoder give up both, which
    # text already shown cannot follow: random byte tokens are left out, whole characters are below.
    byte_tokens = {tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)}
    dice = random.Random(7)
    whole = [number for number in range(len(tokenizer)) if number not in byte_tokens]
    for _ in range(2000):
        token_ids = dice.choices(whole, k=30)
        assert read(tokens, token_ids) == tokenizer.decode(token_ids, skip_special_tokens=True)


def test_a_character_that_has_no_token_is_read_from_its_bytes(tokenizer, tokens):
    dice = random.Random(7)
    for _ in range(500):
        text = "".join(chr(dice.randrange(0x1F300, 0x1FB00)) for _ in range(10))
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(token_ids) == text
        detokenizer = ByteDetokenizer(tokens)
        assert "".join(map(detokenizer.push, token_ids)) == text
