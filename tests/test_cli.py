"""The command line: a mistake is one line on stderr and exit code 2.

All cases run in forks of one process, some also as users run them. `TMP` in a
case is the folder of the fixture `tmp`.
"""

import ast
import os
import pathlib
import re
import shlex

import command_line
import pytest

from metaformer_jax.config import typed

GOOD = "--config=configs/quickstart.py"
FOLDER = ("--config=configs/poolformer_s12.py --config.data.path=TMP/data "
          "--config.task.num_classes=None")


def _case(args, *says):
  return pytest.param(args, says, id=args[:70])


# --config.KEY=VALUE for quickstart.py, and what the message contains.
OVERRIDES = [_case(f"{GOOD} --config.{override}", *says)
             for override, *says in [
    # No such key.
    ("optim.baselr=3", "config.optim.baselr: no such key", "optim.base_lr?"),
    ("optimizer.base_lr=3", "config.optimizer.base_lr", "optim.base_lr?"),
    ("base_lr=3", "config.base_lr: no such key", "optim.base_lr?"),
    # The section that has it, or the keys that a word or initials stand for.
    ("batch_size=3", "did you mean train.batch_size or eval.batch_size?"),
    ("optimizer.name=lamb", "did you mean optim.name, "),
    ("lr=3", "mean optim.base_lr, optim.min_lr or optim.warmup_lr?"),
    ("train.learning_rate=3", "did you mean optim.base_lr, "),
    ("optim.wd=3", "did you mean optim.weight_decay?"),
    ("data.train=x", "did you mean data.train_split?"),
    ("task.mixupp=1", "config.task.mixupp: no such key", "task.mixup?"),
    ("data.zzz=1", "valid: data.source, data.path, "),
    ("model.name=poolformer_s13", "did you mean poolformer_s12, "),
    ("model.name=resnet", "did you mean resnet18, resnet34 or resnet50?"),
    ("train.mixup=0.1", "config.train.mixup: no such key", "task.mixup?"),
    ("task=classification", "config.task: is a section", "config.task.name"),
    ("checkpoint.best_metric=topp1", "config.checkpoint.best_metric: 'topp1'",
     "did you mean top1?"),
    ("optim.base_lr.x=3", "config.optim.base_lr.x", "optim.base_lr?"),
    ("zzz=1", "config.zzz: no such key", "valid: "),
    ("optim=3", "config.optim: is a section", "config.optim.name"),
    ("optim", "config.optim: is a section"),
    ("model.=3", "config.model."),
    # Values that cannot be parsed; the others are in test_config.py.
    ("optim.base_lr=nan", "config.optim.base_lr: nan is not a finite number"),
    ("optim.base_lr=-1", "config.optim.base_lr: -1.0 is not above 0"),
    ("optim.base_lr=fast", "config.optim.base_lr: 'fast'", "float"),
    ("optim.base_lr=True", "config.optim.base_lr: 'True'", "float"),
    ("optim.base_lr", "--config.optim.base_lr", "Missing value"),
    ("train.batch_size=1.5", "config.train.batch_size: '1.5'", "int"),
    ("train.batch_size=1e3", "config.train.batch_size: '1e3'", "int"),
    ("train.accumulate=3", "config.train.batch_size: 128",
     "config.train.accumulate = 3", "nearest: 129"),
    ("log.tensorboard=maybe", "config.log.tensorboard: 'maybe'", "boolean"),
    ("model.name=poolfomer_s24", "config.model.name: ", "'poolfomer_s24'",
     "did you mean poolformer_s24?"),
    ("data.source=folder", "config.data.path: None", "train/", "val/"),
    ("model.depths=3", "config.model.depths: has 1 stage, dims has 4"),
    ("model.depths=(1,2,2,True)", "config.model.depths: ", "holds True"),
    ("model.depths=deep", "config.model.depths: ", "'deep'"),
    ("model.depths='(1, 2'", "config.model.depths: '(1, 2'"),
    ("data.mean=(0,0)", "config.data.mean: (0, 0) has 2 items, not 3"),
    ("mesh.rules=\"('a',0)\"", "config.mesh.rules: ('a', 0)", "of tuples"),
]]

