"""Entry point of the console script and of ``python -m chunkllama_server.cli``.

Imports nothing but ``sys`` at the top: the import path is made safe, and the signals of a starting
server are handled, before any module that takes time is loaded.
"""

import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the command line; errors a user can cause are one line and exit code 2."""
    if __name__ == "__main__":
        _drop_working_directory()
    arguments = sys.argv[1:]
    serves = arguments[:1] == ["serve"]
    if serves:
        from chunkllama_server.process import start_signals

        start_signals.install()
    try:
        from chunkllama_server.commands import run

        code = run(arguments)
    except KeyboardInterrupt:  # while the command's modules are imported
        code = _INTERRUPTED
    if serves:  # sys.exit would wait for threads, and one that compiles a grammar may not end
        start_signals.end_process(code)
    sys.exit(code)


def _drop_working_directory() -> None:
    """Remove the entry of ``sys.path`` that ``python -m`` adds for the working directory.

    The working directory may be a model's folder, whose ``numpy.py`` must not be executed.
    """
    if not sys.flags.safe_path and sys.path:
        del sys.path[0]


if __name__ == "__main__":
    main()
