"""The preflight: numbers of small programs by hand, verdicts as the compiler's.

All of it compiles for TPUs that are not here.
"""

import contextlib
import dataclasses
import json

import command_line
import jax
import jax.numpy as jnp
import line_task
import numpy as np
import pytest

from metaformer_jax import tasks
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config.schema import Data, Experiment, Log, Mesh, Train
from metaformer_jax.models import cost, registry
from metaformer_jax.preflight import (
  compilation,
  hlo,
  report,
  search,
  topologies,
)
from metaformer_jax.runtime import sharding, signals
from metaformer_jax.tools import preflight as tool
from metaformer_jax.training import program

GIB = 2**30


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  for key, value in topologies.ENVIRONMENT.items():
    monkeypatch.setenv(key, value)


def line_on(name, *, values=1, **train):
  """The toy task of tests/line_task.py on a slice; (cfg, task, mesh).

  An example is as many values of x.
  """
  class Task(line_task.LineTask):
    def train_batch(self, batch_size):
      return super().train_batch(batch_size * values)

  cfg = Experiment(data=Data(source="digits"), train=Train(steps=3, **train))
  devices = topologies.devices(topologies.parse(name))
  return cfg, Task(), sharding.make_mesh(cfg, devices)


@pytest.mark.parametrize("name,n_devices", [
    ("v2-8", 8), ("v3-8", 8), ("v4-8", 4), ("v5e-8", 8), ("v5p-8", 4),
    ("v6e-8", 8), ("tpu7x-8", 8)])
def test_any_task_is_compiled_for_any_tpu(name, n_devices):
  said = []
  found = compilation.compile_step(*line_on(name, batch_size=64),
                                   n_examples=10, say=said.append)
  assert found.fits
  assert said
  # The parameter, Adam's moments and counters, batch_stats, the step.
  assert found.state == found.checkpoint == 4 * 7
  assert found.flops == 0  # No matrix product.
  # The gradient, the loss and the batch statistic; the flag of being told.
  assert {(c.kind, c.dtype, c.count * c.n_bytes, c.group)
          for c in found.collectives} == {
              ("all-reduce", "f32", 12, n_devices),
              ("all-reduce", "s32", 4, n_devices)}
  assert compilation.Compiled.from_json(
      json.loads(json.dumps(found.to_json()))) == found


def test_the_verdict_is_the_compilers_on_both_sides_of_the_border():
  """Examples of 16 MiB: 15.75 GiB hold 1008, and 896 is the last that fits."""
  def compile_batch(n):
    return compilation.compile_step(
        *line_on("v5e-1", values=2**22, batch_size=n), n_examples=10)

  tried = search.largest_batch(compile_batch, 64)
  fits, fails = tried[896], tried[1024]
  assert fits.fits
  assert not fails.fits
  assert max(tried) == 1024
  assert fits.available == fails.available == int(15.75 * GIB)
  assert 896 * 2**24 <= fits.needed <= fits.available < fails.needed
  # The error of the compiler is rounded to hundredths of a GiB.
  assert fails.needed == pytest.approx(1024 * 2**24, rel=1e-2)


@pytest.mark.parametrize("state,an_image,curve", [
    (0.3, 0.02, 1.0), (1.0, 0.1, 1.0), (0.1, 3.0, 1.0), (2.0, 1e-3, 1.0),
    (0.5, 0.02, 1.3), (0.5, 0.3, 0.7), (20.0, 0.1, 1.0), (15.0, 1.0, 1.0),
    # As PoolFormer-S24's: from some batch on, much is computed again.
    (0.25, 2.1, 0.3), (0.25, 3.9, 0.2)])
@pytest.mark.parametrize("first", [1, 48, 512, 5000])
def test_the_search_finds_the_border(state, an_image, curve, first):
  """With memory of any shape, however wrong a straight line through it is."""
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
def test_what_the_compiler_says_of_too_much(message, found):
  assert compilation.read_too_large(message) == pytest.approx(found, abs=1)


def test_other_errors_are_not_taken_for_it():
  assert compilation.read_too_large("INTERNAL: Mosaic failed") is None


def subject_of(**changes):
  cfg = Experiment(data=Data(source="digits"),
                   train=Train(batch_size=2048, accumulate=2))
  known = {
      "cfg": cfg, "target": topologies.parse("v5e-8"), "n_params": 10**7,
      "n_devices": 8, "n_hosts": 1, "mesh": {"data": 8, "fsdp": 1},
      "n_steps": 1000, "n_examples": 1_281_167, "examples_are": "as given",
      "batch_bytes": 3 * 10**8, "versions": {"jax": "1"}}
  return report.Subject(**known | changes)


def compiled_of(**changes):
  known = {
      "fits": True, "needed": 4 * GIB, "available": 16 * GIB, "seconds": 1.0,
      "flops": 197e12 * 0.05, "state": 10**8, "checkpoint": 10**8,
      "code": 10**8, "accessed": 819e9 * 0.2, "collectives": (
          hlo.Collective("all-reduce", "f32", 1, 4 * 10**7, 8),)}
  return compilation.Compiled(**known | changes)


