"""Quantized GGUF files: decoded exactly, served from where they lie."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import PROMPT, converted, write_gguf

from chunkllama.errors import ConfigError
from chunkllama.models.loading.gguf_blocks import BLOCK_TYPES, decode_rows
from chunkllama.models.loading.hub import resolve_model

# Types whose scales are products, rounded to half precision.
ROUNDED = ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


def random_blocks(rng: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """Rows of random blocks whose scales are sane numbers."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    scales = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,))
    scales = {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}.get(kind, scales)
    for at in scales:
        d = rng.uniform(0.5, 1, len(raw)) * (1e-4 if kind.endswith(("_K", "_XS")) else 2e-3)
        raw[:, at : at + 2] = d.astype(np.float16)[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


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
