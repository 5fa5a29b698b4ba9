"""Reads the collectives that run: from handwritten HLO, and from a module that XLA compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ar_unified.parallel.mesh import make_mesh
from ar_unified.planning.collectives import collectives, unknown_loops

# A loop of 3 iterations in which two of four devices gather, a fused reduce-scatter that TPUs write as an all-reduce, a
# gather that is written twice because it overlaps with computation, and a loop whose end depends on data.
MODULE = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[8,128]) -> f32[8,64] {
  %input = f32[8,128]{1,0:T(8,128)} parameter(0)
  %reduced = f32[8,128]{1,0:T(8,128)} all-reduce(%input), channel_id=3, replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, use_global_device_ids=true, to_apply=%add
  ROOT %part = f32[8,64]{1,0} slice(%reduced), slice={[0:8], [0:64]}
}

%async_collective_fusion.1 (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %gathered = bf16[16,8]{1,0} all-gather(%p), channel_id=4, replica_groups={{0,1,2,3}}, dimensions={0}
}

%fused_computation.2 (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %again = bf16[16,8]{1,0} all-gather(%p), channel_id=4, replica_groups={{0,1,2,3}}, dimensions={0}
}

%condition (state: (s32[], f32[16])) -> pred[] {
  %state = (s32[], f32[16]{0}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %turns = s32[] constant(3)
  ROOT %less = pred[] compare(%turn, %turns), direction=LT
}

%body (state: (s32[], f32[16])) -> (s32[], f32[16]) {
  %state = (s32[], f32[16]{0}) parameter(0)
  %x = f32[8]{0} custom-call(%state), custom_call_target="part"
  %whole = f32[16]{0} all-gather(%x), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}, metadata={op_name="jit(step)/while/body/gather"}
  ROOT %next = (s32[], f32[16]{0}) tuple(%state, %whole)
}

%until (state: (pred[], f32[4])) -> pred[] {
  %state = (pred[], f32[4]{0}) parameter(0)
  %phase = s32[] get-tuple-element(%state), index=0
  %step = s32[] get-tuple-element(%state), index=1
  %steps = s32[] get-tuple-element(%state), index=2
  %last = s32[] constant(4)
  %less = pred[] compare(%step, %steps), direction=LT
  %ended = pred[] compare(%phase, %last), direction=EQ
  %not = pred[] not(%ended)
  ROOT %go = pred[] and(%less, %not)
}

%turn (state: (pred[], f32[4])) -> (pred[], f32[4]) {
  %state = (pred[], f32[4]{0}) parameter(0)
  %moved = f32[4]{0} collective-permute(%state), channel_id=5, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %out = (pred[], f32[4]{0}) tuple(%state, %moved)
}

ENTRY %main (x: (s32[], f32[16])) -> f32[] {
  %x = (s32[], f32[16]{0}) parameter(0)
  %loop = (s32[], f32[16]{0}) while(%x), condition=%condition, body=%body
  %scattered = f32[8,64]{1,0} fusion(%loop), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/gradient"}
  %f1 = bf16[16,8]{1,0} fusion(%loop), kind=kCustom, calls=%async_collective_fusion.1
  %f2 = bf16[16,8]{1,0} fusion(%loop), kind=kCustom, calls=%fused_computation.2
  %open = (pred[], f32[4]{0}) while(%x), condition=%until, body=%turn
  ROOT %all = f32[] all-reduce(%open), channel_id=6, replica_groups={}, to_apply=%add
}
"""  # noqa: E501


def test_kinds_groups_and_loops():
    found = {each.kind: each for each in collectives(MODULE, 4) if not each.overlapped}
    gather = found["all-gather"]
    assert (gather.bytes, gather.times, gather.groups.tolist()) == (64, 3, [[0, 2], [1, 3]])
    assert gather.sent == 3 * 64 / 2 and gather.source == "jit(step)/while/body/gather"
    scatter = found["reduce-scatter"]
    assert (scatter.bytes, scatter.times, scatter.groups.tolist()) == (4096, 1, [[0, 1], [2, 3]])
    assert scatter.sent == 2048 and scatter.source == "jit(step)/gradient"
    assert found["all-reduce"].groups.tolist() == [[0, 1, 2, 3]] and found["all-reduce"].sent == 4 * 2 * 3 / 4
    permute = found["collective-permute"]
    assert (permute.bytes, permute.sent, permute.known) == (16, 16, False)
    assert unknown_loops(MODULE) == 1


def test_what_runs_beside_computation_counts_once():
    (gather,) = [each for each in collectives(MODULE, 4) if each.bytes == 256]
    assert (gather.kind, gather.overlapped, gather.times) == ("all-gather", True, 1)


