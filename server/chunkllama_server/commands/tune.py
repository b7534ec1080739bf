"""``chunkllama tune``: measure the CPU backend's numbers on this machine."""

from __future__ import annotations

from typing import Annotated

import typer


def tune(
    isa_level: Annotated[
        str, typer.Option(help="Instructions to tune for. Default: the best level this CPU has.")
    ] = "",
    threads: Annotated[
        int, typer.Option(min=0, help="Compute threads. Default: as `chunkllama serve` takes.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the table without writing it.")
    ] = False,
) -> int:
    """Measure the CPU kernels' numbers on this machine.

    It takes less than a minute if the machine is idle.

    The table goes to the cache folder; `chunkllama serve` reads it at its next start. Delete the
    file to return to the shipped numbers.
    """
    from chunkllama.resources import check_threads, usable_threads

    check_threads(threads or None, "none")
    import torch  # here: the help of all commands is made from this module

    from chunkllama.backends.cpu import tune as tuner
    from chunkllama.backends.cpu.tuning import as_yaml, save_tuning

    torch.set_num_threads(threads or usable_threads())
    level = "" if isa_level == "auto" else isa_level
    found, used = tuner.measure(level, print)
    if dry_run:
        print(as_yaml(found, used, torch.get_num_threads()), end="")
    else:
        print(f"written: {save_tuning(found, used, torch.get_num_threads())}")
    return 0
