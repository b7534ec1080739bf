"""Instruction-set levels of machines, by what their /proc/cpuinfo lists."""

from __future__ import annotations

import platform

import pytest

from chunkllama.backends.cpu.build import LEVELS, levels_of

AVX2 = "fpu sse sse2 ssse3 sse4_1 sse4_2 fma f16c avx avx2 bmi1 bmi2"
SKYLAKE = f"{AVX2} avx512f avx512dq avx512cd avx512bw avx512vl"
ZEN4 = (
    f"{SKYLAKE} avx512ifma avx512_bf16 avx512vbmi avx512_vbmi2 gfni vaes vpclmulqdq "
    "avx512_vnni avx512_bitalg avx512_vpopcntdq"
)
NEOVERSE_N1 = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop "
    "asimddp ssbs"
)
NEOVERSE_V1 = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma "
    "lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs paca pacg "
    "dcpodp svei8mm svebf16 i8mm bf16 dgh rng"
)
APPLE_M1 = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma "
    "lrcpc dcpop sha3 asimddp sha512 asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg dcpodp "
    "flagm2 frint"
)
RASPBERRY_PI_4 = "fp asimd evtstrm crc32 cpuid"
# machine -> its kind, the features of its processors, its levels
MACHINES = {
    "Sandy Bridge": ("x86_64", "fpu sse sse2 ssse3 sse4_1 sse4_2 avx", "baseline"),
    "Haswell, Zen 2": ("x86_64", AVX2, "avx2 baseline"),
    "Alder Lake": ("x86_64", f"{AVX2} avx_vnni gfni vaes", "avx2 baseline"),
    "Cascade Lake": ("x86_64", f"{SKYLAKE} avx512_vnni", "avx512 avx2 baseline"),
    "Cooper Lake": (
        "x86_64",
        f"{SKYLAKE} avx512_vnni avx512_bf16",
        "avx512 avx512_bf16 avx2 baseline",
    ),
    "Zen 4": ("x86_64", ZEN4, "avx512_bf16 avx512 avx2 baseline"),
    "Zen 5": (
        "x86_64",
        f"{ZEN4} avx_vnni movdiri avx512_vp2intersect",
        "avx512_bf16 avx512 avx2 baseline",
    ),
    "Sapphire Rapids": (
        "x86_64",
        f"{ZEN4} avx_vnni amx_bf16 avx512_fp16 amx_tile amx_int8",
        "amx avx512 avx512_bf16 avx2 baseline",
    ),
    "Sapphire Rapids without tiles": (
        "x86_64",
        f"{ZEN4} avx_vnni avx512_fp16",
        "avx512 avx512_bf16 avx2 baseline",
    ),
    "Graviton 2": ("aarch64", NEOVERSE_N1, "neon_dot neon baseline"),
    "Graviton 3": ("aarch64", NEOVERSE_V1, "neon_bf16 neon_dot neon baseline"),
    "Graviton 4": ("aarch64", f"{NEOVERSE_V1} sve2 bti", "neon_bf16 neon_dot neon baseline"),
    "Apple M1": ("aarch64", APPLE_M1, "neon_dot neon baseline"),
    "Apple M2": ("aarch64", f"{APPLE_M1} i8mm bf16", "neon_bf16 neon_dot neon baseline"),
    "Raspberry Pi 4": ("aarch64", RASPBERRY_PI_4, "neon baseline"),
    "Raspberry Pi 5": ("aarch64", NEOVERSE_N1.removesuffix(" ssbs"), "neon_dot neon baseline"),
    "a RISC-V board": ("riscv64", "", "baseline"),
}


def cpuinfo(machine: str, *processors: str, vendor: str = "GenuineIntel") -> str:
    """Its text: a block of lines for each processor."""
    blocks = []
    for number, features in enumerate(processors):
        lines = [f"processor\t: {number}"]
        if machine == "x86_64":
            lines += [
                f"vendor_id\t: {vendor}",
                "model name\t: an amx avx2 processor",
                f"flags\t\t: {features}",
            ]
        elif machine == "aarch64":
            lines += [f"Features\t: {features}", "CPU implementer\t: 0x41"]
        else:
            lines += ["isa\t\t: rv64imafdc"]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("name", MACHINES)
def test_levels_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, features, expected = MACHINES[name]
    monkeypatch.setattr(platform, "machine", lambda: machine)
    vendor = "AuthenticAMD" if name.startswith("Zen") else "GenuineIntel"
    found = levels_of(cpuinfo(machine, features, features, vendor=vendor))
    assert " ".join(level.name for level in found) == expected


def test_a_level_needs_its_features_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    found = levels_of(cpuinfo("aarch64", NEOVERSE_V1, RASPBERRY_PI_4))
    assert [level.name for level in found] == ["neon", "baseline"]


def test_without_cpuinfo_the_baseline_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert levels_of("") == LEVELS[-1:]


def test_every_level_is_the_best_of_some_machine() -> None:
    best = {levels.split()[0] for _, _, levels in MACHINES.values()}
    assert best == {level.name for level in LEVELS}
