"""The engine process of a replica: tells a router what its cache holds."""

from __future__ import annotations

from chunkllama.cluster.prefix_keys import tree_heads
from chunkllama.engine.process import main

if __name__ == "__main__":
    main(tree_heads)
