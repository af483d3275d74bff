"""Loops and collectives read from compiled programs, counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from metaformer_jax.models import cost
from metaformer_jax.preflight import hlo, topologies

# With every notation for groups.
TEXT = """\
HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], /*index=1*/f32[8]{0:T(8)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %ar = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%sum
  %fused = f32[8]{0} fusion(%ar), kind=kLoop, calls=%inner
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %fused)
}

%inner (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %neg = f32[8]{0} negate(%q)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8]{0}) tuple(%zero, %x)
  %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body
  %y = f32[8]{0} get-tuple-element(%w), index=1
  %ag = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%half), replica_groups=[2,4]<=[8], dimensions={0}
  %half = bf16[4]{0} convert(%y)
  %agd = bf16[16]{0} all-gather-done(%ag)
  %rs = f32[2]{0} reduce-scatter(%y), replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}, to_apply=%sum
  %cp = f32[8]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
  ROOT %out = f32[8]{0} add(%y, %y)
}
"""  # noqa: E501  As printed by the compiler.


def test_collectives_in_each_notation():
  found = hlo.Module(TEXT).collectives(n_devices=8)
  assert found == [
      hlo.Collective("all-gather", "bf16", 1, 8, 4),
      hlo.Collective("all-reduce", "f32", 5, 32, 2),  # 5 iterations.
      hlo.Collective("collective-permute", "f32", 1, 32, 8),
      hlo.Collective("reduce-scatter", "f32", 1, 32, 4)]
  assert [c.sent_bytes for c in found] == [3 * 8, 5 * 32, 32, 24]


def test_bytes_of_loops():
  # Body: 64 for the all-reduce, 64 for the fusion; condition: 9. Outside: 40
  # for the convert, 48 for the all-gather-start, then 40, 64 and 96.
  body, condition, outside = 128, 4 + 4 + 1, 40 + 48 + 40 + 64 + 96
  once = outside + body + condition
  assert hlo.Module(TEXT).loop_factor() == pytest.approx(
      (outside + 5 * (body + condition)) / once)


def test_of_branches_the_mean_counts():
  text = TEXT.replace(
      "fusion(%ar), kind=kLoop, calls=%inner",
      "conditional(%i, %ar, %ar), branch_computations={%inner, %nothing}")
  text = text.replace("ENTRY", """\
%nothing (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0} parameter(0)
}

