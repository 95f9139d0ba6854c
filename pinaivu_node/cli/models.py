"""Commands about the models on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.table import Table

from pinaivu_node.cli import Json, ModelsFolder, app, errors, print_json, screen
from pinaivu_node.config import DATA_FOLDER

if TYPE_CHECKING:
    from pinaivu_node.models.catalogue import CatalogueEntry
    from pinaivu_node.models.store import InstalledModel, ModelStore

models_app: Final = typer.Typer(no_args_is_help=True, help="The models on this machine.")
app.add_typer(models_app, name="models")


def _store(folder: Path | None) -> ModelStore:
    from pinaivu_node.models.store import ModelStore

    return ModelStore(folder or DATA_FOLDER / "models")


@models_app.command("list")
def list_models(*, models_folder: ModelsFolder = None, as_json: Json = False) -> None:
    """What can be pulled, and what is here."""
    from pinaivu_node.models.catalogue import CATALOGUE

    store = _store(models_folder)
    installed = {model.name: model for model in store.installed()}
    rows = [_row(name, entry, installed=name in installed) for name, entry in CATALOGUE.items()] + [
        _row(source, model, installed=True) for source, model in store.conversions()
    ]
    if as_json:
        print_json(rows)
        return
    table = Table("model", "", "context", "makes", "licence", "owner", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            str(row["name"]),
            "[green]here[/]" if row["installed"] else "",
            f"{row['context_window']:,}",
            "chat" if row["chat"] else str(row["kind"]),
            str(row["licence"]),
            str(row["owner"]),
        )
    screen.print(table)


def _row(
    name: str, model: CatalogueEntry | InstalledModel, *, installed: bool
) -> dict[str, object]:
    return {
        "name": name,
        "installed": installed,
        "context_window": model.context_window,
        "chat": model.chat,
        "kind": model.kind,
        "licence": model.licence.name,
        "owner": model.owner,
    }


@models_app.command("pull", epilog="Example: `pinaivu-node models pull smollm2:135m`")
def pull_model(
    name: Annotated[
        str,
        typer.Argument(
            help="A catalogue name; or a GGUF file to convert, here (./model.gguf) or on the hub "
            "(hf.co/owner/repository/file.gguf)."
        ),
    ],
    *,
    models_folder: ModelsFolder = None,
) -> None:
    """Fetch a model, check its digest, say its licence.  Goes on where it was broken off."""
    from pinaivu_node.models.progress import ConsoleProgress
    from pinaivu_node.models.pull import pull

    with ConsoleProgress(errors) as progress:
        model = pull(_store(models_folder), name, progress=progress)
    screen.print(f"{model.name} is in {model.folder}\n{model.digest}", soft_wrap=True)


@models_app.command("verify")
def verify_model(name: str, *, models_folder: ModelsFolder = None) -> None:
    """Read every byte of a model again and compare it with its digests."""
    model = _store(models_folder).verify(name)
    screen.print(f"{model.name} is whole: {model.digest}", soft_wrap=True)


@models_app.command("rm")
def remove_model(name: str, *, models_folder: ModelsFolder = None) -> None:
    """Remove a model from this machine; of a GGUF file, what was made of it."""
    freed = _store(models_folder).remove(name)
    screen.print(f"{name}: {freed / 1e6:,.0f} MB freed")
