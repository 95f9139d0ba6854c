"""A model that runs in int8 is sold as another one: by a name and a digest of its own.

Its answers are not those of the weights as published, so whoever asks for these must never be given
it, and nobody's measurements of the one may count for the other.  The digest is made of the
published one, so that anyone who knows the weights can tell what was sold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from pinaivu_node.models.catalogue import CATALOGUE
from pinaivu_node.models.errors import ModelError
from pinaivu_node.models.store import InstalledModel, ModelStore
from pinaivu_node.protocol.ids import Digest, ModelName, digest_of, is_model_name

_SUFFIX: Final = "-int8"


def resolve_variant(store: ModelStore, name_or_path: str, *, int8: bool) -> InstalledModel:
    """What is to be run for `smollm2:135m-int8`, or for any model where all are to be `int8`.

    ModelMissing and ModelDamaged as of `ModelStore.resolve`; ModelError as of `in_int8`.
    """
    published = published_name(name_or_path)
    model = store.resolve(published)
    return in_int8(model) if int8 or published != name_or_path else model


def published_name(name_or_path: str) -> str:
    """What is to be pulled for a model of this name."""
    published = name_or_path.removesuffix(_SUFFIX)
    return published if published in CATALOGUE else name_or_path


def in_int8(model: InstalledModel) -> InstalledModel:
    """The model as it is to be announced; ModelError if its name leaves no room to say so."""
    name = model.name + _SUFFIX
    if not is_model_name(name):
        raise ModelError(f"{model.name} is too long a name for a model in int8: give it a shorter")
    return replace(
        model, name=ModelName(name), digest=int8_digest(model.digest), quantization="int8"
    )


def int8_digest(published: Digest) -> Digest:
    """What names these weights in int8: linear layers and embeddings, a scale for each row."""
    return digest_of(b"pinaivu/int8/1\0" + published.encode())


def pinned_digest(name: ModelName) -> Digest | None:
    """What a catalogue name stands for, so that nobody sells other weights under it."""
    if name in CATALOGUE:
        return CATALOGUE[name].digest
    published = CATALOGUE.get(ModelName(name.removesuffix(_SUFFIX)))
    if published is None or published.digest is None or not name.endswith(_SUFFIX):
        return None
    return int8_digest(published.digest)
