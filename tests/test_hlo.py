"""Claims about parsing the text of a compiled program."""

import jax
import pytest
from jax import numpy as jnp

from calm_jax.planning.compiled import hlo, runs

# As the TPU compiler writes: no trip counts, constants carried by outer loops, comments.
LOOPS = """HloModule jit_step, is_scheduled=true, num_partitions=4, entry_computation_layout={()->()}

%fused_add (param_0: s32[], param_1: s32[]) -> s32[] {
  %param_0 = s32[]{:T(128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  ROOT %add.1 = s32[]{:T(128)} add(%param_0, %param_1)
}

%inner_body (p.1: (s32[], s32[], bf16[8,4])) -> (s32[], s32[], bf16[8,4]) {
  %p.1 = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %get-tuple-element.2 = s32[]{:T(128)} get-tuple-element(%p.1), index=1
  %get-tuple-element.3 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=2
  %constant.1 = s32[]{:T(128)} constant(2), metadata={op_name="a(b)/{c}" stack_frame_id=1}
  %fusion.1 = s32[]{:T(128)} fusion(%get-tuple-element.1, %constant.1), kind=kLoop, calls=%fused_add
  %negate.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} negate(%get-tuple-element.3)
  ROOT %tuple.1 = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) tuple(%fusion.1, %get-tuple-element.2, %negate.1)
}

%inner_condition (p.2: (s32[], s32[], bf16[8,4])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.4 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %get-tuple-element.5 = s32[]{:T(128)} get-tuple-element(%p.2), index=1
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.4, %get-tuple-element.5), direction=LT
}

%outer_body (p.3: (s32[], bf16[8,4], s32[])) -> (s32[], bf16[8,4], s32[]) {
  %p.3 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %get-tuple-element.6 = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  %get-tuple-element.7 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.3), index=1
  %get-tuple-element.8 = s32[]{:T(128)} get-tuple-element(%p.3), index=2
  %constant.2 = s32[]{:T(128)} constant(1)
  %constant.3 = s32[]{:T(128)} constant(0)
  %add.2 = s32[]{:T(128)} add(%get-tuple-element.6, %constant.2)
  %tuple.2 = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) tuple(%constant.3, %get-tuple-element.8, /*index=2*/%get-tuple-element.7)
  %while.1 = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.2), condition=%inner_condition, body=%inner_body
  %get-tuple-element.9 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while.1), index=2
  ROOT %tuple.3 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) tuple(%add.2, %get-tuple-element.9, %get-tuple-element.8)
}

%outer_condition (p.4: (s32[], bf16[8,4], s32[])) -> pred[] {
  %p.4 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %get-tuple-element.10 = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  %constant.4 = s32[]{:T(128)} constant(5)
  ROOT %lt.2 = pred[]{:T(512)} compare(%get-tuple-element.10, %constant.4), direction=LT
}

ENTRY %main (param.1: bf16[8,4], param.2: s32[]) -> bf16[8,4] {
  %param.1 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %param.2 = s32[]{:T(128)} parameter(1)
  %constant.5 = s32[]{:T(128)} constant(1)
  %copy.1 = s32[]{:T(128)} copy(%constant.5)
  %constant.6 = s32[]{:T(128)} constant(6)
  %tuple.4 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/s32[]{:T(128)}) tuple(%copy.1, %param.1, %constant.6)
  %while.2 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) while(%tuple.4), condition=%outer_condition, body=%outer_body
  ROOT %get-tuple-element.11 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while.2), index=1
}
"""  # noqa: E501


def test_loops_without_stated_trip_counts_are_simulated():
  module = runs.read(LOOPS)
  # The outer counter goes from 1 to 5 by 1, the inner from 0 to 6 by 2; the 6 is carried in.
  assert module.trips == {"while.2": 4, "while.1": 3}
  assert module.counts["outer_body"] == 4 and module.counts["inner_body"] == 12
  assert module.fused == {"fused_add"} and module.partitions == 4
  negations = [n for _, instruction, n in module.running() if instruction.opcode == "negate"]
  assert negations == [12]


def test_a_loop_whose_end_is_an_argument_has_an_unknown_trip_count():
  module = runs.read(
    LOOPS.replace("tuple(%copy.1, %param.1, %constant.6)", "tuple(%copy.1, %param.1, %param.2)")
  )
  assert module.trips == {"while.2": 4, "while.1": None}
  assert module.counts["inner_body"] == 4


def test_shapes_operands_and_attributes_are_parsed():
  module = runs.read(LOOPS)
  negation = module.computations["inner_body"].instructions["negate.1"]
  assert negation.arrays == (hlo.Array("bf16", (8, 4), space=1),) and negation.bytes == 64
  assert negation.operands == ("get-tuple-element.3",)
  entry = module.entry
  assert [entry.parameters[number].name for number in (0, 1)] == ["param.1", "param.2"]
  assert [user.name for user in entry.users["param.1"]] == ["tuple.4"]
  constant = module.computations["inner_body"].instructions["constant.1"]
  assert constant.literal == "2"
  assert constant.attribute("metadata") == '{op_name="a(b)/{c}" stack_frame_id=1}'


def test_an_instruction_may_have_several_lines():
  text = """HloModule one

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %constant.1 = f32[2,2]{1,0} constant({
    { 1, 2 },
    { 3, 4 }
  })
  ROOT %kernel = f32[4]{0} custom-call(%p, %constant.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block, q\\": 128}"
}}, metadata={op_name="jit(f)"}
}
"""  # noqa: E501
  module = runs.read(text)
  kernel = module.entry.root
  assert kernel.operands == ("p", "constant.1") and kernel.target == "tpu_custom_call"
  assert kernel.attribute("metadata") == '{op_name="jit(f)"}'
  assert kernel.attribute("frontend_attributes").endswith("}}")


def test_bytes_of_dtypes():
  sizes = {"pred": 1, "s4": 0.5, "u8": 1, "bf16": 2, "f32": 4, "f8e4m3fn": 1, "c64": 8, "token": 0}
  assert {dtype: hlo.Array(dtype, (8,)).bytes / 8 for dtype in sizes} == sizes


def test_text_without_a_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    runs.read("HloModule nothing")


def test_trip_counts_that_the_backend_states_are_used():
  def f(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

  x, ws = jnp.ones((16, 32)), jnp.ones((7, 32, 32))
  module = runs.read(jax.jit(f).lower(x, ws).compile().as_text())
  assert list(module.trips.values()) == [7]
