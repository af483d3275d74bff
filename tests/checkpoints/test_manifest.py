"""Manifests: whatever changes in a step is noticed, and nothing else is."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
from checkpoint_cases import TOP1, flip

from metaformer_jax import errors
from metaformer_jax.checkpoints import manifest, steps
from metaformer_jax.runtime import workdir as workdir_lib
from metaformer_jax.tools import checkpoints as tool

FILES = {"params/d/0": b"kernel", "params/_METADATA": b"{}", "model/e": b""}
FACTS = {"step": 7, "record": {"position": 224, "started": 1.5},
         "metrics": {"top1": 0.5}, "data": {"train": {"examples": 9}},
         "tree": {"params/a/kernel": "float32[16, 8]"}}


def make(folder, **facts):
  """A step such as Orbax leaves, but small; step 7 unless said otherwise."""
  for name, content in FILES.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  manifest.write(folder, **{**FACTS, **facts})
  return folder


def damage(folder, *, contents=True):
  """What is found to be wrong with a step."""
  with pytest.raises(manifest.DamagedError) as e:
    manifest.verify(folder, contents=contents)
  return str(e.value)


def test_what_is_written_is_read(tmp_path):
  found = manifest.verify(make(tmp_path / "7"))
  assert dataclasses.asdict(found).items() >= FACTS.items()
  assert found.files.keys() == FILES.keys()
  assert found.n_bytes == 8 and found.items == {"params"}
  assert manifest.read(tmp_path / "7") == found


def test_every_flipped_bit_is_noticed(tmp_path):
  step = make(tmp_path / "7")
  n_flips = 0
  for name in (*FILES, manifest.NAME):
    for bit in range(8 * (step / name).stat().st_size):
      flip(step / name, bit)
      assert damage(step).startswith(f"{name}: "), bit
      flip(step / name, bit)
      n_flips += 1
  assert n_flips > 4000
  manifest.verify(step)


def test_every_cut_is_noticed_without_the_checksums(tmp_path):
  step = make(tmp_path / "7")
  for name in ("params/d/0", manifest.NAME):
    content = (step / name).read_bytes()
    for size in reversed(range(len(content))):
      os.truncate(step / name, size)
      assert damage(step, contents=False).startswith(f"{name}: "), size
    (step / name).write_bytes(content)
  manifest.verify(step)


def link(path, target):
  path.unlink()
  path.symlink_to(target)


CHANGES = {
    "deleted": (lambda s: (s / "params/d/0").unlink(),
                "params/d/0: is missing"),
    "no item": (lambda s: shutil.rmtree(s / "params"),
                "params/_METADATA: is missing; params/d/0: is missing"),
    "longer": (lambda s: (s / "model/e").write_bytes(b"x"),
               "model/e: has 1 bytes, not 0"),
    "added": (lambda s: (s / "params/d/1").write_bytes(b"x"),
              "params/d/1: was added later"),
    "renamed": (lambda s: (s / "params/d/0").rename(s / "params/d/1"),
                "params/d/0: is missing; params/d/1: was added later"),
    "linked": (lambda s: link(s / "params/d/0", __file__),
               "params/d/0: is not a regular file"),
    "linked manifest": (lambda s: link(s / manifest.NAME, __file__),
                        "manifest.json: is not a regular file"),
    "pipe": (lambda s: os.mkfifo(s / "pipe"), "pipe: is not a regular file"),
    "of another step": (lambda s: make(s, step=8),
                        "manifest.json: belongs to step 8"),
    "deep": (lambda s: (s / manifest.NAME).write_bytes(b"[" * 99999),
             "manifest.json: cannot be parsed"),
    "not JSON": (lambda s: (s / manifest.NAME).write_bytes(b"\xff\0"),
                 "manifest.json: cannot be parsed"),
    "list": (lambda s: (s / manifest.NAME).write_bytes(b"[]"),
             "manifest.json: cannot be parsed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_damage_is_named(tmp_path, change):
  step = make(tmp_path / "7")
  damager, message = CHANGES[change]
  damager(step)
  assert damage(step) == message


def test_steps_without_a_manifest_are_partial(tmp_path):
  step = make(tmp_path / "7")
  (step / manifest.NAME).unlink()
  (tmp_path / "8").mkdir()
  (tmp_path / "9").touch()
  make(tmp_path / "elsewhere", step=10)
  (tmp_path / "10").symlink_to(tmp_path / "elsewhere")
  for name in ("7", "8"):
    with pytest.raises(manifest.PartialError, match=r"no manifest\.json"):
      manifest.verify(tmp_path / name)
  for name in ("9", "10"):
    assert damage(tmp_path / name) == "is not a folder"
  good, bad = steps.survey(tmp_path)
  assert not good and bad.keys() == {7, 8, 9, 10}


def test_what_systems_leave_is_no_damage(tmp_path):
  step = make(tmp_path / "7")
  (step / "params" / ".DS_Store").write_bytes(b"x")
  (step / ".snapshot").mkdir()
  (step / ".snapshot" / "0").write_bytes(b"x")
  manifest.verify(step)


@pytest.mark.parametrize("key, value", [
    ("files", {"../../secret": [6, "0" * 64]}),
    ("files", {"/etc/passwd": [6, "0" * 64]}),
    ("files", {"params/d/0": 6}), ("files", {"params/d/0": ["6", None]}),
    ("files", []), ("step", "7"), ("step", True),
    ("record", {"position": -1}), ("record", {"position": 1.5}),
    ("record", {}), ("record", {"position": 1, "started": None}),
    ("record", {"position": 1, "other": 1}), ("data", []), ("data", None),
    ("metrics", {"top1": "best"}), ("tree", {"a": 1}),
    ("time", None), ("extra", 1)], ids=str)
def test_a_manifest_that_was_forged_is_damage(tmp_path, key, value):
  """Its own digest is right; still it reaches nothing outside the step."""
  step = make(tmp_path / "7")
  (tmp_path / "secret").write_bytes(b"secret")
  facts = {**dataclasses.asdict(manifest.read(step)), key: value}
  (step / manifest.NAME).write_bytes(manifest._encode(facts))
  assert damage(step)


def test_names_that_are_no_steps(tmp_path):
  for name in ("7", "0", "07", "-1", "7.saving", "x", "9" * 99, "\u0663"):
    (tmp_path / name).mkdir()
  assert steps.found(tmp_path) == [0, 7]
  assert steps.found(tmp_path / "none") == []


@pytest.mark.parametrize("last, best, want", [
    (1, 0, {5}), (2, 0, {4, 5}), (1, 1, {3, 5}), (1, 2, {2, 3, 5}),
    (9, 0, {1, 2, 3, 4, 5}), (1, 9, {1, 2, 3, 5})])
def test_the_last_and_the_best_are_kept(tmp_path, last, best, want):
  """Nothing is best by a measure that is NaN; of equals, the newest is."""
  scores = {1: 0.1, 2: 0.9, 3: 0.9, 4: float("nan"), 5: None}
  found = {step: manifest.Manifest(
      step, {}, {} if score is None else {"top1": score}, {}, {}, "", {})
      for step, score in scores.items()}
  assert manifest.kept(found, last, best, TOP1) == want


def test_measures_are_added(tmp_path):
  """And nothing else changes; a step that is cut short in it stays intact."""
  before = manifest.read(make(tmp_path / "7", metrics={}))
  (tmp_path / "7" / ".manifest.json.tmp").write_bytes(b"{")
  manifest.verify(tmp_path / "7")
  manifest.add_metrics(tmp_path / "7", {"top1": 0.25, "bad_images": 0})
  after = manifest.verify(tmp_path / "7")
  assert after.metrics == {"top1": 0.25, "bad_images": 0}
  assert type(after.metrics["bad_images"]) is int
  assert dataclasses.replace(after, metrics={}) == before
  (tmp_path / "7" / manifest.NAME).unlink()
  with pytest.raises(manifest.PartialError):
    manifest.add_metrics(tmp_path / "7", {"top1": 0.25})


@pytest.fixture
def workdir(tmp_path):
  """A run with steps 1 to 4, of which 2 is the best, and one set aside."""
  folder = tmp_path / "run" / "checkpoints"
  for step, top1 in enumerate((0.1, 0.9, 0.3, 0.2), 1):
    make(folder / str(step), step=step, metrics={"top1": top1, "loss": step})
  steps.set_aside(make(folder / "9", step=9))
  config = {"checkpoint": {"best_metric": "top1"}}
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  return tmp_path / "run"


def use(capsys, workdir, *args):
  """Runs the tool; returns its code and the rows it printed."""
  code = tool.main(tool.parse([*args, f"--workdir={workdir}", "--json"]))
  return code, [json.loads(line) for line in capsys.readouterr().out.split(
      "\n") if line]


def test_the_tool_lists(workdir, capsys):
  (workdir / "checkpoints/3/model/e").write_bytes(b"x")
  (workdir / "checkpoints/5").mkdir()
  code, rows = use(capsys, workdir, "list")
  assert code == 0
  assert [(r["step"], r["state"], r.get("marks")) for r in rows] == [
      (1, "complete", []), (2, "complete", ["best"]), (3, "damaged", None),
      (4, "complete", ["last"]), (5, "partial", None), (9, "set aside", None)]
  assert rows[0]["position"] == 224 and rows[0]["bytes"] == 8
  assert rows[2]["problem"] == "model/e: has 1 bytes, not 0"
  tool.main(tool.parse(["list", f"--workdir={workdir}", "--best_metric=loss"]))
  assert "224 examples  0.0 MB  " in (out := capsys.readouterr().out)
  assert "loss=1  top1=0.1  best" in out  # The lowest loss is the best.
  with pytest.raises(errors.ConfigError, match=(
      "--best_metric: 'lss' is not a measure of classification; did you mean "
      r"loss\?")):
    use(capsys, workdir, "list", "--best_metric=lss")


def test_the_tool_lists_a_run_of_another_version(workdir, capsys):
  (workdir / "config.json").write_text('{"checkpoint": {"best": "top1"}}')
  with pytest.raises(errors.ConfigError, match=r"; give --best_metric$"):
    use(capsys, workdir, "list")
  _, rows = use(capsys, workdir, "list", "--best_metric=top1")
  assert [r["step"] for r in rows if "best" in r.get("marks", ())] == [2]


def test_the_tool_verifies(workdir, capsys):
  assert use(capsys, workdir, "verify")[0] == 0
  (workdir / "checkpoints/3/params/d/0").write_bytes(b"Kernel")
  code, rows = use(capsys, workdir, "verify")
  assert code == 1
  assert [r["state"] for r in rows] == ["intact", "intact", "damaged", "intact"]
  assert use(capsys, workdir, "verify", "--step=4")[0] == 0
  assert use(capsys, workdir, "verify", "--step=3")[0] == 1
  with pytest.raises(errors.ConfigError, match="it holds 1, 2, 3, 4"):
    use(capsys, workdir, "verify", "--step=5")


def test_the_tool_prunes(workdir, capsys):
  folder = workdir / "checkpoints"
  keep = ("prune", "--keep_last=1", "--keep_best=1")
  _, rows = use(capsys, workdir, *keep, "--damaged", "--dry_run")
  assert [r["step"] for r in rows if r["state"] == "to be deleted"] == [1, 3, 9]
  assert steps.found(folder) == [1, 2, 3, 4]
  # Nothing is deleted while a step that would be kept is damaged.
  content = (folder / "2/params/d/0").read_bytes()
  (folder / "2/params/d/0").write_bytes(b"Kernel")
  with pytest.raises(errors.ConfigError, match="2: would be kept, but params"):
    use(capsys, workdir, *keep)
  (folder / "2/params/d/0").write_bytes(content)
  use(capsys, workdir, *keep)
  assert steps.found(folder) == [2, 4] and steps.damaged(folder)
  use(capsys, workdir, *keep, "--damaged")
  assert steps.found(folder) == [2, 4] and not steps.damaged(folder)


def test_tool_deletes_nothing_elsewhere(workdir, tmp_path, capsys):
  keep = ("prune", "--keep_last=1", "--keep_best=0", "--damaged")
  linked = tmp_path / "linked"
  linked.mkdir()
  (linked / "checkpoints").symlink_to(workdir / "checkpoints")
  shutil.copy(workdir / "config.json", linked)
  with pytest.raises(errors.ConfigError, match="is a link"):
    use(capsys, linked, *keep)
  (workdir / "config.json").rename(workdir / "config")
  with pytest.raises(errors.ConfigError, match="is not a run"):
    use(capsys, workdir, *keep)
  with pytest.raises(errors.ConfigError, match="holds no checkpoints"):
    use(capsys, tmp_path / "none", *keep)
  with pytest.raises(errors.ConfigError, match=r"keep_last.*count from 1"):
    use(capsys, workdir, "prune", "--keep_last=0", "--keep_best=1")
  (workdir / "config").rename(workdir / "config.json")
  with workdir_lib.hold(workdir), pytest.raises(
      errors.ConfigError, match="is in use"):
    use(capsys, workdir, *keep)
  assert steps.found(workdir / "checkpoints") == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["~nobody-here", "x" * 5000])
def test_tool_refuses_an_impossible_path(capsys, name):
  with pytest.raises(errors.ConfigError, match=r"^--workdir: "):
    use(capsys, name, "list")


def test_the_tool_needs_no_jax(workdir):
  code = ("import sys; from metaformer_jax.tools import checkpoints as tool; "
          f"code = tool.main(tool.parse(['verify', '--workdir={workdir}'])); "
          "sys.exit(code or 'jax' in sys.modules)")
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
