"""tools.predict: what it prints equals `Loaded.predict`, in every form."""

import csv
import json
import os
import subprocess
import sys

import command_line
import drawings
import hub_cases
import pytest
from test_inference import STAGES, variables_of, write

import metaformer_jax
from metaformer_jax import errors
from metaformer_jax.config import resolve
from metaformer_jax.tools import predict


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  cfg = resolve.resolve({
      "model": {"name": "poolformer_s12", **STAGES},
      "data": {"source": "digits"},
      "task": {"num_classes": 6, "image_size": 32,
               "class_names": drawings.SHAPES}})
  path = tmp_path_factory.mktemp("weights") / "shapes.safetensors"
  write(path, cfg, variables_of(cfg), "timm")
  return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  root = drawings.write(tmp_path_factory.mktemp("photos"), 3,
                        shapes=("ring", "star"))
  (root / "ring" / "b\nad.jpg").write_bytes(b"no image")
  (root / "notes.txt").write_text("not an image")
  return root


def run(monkeypatch, capsys, *argv):
  monkeypatch.setattr(sys, "argv", ["predict", *map(str, argv)])
  predict.main(predict.parse())
  return capsys.readouterr().out


def expected(weights, paths, top):
  loaded = metaformer_jax.load(weights)
  return {str(path): [
      (int(n), name, pytest.approx(float(p), rel=1e-5)) for n, name, p in zip(
          found["classes"], found["names"], found["probabilities"])][:top]
      for path, found in zip(paths, loaded.predict(paths))}


def test_every_form_has_the_models_predictions(weights, photos, monkeypatch,
                                               capsys, caplog):
  single = photos / "star" / "star 0.jpg"
  good = sorted(p for p in photos.rglob("*") if drawings.is_picture(p))
  want = expected(weights, [*good, single], 2)
  # Batches of 2, so that a bad image is in one, and the last is filled up.
  common = (photos / "ring", single, photos / "star", f"--weights={weights}",
            "--top=2", "--batch_size=2")
  lines = run(monkeypatch, capsys, *common, "--json").splitlines()
  found = [json.loads(line) for line in lines]
  given = [str(photos / "ring"), str(single), str(photos / "star")]
  assert [x["image"] for x in found] == [path for path, _ in
                                         predict.find(given)]
  assert predict.find(given)[-1] == (str(photos / "star" / "star 2.JPEG"),
                                     "star 2.JPEG")
  for line in found:
    if "ad.jpg" in line["image"]:
      assert "cannot be used as an image" in line["error"]
    else:
      assert [tuple(row.values()) for row in line["predictions"]] == (
          want[line["image"]])
  assert "1 of 8 images cannot be used" in caplog.text

  rows = list(csv.DictReader(
      run(monkeypatch, capsys, *common, "--csv").splitlines()))
  assert [(row["image"], int(row["class"]), row["name"]) for row in rows] == [
      (line["image"], row["class"], row["name"]) for line in found
      if "error" not in line for row in line["predictions"]]

  table = run(monkeypatch, capsys, *common).splitlines()
  assert table[0] in want and len(table) == 4 * len(rows) // 2
  assert table[1].split() == ["class", "name", "probability"]
  for line, (number, name, probability) in zip(table[2:], want[table[0]]):
    assert line.split()[:2] == [str(number), name]
    assert float(line.split()[2]) == pytest.approx(
        probability.expected, abs=6e-5)


@pytest.mark.parametrize("argv,words", [
    (["missing.jpg"], "missing.jpg: does not exist"),
    (["{empty}"], "has no images"),
    (["{photos}", "--top=0"], "--top: '0' is not a positive integer"),
    (["{photos}", "--csv", "--json"], "not allowed with argument"),
    (["{photos}", "--weights=resnet19"], "did you mean resnet18"),
])
def test_mistakes_are_one_line(weights, photos, tmp_path, monkeypatch, capsys,
                               argv, words):
  argv = [a.format(photos=photos, empty=tmp_path) for a in argv]
  if not any("--weights" in a for a in argv):
    argv.append(f"--weights={weights}")
  with pytest.raises(errors.ConfigError) as caught:
    run(monkeypatch, capsys, *argv)
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_odd_files(weights, photos, tmp_path):
  """A name that is not UTF-8 is printed as it is; a pipe is not waited for."""
  name = os.fsencode(tmp_path) + b"/\xff.png"
  with open(name, "wb") as file:
    file.write(next(photos.rglob("*.png")).read_bytes())
  os.mkfifo(tmp_path / "pipe.jpg")
  done = subprocess.run(
      [sys.executable, "-m", "metaformer_jax.tools.predict", "--csv", "--top=1",
       f"--weights={weights}", tmp_path], capture_output=True, timeout=120,
      cwd=command_line.ROOT)
  assert done.stdout.splitlines()[1].startswith(name + b","), done
  assert b"is not a regular file: '" in done.stderr
  assert b"Traceback" not in done.stderr


def test_weights_without_a_head_are_a_line(photos, monkeypatch, capsys):
  folder = hub_cases.GOLDEN / "poolformer_base"
  with pytest.raises(errors.ConfigError, match="has no head"):
    run(monkeypatch, capsys, photos, f"--weights={folder}")


def test_no_usable_image_is_an_error(weights, photos, monkeypatch, capsys):
  bad = next(photos.rglob("b*ad.jpg"))
  with pytest.raises(errors.DataError, match="1 of 1 images cannot be used"):
    run(monkeypatch, capsys, bad, f"--weights={weights}")


def test_a_reader_may_end_early(weights, photos):
  """As `| head` does: no traceback."""
  done = subprocess.run(
      f"{sys.executable} -m metaformer_jax.tools.predict --weights='{weights}' "
      f"--csv --batch_size=2 '{photos}' | head -1", shell=True, text=True,
      capture_output=True, cwd=command_line.ROOT, timeout=120)
  assert done.stdout == "image,class,name,probability\n"
  assert "Traceback" not in done.stderr and "Error" not in done.stderr


def test_the_console_command(weights, photos, monkeypatch, capsys):
  """As setup.py names it."""
  assert "metaformer-predict = metaformer_jax.tools.predict:console" in (
      command_line.ROOT / "setup.py").read_text()
  monkeypatch.setattr(sys, "argv", ["/bin/metaformer-predict", "--help"])
  with pytest.raises(SystemExit):
    predict.console()
  assert capsys.readouterr().out.startswith("usage: metaformer-predict ")
  monkeypatch.setattr(sys, "argv", [
      "/bin/metaformer-predict", f"--weights={weights}", "nothing.jpg"])
  with pytest.raises(SystemExit) as e:
    predict.console()
  assert e.value.code == errors.ConfigError.exit_code
  assert capsys.readouterr().err == (
      "ConfigError: nothing.jpg: does not exist\n")


def test_a_classifier_has_no_pictures(weights, photos, monkeypatch, capsys,
                                      tmp_path):
  with pytest.raises(errors.ConfigError, match="--output: the weights are of a "
                     "task whose predictions are not pictures"):
    run(monkeypatch, capsys, photos, f"--weights={weights}",
        f"--output={tmp_path / 'out'}")
  assert not (tmp_path / "out").exists()
