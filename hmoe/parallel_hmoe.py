"""Expert parallelism for experts of different sizes, on the engine of Transformers.

The bank of tiles is cut into equal runs, one per rank. Where the experts' order puts whole experts (MoDSE's pairs)
into every run, each rank holds whole experts and the same number of parameters; where it does not, the tiles of an
expert lie on several ranks, each computes its part, and the parts are added: exact for any sizes, at the price of
sending the token to all of them. This file travels with every saved checkpoint.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.distributed.parallel_utils import _AllReduceBackward, _AllReduceForward


class _Exchange(torch.autograd.Function):
    """All-to-all of rows: `send_sizes[r]` go to rank r, `recv_sizes[r]` come from it; backward is the way back."""

    @staticmethod
    def forward(ctx, rows, send_sizes, recv_sizes, group):
        ctx.send_sizes, ctx.recv_sizes, ctx.group = send_sizes, recv_sizes, group
        received = rows.new_empty(sum(recv_sizes), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), recv_sizes, send_sizes, group=group)
        return received

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, ctx.recv_sizes, ctx.send_sizes, ctx.group), None, None, None


class HMoEExpertParallel(EPImplementation):
    """Brings each token once to every rank that holds tiles of one of its experts, and adds the partial outputs.

    Where all ranks of the group hold the same batch (`ep_size == tp_size`) nothing is sent: each rank runs its own
    experts on it and an all-reduce adds the outputs. Unused Top-P slots are dropped before anything is sent.
    `bytes_sent` of the experts module counts what its last forward sent to other ranks point to point: rows with their
    routing there, and output rows back.
    """

    def __init__(self, experts, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        # Transformers has written the number of tiles held here there, as if each were an expert.
        self.num_experts = experts.num_experts = len(experts.tile_offsets) - 1
        self.experts = experts
        experts.bytes_sent = 0
        tiles_per_rank = experts.gate_up_proj.shape[0] // ep_mesh.size()
        offsets = torch.tensor(experts.tile_offsets)  # [E + 1], of the whole bank
        starts = torch.arange(ep_mesh.size()).unsqueeze(1) * tiles_per_rank  # [R, 1]
        local_offsets = (offsets - starts).clamp(0, tiles_per_rank)  # [R, E + 1]
        holds = local_offsets.diff(dim=1) > 0  # [R, E]
        self.holds = torch.cat([holds, holds.new_zeros(len(holds), 1)], dim=1)  # [R, E + 1], nobody holds the sentinel
        experts.tile_offsets = local_offsets[ep_mesh.get_local_rank()].tolist()

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.holds = self.holds.to(top_k_index.device)
        if self.shares_batch:
            return self._on_shared_batch(hidden_states, top_k_index, top_k_weights)
        if self.tp_mesh.size() == 1:
            return self._dispatch(hidden_states, top_k_index, top_k_weights)
        # The ranks of a tensor-parallel group hold the same batch: each dispatches its own slice of it.
        slices = [
            DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
            .redistribute(self.tp_mesh, [Shard(0)])
            .to_local()
            for tensor in (hidden_states, top_k_index, top_k_weights)
        ]
        output = self._dispatch(*slices)
        return DTensor.from_local(
            output.contiguous(),
            self.tp_mesh,
            [Shard(0)],
            shape=hidden_states.shape,
            stride=hidden_states.stride(),
        ).full_tensor()

    def _on_shared_batch(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        group = self.ep_mesh.get_group()
        hidden_states = _AllReduceBackward.apply(hidden_states, group)
        top_k_weights = _AllReduceBackward.apply(top_k_weights, group)
        index, weights = self._keep_local(top_k_index, top_k_weights)
        return _AllReduceForward.apply(self.experts_forward(hidden_states, index, weights), group)

    def _dispatch(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        group = self.ep_mesh.get_group()
        needed = self.holds[:, top_k_index.clamp(max=self.num_experts)].any(dim=-1)  # [R, T]
        send_counts = needed.sum(dim=1)  # [R]
        recv_counts = torch.empty_like(send_counts)
        dist.all_to_all_single(recv_counts, send_counts, group=group)
        send_sizes, recv_sizes = torch.stack([send_counts, recv_counts]).tolist()  # the one host synchronisation
        token = torch.nonzero_static(needed, size=sum(send_sizes))[:, 1]  # by receiving rank

        rows, weights = (
            _Exchange.apply(tensor[token], send_sizes, recv_sizes, group) for tensor in (hidden_states, top_k_weights)
        )
        sent_index = top_k_index[token].to(torch.int32)
        index = sent_index.new_empty(rows.shape[0], top_k_index.shape[1])
        dist.all_to_all_single(index, sent_index, recv_sizes, send_sizes, group=group)
        local_output = self.experts_forward(rows, *self._keep_local(index, weights))
        partial = _Exchange.apply(local_output, recv_sizes, send_sizes, group)
        self._count_bytes(send_sizes, recv_sizes, rows, index, weights)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)  # as experts of one rank are added
        output = torch.zeros_like(hidden_states, dtype=dtype).index_add(0, token, partial.to(dtype))
        return output.to(hidden_states.dtype)

    def _keep_local(self, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of experts that have no tile here become unused."""
        local = self.holds[self.ep_mesh.get_local_rank()][index.clamp(max=self.num_experts)]
        return torch.where(local, index.long(), self.num_experts), torch.where(local, weights, 0)

    def _count_bytes(self, send_sizes: list[int], recv_sizes: list[int], *sent_with_row: Tensor) -> None:
        rank = self.ep_mesh.get_local_rank()
        per_row = sum(tensor.shape[1] * tensor.element_size() for tensor in sent_with_row)
        output_row = sent_with_row[0].shape[1] * sent_with_row[0].element_size()
        sent, returned = sum(send_sizes) - send_sizes[rank], sum(recv_sizes) - recv_sizes[rank]
        self.experts.bytes_sent = sent * per_row + returned * output_row


EP_IMPLEMENTATION = "hmoe"
EPImplementationInterface.register(EP_IMPLEMENTATION, HMoEExpertParallel)


def check_tiles_divide(config, ep_size: int) -> None:
    """Raises ValueError if the tiles of some layer cannot be cut into `ep_size` equal runs."""
    for layer, sizes in enumerate(config.layer_expert_sizes):
        num_tiles = sum(sizes) // config.expert_tile_size
        if num_tiles % ep_size:
            raise ValueError(
                f"`ep_size`={ep_size} does not divide the {num_tiles} tiles of {config.expert_tile_size} neurons in "
                f"layer {layer}: use a divisor of {num_tiles}, or convert to a smaller `expert_tile_size`"
            )