LINES = [_case(*row) for row in [
    ("", "--config: is missing", "--config=configs/quickstart.py"),
    ("--config", "--config", "Missing value"),
    ("--config=configs/quickstar.py", "--config: configs/quickstar.py",
     "did you mean ", "quickstart.py?"),
    ("--config=configs/quickstart", "--config: configs/q", "quickstart.py?"),
    ("--config=quickstart", "did you mean configs/quickstart.py?"),
    ("--config=configs/poolformer_s25.py", "mean configs/poolformer_s24.py, "),
    ("--config=configs/caformer_s18.py", "did you mean configs/caformer.py"),
    ("--config configs/quickstar.py:x", "quickstart.py?"),
    ("--config=/no/such.py", "--config: /no/such.py is not a file"),
    ("--confg=configs/quickstart.py", "confg", "Did you mean: config"),
    ("configs/quickstart.py", "'configs/quickstart.py'", "--flag=value"),
    (f"{GOOD} --wrkdir=/tmp/x", "wrkdir", "Did you mean: workdir"),
    (f"{GOOD} stray", "'stray'", "--flag=value"),
    (f"{GOOD} -- --config.seed=1", "--config.seed=1"),
    (f"{GOOD} --config.log.tensorboard false", "'false'", "--flag=value"),
    (f"{GOOD} --config.seed=1 --config.seed=x", "config.seed: 'x'"),
    (f"--config.seed=1 {GOOD}", "--config.seed", "before"),
    (f"{GOOD} --workdir", "--workdir", "Missing value"),
    (f"{GOOD} --workdir=TMP/file", "--workdir: TMP/file is a file"),
    (f"{GOOD} --workdir=TMP/file/a/b", "--workdir: TMP/file is a file"),
    (rf"{GOOD} --workdir='TMP/a\b/x'", "TMP/a\\b/x/ has a backslash",
     "choose another path"),
    (f"{GOOD} --workdir='TMP/a\nb'", "TMP/a b/ has control characters"),
    (f"{GOOD} --workdir=/gs/bucket/x", "/gs/bucket/x/ has a first folder"),
    (f"{GOOD} --workdir=s3://bucket/x", "s3://bucket/x is neither a local"),
    (f"{GOOD} --workdir=gs://bkt//x", "gs://bkt//x: has an empty name"),
    (f"{GOOD} --config.data.path=TMP/dat", "config.data.path: TMP/dat",
     "did you mean data?"),
    (f"{GOOD} --config.data.path=TMP/file", "config.data.path: TMP/file is "
     "not a folder"),
    (f"{GOOD} --config.data.path=TMP/file/x", "config.data.path: TMP/file/x"),
    (f"{GOOD} --config.data.path=TMP/a/b/c", "config.data.path: TMP/a/b/c",
     "(in TMP;"),
    ("--config=configs/poolformer_s12.py --config.data.path=TMP/empty",
     "config.data.train_split", "'train'", "config.data.eval_split", "'val'",
     "TMP/empty has no folders"),
    (f"{FOLDER} --config.data.train_split=trian",
     "config.data.train_split: TMP/data has no folder 'trian'",
     "did you mean train?"),
    (f"{FOLDER} --config.data.eval_split=valid", "config.data.eval_split",
     "'valid'", "did you mean val?"),
    (f"{FOLDER} --config.mesh.data=8 --config.mesh.fsdp=3",
     "config.train.batch_size: 4096", "24 devices", "nearest: 4104"),
]]

# The text of a config file; indented text is put after _HEAD.
_HEAD = ("from metaformer_jax import config as c\n\ndef get_config():\n"
         "  config = c.default()\n  config.data.source = 'digits'\n"
         "  config.model.name = 'poolformer_s12'\n")