def test_bounds_are_work_over_published_rates():
  values = report.to_json(subject_of(), compiled_of(), {})
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
  values = report.to_json(subject_of(target=target), compiled_of(), {})
  assert values["bound"]["seconds"]["compute"] == pytest.approx(
      197e12 * 0.05 / (123e12 / 2))
  assert values["bound"]["images_per_second_per_chip"] == pytest.approx(
      2048 / max(values["bound"]["seconds"].values()) / 4)


def with_batch(**train):
  return Experiment(data=Data(source="digits"), train=Train(**train))


@pytest.mark.parametrize("subject,compiled,says", [
    ({"cfg": with_batch(batch_size=8 * 96)}, {}, "96 images of a device"),
    ({}, {"needed": 15 * GIB}, "94% of the memory"),
    ({}, {"collectives": (
        hlo.Collective("all-reduce", "bf16", 1, 2 * 10**7, 8),)},
     "in bfloat16"),
    ({"mesh": {"data": 1, "fsdp": 8}}, {}, "config.mesh.fsdp is 8"),
    ({}, {}, "config.model.dtype is float32")])
def test_what_costs_is_warned_of(subject, compiled, says):
  found = list(report.warnings(subject_of(**subject), compiled_of(**compiled)))
  assert [w for w in found if says in w]
  usual = list(report.warnings(subject_of(), compiled_of()))
  assert len(usual) == 1  # The dtype's.


def test_what_does_not_fit_is_told_with_what_would():
  too_large = compiled_of(fits=False, needed=30 * GIB, code=None,
                          accessed=None, collectives=None)
  subject = subject_of(cfg=with_batch(batch_size=4096))
  text = "\n".join(report.lines(report.to_json(subject, too_large, {})))
  assert "DOES NOT FIT: needs 30.00 GiB of 16.00 GiB" in text
  assert "--find_batch" in text
  tried = {128: compiled_of(), 256: too_large, 512: too_large}
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


def small_experiment():
  """A PoolFormer of four blocks, 32 x 32 pixels; seconds to compile."""
  config = config_lib.default()
  config.model.name = "poolformer_s12"
  config.model.num_classes = 10
  config.model.depths = (1, 1, 1, 1)
  config.model.dims = (16, 32, 32, 64)
  config.data.source = "digits"
  config.data.image_size = 32
  config.train.batch_size = 8 * 128
  config.train.ema_decay = 0.9
  return config


def test_a_batch_is_what_the_data_gives():
  config = small_experiment()
  config.train.batch_size = 16
  task = tasks.create(config_lib.resolve(config))
  with contextlib.closing(task.make_data("train").train_batches(0)) as batches:
    given = next(batches)
  said = task.train_batch(16)
  assert {k: (v.shape, np.dtype(v.dtype)) for k, v in said.items()} == {
      k: (v.shape, v.dtype) for k, v in given.items()}


def test_arguments_are_those_of_a_run():
  """What is compiled elsewhere can be called here: same shapes, same places."""
  cfg = Experiment(data=Data(source="digits"),
                   train=Train(batch_size=8, steps=3))
  task, mesh = line_task.LineTask(), sharding.make_mesh(cfg)
  made = program.build(cfg, task, mesh, 10)
  compiled = made.step.lower(
      *program.abstract_arguments(cfg, task, mesh, made)).compile()
  state = jax.jit(made.create, out_shardings=made.shardings)()
  batch = next(task.make_data("train").train_batches(0))
  state, metrics = compiled(state, sharding.put_batch(batch, mesh),
                            signals.StopSignal().flags(mesh))
  assert int(state.step) == 1
  assert float(metrics["loss"]) == np.square(batch["x"]).mean()


def preflight(tmp_path, *arguments):
  """Runs the command with the small experiment as JSON."""
  path = tmp_path / "small.json"
  path.write_text(config_lib.to_json(config_lib.resolve(small_experiment())))
  return command_line.python([
      "-m", "metaformer_jax.tools.preflight", f"--config_json={path}",
      f"--config.log.compilation_cache={tmp_path}/cache", *arguments])


