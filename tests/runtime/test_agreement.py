"""What processes compare: every key, the code, the libraries, the devices."""

import dataclasses
import shutil
import sys

import numpy as np
import pytest
import thread_pods

from metaformer_jax import errors
from metaformer_jax.config import comparison, saved, schema, tasks, typed
from metaformer_jax.runtime import agreement, processes

# Keys that are facts of a host. Any other key must be the same everywhere.
OF_A_HOST = {"data.path", "data.workers", "data.threads", "init",
             "log.compilation_cache", "task.real_path"}


def other(value):
  """A value that is not the given one, of its type or of another."""
  match value:
    case bool():
      return not value
    case int() | float():
      return value + 1
    case str():
      return value + "x"
    case tuple():
      return (*value, "x")
  return "x"


def perturbed(cfg):
  """Yields ("section.key", the experiment with another value of it)."""
  for f in dataclasses.fields(cfg):
    value = getattr(cfg, f.name)
    if not dataclasses.is_dataclass(value):
      yield f.name, dataclasses.replace(cfg, **{f.name: other(value)})
      continue
    for key in dataclasses.fields(value):
      changed = dataclasses.replace(
          value, **{key.name: other(getattr(value, key.name))})
      yield f"{f.name}.{key.name}", dataclasses.replace(
          cfg, **{f.name: changed})


EXPERIMENTS = {name: schema.Experiment(task=section())
               for name, section in tasks.TASKS.items()}
PERTURBED = {name: dict(perturbed(cfg)) for name, cfg in EXPERIMENTS.items()}


@pytest.mark.parametrize("task", EXPERIMENTS)
def test_every_key_is_of_a_host_or_is_compared(task):
  cfg = EXPERIMENTS[task]
  facts, seen = agreement.of_experiment(cfg), set()
  for key, changed in PERTURBED[task].items():
    found = list(comparison.between(facts, agreement.of_experiment(changed)))
    seen.add(key)
    if key in OF_A_HOST:
      assert not found, key
    else:
      text, = found
      assert text.startswith(f"config.{key}: ") and " -> " in text
  assert seen == set(saved.flat(cfg))
  assert seen <= set(typed.keys())


def test_random_disagreements_are_named_on_all_processes(monkeypatch):
  rng = np.random.default_rng(0)
  for _ in range(15):
    task = rng.choice(list(EXPERIMENTS))
    cfg, keys = EXPERIMENTS[task], PERTURBED[task]
    n = int(rng.integers(2, 5))
    changed = {int(i): str(rng.choice(list(keys))) for i in rng.choice(
        n, rng.integers(1, n), replace=False)}
    mine = [keys[changed[i]] if i in changed else cfg for i in range(n)]
    found = thread_pods.run(monkeypatch, n, lambda i, mine=mine: (
        processes.require_same(lambda: agreement.of_experiment(mine[i]))))
    first = agreement.of_experiment(mine[0])
    different = [i for i in range(n)
                 if agreement.of_experiment(mine[i]) != first]
    if not different:
      assert found == [None] * n, changed
      continue
    assert len({str(e) for e in found}) == 1
    assert all(isinstance(e, errors.ConfigError) for e in found)
    i = different[0]
    for key in (changed.get(0), changed.get(i)):
      if key and key not in OF_A_HOST and changed.get(0) != changed.get(i):
        assert f"config.{key}: " in str(found[0])
    assert "on process 0, " in str(found[0]) and f"process {i} " in str(
        found[0])


def test_a_changed_file_of_the_package_is_named(monkeypatch, tmp_path):
  before = agreement.of_program()
  copy = tmp_path / "metaformer_jax"
  shutil.copytree(agreement._PACKAGE, copy,
                  ignore=shutil.ignore_patterns("__pycache__"))
  monkeypatch.setattr(agreement, "_PACKAGE", copy)
  assert agreement.of_program() == before
  with (copy / "training/rng.py").open("a") as file:
    file.write("\n")
  assert list(comparison.between(before, agreement.of_program())) == [
      "other code of metaformer_jax/training/rng.py"]


