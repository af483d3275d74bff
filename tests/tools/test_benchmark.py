"""tools.benchmark: its figures, the protocol of its processes, its errors."""

import contextlib
import dataclasses
import json
import os
import stat
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaformer_jax import errors, tasks
from metaformer_jax.benchmark import (
  batches,
  chips,
  ours,
  profiles,
  serving,
  workers,
)
from metaformer_jax.config import schema, typed
from metaformer_jax.config import tasks as sections
from metaformer_jax.models import cost, registry
from metaformer_jax.preflight import hlo
from metaformer_jax.tools import benchmark

SMALL = {"depths": (1, 1), "dims": (8, 16), "token_mixers": ("pooling",) * 2}
CFG = schema.Experiment(
    model=schema.Model(name="poolformer_s12", **SMALL),
    task=sections.Classification(num_classes=4, image_size=32),
    train=schema.Train(batch_size=4, ema_decay=0.9))


@pytest.fixture(scope="module")
def program():
  return ours.Program(CFG, "train", n_devices=1)


class Clock:
  """A program whose calls take `cost` seconds each, and waits another."""

  def __init__(self, cost, wait, monkeypatch):
    self._cost, self._wait, self.now = cost, wait, 0.0
    monkeypatch.setattr(serving.time, "perf_counter", lambda: self.now)

  def call(self):
    self.now += self._cost

  def wait(self):
    self.now += self._wait


def test_a_round_has_the_speed_without_waits_and_the_latency_with(monkeypatch):
  found = serving.measure(Clock(0.01, 0.03, monkeypatch), seconds=1.0)
  assert found["calls"] == round(0.5 / 0.04)
  assert found["seconds"] == pytest.approx(0.01 * found["calls"] + 0.03)
  assert found["latencies"] == pytest.approx([0.04] * found["calls"])


def test_a_slow_program_is_called_a_few_times(monkeypatch):
  assert serving.measure(Clock(5.0, 0.0, monkeypatch), 1.0)["calls"] == 3


def test_percentiles_are_those_of_numpy():
  values = np.random.default_rng(0).exponential(size=37)
  for q in (0, 1, 50, 90, 99, 100):
    assert workers.percentile(values, q) == pytest.approx(
        np.percentile(values, q))


def test_figures_of_a_step_are_consistent(program):
  worker = workers.Worker("ours", [], {"batch_size": 4})
  worker.facts = program.facts
  for _ in range(2):
    worker.rounds.append(serving.measure(program, 0.1))
  worker.memory = program.memory()
  row = worker.row()
  assert row["p50 ms"] <= row["p90 ms"] <= row["p99 ms"]
  # Calls that wait are not faster; the machine may be busy in one half.
  assert 0.2 < row["images/s"] * row["p50 ms"] / 1e3 / 4 < 5
  assert row["MiB"] > 50  # Python and jax alone.
  assert row["compile s"] > 0


def forward_macs(**settings):
  """Of one image of 32 x 32 pixels, from the traced program."""
  model = registry.create_model("poolformer_s12", **settings)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  return cost.count_macs(model.apply, variables, image)


def test_flops_of_a_step_are_those_of_three_passes(program):
  # Of the stem, 7 x 7 x 3 inputs of 8 x 8 x 8 outputs, there is no gradient of
  # the image.
  macs = 3 * forward_macs(num_classes=4, **SMALL) - 7 * 7 * 3 * 8**3
  assert program.facts["flops_per_image"] == 2 * macs


def test_a_trace_has_the_parts_of_the_model(program, tmp_path):
  found = program.trace(str(tmp_path))["operations"]
  total = sum(row["ms"] for row in found)
  kinds = {row["kind"]: row for row in profiles.by(found, "kind")}
  parts = profiles.by(found, "phase", "part")
  for rows in (kinds.values(), parts):
    assert sum(row["ms"] for row in rows) == pytest.approx(total)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
  assert {"convolution", "matrix product", "elementwise"} <= kinds.keys()
  own = {"augment", "average", "checks", "optimizer", "other"}
  known = {"stage1", "stage2", "norm", "head"}
  assert {row["part"].partition("/")[0] for row in parts} <= known | own
  places = {(row["phase"], row["part"]) for row in parts}
  assert {("forward", "stage1/token_mixer"), ("backward", "stage1/mlp"),
          ("backward", "stage2/downsample"),
          ("update", "optimizer")} <= places


def test_a_moment_of_a_profile_is_counted_once():
  events = [(0, 100, "loop"), (10, 30, "a"), (40, 60, "a"),  # Within it.
            (100, 150, "b"), (149, 200, "c"), (199, 300, "d"),  # A stream.
            (310, 311, "e")]
  assert profiles._own_times(events) == {
      "loop": 60, "a": 40, "b": 49, "c": 50, "d": 101, "e": 1}


@pytest.mark.parametrize(("target", "kind"), [
    ("__cudnn$fmhaSoftmaxBackward", "attention"),
    ("__cudnn$convBackwardFilter", "convolution"),
    ("__cublas$lt$matmul", "matrix product"), ("Sharding", "other")])