def test_the_command_on_a_small_model(tmp_path):
  done = preflight(tmp_path, "--topology=v5e-8", "--json")
  assert done.returncode == 0, done.stderr
  assert all(line.startswith("preflight: ")
             for line in done.stderr.splitlines()), done.stderr
  values = json.loads(done.stdout)
  assert values["fits"]
  assert values["topology"] == {
      "name": "v5e-8", "libtpu": "v5e:2x4", "chips": 8, "devices": 8,
      "hosts": 1, "mesh": {"data": 8, "fsdp": 1}}
  assert values["images_at_once"] == 128

  spec = small_experiment().model
  model = registry.create_model(spec.name, num_classes=10, depths=spec.depths,
                                dims=spec.dims)
  forward = cost.of_model(model, 32)
  assert values["n_params"] == forward.n_params
  # Matrix products: forward, and twice that backward, but for the gradient of
  # the image, which nobody asks for. Normalisation is none.
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  macs = cost.count_macs(model.apply, variables, image)
  stem = 8 * 8 * 16 * 7 * 7 * 3
  assert values["flops_per_image"] == 2 * (3 * macs - stem)
  # Parameters, two moments, their average, and three counters.
  assert values["checkpoint"] == values["memory"]["state"] == 4 * (
      4 * forward.n_params + 3)
  # Float32 gradients are summed as such, and little besides.
  summed = [c for c in values["collectives"] if c["kind"] == "all-reduce"]
  assert sum(c["count"] * c["n_bytes"] for c in summed) == pytest.approx(
      4 * forward.n_params, rel=0.01)
  assert {c["kind"] for c in values["collectives"]} == {"all-reduce"}
  memory = values["memory"]
  assert memory["state"] < memory["needed"] < memory["available"]
  assert memory["available"] == int(15.75 * GIB)
  seconds = values["bound"]["seconds"]
  assert seconds["compute"] == pytest.approx(
      values["flops_per_image"] * 128 / 197e12)
  assert values["bytes_per_image"] * 128 / 819e9 == pytest.approx(
      seconds["memory"])
  n_steps = round(300 * 1500 / 1024)
  assert values["run"] == {"steps": n_steps, "examples": 1500,
                           "examples_are": "of the data"}
  assert values["bound"]["hours"] == pytest.approx(
      max(seconds.values()) * n_steps / 3600)

  again = preflight(tmp_path, "--topology=v5e-8")
  assert again.returncode == 0
  assert "remembered" in again.stderr
  assert "compiling" not in again.stderr
  assert "FITS: needs" in again.stdout
  assert f"{forward.n_params:,} parameters" in again.stdout
  assert "a bound, not a measurement" in again.stdout


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", None])
def test_what_cannot_be_remembered_is_compiled(tmp_path, capfd, damage):
  """A damaged file, or a folder that cannot be, costs no more than the time."""
  compiled = compiled_of()
  cfg = subject_of().cfg
  arguments = topologies.parse("v5e-8"), {"jax": "1"}, lambda: compiled
  cache = tmp_path / "cache"
  cfg = dataclasses.replace(cfg, log=Log(compilation_cache=str(cache)))
  if damage is None:
    cache.write_text("a file")
  assert tool._remembered(cfg, *arguments) == compiled
  if damage is not None:
    (path,) = cache.rglob("*.json")
    path.write_text(damage)
    assert tool._remembered(cfg, *arguments) == compiled
    assert "cannot be used" in capfd.readouterr().err
    assert tool._remembered(cfg, *arguments) == compiled
    assert "remembered: " in capfd.readouterr().err
  else:
    assert "not remembered" in capfd.readouterr().err


def test_what_does_not_fit_ends_with_1(tmp_path):
  done = preflight(tmp_path, "--topology=v5e-1",
                   "--config.train.batch_size=1048576")
  assert done.returncode == 1, done.stderr
  assert "DOES NOT FIT" in done.stdout


@pytest.mark.parametrize("arguments,says", [
    ([], "--topology: is missing"),
    (["--topology=v5e-12"], "nearest: v5e-16"),
    (["--topology=v5e-256"], "not divisible by 256 devices"),
    (["--topology=v5e-8", "--config.mesh.fsdp=16"], "does not fit 8 devices"),
    (["--topology=v5e-8", "--config.mesh.fsdp=8",
      "--config.mesh.rules=(('nothing', 0),)"], "finds no parameter"),
    (["--topology=v5e-8", "--n_examples=0"], "n_examples"),
])
def test_mistakes_are_one_line(tmp_path, arguments, says):
  extra = ["--config.train.batch_size=640"] if "256" in says else []
  done = preflight(tmp_path, *arguments, *extra)
  assert done.returncode == 2, done
  assert says in done.stderr
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert done.stdout == ""


def test_data_and_weights_need_not_be_here(tmp_path):
  """The shipped config passes its checks, and fails at the slice's name."""
  done = command_line.python([
      "-m", "metaformer_jax.tools.preflight",
      "--config=configs/caformer_s18_384.py", "--topology=v5e-13",
      "--config.data.path=/no/such/folder", "--workdir=gs://bucket/run"])
  assert done.returncode == 2
  assert "v5e-13" in done.stderr
  assert "/no/such/folder" not in done.stderr


def test_fsdp_shares_the_state():
  cfg = dataclasses.replace(config_lib.resolve(small_experiment()),
                            mesh=Mesh(fsdp=8, min_size=0))
  mesh = sharding.make_mesh(
      cfg, topologies.devices(topologies.parse("v5e-8")))
  made = program.build(cfg, tasks.create(cfg), mesh, 100)
  whole = sharding.n_bytes(made.shapes)
  shared = compilation.state_on_device(made)
  assert whole / 8 <= shared < 1.1 * whole / 8
