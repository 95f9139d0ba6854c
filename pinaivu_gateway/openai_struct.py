"""What all objects of OpenAI's API have in common when they come from a client."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from pinaivu_gateway.errors import refusal
from pinaivu_node.protocol.inference import MAX_CONSTRAINT_CHARACTERS


class Struct(BaseModel):
    """Frozen and strict; null means the default, and unknown extras are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


def without_halves(text: Any) -> Any:
    """JSON can spell half a character; clients that cut strings do.  It becomes U+FFFD."""
    if not isinstance(text, str) or text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def schema_text(schema: dict[str, Any], *, param: str) -> str:
    """A schema as it travels; RequestRefused, naming `param`, if it is too large."""
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise refusal(
            f"Invalid '{param}': it is nested too deeply.", code="invalid_value", param=param
        ) from None
    if len(text) > MAX_CONSTRAINT_CHARACTERS:
        raise refusal(
            f"Invalid '{param}': {len(text)} characters are over the limit of "
            f"{MAX_CONSTRAINT_CHARACTERS}.",
            code="string_above_max_length",
            param=param,
        )
    whole: str = without_halves(text)
    return whole