def test_custom_calls_have_kinds(target, kind):
  module = hlo.Module(
      "HloModule jit_f\n\nENTRY %main (x: f32[2]) -> f32[2] {\n"
      "  %x = f32[2]{0} parameter(0)\n"
      "  ROOT %y = f32[2]{0} custom-call(%x), "
      f'custom_call_target="{target}"\n}}\n')
  assert profiles.classify(module, module.instructions()["y"], False)[0] == kind


@pytest.mark.parametrize("name", ["semantic_fpn/poolformer_s12",
                                  "mask_rcnn/poolformer_s12"])
def test_batches_of_dense_tasks_are_valid(name):
  cfg = benchmark.of_model(name, None)
  cfg, task = tasks.create(dataclasses.replace(cfg), files=False)
  found = batches.training(task, 2, cfg.task.num_classes)
  wanted, *_ = task.train_batches(2)
  assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
      k: (v.shape, v.dtype) for k, v in wanted.items()}
  height, width = found["image"].shape[1:3]
  assert (found["size"] == (height, width)).all()
  if "boxes" in found:
    boxes = found["boxes"][found["labels"] >= 0]
    assert len(boxes) == 2 * 8 and (boxes >= 0).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes <= (width, height, width, height)).all()
    assert found["labels"].max() < cfg.task.num_classes
  else:
    assert found["label"].max() == cfg.task.num_classes - 1
  assert len(batches.evaluation(task, 3)["image"]) == 3


@pytest.mark.parametrize("kind, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12), ("TPU v5 lite", 197e12), ("TPU v3", 123e12 / 2),
    ("NVIDIA A1000", None), ("Tesla T4", None), ("cpu", None)])
def test_peaks_of_chips(kind, peak):
  assert chips.peak_flops(kind) == peak


class Turn:
  """A worker that notes its turns, and fails at one of them."""

  def __init__(self, name, turns, fails_at=None):
    self.name, self._turns, self._fails_at = name, turns, fails_at
    self.images_per_second = []

  def measure(self, seconds):
    self._turns.append(self.name)
    self.images_per_second.append(float(len(self._turns)))
    if self._turns.count(self.name) == self._fails_at:
      raise workers.WorkerError(f"{self.name}: no\nmemory")


def test_programs_are_measured_in_turns_and_one_that_fails_is_left_out():
  turns, said = [], []
  failed = workers.in_turns(
      [Turn("ours", turns), Turn("a", turns, 2), Turn("b", turns)], 3, 1.0,
      said.append)
  assert turns == ["ours", "a", "b", "ours", "a", "b", "ours", "b"]
  assert failed == {"a": "a: no memory"}
  assert said == ["round 1 of 3: images/s 1.0 ours, 2.0 a, 3.0 b",
                  "round 2 of 3: images/s 4.0 ours, 6.0 b",
                  "round 3 of 3: images/s 7.0 ours, 8.0 b"]
  with pytest.raises(workers.WorkerError):
    workers.in_turns([Turn("first", turns, 1)], 1, 1.0, said.append)


def test_ratios_are_of_neighbouring_rounds():
  one, other = (workers.Worker(name, [], {"batch_size": 8}) for name in "ab")
  one.rounds = [{"calls": 1, "seconds": s} for s in (1.0, 2.0, 4.0)]
  other.rounds = [{"calls": 2, "seconds": s} for s in (4.0, 4.0, 4.0)]
  assert workers.ratios(one, other) == {
      "than": "b", "median": 1.0, "min": 0.5, "max": 2.0, "pairs": 3}


def interpreter(path, code):
  """An executable that runs the code instead of timm's script."""
  path.write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return str(path)


@pytest.mark.parametrize("code, message", [
    ("raise SystemExit('No module named timm')", "No module named timm"),
    ("print('hello')", "answered 'hello', not JSON"),
    ("import os; os.kill(os.getpid(), 9)", "ended with -9")])
def test_an_interpreter_that_does_not_answer_is_a_line(tmp_path, code, message):
  python = interpreter(tmp_path / "python", code)
  with (pytest.raises(workers.WorkerError, match=message),
        workers.theirs(python, {"form": "eager"}).running()):
    pass


TIMM = """
    import json, os, sys, time
    sys.path.insert(0, os.path.dirname(sys.argv[1]))
    import serving

    class Program:
      facts = {"compile_seconds": 1.0,
               "versions": {"timm": "1.0", "torch": "2"}}
      def call(self): time.sleep(0.002)
      def wait(self): pass
      def rest(self): pass
      def memory(self): return {"memory": 2**20, "memory_of": "device"}

    def prepare(spec):
      print("a library's own words")
      if spec["form"] == "compile":
        raise RuntimeError("no working\\ncompiler")
      with open(__file__ + ".json", "w") as file:
        json.dump(spec, file)
      return Program()

    serving.serve(prepare)
"""


