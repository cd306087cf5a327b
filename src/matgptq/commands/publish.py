"""The commands ``card`` and ``push``."""

from __future__ import annotations

from typing import Annotated

import typer

from matgptq.commands.options import Checkpoint, err_console, examples, out_console

CARD_EPILOG = examples("matgptq card out", "matgptq card out --name me/smollm2-matgptq")
PUSH_EPILOG = examples("matgptq push out me/smollm2-matgptq", "matgptq push out me/smollm2-matgptq --private")


def card(
    checkpoint: Checkpoint,
    name: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="What its examples load. (default: the directory's name)")
    ] = None,
) -> None:
    """Write the model card OUT/README.md: widths with their figures and sizes, how to load each, the recipe.

    The figures are those that `matgptq eval` recorded. Text of yours in the file is kept.
    """
    from matgptq.checkpoints.checkpoint import open_checkpoint
    from matgptq.checkpoints.evaluation_record import read_record
    from matgptq.publishing.model_card import write_card

    file = write_card(checkpoint, name=name)
    if not any(read_record(open_checkpoint(checkpoint, slices=True)).values()):
        err_console.print("[yellow]note:[/yellow] no figures to show yet; `matgptq eval` records them", highlight=False)
    out_console.print(f"saved to {file}", markup=False, highlight=False)


def push(
    checkpoint: Checkpoint,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository; created if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to. (default: main)")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload checkpoint",
) -> None:
    """Upload the checkpoint OUT to the Hugging Face Hub with a model card and without paths of this machine."""
    from matgptq.publishing.hub import push

    url = push(checkpoint, repository, private=private or None, revision=revision, message=message)
    out_console.print(f"pushed: {url}", markup=False, highlight=False)
