"""Define decode steps to measure: rows that share a prefix and have private tokens, over a chunk
pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from gpu_suite.device import DTYPES, Device

from chunkllama.attention.plan import Planner
from chunkllama.attention.plan_format import AttentionPlan
from chunkllama.backends.base import DevicePlan, KVCache
from chunkllama.backends.cuda.backend import CudaBackend

CHUNK = 64


@dataclass(frozen=True)
class Workload:
    """One decode step (Table 3 of arXiv 2402.15220 has 32 heads of 128, 32 rows).

    Attributes:
        rows: sequences in the batch.
        shared: leading tokens that all of them share, a multiple of 64.
        private: further tokens of each.
    """

    rows: int
    shared: int
    private: int
    num_qo_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        heads = f"{self.num_qo_heads}/{self.num_kv_heads}x{self.head_dim}"
        return f"b{self.rows} ns{self.shared} nu{self.private} {heads} {self.dtype}"

    @property
    def context(self) -> int:
        return self.shared + self.private

    @property
    def token_bytes(self) -> int:
        """K and V of one token and layer."""
        return 4 * self.num_kv_heads * self.head_dim

    @property
    def unique_bytes(self) -> int:
        """K and V of a step if every shared token is read once."""
        return (self.shared + self.rows * self.private) * self.token_bytes

    @property
    def unshared_bytes(self) -> int:
        """K and V of a step if every sequence reads its own."""
        return self.rows * self.context * self.token_bytes

    @property
    def shared_chunks(self) -> int:
        return self.shared // CHUNK

    @property
    def private_chunks(self) -> int:
        return -(-self.private // CHUNK)

    @property
    def num_chunks(self) -> int:
        return self.shared_chunks + self.rows * self.private_chunks

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @cached_property
    def chunk_ids(self) -> list[np.ndarray]:
        """The chunks of each row; private chunks lie scattered, as after a while of serving."""
        names = np.random.default_rng(0).permutation(self.num_chunks).astype(np.int32)
        prefix, rest = np.split(names, [self.shared_chunks])
        return [np.concatenate((prefix, own)) for own in np.array_split(rest, self.rows)]

    def plan(self, ops: CudaBackend, *, sharing: bool = True) -> AttentionPlan:
        """The step's plan; without sharing every row reads its whole context by itself."""
        packing = ops.packing(
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
        )
        return Planner(packing, CHUNK).build(
            first_positions=[self.context - 1] * self.rows,
            num_tokens=[1] * self.rows,
            chunk_ids=self.chunk_ids,
            shared=self.common_chunks if sharing else [0] * self.rows,
            version=0,
        )

    @property
    def common_chunks(self) -> list[int]:
        """Leading chunks of each row that are those of the row before."""
        return [0] + [self.shared_chunks] * (self.rows - 1)


