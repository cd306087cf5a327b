"""The command ``serve``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from matgptq.commands.options import (
    ActivationsOption,
    Checkpoint,
    DeviceOption,
    DtypeOption,
    HeadBitsOption,
    TrustOption,
    err_console,
    examples,
    progress_bars,
)

EPILOG = examples(
    "matgptq serve out",
    "matgptq serve out --bits 4 --port 8080",
    """curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' """
    """-d '{"model": "out:3", "messages": [{"role": "user", "content": "Name three rivers."}]}'""",
)


def serve(
    checkpoint: Checkpoint,
    bits: Annotated[
        int | None, typer.Option(help="Width that answers to the bare name. (default: the checkpoint's)")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A width per layer that answers to the bare name.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call it. (default: the directory's name)")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Keep, and serve, only the slice of one width.")] = False,
    parallel: Annotated[
        int, typer.Option("--parallel", "-np", min=1, help="Requests that are answered at once; others wait.")
    ] = 8,
    cache_ram: Annotated[
        int,
        typer.Option(
            "--cache-ram",
            "-cram",
            min=0,
            metavar="MIB",
            help="Memory for what was read last: prompts that begin like it go on from there. 0 keeps nothing.",
        ),
    ] = 1024,
    activations: ActivationsOption = "exact",
    head_bits: HeadBitsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Serve a checkpoint at all its widths as an OpenAI-compatible server; requests choose theirs by OUT:BITS."""
    from matgptq.serving.served_models import open_models
    from matgptq.serving.server import listen, require_packages
    from matgptq.serving.server import serve as run

    require_packages()
    with listen(host, port) as listener:
        with progress_bars() as progress:
            progress.start("load the model", 1)
            models = open_models(
                checkpoint,
                bits,
                allocation,
                name=name,
                resident=not packed,
                activations=activations,
                head_bits=head_bits,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
            )
        url = f"http://{host}:{listener.getsockname()[1]}/v1"
        err_console.print(f"serving at {url}", highlight=False)
        err_console.print(escape(", ".join(models.names)), highlight=False)
        run(models, listener, parallel, cache_ram << 20)
