"""The doctor reports each problem in one line, and survives all of them."""

import dataclasses
import json
import os
import pathlib
import sys
import time

import command_line
import pytest
import source_files

from metaformer_jax import command
from metaformer_jax.config import schema, tasks
from metaformer_jax.doctor import versions
from metaformer_jax.doctor.versions import FAIL, OK, WARN, Package
from metaformer_jax.tools import doctor


def run(*args, **env):
  """The real command: (exit code, {name: [(state, text)]})."""
  command = ["-c", f"import os, runpy; os.environ.update({env!r}); "
             "runpy.run_module('metaformer_jax.tools.doctor', run_name="
             "'__main__', alter_sys=True)", "--json", *args]
  done = command_line.python(command)
  assert "Traceback" not in done.stderr, done.stderr
  lines = {}
  for line in map(json.loads, done.stdout.splitlines()):
    lines.setdefault(line["name"], []).append((line["state"], line["text"]))
  return done.returncode, lines, done.stderr


def test_this_machine_passes_and_nothing_is_left_behind(tmp_path):
  code, lines, _ = run(
      "--config=configs/quickstart.py", f"--workdir={tmp_path / 'new'}",
      JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
  failed = {name: found for name, found in lines.items()
            if any(state == FAIL for state, _ in found)}
  assert (code, failed) == (0, {})
  assert lines["devices"] == [(OK, "8 x cpu, cpu")]
  assert lines["data"] == [
      (OK, "1,500 examples to train, 297 examples to eval")]
  assert lines["config"][0][1].startswith("poolformer_s12, ")
  assert lines["imports"][0][0] == OK
  [(state, fake), (_, rest)] = lines["environment"]
  assert state == WARN and fake.endswith("all devices are the same CPU")
  assert "JAX_PLATFORMS=cpu" in rest
  for name in ("workdir", "cache"):
    assert lines[name][0][1].startswith(f"{tmp_path} is writable, ")
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_exit_code_2_for_an_experiment_that_cannot_run_here(tmp_path):
  code, lines, _ = run(
      "--config=configs/quickstart.py", "--config.train.batch_size=100",
      "--config.data.source=folder", f"--config.data.path={tmp_path}",
      f"--workdir={tmp_path}")
  assert code == 2
  assert lines["config"][0][0] == FAIL
  assert "has no folder 'train'" in lines["config"][0][1]
  code, lines, _ = run("--config=configs/quickstart.py",
                       "--config.train.batch_size=100",
                       f"--workdir={tmp_path}")
  assert code == 2
  assert lines["config"] == [
      (OK, f"poolformer_s12, {tmp_path}"),
      (FAIL, "config.train.batch_size: 100 is not divisible by 8 devices x 1 "
       "micro-batches; nearest: 104")]


@pytest.mark.slow
def test_a_jax_that_hangs_and_failed_imports_are_reported(tmp_path):
  (tmp_path / "jax").mkdir()
  (tmp_path / "jax" / "__init__.py").write_text(
      "import os, pathlib, time\n"
      "def devices():\n"
      f"  pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid()))\n"
      "  time.sleep(600)\n")
  (tmp_path / "optax.py").write_text("raise OSError('libfoo.so: not found')")
  start = time.monotonic()
  code, lines, _ = run("--timeout=20", "--workdir=/proc/none",
                       PYTHONPATH=f"{tmp_path}{os.pathsep}{command_line.ROOT}")
  assert time.monotonic() - start < 100
  assert code == 1
  assert lines["devices"] == [
      (FAIL, "jax does not start: did not finish within 20 s")]
  assert lines["optax"] == [
      (FAIL, "cannot be imported: OSError: libfoo.so: not found")]
  assert "imports" not in lines and lines["flax"][0][0] == FAIL
  assert lines["workdir"][0][0] == FAIL
  pid = pathlib.Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
  for _ in range(50):  # It has been killed, but may be a zombie.
    if not pid.exists() or pid.read_text().rpartition(")")[2].split()[0] == "Z":
      return
    time.sleep(0.1)
  raise AssertionError("the process that hangs is still running")


def test_a_jax_that_crashes_is_reported(tmp_path):
  (tmp_path / "jax.py").write_text(
      "import os, sys\n"
      "sys.stderr.write('F0000 no such chip\\n@ 0x7f stack\\n')\n"
      "sys.stderr.flush()\n"
      "os.abort()\n")
  found, problem = doctor.probe("devices", None, 60, PYTHONPATH=os.pathsep.join(
      [str(tmp_path), str(command_line.ROOT)]))
  assert (found, problem) == ({}, "killed by SIGABRT: F0000 no such chip")


def test_an_image_that_cannot_be_read_is_reported(tmp_path):
  source_files.write(tmp_path, "train/cat/0.jpg", "val/cat/0.jpg")
  cfg = schema.Experiment(model=schema.Model(name="poolformer_s12"),
                          data=schema.Data(path=str(tmp_path)),
                          task=tasks.Classification(num_classes=1))
  found, problem = doctor.probe("data", dataclasses.asdict(cfg), 90,
                                JAX_PLATFORMS="cpu")
  assert found == {} and "UnidentifiedImageError" in problem


@pytest.mark.parametrize("argv", [
    ["--nope"], ["more"], ["--timeout=so\non"], ["--a\x1b[2J"]])
def test_a_wrong_command_line_is_one_line(argv, capsys):
  with pytest.raises(SystemExit) as e, command.one_line_errors():
    doctor.main(argv)
  assert e.value.code == 2
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1
  assert err.startswith("ConfigError: command line: ")
  assert err[:-1].isprintable()


# Version conflicts: the first package; the second, with a version that fails
# and one that works (if any); a requirement of the first; the state; a part of
# the reported effect.
BAD = [
    (("jax", "0.10.2"), ("jaxlib", "0.10.0", "0.10.1"),
     "jaxlib<=0.10.2,>=0.10.1", FAIL, "refuses"),
    (("numba", "0.61"), ("numpy", "2.5.0", "2.1.3"), "numpy<2.2,>=1.24", FAIL,
     "refuses"),
    (("jax", "0.10.2"), ("libtpu", "0.0.52", "0.0.42.1"),
     'libtpu==0.0.42.*; extra == "tpu"', WARN, "may not start"),
    (("libtpu", "0.0.42"), ("libtpu-nightly", "0.1.dev2"), None, FAIL,
     "module libtpu"),
    (("jax", "0.10.2"), ("tensorflow-tpu", "2.18.0"), None, FAIL, "libtpu"),
    (("libtpu", "0.0.42"), ("torch-xla", "2.9.0"), None, WARN, "environment"),
    (("tensorflow", "2.21.0"), ("tensorflow-cpu", "2.21.0"), None, WARN,
     "module tensorflow"),
    (("jax-cuda12-plugin", "0.10.2"), ("jax-cuda13-plugin", "0.10.2"), None,
     WARN, "platform cuda"),
    *((("jaxlib", "0.10.2"), (f"jax-cuda{v}-plugin", "0.12.0", "0.10.2"), None,
       FAIL, "crashes") for v in (12, 13)),
    *(((f"jax-cuda{v}-plugin", "0.10.2"),
       (f"jax-cuda{v}-pjrt", "0.12.0", "0.10.2"), f"jax-cuda{v}-pjrt==0.10.2",
       FAIL, "GPU") for v in (12, 13)),
    *(((f"jax-cuda{v}-plugin", "0.10.2"), ("tensorflow", "2.21.0"), None, WARN,
       "cuBLAS") for v in (12, 13)),
    *(((f"jax-cuda{v}-plugin", "0.10.2"), ("libtpu", "0.0.42"), None, WARN,
       "looks for a TPU") for v in (12, 13)),
]


@pytest.mark.parametrize("first, second, requires, state, effect", BAD,
                         ids=lambda v: v[0] if isinstance(v, tuple) else "")
def test_each_conflict_is_reported_and_a_good_pair_is_not(
    first, second, requires, state, effect):
  packages = {first[0]: Package(first[1], (requires,) if requires else ()),
              second[0]: Package(second[1])}
  [line] = versions.pairs(packages)
  assert (line.name, line.state) == ("pair", state)
  for word in (*first, *second[:2], effect):
    assert word in line.text
  if len(second) == 3:
    packages[second[0]] = Package(second[2])
  else:
    del packages[second[0]]
  [line] = versions.pairs(packages)
  assert line.state == OK


def test_every_conflict_is_tested_and_has_a_source():
  assert sorted((p.first, p.second) for p in versions.PAIRS) == sorted(
      (first[0], second[0]) for first, second, *_ in BAD)
  for pair in versions.PAIRS:
    assert pair.source or pair.rule not in ("together", "equal")


OWN = Package("0.1", (
    "jax<0.13,>=0.10.2", "Orbax_Checkpoint>=0.12.8", "tqdm",
    'jax[tpu]; extra == "tpu"', 'tensorflow-cpu<2.22,>=2.21; extra == "test"'))


def failing(lines):
  return [(line.name, line.state, line.text) for line in lines
          if line.state != OK]


def test_bounds_come_from_the_metadata():
  packages = {versions.OWN: OWN, "jax": Package("0.12.0"),
              "orbax-checkpoint": Package("0.12.8"), "tqdm": Package("4.0")}
  assert not failing(versions.bounds(packages))
  bad = packages | {"jax": Package("0.13.0"),
                    "tensorflow-cpu": Package("2.20.0")}
  del bad["orbax-checkpoint"]
  assert failing(versions.bounds(bad)) == [
      ("jax", FAIL, "0.13.0 is not <0.13,>=0.10.2; "
       "pip install 'jax<0.13,>=0.10.2'"),
      ("orbax-checkpoint", FAIL, "is missing; "
       "pip install 'orbax-checkpoint>=0.12.8'"),
      ("tensorflow-cpu", WARN, "2.20.0 is not <2.22,>=2.21, as the extra test "
       "requires; pip install 'metaformer-jax[test]'")]
  [(name, state, text)] = failing(versions.bounds({}))
  assert (name, state) == ("packages", FAIL) and "pip install ." in text


def test_requirements_of_our_requirements_are_checked_too():
  packages = {versions.OWN: OWN, "tqdm": Package("4.0", ("colorama>=1",)),
              "jax": Package("0.12.0", ("scipy>=1.14", 'x; extra == "ci"')),
              "scipy": Package("1.13.1")}
  assert failing(versions.pairs(packages)) == [
      ("pair", FAIL, "jax 0.12.0 requires scipy>=1.14, found 1.13.1"),
      ("pair", FAIL, "tqdm 4.0 requires colorama>=1, found none")]


def test_this_installation_has_the_versions_that_pip_reports():
  from importlib import metadata  # noqa: PLC0415

  found = versions.installed()
  for name in ("jax", "orbax-checkpoint", "ml-collections", "pillow"):
    assert found[name].version == metadata.version(name)
  own = {name for name, _ in versions.required(found[versions.OWN]).items()}
  assert {"jax", "numba", "tensorboardx"} <= own
  assert "tensorflow-cpu" not in own


def test_without_packaging_one_line_is_reported(monkeypatch):
  monkeypatch.setitem(sys.modules, "packaging", None)
  [line] = doctor._guarded("pairs", lambda: versions.pairs(
      {versions.OWN: OWN, "jax": Package("0.12.0")}))
  assert line.state == FAIL and "ModuleNotFoundError" in line.text


def found(platform, reasons=(), config=None):
  return {"platform": platform, "kind": "v5e", "count": 4, "config": config,
          "reasons": list(reasons)}


BUSY = ("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use"
        " by process with pid 7.")
NO_LIBTPU = ("Unable to initialize backend 'tpu': INTERNAL: Failed to open "
             "libtpu.so")


@pytest.mark.parametrize("arguments, state, text", [
    ((found("cpu"), None, [], {}), OK, "4 x v5e, cpu"),
    ((found("tpu"), None, ["/dev/accel0"], {}), OK, "4 x v5e, tpu"),
    ((found("cpu"), None, ["/dev/accel0"], {}), FAIL, "metaformer-jax[tpu]"),
    ((found("cpu", [BUSY]), None, ["/dev/vfio/0"], {}), FAIL, "with pid 7"),
    ((found("cpu", [NO_LIBTPU]), None, ["/dev/vfio/0"], {}), WARN,
     "/dev/vfio/0 in /dev: Unable to initialize backend 'tpu'"),
    ((found("cpu", [NO_LIBTPU]), None, ["/dev/nvidia0"], {}), FAIL,
     "/dev/nvidia0 in /dev: pip install 'metaformer-jax[cuda]'"),
    ((found("cpu"), None, ["/dev/accel0"], {"JAX_PLATFORMS": "cpu"}), WARN,
     "JAX_PLATFORMS=cpu hides"),
    (({}, "did not finish within 90 s", ["/dev/accel0"], {}), FAIL,
     "fuser -v /dev/accel0"),
])
def test_devices_of_jax_are_compared_with_those_in_dev(arguments, state, text):
  [line] = doctor.devices(*arguments)
  assert (line.name, line.state) == ("devices", state)
  assert text in line.text


def test_an_experiment_that_does_not_fit_the_devices_is_a_config_error():
  _, line = doctor.devices(found("tpu", config="config.mesh: no"), None, [], {})
  assert (line.name, line.state, line.code) == ("config", FAIL, 2)
