"""Every knob of the gateway: a TOML file, then PINAIVU_GATEWAY_… variables, then flags.

The last is the strongest.  Parsed once by the CLI and frozen.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import platformdirs
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

ENV_PREFIX: Final = "PINAIVU_GATEWAY_"
CONFIG_FILE: Final = "config.toml"
DEFAULT_HOME: Final = platformdirs.user_data_path("pinaivu") / "gateway"


class ConfigError(Exception):
    """A setting is unknown or unusable; the message says which."""


class HttpConfig(BaseModel, frozen=True, extra="forbid"):
    """Every number that the HTTP side goes by.  Durations are in seconds."""

    default_output_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Of a chat that names no limit: the hold is made for it, so it is not the whole window."""
    request_timeout: Annotated[float, Field(gt=0, le=3600)] = 600.0
    """From request to last token; as long as OpenAI's SDK waits for a read."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1 << 20
    """What fits one frame of the mesh."""
    body_timeout: Annotated[float, Field(gt=0)] = 30.0
    """For a whole request body: a mebibyte over a slow phone."""
    ping_interval: Annotated[float, Field(gt=0)] = 10.0
    """Without text for this long, a stream carries a comment: proxies cut silent ones."""
    keep_alive: Annotated[float, Field(ge=1)] = 75.0
    """Longer than clients keep connections, which would else be reused as they are closed."""
    stall_limit: Annotated[float, Field(gt=0)] = 60.0
    """A client that reads nothing for this long is dropped: it holds a slot at a provider."""
    max_connections: Annotated[int, Field(ge=1)] = 2048
    """Open at once, each about 60 KiB; more wait in the kernel's queue."""
    max_requests: Annotated[int, Field(ge=1)] = 1024
    """Jobs at once; more are told to come back.  The coordinator takes 2048 per gateway."""
    drain_timeout: Annotated[float, Field(ge=0)] = 5.0
    """How long running answers may take to finish when the gateway stops."""


def _split(value: object) -> object:
    """A variable holds a list as comma-separated words; files and flags bring real lists."""
    return tuple(value.split(",")) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class GatewaySettings(BaseSettings):
    """What an operator sets."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_nested_delimiter="__"
    )

    home: Path = DEFAULT_HOME
    coordinator: Words = ()
    """Multiaddrs ending in /p2p/<peer id>: several of one coordinator, or of several, of which the
    first to answer is dealt with."""
    listen: str = "127.0.0.1:8080"
    """Where HTTP is served; port 0 picks a free one."""
    mesh_listen: Annotated[Words, Field(min_length=1)] = ("/ip4/0.0.0.0/tcp/0",)
    mesh_announce: Words = ()
    """Multiaddrs to tell others, for a gateway behind NAT or in a container."""
    mesh_tls_cert: Path | None = None
    """PEM, to listen for peers on /wss."""
    mesh_tls_key: Path | None = None
    """PEM; None: in the same file."""
    lan: bool = False
    """Whether to look for a coordinator by mDNS where none is named."""
    relay: bool = False
    """Whether to pass on bytes between peers that cannot dial each other."""
    relay_through: Words = ()
    """Multiaddrs of relays to be reached through, besides the coordinators."""
    database: str | None = None
    """An SQLAlchemy URL; None: SQLite in the home folder."""
    http: HttpConfig = HttpConfig()

    @property
    def database_url(self) -> str:
        """Where keys and deliveries are kept."""
        return self.database or f"sqlite:///{self.home / 'gateway.db'}"

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
        home = init_settings().get("home") or env_settings().get("home") or DEFAULT_HOME
        file = TomlConfigSettingsSource(settings_cls, toml_file=Path(home) / CONFIG_FILE)
        return (init_settings, env_settings, file)


def load(flags: Mapping[str, Any], environ: Mapping[str, str]) -> GatewaySettings:
    """The settings; a flag that is None or an empty list was not given.

    `environ` is searched for misspelt variables.  Raises ConfigError naming the key.
    """
    for variable in environ:
        name = variable.removeprefix(ENV_PREFIX).lower().partition("__")[0]
        if variable.startswith(ENV_PREFIX) and name not in GatewaySettings.model_fields:
            raise ConfigError(f"the environment variable {variable} names no setting")
    try:
        return GatewaySettings(
            **{name: value for name, value in flags.items() if value not in (None, [])}
        )
    except ValidationError as exc:
        fault = exc.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            known = ", ".join(sorted(GatewaySettings.model_fields))
            raise ConfigError(f"unknown setting {key!r}; known are {known}") from exc
        raise ConfigError(f"setting {key!r}: {fault['msg']}") from exc
    except (SettingsError, OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the configuration: {exc}") from exc


def split_address(listen: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8080` or `[::1]:8080`.  Raises ConfigError."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{listen!r} is no address to listen on; write 127.0.0.1:8080")
    return host.removeprefix("[").removesuffix("]") or "0.0.0.0", int(port)  # noqa: S104 - as asked
