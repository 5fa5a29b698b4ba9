"""Reads the operations of one iteration of a compiled loop from handwritten HLO."""

from __future__ import annotations

from ar_unified.planning.loops import Copy, turn

# A loop that copies one array, prefetches a second into closer memory, moves a third inside a fusion, uses a private
# copy inside another fusion, calls a kernel, and draws text tokens if some row needs them.
MODULE = """HloModule jit_step, is_scheduled=true

%moves (p: f32[64,128]) -> f32[128,64] {
  %p = f32[64,128]{1,0} parameter(0)
  ROOT %t = f32[128,64]{1,0} transpose(%p), dimensions={1,0}
}

%computes (p: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %c = f32[64,128]{0,1} copy(%p)
  ROOT %sum = f32[64,128]{1,0} add(%p, %c)
}

%nothing (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%words (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %drawn = f32[8]{0} negate(%p), backend_config={"window_config":{"estimated_cycles":"1000"}}
}

%until (s: (s32[], f32[64,128])) -> pred[] {
  %s = (s32[], f32[64,128]{1,0}) parameter(0)
  ROOT %go = pred[] custom-call(%s), custom_call_target="go", backend_config={"window_config":{"estimated_cycles":"1"}}
}

%body (s: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %s = (s32[], f32[64,128]{1,0}) parameter(0)
  %x = f32[64,128]{1,0} get-tuple-element(%s), index=1
  %copy.1 = f32[64,128]{0,1:T(8,128)} copy(%x), metadata={op_name="jit(step)/while/body/scatter"}, backend_config={"window_config":{"estimated_cycles":"200"}}
  %fetch = (bf16[4096]{0:S(1)}, bf16[4096]{0}, u32[]{:S(2)}) copy-start(%x)
  %turned = f32[128,64]{1,0} fusion(%x), kind=kLoop, calls=%moves
  %more = f32[64,128]{1,0} fusion(%x), kind=kLoop, calls=%computes, backend_config={"window_config":{"estimated_cycles":"30"}}
  %kernel = f32[64,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/while/body/cache_write/pallas_call"}
  %word = f32[8]{0} conditional(%x, %x, %x), branch_computations={%nothing, %words}, metadata={op_name="jit(step)/while/body/words/cond"}
  ROOT %next = (s32[], f32[64,128]{1,0}) tuple(%s, %more)
}

ENTRY %main (x: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %x = (s32[], f32[64,128]{1,0}) parameter(0)
  %before = f32[64,128]{0,1} copy(%x), backend_config={"window_config":{"estimated_cycles":"99999"}}
  ROOT %loop = (s32[], f32[64,128]{1,0}) while(%x), condition=%until, body=%body
}
"""  # noqa: E501


def test_copies_cycles_and_kernels_of_a_turn():
    found = turn(MODULE)
    assert found.copies == (
        Copy(64 * 128 * 4, 1, "jit(step)/while/body/scatter"),
        Copy(64 * 128 * 4, 1, ""),  # the fusion that only moves data
    )
    assert (found.cycles, found.kernels) == (1231, {"cache_write": 1})


def test_a_conditional_that_is_not_taken_takes_no_time():
    assert turn(MODULE, "words").cycles == 231 and turn(MODULE, "codes").cycles == 1231