ENTRY""")
  # As above, with half of the 64 for the negation in the place of the fusion.
  rest, body = 40 + 48 + 40 + 64 + 96, 64 + 64 / 2 + 9
  assert hlo.Module(text).loop_factor() == pytest.approx(
      (rest + 5 * body) / (rest + body))

  def step(x, i):
    return jax.lax.switch(i, [lambda x: x @ x, lambda x: x], x)

  assert cost.count_macs(step, jnp.ones((8, 8)), 0) == 8**3 // 2


@pytest.mark.parametrize("text,n_bytes", [
    ("f32[8,4]{1,0:T(8,128)S(1)}", 128), ("(bf16[3]{0}, s32[])", 10),
    ("pred[5]", 5), ("f8e4m3fn[16]", 16), ("u4[8]", 4), ("f32[]", 4),
    ("c64[2]", 16), ("token[]", 0), ("s32[0]", 0)])
def test_sizes_of_types(text, n_bytes):
  assert hlo.type_bytes(text) == n_bytes


@pytest.fixture(scope="module")
def chips():
  with pytest.MonkeyPatch.context() as patch:
    for key, value in topologies.ENVIRONMENT.items():
      patch.setenv(key, value)
    yield topologies.devices(topologies.parse("v5e-8"))


def compile_for(chips, shape, fn, spec, *shapes):
  mesh = jax.make_mesh(shape, ("data", "fsdp"), devices=chips,
                       axis_types=(AxisType.Auto,) * 2)
  arguments = [jax.ShapeDtypeStruct(
      s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s in shapes]
  out = NamedSharding(mesh, PartitionSpec())
  return jax.jit(fn, out_shardings=out).lower(*arguments).compile()


@pytest.mark.parametrize("turns", [1, 7])
def test_the_trip_count_of_a_scan_compiled_for_a_tpu(chips, turns):
  """Each iteration sums a row of 1000 values over all chips."""
  def fn(x):  # [turns, 8, 1000]
    def turn(carry, row):
      return jnp.sin(carry) + row.sum(0), None
    return jax.lax.scan(turn, jnp.zeros(x.shape[-1]), x)[0]

  compiled = compile_for(chips, (8, 1), fn, PartitionSpec(None, "data"),
                         (turns, 8, 1000))
  summed = [c for c in hlo.Module(compiled.as_text()).collectives(8)
            if c.n_bytes >= 4000]
  assert sum(c.count * c.n_bytes for c in summed) == pytest.approx(
      4000 * turns, rel=0.05)  # The compiler pads rows.
  assert {(c.kind, c.dtype, c.group) for c in summed} == {
      ("all-reduce", "f32", 8)}


@pytest.mark.slow
def test_the_bytes_of_a_loop_include_every_iteration(chips):
  """Each iteration reads 256 MiB, in a loop and unrolled."""
  def turn(x, total):
    return jnp.sin(x * total).sum()

  def looped(x):
    return jax.lax.fori_loop(0, 12, lambda i, total: turn(x, total), 1.0)

  def unrolled(x):
    total = 1.0
    for _ in range(12):
      total = turn(x, total)
    return total

  for fn, factor in ((looped, 12), (unrolled, 1)):
    compiled = compile_for(chips, (8, 1), fn, PartitionSpec(), (8192, 8192))
    found = hlo.Module(compiled.as_text()).loop_factor()
    assert found == pytest.approx(factor, rel=1e-2)
    counted = compiled.cost_analysis()["bytes accessed"]
    assert counted * found == pytest.approx(12 * 4 * 8192**2, rel=0.05)


def test_groups_follow_the_mesh_axis(chips):
  compiled = compile_for(chips, (2, 4), lambda x: x.sum(0),
                         PartitionSpec("fsdp"), (4, 100_000))
  largest = max(hlo.Module(compiled.as_text()).collectives(8),
                key=lambda c: c.n_bytes)
  assert largest.group == 4


@pytest.mark.parametrize("line,operands,n_bytes", [
    # Channels in the lanes: 64 take the space of 128.
    ("%a = bf16[2,56,56,64]{3,2,1,0:T(8,128)(2,1)} negate(%b)",
     ["bf16[2,56,56,64]{3,2,1,0:T(8,128)(2,1)}"],
     2 * 2 * 2 * 56 * 56 * 128),
    # 7 rows take the space of 8; the batch fills the lanes.
    ("%a = f32[128,3,7]{0,2,1:T(8,128)} negate(%b)",
     ["f32[128,3,7]{0,2,1:T(8,128)}"], 2 * 4 * 128 * 3 * 8),
    # Next to the cores, and in the main memory.
    ("%a = f32[8,128]{1,0:T(8,128)S(1)} add(%b, %c)",
     ["f32[8,128]{1,0:T(8,128)S(1)}", "f32[8,128]{1,0:T(8,128)}"], 4096),
    # A prefetch reads the main memory, and writes that next to the cores.
    ("%a = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]) "
     "copy-start(%b)", ["f32[8,128]{1,0:T(8,128)}"], 4096),
    # Of a slice, only what is sliced.
    ("%a = ((f32[64,128]{1,0:T(8,128)}), f32[16,128]{1,0:T(8,128)S(1)}, s32[]) "
     "slice-start(%b)", ["f32[64,128]{1,0:T(8,128)}"], 8192),
    ("%a = f32[]{} add(%b, %c)", ["f32[]", "f32[]"], 12),
])
def test_main_memory_is_counted_with_padding_and_without_the_cores(
    line, operands, n_bytes):
  assert hlo.hbm_bytes(hlo._instruction("  " + line), operands) == n_bytes
