"""The command tools.preflight, and its cache of results."""

import json

import command_line
import jax
import jax.numpy as jnp
import preflight_cases as cases
import pytest

from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config import typed
from metaformer_jax.models import cost, registry
from metaformer_jax.preflight import compilation, topologies
from metaformer_jax.tools import preflight as tool

GIB = cases.GIB


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  for key, value in topologies.ENVIRONMENT.items():
    monkeypatch.setenv(key, value)


def preflight(tmp_path, *arguments):
  """Runs the command with the small experiment as JSON."""
  path = tmp_path / "small.json"
  path.write_text(typed.to_json(
      config_lib.resolve(cases.small_experiment())))
  return command_line.python([
      "-m", "metaformer_jax.tools.preflight", f"--config_json={path}",
      f"--config.log.compilation_cache={tmp_path}/cache", *arguments])


@pytest.mark.slow
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

  spec = cases.small_experiment().model
  model = registry.create_model(spec.name, num_classes=10, depths=spec.depths,
                                dims=spec.dims)
  forward = cost.of_model(model, 32)
  assert values["n_params"] == forward.n_params
  # Matrix products: forward, and twice that backward, except the gradient with
  # respect to the image. Normalisation has none.
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  macs = cost.count_macs(model.apply, variables, image)
  stem = 8 * 8 * 16 * 7 * 7 * 3
  assert values["flops_per_image"] == 2 * (3 * macs - stem)
  # Parameters, two moments, the moving average and three counters.
  assert values["checkpoint"] == values["memory"]["state"] == 4 * (
      4 * forward.n_params + 3)
  # Gradients are summed in float32; little else is exchanged.
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
                           "examples_are": "counted in the data"}
  assert values["bound"]["hours"] == pytest.approx(
      max(seconds.values()) * n_steps / 3600)

  again = preflight(tmp_path, "--topology=v5e-8")
  assert again.returncode == 0
  assert "read from the cache" in again.stderr
  assert "compiling" not in again.stderr
  assert "FITS: needs" in again.stdout
  assert f"{forward.n_params:,} parameters" in again.stdout
  assert "a bound, not a measurement" in again.stdout


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", None])
def test_what_cannot_be_cached_is_compiled(tmp_path, capfd, damage):
  """A damaged file, or a folder that cannot be made, only costs time."""
  compiled = cases.compiled_of()
  cache = tmp_path / "cache"
  arguments = str(cache), "key", lambda: compiled
  if damage is None:
    cache.write_text("a file")
  assert tool._cached(*arguments) == compiled
  if damage is not None:
    (path,) = cache.rglob("*.json")
    path.write_text(damage)
    assert tool._cached(*arguments) == compiled
    assert "cannot be used" in capfd.readouterr().err
    assert tool._cached(*arguments) == compiled
    assert "read from the cache: " in capfd.readouterr().err
  else:
    assert "cannot be cached" in capfd.readouterr().err


@pytest.fixture
def n_compiled(tmp_path, monkeypatch):
  """Runs a preflight with this change, without compiling anything.

  Returns how many programs it would have compiled: 0 if it used the cache.
  """
  compiled = []

  def compile_step(lowered, say):
    compiled.append(lowered)
    return cases.compiled_of()

  monkeypatch.setattr(compilation, "compile_step", compile_step)

  def run(name="v5e-1", **changes):
    config = cases.small_experiment()
    config.log.compilation_cache = str(tmp_path)
    for key, value in changes.items():
      section, _, key = key.rpartition("__")
      (config[section] if section else config)[key] = value
    before = len(compiled)
    tool.preflight(config_lib.resolve(config, files=False),
                   topologies.parse(name), n_examples=1500)
    return len(compiled) - before

  return run


def test_experiments_with_the_same_program_share_a_verdict(n_compiled):
  assert n_compiled() == 1
  assert n_compiled(data__source="folder", data__path="/none", task__flip=0.0,
                    data__workers=2, init="/none/weights", seed=1,
                    eval__batch_size=8, log__every_steps=7) == 0


@pytest.mark.parametrize("change", [
    {"optim__weight_decay": 0.051}, *(
        pytest.param(change, marks=pytest.mark.slow) for change in (
            {"data__mean": (0.5, 0.4, 0.4)}, {"name": "v5e-4"},
            {"train__batch_size": 512}, {"task__erasing": 0.25},
            {"task__mixup": 0.8}, {"model__dtype": "bfloat16"},
            {"name": "v6e-1"}))],
    ids=lambda change: next(iter(change)))
def test_another_program_or_target_has_another_verdict(n_compiled, change):
  assert n_compiled() == 1
  assert n_compiled(**change) == 1


def test_compiler_settings_and_versions_have_their_own_verdicts(monkeypatch):
  lowered = cases.line_on("v5e-1", batch_size=8)
  target = topologies.parse("v5e-1")
  keys = [tool._key(lowered, target, {"jax": "1"}),
          tool._key(lowered, target, {"jax": "2"})]
  for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
    with monkeypatch.context() as patch:
      patch.setenv(name, "--xla_of_a_test=1")
      keys.append(tool._key(lowered, target, {"jax": "1"}))
  assert len(set(keys)) == 4
  again = cases.line_on("v5e-1", batch_size=8)
  assert tool._key(again, target, {"jax": "1"}) == keys[0]


@pytest.mark.slow
def test_exit_code_1_if_it_does_not_fit(tmp_path):
  done = preflight(tmp_path, "--topology=v5e-1",
                   "--config.train.batch_size=1048576")
  assert done.returncode == 1, done.stderr
  assert "DOES NOT FIT" in done.stdout


@pytest.mark.parametrize("arguments,says", [
    ([], "--topology: is missing"),
    (["--topology=v5e-12"], "nearest: v5e-16"),
    pytest.param(["--topology=v5e-256"], "not divisible by 256 devices",
                 marks=pytest.mark.slow),
    pytest.param(["--topology=v5e-8", "--config.mesh.fsdp=16"],
                 "does not fit 8 devices", marks=pytest.mark.slow),
    pytest.param(["--topology=v5e-8", "--config.mesh.fsdp=8",
                  "--config.mesh.rules=(('nothing', 0),)"],
                 "matches no parameter", marks=pytest.mark.slow),
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
  """The shipped config passes the checks; only the slice's name is refused."""
  done = command_line.python([
      "-m", "metaformer_jax.tools.preflight",
      "--config=configs/caformer.py:s18_384", "--topology=v5e-13",
      "--config.data.path=/no/such/folder", "--workdir=gs://bucket/run"])
  assert done.returncode == 2
  assert "v5e-13" in done.stderr
  assert "/no/such/folder" not in done.stderr