FILES = {
    "no_function": ("x = 1\n", "get_config"),
    "syntax": ("def get_config(:\n", "SyntaxError", "line 1"),
    "indented": ("def get_config():\n  x = 1\n   y\n", "Indent", "line 3"),
    "latin": ("x = '\udcff'\n", "SyntaxError", "decode byte 0xff"),
    "raises": ("def get_config():\n  return 1 / 0\n", "division by zero"),
    "asserts": ("assert False, 'no luck'\n", "AssertionError: no luck"),
    "recursive": ("def get_config():\n  return get_config()\n", "Recursion"),
    "disk": ("open('/no/such')\n", "No such file", "/no/such"),
    "imports": ("import nosuchmodule\n", "nosuchmodule"),
    "returns_dict": ("get_config = lambda: {'sed': 3}\n",
                     "config.sed: no such key", "did you mean seed?"),
    "key": ("  config.optim.baselr = 3\n  return config\n",
            "config.optim.baselr: no such key", "did you mean base_lr?"),
    "section": ("  config.optm.base_lr = 3\n  return config\n", "optm",
                "optim"),
    "not_a_number": ("  config.seed = float('nan')\n", "seed", "nan"),
    "nan": ("  config.optim.eps = float('nan')\n  return config\n",
            "config.optim.eps: nan"),
    "bool": ("  config.train.batch_size = True\n  return config\n",
             "config.train.batch_size: True is not an int"),
    "none": ("  config.task.crop_area = None\n  return config\n",
             "config.task.crop_area: None"),
    "unset": ("  config.eval.batch_size = config.train.get_ref('steps')\n"
              "  return config\n", "config.eval.batch_size: None"),
    "returns_none": ("get_config = lambda: None\n", "get_config() ", "None"),
    "returns_int": ("get_config = lambda: 3\n", "get_config() ", "3"),
    "value_error": ("raise ValueError('no luck')\n", "ValueError: no luck"),
    "two_lines": ("raise RuntimeError('first\\nlast')\n", "first", "last"),
    "json": ("import json\njson.loads('{')\n", "Expecting property"),
    "wrong_type": ("  config.optim.base_lr = 'x'\n  return config\n",
                   "base_lr", "x"),
    "float": ("  config.train.batch_size = 3.5\n  return config\n",
              "batch_size", "3.5"),
    "scalar": ("  config.optim = 3\n  return config\n", "optim", "3"),
    "exits": ("raise SystemExit('no luck')\n", "no luck"),
    "own": ("class Own(BaseException): pass\nraise Own('no luck')\n",
            "Own: no luck"),
    "mute": ("class Mute(Exception):\n  def __str__(self): return 1 / 0\n"
             "raise Mute\n", "Mute"),
}
LINES += [
    _case(f"--config=TMP/{name}.py", *says)
    for name, (_, *says) in FILES.items()]

HOSTILE = [_case(*row) for row in [
    (f"{GOOD}:arg", "quickstart.py", "get_config()"),
    (f"{GOOD} --flagfile=TMP/latin.py", "command line: ", "byte 0xff"),
    (f"{GOOD} --workdir=", "--workdir: is empty"),
    (f"{GOOD} --process_count=99999999999", "process_count: '99999999999'"),
    (f"{GOOD} --config.init=", "config.init: '' is not a path"),
    (f"{FOLDER} --config.task.eval_labels=real "
     "--config.task.real_path=~nobody/x",
     "config.task.real_path: '~nobody/x' is not a file"),
    (f"{FOLDER} --config.task.eval_labels=real "
     f"--config.task.real_path={'x' * 300}", "config.task.real_path: 'xxx"),
    (f"{GOOD} --workdir=~nobody-here/x",
     "--workdir: ~nobody-here/x"),
    (f"{GOOD} --config.data.path=~nobody-here", "config.data.path: ~nobody"),
    (f"{GOOD} --workdir={'x' * 300}", "--workdir: xxx"),
    (f"{GOOD} --config.data.path={'x' * 300}",
     "config.data.path: xxx"),
    (f"{FOLDER} --config.data.train_split={'x' * 300}",
     "config.data."),
    (f"{GOOD} --workdir=gs://b/x",
     "--workdir: gs://b/x"),
    ("--config=configs/poolformer_s12.py --config.data.path=gs://b/x",
     "config.data.path: gs://b/x"),
    ("--config=configs/fashion_mnist.py "
     "--config.data.path=TMP/empty", "config.data.path: TMP/empty"),
    ("--config=configs/poolformer_s12.py --config.data.path=",
     "config.data.path: ''"),
    (f"{GOOD} --noconfig.log.tensorbord",
     "config.log.tensorbord: no such key", "log.tensorboard?"),
    (f"{GOOD} --config.data.path='/no\x1b[2J\x07\u202e'",
     "config.data.path: /no?[2J?? is not a folder"),
    (f"{GOOD} --flagfile=TMP/flags",
     "config.sed: no such key", "did you mean seed?"),
    ("--config.seed=1",
     "--config: is missing"),
    ("--config=", "--config: ",
     "configs/quickstart.py"),
    ("--config=quickstart.py", "--config: ",
     "did you mean configs/quickstart.py?"),
    ("--config=configs", "--config: configs is ",
     "quickstart.py"),
    (f"{GOOD} '--config.seed=a: b'",
     "config.seed: 'a: b'"),
    (f"{GOOD} --config.mesh.rules=\"(('a',-7),)\"",
     "config.mesh.rules: ('a', -7)"),
    (f"{GOOD} --config.mesh.rules=\"(('a',True),)\"", "config.mesh.rules: "),
    (f"{GOOD} --config.model.mlp_ratio=0.001",
     "config.model.mlp_ratio: 0.001"),
    (f"{GOOD} --config.train.batch_size=9{'0' * 30}",
     "config.train.batch_size: 9"),
]]