@pytest.mark.parametrize("library", ["jax", "jaxlib", "flax", "optax",
                                     "orbax-checkpoint", "numpy"])
def test_another_version_of_a_library_is_named(monkeypatch, library):
  before = agreement.of_program()
  version = agreement.metadata.version
  monkeypatch.setattr(agreement.metadata, "version", lambda name: (
      "99.1" if name == library else version(name)))
  text, = comparison.between(before, agreement.of_program())
  assert text == f"version of {library}: {version(library)} -> 99.1"


def test_options_that_change_a_program_are_compared(monkeypatch):
  before = agreement.of_program()
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
  text, = comparison.between(before, agreement.of_program())
  assert text.startswith("environment's XLA_FLAGS: ")


def test_modules_of_the_users_own_and_their_neighbours(monkeypatch, tmp_path):
  (tmp_path / "near_mixer.py").write_text("WIDTH = 3\n")
  (tmp_path / "far_mixer.py").write_text("import near_mixer\n"
                                         "Far = near_mixer.WIDTH\n")
  monkeypatch.syspath_prepend(tmp_path)
  import far_mixer  # noqa: F401, PLC0415

  cfg = schema.Experiment(model=schema.Model(name="far_mixer:Far"))
  before = agreement.of_experiment(cfg)
  for name in ("far_mixer", "near_mixer"):
    path = tmp_path / f"{name}.py"
    text = path.read_text()
    path.write_text(text + "# changed\n")
    assert list(comparison.between(before, agreement.of_experiment(cfg))) == [
        f"other code of the module {name}"]
    path.write_text(text)
  del sys.modules["far_mixer"], sys.modules["near_mixer"]


def test_digests_of_arrays_are_of_names_types_and_values():
  tree = {"a": {"b": np.arange(6.0).reshape(2, 3)}, "c": np.zeros(2, int)}
  same = {"c": np.zeros(2, int), "a": {"b": np.arange(6.0).reshape(2, 3)}}
  assert agreement.of_arrays(tree) == agreement.of_arrays(same)
  others = [{}, {"a": tree["a"]}, {**tree, "c": np.zeros(2, np.int32)},
            {**tree, "c": np.ones(2, int)}, {**tree, "d": tree["c"]},
            {**tree, "a": {"b": np.arange(6.0)}}]
  assert len({agreement.of_arrays(t) for t in [tree, *others]}) == 7


def test_long_values_show_where_they_differ():
  names = [f"class {i}" for i in range(1000)]
  renamed = [*names[:700], "cat", *names[701:]]
  assert list(comparison.between({"names": names}, {"names": renamed})) == [
      "names[700]: class 700 -> cat"]
  assert list(comparison.between({"names": names}, {"names": names[1:]})) == [
      "names: 1000 values -> 999 values"]
  assert comparison.listed("abcdefg") == "a; b; c; d; e; and 2 more"


def test_an_error_of_any_process_is_raised_on_all(monkeypatch):
  rng = np.random.default_rng(1)
  for _ in range(20):
    n = int(rng.integers(2, 6))
    failing = set(rng.choice(n, rng.integers(0, n + 1), replace=False).tolist())

    def act(i, failing=failing):
      with processes.agreeing():
        if i in failing:
          raise (errors.StorageError if i % 2 else KeyError)(f"of {i}")
      return "done"

    found = thread_pods.run(monkeypatch, n, act)
    for i, result in enumerate(found):
      if not failing:
        assert result == "done"
      elif i in failing:
        assert f"of {i}" in str(result)
      else:
        first = min(failing)
        assert isinstance(result, errors.StorageError if first % 2 else
                          errors.WorkerLostError)
        assert str(result).startswith(f"process {first}: ")
        assert f"of {first}" in str(result)
