"""Quantized GGUF files: decoded exactly, served from where they lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import PROMPT, converted, random_blocks, write_gguf

from chunkllama.errors import ConfigError
from chunkllama.models.loading.gguf_blocks import BLOCK_TYPES, decode_rows
from chunkllama.models.loading.hub import resolve_model
from chunkllama.models.loading.sizes import PACKED_BITS

# Types whose scales are products, rounded to half precision.
ROUNDED = ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_decoded_blocks_are_what_the_gguf_package_reads(
    kind: str, rng: np.random.Generator
) -> None:
    raw = random_blocks(rng, kind, 6, 512)
    expected = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    found = decode_rows(BLOCK_TYPES[kind], raw, 512).floats()
    if kind in ROUNDED:
        torch.testing.assert_close(
            found, expected, rtol=1e-3, atol=float(expected.abs().max()) / 1e3
        )
    else:
        assert torch.equal(found, expected)


def test_blocks_keep_every_bit_of_their_scales() -> None:
    values = np.linspace(-1, 1, 32, dtype=np.float32)[None] * np.float32(np.float16(0.0123))
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        kind = gguf.GGMLQuantizationType[name]
        raw = gguf.quantize(values, kind)
        found = decode_rows(BLOCK_TYPES[name], raw, 32).floats()
        assert np.array_equal(found.numpy(), gguf.dequantize(raw, kind)), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "BF16"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_indexed_file_equals_the_converted_one(
    kind: str, tied: bool, make_tiny, our_logits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path / "cache"))
    model = make_tiny(
        hidden_size=96, intermediate_size=64, tie_word_embeddings=tied, attention_bias=True
    )
    if tied:
        del model.lm_head
    path = tmp_path / "m.gguf"
    write_gguf(path, model, gguf.GGMLQuantizationType[kind])
    folder = resolve_model(str(path))
    ours = our_logits(folder, PROMPT)
    assert torch.equal(ours, our_logits(converted(path, tmp_path / "out"), PROMPT))
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size < path.stat().st_size, "the cache folder holds no second copy of the matrices"
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ConfigError, match="has changed"):
        our_logits(folder, PROMPT)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        our_logits(folder, PROMPT)


MIXES = {  # as llama.cpp mixes types: values and the head in more bits
    "Q4_K_M": lambda name: "Q6_K" if "_v." in name or "down" in name or "embd" in name else "Q4_K",
    "Q5_K_M": lambda name: "Q6_K" if "_v." in name or "output." in name else "Q5_K",
    "Q3_K_M": lambda name: "Q5_K" if "down" in name else "Q3_K",
    "IQ4_XS": lambda name: "Q5_K" if "_v." in name else "IQ4_XS",
    "IQ4_NL": lambda name: "Q8_0" if "output." in name else "IQ4_NL",
    "Q2_K": lambda name: "Q4_K" if "_v." in name else "Q2_K",
}


@pytest.mark.nightly
@pytest.mark.parametrize("mix", MIXES)
def test_logits_of_a_mixed_file_are_those_of_its_dequantized_weights(
    mix: str, make_tiny, our_logits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHUNKLLAMA_CACHE", str(tmp_path / "cache"))
    tied = mix == "Q4_K_M"
    model = make_tiny(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, tie_word_embeddings=tied
    )
    if tied:
        del model.lm_head
    path = tmp_path / "m.gguf"
    write_gguf(path, model, MIXES[mix])
    expected = our_logits(converted(path, tmp_path / "out"), PROMPT)
    folder = resolve_model(str(path))
    assert torch.equal(our_logits(folder, PROMPT), expected)
    native = our_logits(folder, PROMPT, backend="cpu", chunk_size=64)
    assert expected.abs().max() > 0.01
    # Scales in half precision cost less than products in bfloat16 do.
    assert (native - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_loading_takes_little_more_than_the_packed_weights(tmp_path: Path) -> None:
    """A matrix is read, decoded and packed in pieces, from the file into its last place."""
    path = tmp_path / "weights"
    rows, columns = 12_288, 4096
    size = rows * columns * 18 // 32
    path.write_bytes(bytes(size))
    code = f"""
from pathlib import Path
import torch
from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.backends.cpu.packed import pack_linear
from chunkllama.backends.cpu.abi import BF16
from chunkllama.backends.quantized import QuantizedLinear
from chunkllama.models.loading.gguf_rows import GgufRows
from chunkllama.models.loading.tensor_info import TensorInfo

def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

ops = CpuBackend(dtype=torch.bfloat16, head_dim=64, num_kv_heads=1)
def packed(rows):
    end = rows * {columns} * 18 // 32
    info = TensorInfo(Path({str(path)!r}), "Q4_0", (rows, {columns}), 0, end)
    linear = QuantizedLinear(torch.empty(0), parts=(GgufRows(info, None),))
    return pack_linear(ops.library, linear, BF16, None)
first = packed(2048)  # all that a first call loads
before = peak()
whole = packed({rows})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1.15 * size


def test_sizes_are_those_of_the_packed_blocks() -> None:
    """``sizes`` has its own table, because the API process uses it and imports no torch."""
    extra = {"none": 0.5, "offsets": 1.0, "upper_scales": 1.0}
    packed = {
        name: kind.format.bits + extra[kind.format.extra] for name, kind in BLOCK_TYPES.items()
    }
    assert packed == PACKED_BITS
