"""The preflight: costs counted by hand, and the compiler's verdicts.

Everything is compiled for TPUs that are not here.
"""

import contextlib
import dataclasses
import json

import jax
import line_task
import numpy as np
import preflight_cases as cases
import pytest

from metaformer_jax import tasks
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config.model import Model
from metaformer_jax.config.schema import Data, Experiment, Mesh, Train
from metaformer_jax.models.compiling import Compile
from metaformer_jax.preflight import (
  compilation,
  hlo,
  report,
  search,
  topologies,
)
from metaformer_jax.runtime import devices, sharding, signals
from metaformer_jax.training import step

GIB = cases.GIB


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  for key, value in topologies.ENVIRONMENT.items():
    monkeypatch.setenv(key, value)


@pytest.mark.parametrize("name,n_devices", [
    ("v2-8", 8), ("v3-8", 8), ("v4-8", 4), ("v5e-8", 8), ("v5p-8", 4),
    ("v6e-8", 8), ("tpu7x-8", 8)])
def test_any_task_compiles_for_any_tpu(name, n_devices):
  said = []
  found = compilation.compile_step(
      cases.line_on(name, batch_size=64), said.append)
  assert found.fits
  assert said
  # The parameter, Adam's moments and counters, batch_stats, the step.
  assert found.state == found.checkpoint == 4 * 7
  assert found.flops == 0  # No matrix product.
  # The gradient, the loss and the batch statistic; the stop flag.
  assert {(c.kind, c.dtype, c.count * c.n_bytes, c.group)
          for c in found.collectives} == {
              ("all-reduce", "f32", 12, n_devices),
              ("all-reduce", "s32", 4, n_devices)}
  assert compilation.Compiled.from_json(
      json.loads(json.dumps(found.to_json()))) == found


def test_the_verdict_is_the_compilers_on_both_sides_of_the_limit():
  """Examples of 16 MiB: 15.75 GiB hold 1008; 896 is the largest that fits."""
  def compile_batch(n):
    return compilation.compile_step(
        cases.line_on("v5e-1", values=2**22, batch_size=n))

  tried = search.largest_batch(compile_batch, 64)
  fits, fails = tried[896], tried[1024]
  assert fits.fits
  assert not fails.fits
  assert max(tried) == 1024
  assert fits.available == fails.available == int(15.75 * GIB)
  assert 896 * 2**24 <= fits.needed <= fits.available < fails.needed
  # The compiler's message rounds to hundredths of a GiB.
  assert fails.needed == pytest.approx(1024 * 2**24, rel=1e-2)


@pytest.mark.parametrize("state,an_image,curve", [
    (0.3, 0.02, 1.0), (1.0, 0.1, 1.0), (0.1, 3.0, 1.0), (2.0, 1e-3, 1.0),
    (0.5, 0.02, 1.3), (0.5, 0.3, 0.7), (20.0, 0.1, 1.0), (15.0, 1.0, 1.0),
    # Like PoolFormer-S24: large batches recompute many values.
    (0.25, 2.1, 0.3), (0.25, 3.9, 0.2)])
@pytest.mark.parametrize("first", [1, 48, 512, 5000])
def test_the_search_finds_the_limit(state, an_image, curve, first):
  """Even if memory is far from linear in the batch size."""
  def compile_batch(batch):
    needed = state + an_image * batch**curve
    return compilation.Compiled(
        needed <= 16, int(needed * GIB), 16 * GIB, 0, 0, int(0.2 * GIB), 0)

  grid = [2**i for i in range(7)] + [128 * i for i in range(1, 1000)]
  fitting = [n for n in grid if state + an_image * n**curve <= 16]
  tried = search.largest_batch(compile_batch, first)
  assert max((n for n, c in tried.items() if c.fits), default=0) == max(
      fitting, default=0)
  assert len(tried) <= 10


@pytest.mark.parametrize("message,found", [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
     "for HLO temporaries (36.03G) exceeds available HBM (15.75G).",
     (36.03 * GIB, 15.75 * GIB)),
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom:\nthe total memory required "
     "for HLO temporaries (8.00T) exceeds available HBM (95.74G).\n",
     (8192 * GIB, 95.74 * GIB)),
    ("Ran out of memory in memory space hbm. Used 20.43G of 15.75G hbm. "
     "Exceeded hbm capacity by 4.68G.", (20.43 * GIB, 15.75 * GIB)),
    ("Ran out of memory in memory space hbm. Used 900.5M of 512.0M hbm.",
     (900.5 * 2**20, 512 * 2**20))])
def test_out_of_memory_messages_are_parsed(message, found):
  assert compilation.read_too_large(message) == pytest.approx(found, abs=1)


def test_other_errors_are_not_out_of_memory():
  assert compilation.read_too_large("INTERNAL: Mosaic failed") is None


def test_bounds_are_work_over_published_rates():
  values = report.to_json(cases.subject_of(), cases.compiled_of(), {})
  bound = values["bound"]
  assert bound["seconds"] == pytest.approx(
      {"compute": 0.05, "memory": 0.2, "links": 2 * 7 / 8 * 4e7 / 200e9})
  assert bound["by"] == "memory"
  assert bound["images_per_second_per_chip"] == pytest.approx(2048 / 0.2 / 8)
  assert bound["hours"] == pytest.approx(0.2 * 1000 / 3600)
  assert values["flops_per_image"] == pytest.approx(197e12 * 0.05 / 256)
  assert values["host_memory"] == 10**8 + 9 * 10**8
  assert values["images_at_once"] == 128
  json.dumps(values)


