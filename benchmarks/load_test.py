"""Run the load test as a script: ``python benchmarks/load_test.py --tenants 8``; the flags are
those of ``chunkllama bench serve``.
"""

from __future__ import annotations

import sys

from chunkllama_server.commands import run

if __name__ == "__main__":
    sys.exit(run(["bench", "serve", *sys.argv[1:]]))