@pytest.mark.slow
def test_the_command_compares_and_prints_the_same_in_both_forms(
    tmp_path, monkeypatch, capfd):
  python = interpreter(tmp_path / "python", TIMM)
  monkeypatch.setattr(sys, "argv", [
      "benchmark", "--model=poolformer_s12", "--image_size=32",
      "--mode=infer", "--batch_size=2", "--rounds=2", "--seconds=0.05",
      "--against=timm", f"--timm-python={python}", "--json"])
  benchmark.main(*benchmark.parse())
  out, err = capfd.readouterr()
  found = json.loads(out)
  names = ["metaformer_jax", "timm eager", "timm channels_last"]
  assert [row["program"] for row in found["measured"]] == names
  assert [row["than"] for row in found["ratios"]] == names[1:]
  assert found["failed"][0]["error"] == (
      "timm compile: RuntimeError: no working compiler")
  assert "failed: timm compile: RuntimeError: no working compiler" in err
  first, eager, _ = found["measured"]
  assert eager["versions"] == "timm 1.0, torch 2"
  assert first["GFLOP"] == eager["GFLOP"] == 2 * forward_macs() / 1e9
  assert first["MFU"] is None
  assert found["ratios"][0]["min"] <= (
      first["images/s"] / eager["images/s"]) * 1.5
  spec = json.loads((tmp_path / "python.json").read_text())
  assert (spec["model"], spec["batch_size"], spec["image_size"],
          spec["dtype"]) == ("poolformer_s12", 2, 32, "float32")
  measured, ratios = benchmark.tables(found)
  for row, line in zip(found["measured"], measured.splitlines()[1:]):
    assert row["program"] in line
    for key in ("images/s", "p50 ms", "MiB"):
      digits = {"images/s": 1, "p50 ms": 2, "MiB": 0}[key]
      assert f"{row[key]:,.{digits}f}" in line.split()
  assert len(ratios.splitlines()) == 3


def test_some_of_timms_forms(tmp_path, monkeypatch):
  python = interpreter(tmp_path / "python", TIMM)
  monkeypatch.setattr(sys, "argv", [
      "benchmark", "--model=poolformer_s12", "--against=timm",
      f"--timm-python={python}", "--timm-forms=channels_last,eager"])
  args, overrides = benchmark.parse()
  (mode, cfg), _ = benchmark.cases(benchmark.experiment(args, overrides), args)
  with contextlib.ExitStack() as stack:
    assert [program.name for program in benchmark._theirs(
        stack, {"mode": mode}, cfg, args, "cpu", {"failed": []})] == [
            "timm channels_last", "timm eager"]


@pytest.mark.parametrize("argv, message", [
    (["--model=poolformer_s1"], "--model.*did you mean poolformer_s12"),
    (["--model=semanticfpn/poolformer_s12"], "did you mean semantic_fpn"),
    (["--model=poolformer_s12", "--task=segment"], "--task.*segmentation"),
    (["--model=retinanet/pvt_tiny", "--task=segmentation"],
     "--task: .* is for detection"),
    ([], "--model: is missing"),
    (["--model=poolformer_s12", "--nope=1"], "'--nope=1' is not a flag"),
    (["--model=poolformer_s12", "--mode=test"], "'test' is none of .*train"),
    (["--model=poolformer_s12", "--timm-forms=eager,jit"],
     "--timm-forms: 'jit' is none of .*compile"),
    (["--model=poolformer_s12", "--batch_size=8,0"], "'0' is not a positive"),
    (["--model=poolformer_s12", "--batch_size=99999999"],
     "config.train.batch_size: 99999999"),
    (["--model=poolformer_s12", "--dtype=int8"], "--dtype.*bfloat16"),
    (["--model=poolformer_s12", "--against=timm"], "needs --timm-python"),
    (["--model=pvt_tiny", "--against=timm", "--timm-python=p"],
     "pvt_tiny is not a model of timm"),
    (["--model=semantic_fpn/poolformer_s12", "--against=timm",
      "--timm-python=p"], "timm has classifiers only"),
    (["--model=poolformer_s12", f"--trace={__file__}"], "--trace: .*test_be")])
def test_a_mistake_is_a_line(monkeypatch, argv, message):
  monkeypatch.setattr(sys, "argv", ["benchmark", *argv])
  with pytest.raises(errors.ConfigError, match=message) as e:
    benchmark.main(*benchmark.parse())
  assert "\n" not in str(e.value)


WITHOUT = """
import sys

class Finder:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in {absent}:
      raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Finder())
from metaformer_jax.benchmark import ours
from metaformer_jax.config import typed
from metaformer_jax.tools import benchmark
for name in {names}:
  print(typed.as_dict(benchmark.of_model(name, None)))
"""


def test_a_model_is_measured_without_the_packages_of_runs():
  """The modules that measure it, and the same recipes."""
  names = ["poolformer_s12", "semantic_fpn/poolformer_s12",
           "mask_rcnn/resnet50"]
  code = WITHOUT.format(names=names, absent={
      "ml_collections", "clu", "orbax", "tensorstore", "grain",
      "tensorflow", "tensorflow_datasets", "array_record", "tensorboardX",
      "matplotlib", "sklearn"})
  done = subprocess.run([sys.executable, "-c", code], check=True, text=True,
                        capture_output=True, env=os.environ)
  assert done.stdout.splitlines() == [
      str(typed.as_dict(benchmark.of_model(name, None))) for name in names]