def test_a_core_of_two_has_half_of_its_chip():
  target = topologies.parse("v3-8")
  values = report.to_json(
      cases.subject_of(target=target), cases.compiled_of(), {})
  assert values["bound"]["seconds"]["compute"] == pytest.approx(
      197e12 * 0.05 / (123e12 / 2))
  assert values["bound"]["images_per_second_per_chip"] == pytest.approx(
      2048 / max(values["bound"]["seconds"].values()) / 4)


def with_batch(**train):
  return Experiment(data=Data(source="digits"), train=Train(**train))


def with_model(name, **compile):
  return dataclasses.replace(
      cases.subject_of().cfg, model=Model(name=name),
      compile=Compile(**compile))


@pytest.mark.parametrize("subject,compiled,says", [
    ({"cfg": with_batch(batch_size=8 * 96)}, {}, "96 images per device"),
    ({}, {"needed": 15 * GIB}, "94% of the memory"),
    ({}, {"collectives": (
        hlo.Collective("all-reduce", "bf16", 1, 2 * 10**7, 8),)},
     "devices in bfloat16"),
    ({"mesh": {"data": 1, "fsdp": 8}}, {}, "config.mesh.fsdp is 8"),
    ({"cfg": with_model("poolformer_s12")},
     {"fits": False, "accessed": None, "collectives": None},
     "config.compile.remat=('dots',)"),
    ({"cfg": with_model("poolformer_s12", scan=True)}, {}, "twice as much"),
    ({"cfg": with_model("poolformer_s12")}, {}, "kernels=pallas"),
    ({}, {}, "config.model.dtype is float32")])
def test_warnings(subject, compiled, says):
  found = list(report.warnings(
      cases.subject_of(**subject), cases.compiled_of(**compiled)))
  assert [w for w in found if says in w]
  usual = list(report.warnings(cases.subject_of(), cases.compiled_of()))
  assert len(usual) == 1  # About the dtype.


@pytest.mark.parametrize("fits", [True, False])
def test_models_that_are_compiled_in_one_way_have_no_such_warnings(fits):
  """ViT, a user's own, and what has all of it."""
  for cfg in (with_model("deit_small_patch16_224"), with_model(None),
              with_model("poolformer_s12", kernels="pallas", remat=("block",))):
    found = report.warnings(cases.subject_of(cfg=cfg),
                            cases.compiled_of(fits=fits))
    assert not [w for w in found if "compile" in w]


def test_a_report_of_what_does_not_fit_says_what_would():
  too_large = cases.compiled_of(fits=False, needed=30 * GIB, code=None,
                          accessed=None, collectives=None)
  subject = cases.subject_of(cfg=with_batch(batch_size=4096))
  text = "\n".join(report.lines(report.to_json(subject, too_large, {})))
  assert "DOES NOT FIT: needs 30.00 GiB of 16.00 GiB" in text
  assert "--find_batch" in text
  tried = {128: cases.compiled_of(), 256: too_large, 512: too_large}
  text = "\n".join(report.lines(report.to_json(subject, too_large, tried)))
  assert "128 images at once fit; 256 need 30.00 GiB" in text
  assert "--config.train.accumulate=4" in text
  found = report.to_json(subject, too_large, tried)["search"]
  assert found["largest_images_at_once"] == 128
  assert found["tried"]["128"]["images_per_second_per_chip"] == pytest.approx(
      128 / 0.2)
  assert found["tried"]["256"]["images_per_second_per_chip"] is None
  nothing = {1: too_large}
  text = "\n".join(report.lines(report.to_json(subject, too_large, nothing)))
  assert "not even one image fits" in text


def test_train_batch_has_the_shapes_of_the_data():
  config = cases.small_experiment()
  config.train.batch_size = 16
  _, task = tasks.create(config_lib.resolve(config))
  with contextlib.closing(task.make_data("train").train_batches(0)) as batches:
    given = next(batches)
  said, = task.train_batches(16)
  assert {k: (v.shape, np.dtype(v.dtype)) for k, v in said.items()} == {
      k: (v.shape, v.dtype) for k, v in given.items()}


def test_arguments_are_those_of_a_run():
  """A step compiled from abstract arguments accepts the arrays of a run."""
  cfg = Experiment(data=Data(source="digits"),
                   train=Train(batch_size=8, steps=3))
  task, mesh = line_task.LineTask(), devices.make_mesh(cfg)
  made = step.build(cfg, task, mesh, 10)
  compiled = made.step.lower(
      *step.abstract_arguments(cfg, task, mesh, made)[0]).compile()
  state = jax.jit(made.create, out_shardings=made.shardings)()
  batch = next(task.make_data("train").train_batches(0))
  state, metrics = compiled(state, sharding.put_batch(batch, mesh),
                            signals.StopSignal().flags(mesh))
  assert int(state.step) == 1
  assert float(metrics["loss"]) == np.square(batch["x"]).mean()


def test_fsdp_splits_the_state():
  cfg = dataclasses.replace(config_lib.resolve(cases.small_experiment()),
                            mesh=Mesh(fsdp=8, min_size=0))
  mesh = devices.make_mesh(
      cfg, topologies.devices(topologies.parse("v5e-8")))
  made = step.build(cfg, tasks.create(cfg)[1], mesh, 100)
  whole = sharding.n_bytes(made.shapes)
  shared = compilation.state_on_device(made)
  assert whole / 8 <= shared < 1.1 * whole / 8
