"""The C ABI of the CPU backend: its structures and its functions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from chunkllama.backends.cpu.build import IsaLevel, NativeBuildError, build

F32, BF16, INT8, INT4, F16 = range(5)
TYPES: Final = {torch.float32: F32, torch.bfloat16: BF16}
KV_TYPES: Final = {**TYPES, torch.int8: INT8}
# Types that weights are packed from.
SOURCE_TYPES: Final = {**TYPES, torch.float16: F16}
NO_EXTRA, OFFSETS, UPPER_SCALES = range(3)


_S = TypeVar("_S", bound=Structure)
_MIRRORED: Final[dict[str, type[Structure]]] = {}


def mirrors(name: str) -> Callable[[type[_S]], type[_S]]:
    """Declare which struct of kernels/cpu a structure mirrors; loading compares their sizes."""

    def register(structure: type[_S]) -> type[_S]:
        _MIRRORED[name] = structure
        return structure

    return register


@mirrors("Plan")
class CPlan(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("items", "chunk_ids", "row_tail")),
        *((name, c_void_p) for name in ("merge_indptr", "merge_slots", "row_flags")),
        *(("num_items", c_int64), ("num_rows", c_int64), ("window", c_int64)),
    )


@mirrors("Heads")
class CHeads(Structure):
    _fields_ = (
        *(("q_heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64)),
        *(("kv_type", c_int32), ("activation_type", c_int32)),
    )


@mirrors("AttentionArgs")
class CAttention(Structure):
    _fields_ = (
        *(("plan", CPlan), ("heads", CHeads), ("positions", c_void_p)),
        *(("q", c_void_p), ("out", c_void_p), ("q_stride", c_int64), ("out_stride", c_int64)),
        *(("kv", c_void_p), ("partial_out", c_void_p), ("partial_lse", c_void_p)),
        *(("scale", c_float), ("tanh_scale", c_float)),
        *(("vector_rows", c_int32), ("independent_rows", c_int32)),
    )


@mirrors("RopeArgs")
class CRope(Structure):
    _fields_ = (
        *(("plan", CPlan), ("heads", CHeads), ("positions", c_void_p), ("cos_sin", c_void_p)),
        *(("qkv", c_void_p), ("q", c_void_p), ("qkv_stride", c_int64), ("q_stride", c_int64)),
        ("kv", c_void_p),
    )


@mirrors("NormArgs")
class CNorm(Structure):
    _fields_ = (
        *(("x", c_void_p), ("residual", c_void_p), ("sum", c_void_p), ("y", c_void_p)),
        *(("weight", c_void_p), ("hidden", c_int64), ("x_stride", c_int64), ("y_stride", c_int64)),
        *(("x_type", c_int32), ("y_type", c_int32), ("eps", c_float)),
    )


@mirrors("RoundedChunk")
class CRoundedChunk(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("key_codes", "value_codes", "key_scales", "key_zeros")),
        *((name, c_void_p) for name in ("value_scales", "value_zeros", "out")),
        *((name, c_int64) for name in ("layers", "kv_heads", "head_dim", "key_group")),
        *(("bits", c_int32), ("kv_type", c_int32)),
    )


_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "ck_initialize": (c_int, []),
    "ck_struct_size": (c_int64, [c_char_p]),
    "ck_chunk_elements": (c_int64, [POINTER(CHeads)]),
    "ck_attention": (None, [POINTER(CAttention), c_int]),
    "ck_rope_append": (None, [POINTER(CRope), c_int]),
    "ck_rms_norm": (None, [POINTER(CNorm), c_int64, c_int]),
    "ck_silu_and_mul": (None, [c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int]),
    "ck_copy_chunks": (None, [c_void_p, c_int64, POINTER(CHeads), c_void_p, c_int64, c_int]),
    "ck_widen_chunk": (None, [POINTER(CRoundedChunk)]),
    "ck_activation_type": (c_int32, [c_int32]),
    "ck_forward": (None, [c_void_p, c_void_p, c_int]),
    "ck_linear": (
        None,
        [c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_int64, c_int64, c_int],
    ),
    "ck_best": (
        None,
        [c_void_p, c_void_p, c_int64, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_int],
    ),
    "ck_pack": (
        None,
        [c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int],
    ),
    "ck_pack_codes": (
        None,
        [*([c_void_p] * 3), c_int64, c_int64, c_void_p, c_int64, c_int64, c_int],
    ),
    "ck_unpack": (
        None,
        [c_void_p, *([c_int64] * 4), c_void_p, c_int],
    ),
}


def load_library(level: IsaLevel, sanitizer: str = "") -> ctypes.CDLL:
    """Load the library of a level, built if necessary, and declare its signatures.

    Raises:
        NativeBuildError: it cannot be built or loaded (a folder mounted noexec), its structures are
            not those of this module, or the operating system refuses what it needs (AMX state).
    """
    try:
        load_openmp()
        library = ctypes.CDLL(str(build(level, sanitizer)))
    except OSError as error:
        raise NativeBuildError(f"the library cannot be loaded: {error}") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    _check_sizes(library)
    if not library.ck_initialize():
        raise NativeBuildError(f"the operating system does not permit {level.name}")
    return library


def load_openmp() -> None:
    """Make the symbols of torch's OpenMP runtime visible to the libraries, which name none.

    torch brings a runtime under a name of its own; a second one would compete for the cores. Other
    packages (sentencepiece) bring theirs, and may have been loaded before.

    Raises:
        OSError: torch has none, and neither has the system.
    """
    torch.get_num_threads()
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        mapped = []
    runtimes = [line.split(maxsplit=5)[5] for line in mapped if "/libgomp" in line]
    package = str(Path(torch.__file__).parent)  # beside it "torch.libs" in some builds
    runtimes.sort(key=lambda path: not path.startswith(package))
    ctypes.CDLL(runtimes[0] if runtimes else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def _check_sizes(library: ctypes.CDLL) -> None:
    for name, structure in _MIRRORED.items():
        expected, size = library.ck_struct_size(name.encode()), ctypes.sizeof(structure)
        if size != expected:
            raise NativeBuildError(
                f"{structure.__name__} has {size} bytes, but {name} of kernels/cpu has {expected}; "
                "change both alike"
            )