def test_a_start_whose_done_follows_at_once_overlaps_with_nothing():
    text = """%product (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  ROOT %dot = f32[16]{0} dot(%a, %a)
}

%small (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  ROOT %twice = f32[16]{0} add(%a, %a)
}

ENTRY %main (x: f32[8]) -> f32[16] {
  %x = f32[8]{0} parameter(0)
  %start.1 = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}
  %done.1 = f32[16]{0} all-gather-done(%start.1)
  %start.12 = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %moved = f32[16]{0} copy(%done.1)
  %worked = f32[16]{0} fusion(%moved), kind=kOutput, calls=%product
  %done.12 = f32[32]{0} all-gather-done(%start.12)
  %start.3 = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %added = f32[16]{0} fusion(%worked), kind=kLoop, calls=%small
  %done.3 = f32[64]{0} all-gather-done(%start.3)
  ROOT %out = f32[16]{0} slice(%done.12), slice={[0:16]}
}
"""
    assert [(each.bytes, each.overlapped) for each in collectives(text, 8)] == [
        (64, False),
        (128, True),
        (256, False),  # an addition hides nothing
    ]


def test_what_a_sparse_core_runs_overlaps_with_what_is_computed_before_its_call_is_done():
    text = """%product (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  ROOT %multiplied = bf16[4,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}

%called.1 (p: bf16[1,8], t: token[]) -> bf16[4,8] {
  %t = token[] parameter(1)
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %gather.1 = bf16[4,8]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%called.2 (p: bf16[1,16], t: token[]) -> bf16[4,16] {
  %t = token[] parameter(1)
  %p = bf16[1,16]{1,0} parameter(0)
  ROOT %gather.2 = bf16[4,16]{1,0} all-gather(%p), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%called.3 (p: bf16[1,32]) -> bf16[4,32] {
  %p = bf16[1,32]{1,0} parameter(0)
  ROOT %gather.3 = bf16[4,32]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: bf16[1,8], y: bf16[1,16], z: bf16[1,32]) -> bf16[4,16] {
  %x = bf16[1,8]{1,0} parameter(0)
  %y = bf16[1,16]{1,0} parameter(1)
  %ready.1 = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %gather.1.call-start = ((bf16[1,8]{1,0}, token[]), bf16[4,8]{1,0}) call-start(%x, %ready.1), async_execution_thread="sparsecore", to_apply=%called.1, metadata={op_name="first"}
  %begun.2 = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"
  %ready.2 = token[] custom-call(%begun.2), custom_call_target="PrepareAsyncCallDone"
  %gather.2.call-start = ((bf16[1,16]{1,0}, token[]), bf16[4,16]{1,0}) call-start(%y, %ready.2), async_execution_thread="sparsecore", to_apply=%called.2, metadata={op_name="second"}
  %gather.1.call-done = bf16[4,8]{1,0} call-done(%gather.1.call-start)
  %z = bf16[1,32]{1,0} parameter(2)
  %begin.3 = ((bf16[1,32]{1,0}), bf16[4,32]{1,0}) async-start(%z), calls=%called.3, metadata={op_name="third"}
  %product = bf16[4,8]{1,0} fusion(%gather.1.call-done), kind=kOutput, calls=%product
  %end.3 = bf16[4,32]{1,0} async-done(%begin.3), calls=%called.3
  ROOT %gather.2.call-done = bf16[4,16]{1,0} call-done(%gather.2.call-start)
}
"""  # noqa: E501
    found = collectives(text, 4)
    assert [(each.source, each.bytes, each.times, each.overlapped) for each in found] == [
        ("first", 64, 1, False),
        ("second", 128, 1, True),
        ("third", 256, 1, True),
    ]


def test_what_slices_exchange_is_a_send_to_the_host():
    send = """ENTRY %main (x: f32[8,128]) -> token[] {
  %x = f32[8,128]{1,0} parameter(0)
  %start = token[] after-all()
  %send.2 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%x, %start), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %done = token[] send-done(%send.2), channel_id=6, is_host_transfer=true
}
"""  # noqa: E501
    (found,) = collectives(send, 8)
    assert (found.kind, found.bytes, found.times) == ("all-reduce", 8 * 128 * 4, 1)
    assert found.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_compiled_scan_over_sharded_weights():
    """Five layers with weights in four parts: five gathers of a whole weight, in XLA's own HLO."""
    mesh = make_mesh(dict(fsdp=4, data=2))
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

    def layers(weights, x):
        def one(x, weight):
            weight = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(one, x, weights)[0]

    hlo = jax.jit(layers).lower(weights, x).compile().as_text()
    gathers = [each for each in collectives(hlo, 8) if each.kind == "all-gather"]
    assert [(each.bytes, each.times) for each in gathers] == [(64 * 64 * 4, 5)]
    assert np.array_equal(np.sort(gathers[0].groups, 1), [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_collectives_of_shard_map_share_a_channel_and_count_each():
    two = """ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %gathered = f32[32]{0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %again = f32[32]{0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %scattered = f32[8]{0} reduce-scatter(%gathered), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}
"""
    found = collectives(two, 4)
    assert [(each.kind, each.bytes) for each in found] == [
        ("all-gather", 128), ("all-gather", 128), ("reduce-scatter", 128),
    ]  # fmt: skip
