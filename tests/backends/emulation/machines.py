"""The machines that the emulator suites run on, and which of their tests run on the PTX in CI."""

from __future__ import annotations

from kernel_emulator import Machine, PlainMachine
from ptx_emulator import PtxMachine

MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        PlainMachine(),
        PtxMachine("ptx_90", "compute_90"),
        PtxMachine("ptx_80", "compute_80"),
        PtxMachine("ptx_120", "compute_120"),
        # Tensor cores that truncate and functions with twice the error of the PTX ISA's bound.
        PtxMachine("ptx_90_rough", "compute_90", approximate_units=4, truncating_mma=True),
    )
}

SUITES = (
    "test_emulation_attention",
    "test_emulation_ops",
    "test_emulation_model",
    "test_emulation_gpu_check",
)

# Of the tests on a PTX machine, these are cheap: they share the kernels of few libraries. The
# others run at night.
IN_CI = {
    "test_emulation_trees[ptx_90-prefix-0]",
    "test_emulation_trees[ptx_90-two_levels-7]",
    "test_emulation_causal[ptx_90-50-100-0]",
    "test_emulation_captured_launches_follow_the_plan[ptx_90]",
    "test_emulation_rope_append[ptx_90-64-bf16-slices]",
    "test_emulation_device_layer_matches_the_stored_vectors[ptx_90-bf16]",
    "test_emulation_device_layer_matches_the_stored_vectors[ptx_90-fp16]",
}
