"""Describe the machine a benchmark ran on."""

from pathlib import Path


def cpu_name() -> str:
    """Return model name and number of processors, from /proc/cpuinfo."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    flags = Path("/proc/cpuinfo").read_text()
    extra = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    return f"{len(names)} x {names[0]} ({', '.join(extra) or 'no AVX512-BF16'})"