# An experiment as data; files that are not are in test_security.py.
JSON = "--config_json=TMP/part.json"
PART = ('{"data": {"source": "digits"}, "optim": {"base_lr": 1},'
        ' "model": {"name": "poolformer_s12", "depths": [1, 2, 3, 4]},'
        ' "mesh": {"rules": [["k", -1]]}}')
AS_JSON = [_case(*row) for row in [
    ("--config_json", "--config_json", "Missing value"),
    ("--config_json=", "--config_json: ", "is not a file"),
    ("--config_json=TMP/none.json", "--config_json: TMP/none.json", "not a f"),
    ("--config_json=TMP", "--config_json: TMP: is not a file"),
    ("--config_jsn=TMP/part.json", "config_jsn", "Did you mean: config_json"),
    (f"{JSON} {GOOD}", "--config_json: cannot be combined with another config"),
    (f"{GOOD} {JSON}", "--config_json: cannot be combined with another config"),
    (f"{JSON} {JSON}", "--config_json: cannot be combined with another config"),
    (f"{JSON} --config.sed=1", "config.sed: no such key", "seed?"),
    (f"{JSON} --config.seed=x", "config.seed: 'x'"),
    (f"{JSON} --config.seed", "--config.seed", "Missing value"),
    (f"{JSON} --config.data.source=folder", "config.data.path: None"),
    (f"{JSON} stray", "'stray'", "--flag=value"),
]]

MALFORMED = OVERRIDES + LINES + HOSTILE + AS_JSON

VALID = [_case(f"{GOOD} {line}", *values) for line, *values in [
    ("", ("seed", 0), ("data.path", None), ("model.depths", (1, 1, 2, 1))),
    ("--config.seed 7", ("seed", 7)),
    ("--config.optim.base_lr=1", ("optim.base_lr", 1.0)),
    ("--config.optim.clip_norm=2", ("optim.clip_norm", 2.0)),
    ("--config.train.steps=3", ("train.steps", 3)),
    ("--config.log.tensorboard=false", ("log.tensorboard", False)),
    ("--noconfig.log.tensorboard", ("log.tensorboard", False)),
    ("--config.model.norm=layer_norm", ("model.norm", "layer_norm")),
    ("--config.model.depths=(1,2,3,4)", ("model.depths", (1, 2, 3, 4))),
    ("--config.model.depths=1,2,3,4", ("model.depths", (1, 2, 3, 4))),
    ("--config.data.mean=(0,0.5,1)", ("data.mean", (0.0, 0.5, 1.0))),
    ("--config.mesh.rules=\"(('k',-1),)\"", ("mesh.rules", (("k", -1),))),
    ("--config.data.path=TMP/data", ("data.path", "TMP/data")),
    ("--workdir=TMP/new/run --config.seed=1", ("seed", 1)),
]] + [
    _case(f"{FOLDER} --config.train.accumulate=8", ("train.accumulate", 8)),
    _case(f"{GOOD} --config.model.depths=None", ("model.depths", None)),
    _case(f"{GOOD} --config.init=x --config.init=None", ("init", None)),
    _case(JSON, ("seed", 0), ("optim.base_lr", 1.0), ("train.steps", None),
          ("model.depths", (1, 2, 3, 4)), ("mesh.rules", (("k", -1),))),
    _case("--config_json TMP/part.json --config.train.steps=3 "
          "--config.model.depths=None --config.optim.base_lr=2 --workdir=TMP/x",
          ("train.steps", 3), ("model.depths", None), ("optim.base_lr", 2.0)),
    _case(f"--config.log.tensorboard=false {JSON} --config.mesh.rules=()",
          ("log.tensorboard", False), ("mesh.rules", ()))]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
  """The folder that TMP stands for."""
  root = tmp_path_factory.mktemp("cli")
  for name in ("data/train/cat", "data/val/cat", "empty"):
    (root / name).mkdir(parents=True)
  (root / "file").write_text("")
  (root / "flags").write_text("--config.sed=3\n")
  (root / "part.json").write_text(PART)
  for name, (text, *_) in FILES.items():
    (root / f"{name}.py").write_text(
        _HEAD + text if text.startswith(" ") else text,
        errors="surrogateescape")
  return root


