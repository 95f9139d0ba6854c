from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pinaivu_node.models.catalogue import CATALOGUE
from pinaivu_node.models.errors import ModelError
from pinaivu_node.models.store import InstalledModel
from pinaivu_node.models.variants import in_int8, int8_digest, pinned_digest, published_name
from pinaivu_node.protocol.ids import ModelName

NAME = ModelName("smollm2:135m")
ENTRY = CATALOGUE[NAME]
MODEL = InstalledModel(
    name=NAME,
    digest=ENTRY.digest,
    folder=Path("m"),
    context_window=8192,
    chat=True,
    licence=ENTRY.licence,
    owner=ENTRY.owner,
    bytes_on_disk=1,
)


def test_a_model_in_int8_is_announced_as_another():
    quantised = in_int8(MODEL)
    assert quantised.name == "smollm2:135m-int8"
    assert quantised.digest == int8_digest(ENTRY.digest) != ENTRY.digest
    assert quantised.quantization == "int8"
    assert replace(quantised, name=MODEL.name, digest=MODEL.digest, quantization=None) == MODEL


def test_a_name_asks_for_int8_only_where_the_catalogue_knows_it_without():
    assert published_name("smollm2:135m-int8") == "smollm2:135m"
    assert published_name("smollm2:135m") == "smollm2:135m"
    assert published_name("my-model-int8") == "my-model-int8"
    assert published_name("./smollm2:135m-int8") == "./smollm2:135m-int8"


def test_the_digest_is_the_same_on_every_machine():
    assert (
        int8_digest(ENTRY.digest)
        == "sha256:32806e81ba527f53d18b6b120061cdc54ae135453f7718c660c550b297fdae71"
    )


def test_a_name_that_leaves_no_room_is_refused():
    with pytest.raises(ModelError, match="too long a name"):
        in_int8(replace(MODEL, name=ModelName("a" * 62)))


def test_a_gateway_pins_what_a_catalogue_name_stands_for_in_int8_too():
    assert pinned_digest(NAME) == ENTRY.digest
    assert pinned_digest(ModelName(NAME + "-int8")) == int8_digest(ENTRY.digest)
    assert pinned_digest(ModelName("my-model")) is None
    assert pinned_digest(ModelName("my-model-int8")) is None
    assert pinned_digest(ModelName("smollm2:135m-int4")) is None