@dataclass(frozen=True)
class Tree(Workload):
    """A decode step over a tree of prefixes, as PAT's benchmark has them (ASPLOS 26).

    Chunks that lie across the end of a node are each row's own.

    Attributes:
        nodes: of each level, the root's first; the last number is ``rows``.
        tokens: of a node of each level.
    """

    nodes: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, text: str, num_qo_heads: int, num_kv_heads: int) -> Tree:
        """Make one of PAT's notation, ``nodes per level _ tokens per node``: "1,10_4096,416"."""
        nodes, tokens = (tuple(map(int, part.split(","))) for part in text.split("_"))
        heads = {"num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads}
        return cls(nodes[-1], 0, sum(tokens), **heads, nodes=nodes, tokens=tokens)

    @property
    def name(self) -> str:
        shape = ",".join(map(str, self.nodes)), ",".join(map(str, self.tokens))
        heads = f"{self.num_qo_heads}/{self.num_kv_heads}x{self.head_dim}"
        return f"tree {'_'.join(shape)} {heads} {self.dtype}"

    @cached_property
    def common_chunks(self) -> list[int]:
        common = [0]
        for row in range(1, self.rows):
            places = [(row - 1) * n // self.rows == row * n // self.rows for n in self.nodes]
            depth = places.index(False)
            common.append(sum(self.tokens[:depth]) // CHUNK)
        return common

    @cached_property
    def chunk_ids(self) -> list[np.ndarray]:
        names = np.random.default_rng(0).permutation(self.num_chunks).astype(np.int32)
        paths, used = [np.empty(0, np.int32)], 0
        for common in self.common_chunks:
            own = -(-self.context // CHUNK) - common
            paths.append(np.concatenate((paths[-1][:common], names[used : used + own])))
            used += own
        return paths[1:]

    @cached_property
    def num_chunks(self) -> int:
        return sum(-(-self.context // CHUNK) - common for common in self.common_chunks)

    @property
    def unique_bytes(self) -> int:
        shared = sum(self.common_chunks) * CHUNK
        return (self.rows * self.context - shared) * self.token_bytes


@dataclass(frozen=True)
class Step:
    """A workload on a device: pools, queries, plans."""

    workload: Workload
    device: Device
    layers: int

    @cached_property
    def ops(self) -> CudaBackend:
        w = self.workload
        return self.device.ops(w.head_dim, w.num_kv_heads, w.dtype)

    @cached_property
    def kv(self) -> KVCache:
        w = self.workload
        kv = self.ops.allocate_kv(
            num_layers=self.layers,
            num_chunks=w.num_chunks,
            chunk_size=CHUNK,
            num_kv_heads=w.num_kv_heads,
            head_dim=w.head_dim,
            dtype=DTYPES[w.dtype],
        )
        for layer in kv.layers:
            layer.normal_()
        return kv

    @cached_property
    def q(self) -> torch.Tensor:
        w = self.workload
        shape = (w.rows, w.num_qo_heads, w.head_dim)
        return torch.empty(shape, dtype=DTYPES[w.dtype], device=self.device.torch_device).normal_()

    @cached_property
    def qkv(self) -> torch.Tensor:
        w = self.workload
        width = (w.num_qo_heads + 2 * w.num_kv_heads) * w.head_dim
        place = {"dtype": DTYPES[w.dtype], "device": self.device.torch_device}
        return torch.empty(w.rows, width, **place).normal_()

    @cached_property
    def cos_sin(self) -> torch.Tensor:
        w, place = self.workload, {"device": self.device.torch_device}
        return torch.empty(w.context, w.head_dim, **place).normal_()

    @cached_property
    def positions(self) -> torch.Tensor:
        return torch.full(
            (self.workload.rows,),
            self.workload.context - 1,
            dtype=torch.int32,
            device=self.device.torch_device,
        )

    def upload(self, *, sharing: bool = True) -> DevicePlan:
        plan = self.workload.plan(self.ops, sharing=sharing)
        return self.ops.upload_plan(plan, self.kv, num_qo_heads=self.workload.num_qo_heads)

    def append(self, plan: DevicePlan, layer: int) -> torch.Tensor:
        """Our append of one token to every sequence: rotated queries [rows, Hq, D]."""
        return self.ops.rope_append(self.qkv, self.positions, self.cos_sin, self.kv, layer, plan)

    def attend(self, plan: DevicePlan, layer: int) -> torch.Tensor:
        """Our attention: [rows, Hq D]."""
        return self.ops.tpp_attention(
            self.q, self.kv, layer, self.positions, plan, self.workload.scale
        )

    def contiguous(self, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V per sequence, [rows, Hkv, context, D]: what attention without a prefix tree
        reads.
        """
        ids = torch.from_numpy(np.stack(self.workload.chunk_ids)).long()
        w, pool = self.workload, self.kv.layers[layer]
        chunks = pool[ids.to(pool.device)]  # [rows, chunks, 2, Hkv, 64, D]
        tokens = chunks.permute(2, 0, 3, 1, 4, 5).reshape(
            2, w.rows, w.num_kv_heads, -1, w.head_dim
        )[..., : w.context, :]
        return tokens[0].contiguous(), tokens[1].contiguous()