def _argv(args, tmp):
  return [arg.replace("TMP", str(tmp)) for arg in shlex.split(args)]


@pytest.fixture(scope="module")
def results(tmp):
  """{command line: its Result}."""
  lines = [param.values[0] for param in MALFORMED + VALID]
  return dict(zip(lines, command_line.fork([_argv(a, tmp) for a in lines])))


def _check_refused(result, says, tmp):
  command_line.check_refused(result)
  for part in says:
    assert part.replace("TMP", str(tmp)) in result.err


@pytest.mark.parametrize("line, says", MALFORMED)
def test_malformed_line_is_refused(line, says, results, tmp):
  _check_refused(results[line], says, tmp)


@pytest.mark.parametrize("line, values", VALID)
def test_override_arrives_in_its_type(line, values, results, tmp):
  result = results[line]
  assert (result.code, result.err) == (0, ""), result
  cfg, workdir = ast.literal_eval(result.out)
  flags = dict(arg.split("=", 1) for arg in _argv(line, tmp) if "=" in arg)
  path = flags.get("--config", "part.json")
  assert workdir == flags.get("--workdir", "runs/" + pathlib.Path(path).stem)
  for key, value in values:
    found = cfg
    for part in key.split("."):
      found = found[part]
    if isinstance(value, str):
      value = value.replace("TMP", str(tmp))
    assert repr(found) == repr(value)  # 1 is not 1.0, nor True.


@pytest.mark.parametrize("line, says", [
    p for p in OVERRIDES + LINES if not p.marks][::15])
def test_malformed_line_is_refused_by_the_entry_point(line, says, tmp):
  _check_refused(
      command_line.run([f"--workdir={tmp}/run", *_argv(line, tmp)]), says, tmp)


def test_entry_point_imports_no_framework_for_a_mistake():
  done = command_line.python(["-X", "importtime", "-m", "metaformer_jax.main",
                              GOOD, "--config.seed=-1"])
  assert done.returncode == 2
  modules = {line.rpartition("|")[2].strip().partition(".")[0]
             for line in done.stderr.splitlines()}
  assert {"absl", "metaformer_jax"} <= modules
  assert not modules & {"jax", "flax", "tensorflow", "torch", "numpy"}


def test_the_other_entry_points_take_json(tmp):
  done = command_line.python([
      "-m", "metaformer_jax.tools.evaluate", f"--workdir={tmp}/new",
      f"--config_json={tmp}/part.json", "--config.seed=-1"])
  assert done.returncode == 2
  assert done.stderr.startswith("ConfigError: config.seed: -1 is below")


def test_help_names_every_flag_and_key():
  done = command_line.python(["-m", "metaformer_jax.main", "--help"])
  assert (done.returncode, done.stderr) == (0, "")
  keys = typed.keys()
  for name in ("config", "config_json", "workdir",
               *(f"config.{key}" for key in keys)):
    assert f"--{name}" in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_workdir_must_be_writable(tmp_path):
  tmp_path.chmod(0o500)
  _check_refused(command_line.run([GOOD, f"--workdir={tmp_path}/x"]),
                 (f"--workdir: {tmp_path} is not writable",), tmp_path)


@pytest.mark.parametrize("name", ["metaformer-train", "metaformer-evaluate"])
def test_console_commands_have_their_own_help(name):
  """As setup.py names them; pip writes a script that calls the function."""
  setup = (command_line.ROOT / "setup.py").read_text()
  module, function = re.search(rf'"{name} = (.*):(.*)"', setup).groups()
  script = (f"import sys; sys.argv[0] = '/bin/{name}'; "
            f"from {module} import {function}; sys.exit({function}())")
  done = command_line.python(["-c", script, "--help"])
  as_module = command_line.python(["-m", module, "--help"])
  assert (done.returncode, done.stderr) == (0, "")
  usage, *text = done.stdout.splitlines()
  assert usage == f"usage: {name} [--flag=value ...]"
  assert [f"usage: python -m {module} [--flag=value ...]", *text] == (
      as_module.stdout.splitlines())
  assert text[1] == ast.get_docstring(ast.parse(
      (command_line.ROOT / f"{module.replace('.', '/')}.py").read_text()
  )).splitlines()[0]
  assert ("  --checkpoint  " in done.stdout) == (name == "metaformer-evaluate")
  done = command_line.python(["-c", script, GOOD, "--config.sed=1"])
  command_line.check_refused(command_line.Result(
      done.returncode, done.stdout, done.stderr, 0))
