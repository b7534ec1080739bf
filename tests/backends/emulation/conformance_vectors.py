"""Writes the vectors that hold a GPU's device layer to the emulator's: run as a script.

``benchmarks/gpu.py check`` runs kernels/cuda/conformance.cuh on the stored inputs and compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from kernel_emulator import EmulatedLauncher, table

from chunkllama.backends.cuda.source import DTYPES, PARAMS, conformance_kernel
from chunkllama.resources import data_folder

VECTORS = data_folder("kernels") / "emulation" / "conformance.json"


def conformance_results(dtype: str, elements: list[int], numbers: list[float]) -> np.ndarray:
    """What the emulator answers: [32, 32] uint32, see kernels/cuda/conformance.cuh."""
    launcher = EmulatedLauncher(table("sm_90"))
    inputs = np.array(elements, np.uint16)
    arguments = np.array(numbers, np.float32)
    results = np.zeros((32, 32), np.uint32)
    params = PARAMS["ConformanceParams"].call.pack(
        inputs.ctypes.data, arguments.ctypes.data, results.ctypes.data
    )
    launcher.launch(conformance_kernel(dtype), (1, 1, 1), params)
    return results


def random_vectors(dtype: str, seed: int) -> dict[str, list[int] | list[float] | list[list[int]]]:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(512).astype(np.float32)
    if dtype == "bf16":
        elements = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        elements = values.astype(np.float16).view(np.uint16)
    numbers = rng.standard_normal((32, 8)).astype(np.float32)
    numbers[:, 2] *= 20  # exp2
    numbers[:, 3:5] = np.exp(numbers[:, 3:5])  # log2 and rsqrt
    # Ties that must round to even, both ways, and values beyond float16.
    numbers[:4, 0] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11]
    numbers[4:6, 1] = [65519.0, -(2.0**-24)]
    results = conformance_results(dtype, elements.tolist(), numbers.ravel().tolist())
    return {
        "elements": elements.tolist(),
        "numbers": numbers.ravel().astype(float).tolist(),
        "results": results.tolist(),
    }


if __name__ == "__main__":
    VECTORS.write_text(json.dumps({d: random_vectors(d, i) for i, d in enumerate(DTYPES)}) + "\n")
    print(f"wrote {VECTORS.name}")
