"""Every knob of the daemon: a TOML file, then PINAIVU_… variables, then flags, the last strongest.

Parsed once by the CLI and frozen; each component is handed its own struct, never the whole.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import platformdirs
from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

ENV_PREFIX: Final = "PINAIVU_"
CONFIG_FILE: Final = "config.toml"
DATA_FOLDER: Final = platformdirs.user_data_path("pinaivu")
# Variables that share our prefix and are read elsewhere: the gateway's, and the test suite's.
_FOREIGN_PREFIXES: Final = ("PINAIVU_GATEWAY_", "PINAIVU_TEST_")

DEFAULT_PRICE_INPUT: Final = 50_000_000
DEFAULT_PRICE_OUTPUT: Final = 200_000_000
"""0.05 X and 0.2 X per million tokens: about what small open models cost elsewhere in dollars."""


class ConfigError(Exception):
    """A setting is unknown or unusable; the message says which and where it came from."""


def _split(value: object) -> object:
    """A variable holds a list as comma-separated words; files and flags bring real lists."""
    return tuple(value.split(",")) if isinstance(value, str) else value


AnyWords = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Words = Annotated[AnyWords, Field(min_length=1)]


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=ENV_PREFIX)

    home: Path
    models_folder: Path = DATA_FOLDER / "models"
    """Where weights live; shared by every daemon of this machine, whatever their home."""
    announce: AnyWords = ()
    """Multiaddrs to tell others instead of those listened on, behind a NAT or a proxy."""
    tls_cert: Path | None = None
    """PEM, to listen on /wss."""
    tls_key: Path | None = None
    """PEM; None: in the same file."""
    relay: bool = False
    """Whether to pass on bytes between peers that cannot dial each other."""
    lan: bool = False
    """By mDNS: a coordinator advertises, a provider looks for one if it is told of none."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags over environment over the file in the home folder; no other source."""
        del dotenv_settings, file_secret_settings
        home = init_settings().get("home") or env_settings().get("home")
        folder = Path(home or cls.model_fields["home"].default)
        file = TomlConfigSettingsSource(settings_cls, toml_file=folder / CONFIG_FILE)
        return (init_settings, env_settings, file)


class ProviderSettings(_Settings):
    """`pinaivu-node start`."""

    home: Path = DATA_FOLDER / "provider"
    model: Words = ("smollm2:135m",)
    coordinator: AnyWords = ()
    """Multiaddrs: several of one coordinator, or of several, of which the first to answer is
    dealt with."""
    listen: Words = ("/ip4/0.0.0.0/tcp/0",)
    proxy: SecretStr | None = None
    """The HTTP proxy to dial WebSockets through, like http://proxy.example.org:3128."""
    relay_through: AnyWords = ()
    """Multiaddrs of relays to be reached through, besides the coordinators."""
    price_input: Annotated[int, Field(ge=0, le=2**53 - 1)] = DEFAULT_PRICE_INPUT
    price_cached_input: Annotated[int, Field(ge=0, le=2**53 - 1)] | None = None
    """None: a quarter of `price_input`."""
    price_output: Annotated[int, Field(ge=0, le=2**53 - 1)] = DEFAULT_PRICE_OUTPUT
    engine: Literal["torch", "openai", "bench"] = "torch"
    engine_url: str | None = None
    engine_api_key: SecretStr | None = None
    engine_model: str | None = None
    """What the server at `engine_url` calls the model; None: the same as here."""
    context_window: Annotated[int, Field(ge=16)] | None = None
    """Of the server at `engine_url`: its API does not tell."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on a CPU."""
    tensor_parallel: Annotated[int, Field(ge=1, le=16)] = 1
    """GPUs of this machine that share each model."""
    quantization: Literal["int8"] | None = None
    """int8: run the models in eight bits, and sell them as such: `smollm2:135m-int8`."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of the engine; None: as many as there are cores, less one for all else."""
    max_running: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Answers at once; None: 16 on a CPU, 64 on a GPU."""
    kv_cache_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory for keys and values of each model; None: a tenth of the machine's on a CPU, what
    `memory_fraction` leaves beside the weights on a GPU."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Of a GPU's memory, for weights, cache and work space together."""
    speculate: Annotated[int, Field(ge=0, le=15)] | None = None
    """Tokens guessed per step from what was said before; None: 8 on a CPU, none on a GPU."""
    memory_budget_gb: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """What several models may take together, in GB, before one leaves for another; of the GPU where
    they run on one.  None: 80 % of what there is."""


class CoordinatorSettings(_Settings):
    """`pinaivu-node coordinate`."""

    home: Path = DATA_FOLDER / "coordinator"
    listen: Words = ("/ip4/0.0.0.0/tcp/4001",)
    relay: bool = True
    database: str | None = None
    """An SQLAlchemy URL; None: SQLite in the home folder."""
    welcome_credit: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    """NanoX granted once to every new gateway; for test networks."""


S = TypeVar("S", bound=_Settings)


def load(kind: type[S], flags: Mapping[str, Any], environ: Mapping[str, str]) -> S:
    """The settings of one daemon; a flag that is None or an empty list was not given.

    `environ` is searched for misspelt variables.  Raises ConfigError naming the key.
    """
    _refuse_unknown_variables(environ)
    try:
        return kind(**{name: value for name, value in flags.items() if value not in (None, [])})
    except ValidationError as exc:
        fault = exc.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        known = ", ".join(sorted(kind.model_fields))
        if fault["type"] == "extra_forbidden":
            raise ConfigError(f"unknown setting {key!r}; known are {known}") from exc
        raise ConfigError(f"setting {key!r}: {fault['msg']}") from exc
    except (SettingsError, OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the configuration: {exc}") from exc


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = {*ProviderSettings.model_fields, *CoordinatorSettings.model_fields}
    for variable in environ:
        if not variable.startswith(ENV_PREFIX) or variable.startswith(_FOREIGN_PREFIXES):
            continue
        if variable.removeprefix(ENV_PREFIX).lower() not in known:
            raise ConfigError(f"the environment variable {variable} names no setting")
