"""Published weights by the names of their models, from servers on loopback."""

import dataclasses
import hashlib
import os
import pathlib
import re
import sys
import time

import huggingface_hub
import jax
import numpy as np
import pytest
import small_disk
import weight_servers
from huggingface_hub import constants
from test_pretrained import tensors_of
from weight_servers import File, status

import metaformer_jax
from metaformer_jax import errors
from metaformer_jax import main as main_lib
from metaformer_jax.checkpoints import download, published
from metaformer_jax.config import resolve, schema, tasks
from metaformer_jax.convert import files
from metaformer_jax.models import registry, settings
from metaformer_jax.tools import convert

ROOT = pathlib.Path(__file__).parents[2]
SMALL = settings.ResNet(block="basic", depths=(1,), widths=(4,))
PLACES = {
    "hub": "timm/tiny.a1",
    "hub_url": "https://huggingface.co/sail/dl/resolve/v1/tiny/tiny.safetensors",
    "https": "{url}/releases/v1/tiny.safetensors"}
PATHS = {"hub": "/timm/tiny.a1/resolve/main/model.safetensors",
         "hub_url": "/sail/dl/resolve/v1/tiny/tiny.safetensors",
         "https": "/releases/v1/tiny.safetensors"}


@pytest.fixture
def server():
  with weight_servers.serving() as found:
    found.give(status(404))
    yield found


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The cache folder; the working directory is an empty one beside it."""
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  monkeypatch.setenv("METAFORMER_JAX_WEIGHTS", str(tmp_path / "cache"))
  monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
  monkeypatch.setattr(download, "_WAITS", (0.0, 0.0))
  return tmp_path / "cache"


@pytest.fixture
def without_hub(monkeypatch):
  """As if huggingface_hub were not installed."""
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
  """The hub's client at the server, with an empty cache."""
  # It has read HF_ENDPOINT and so on when it was imported.
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
  to_endpoint(monkeypatch, server.url)


def to_endpoint(monkeypatch, url):
  monkeypatch.setenv("HF_ENDPOINT", url)
  monkeypatch.setattr(constants, "ENDPOINT", url)
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                      url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def tiny(server, folder, monkeypatch):
  """Adds a small row to the table: tiny(place) -> (path, bytes, variables)."""

  def add(place):
    checkpoint = PLACES[place].format(url=server.url)
    spec = dataclasses.replace(
        registry.get_spec("resnet18"), name="tiny", settings=SMALL,
        num_classes=5, input_size=32, mean=(0.1, 0.2, 0.3),
        checkpoint=checkpoint)
    monkeypatch.setitem(registry._MODELS, "tiny", spec)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    source = folder.parent / "source.safetensors"
    files.write_safetensors(
        source, tensors_of("tiny", "timm", num_classes=5), {})
    return PATHS[place], source.read_bytes(), metaformer_jax.load_pretrained(
        "tiny", source)

  return add


def hub_file(data, **changes):
  """An answer of the hub with a large file."""
  return File(data, {
      "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
      "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
      "X-Linked-Size": str(len(data)), "X-Repo-Commit": "0" * 40}, **changes)


def check_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, dict(got), dict(want))


def line_of(call, kind=errors.ConfigError):
  with pytest.raises(kind) as e:
    call()
  line = str(e.value)
  assert line.isprintable(), line
  return line


@pytest.mark.parametrize("place", PLACES)
def test_a_name_is_downloaded_once(server, tiny, folder, without_hub, place):
  path, data, variables = tiny(place)
  server.give(hub_file(data), path=path)
  loaded = metaformer_jax.load("tiny")
  check_equal(loaded.variables, variables)
  assert loaded.cfg.data.mean == (0.1, 0.2, 0.3)
  assert [p.name for p in folder.iterdir()] == ["tiny.safetensors"]
  check_equal(metaformer_jax.load_pretrained("tiny"), variables)
  check_equal(metaformer_jax.load_pretrained("tiny", "tiny"), variables)
  ten = metaformer_jax.load("tiny", num_classes=10)
  assert ten.variables["params"]["head"]["bias"].shape == (10,)
  assert len(server.asked) == 1


@pytest.mark.parametrize("place", ["hub", "hub_url"])
def test_the_hubs_client_downloads_into_its_cache(server, tiny, folder, hub,
                                                  place, monkeypatch):
  path, data, variables = tiny(place)
  server.give(hub_file(data), path=path)
  check_equal(metaformer_jax.load("tiny").variables, variables)
  assert not folder.exists()
  n = len(server.asked)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  check_equal(metaformer_jax.load("tiny").variables, variables)
  assert len(server.asked) == n
  # The folder comes first.
  folder.mkdir()
  (folder / "tiny.pth").write_bytes(b"nothing")
  assert f"{folder}/tiny.pth" in line_of(lambda: metaformer_jax.load("tiny"))


def test_the_hubs_client_checks_the_digest(server, tiny, hub, tmp_path):
  path, data, variables = tiny("hub")
  good = hub_file(data)
  bad = bytes([*data[:-1], data[-1] ^ 1])
  server.give(dataclasses.replace(good, data=bad), path=path)
  line = line_of(lambda: metaformer_jax.load("tiny"))
  assert hashlib.sha256(bad).hexdigest() in line and server.url in line
  server.give(status(503), good, path=path)
  check_equal(metaformer_jax.load("tiny").variables, variables)


def test_the_hubs_client_says_in_one_line_what_is_wrong(server, tiny, hub,
                                                        folder):
  path, _, _ = tiny("hub")
  server.give(status(404, X_Error_Code="EntryNotFound"), path=path)
  line = line_of(lambda: metaformer_jax.load("tiny"))
  assert "404" in line and f"put it here as {folder}/tiny.safetensors" in line
  other = tensors_of("resnet18", "timm", num_classes=5, depths=(1, 1, 1, 1))
  files.write_safetensors(folder.parent / "other", other, {})
  server.give(hub_file((folder.parent / "other").read_bytes()), path=path)
  line = line_of(lambda: metaformer_jax.load("tiny"))
  assert "conv1.weight is [64, 3, 7, 7], not [4, 3, 7, 7]" in line
  server.give(File(b"<html>", {"Content-Type": "text/html"}), path=path)
  line = line_of(lambda: metaformer_jax.load("tiny"))
  assert line.startswith("tiny: its weights cannot be downloaded (")


@pytest.mark.parametrize("client", ["hub", "without_hub"])
@pytest.mark.parametrize("endpoint, offline, reason", [
    ("http://127.0.0.1:1", "", "refused"),
    ("http://no-such-host.invalid", "0", "[Nn]ame"),
    ("https://huggingface.co", "1", "HF_HUB_OFFLINE is set")])
def test_offline_one_line_says_what_to_put_where(
    request, folder, client, endpoint, offline, reason, monkeypatch, capfd):
  request.getfixturevalue(client)
  to_endpoint(monkeypatch, endpoint)
  monkeypatch.setenv("HF_HUB_OFFLINE", offline)
  monkeypatch.setenv("HOME", str(folder.parent))
  monkeypatch.delenv("METAFORMER_JAX_WEIGHTS")
  before = time.monotonic()
  line = line_of(lambda: metaformer_jax.load("resnet18"))
  assert time.monotonic() - before < 5
  assert re.search(reason, line)
  where = folder.parent / ".cache/metaformer_jax/weights/resnet18.safetensors"
  assert line.endswith(
      f"; download {endpoint}/timm/resnet18.a2_in1k/resolve/main/"
      f"model.safetensors on another machine, and put it here as {where}")
  assert not where.exists() and capfd.readouterr() == ("", "")


def test_a_file_that_does_not_fit_is_refused(server, tiny, folder,
                                             without_hub):
  path, _, _ = tiny("https")
  other = folder.parent / "other"
  files.write_safetensors(other, tensors_of(
      "tiny", "timm", num_classes=7), {})
  server.give(File(other.read_bytes()), path=path)
  line = line_of(lambda: metaformer_jax.load("tiny"), errors.WeightsError)
  assert "fc.weight is [7, 4], not [5, 4]" in line and server.url in line
  for data, reason in ((b"<html>", "is a web page"), (b"", "is empty"),
                       (other.read_bytes()[:-8], "is a damaged safetensors")):
    server.give(File(data), path=path)
    assert f"is refused: {reason}" in line_of(
        lambda: metaformer_jax.load("tiny"))
  assert not list(folder.iterdir())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pth.tar"])
def test_a_damaged_file_in_the_folder_is_to_be_deleted(tiny, folder, suffix):
  _, data, _ = tiny("https")
  folder.mkdir()
  path = folder / f"tiny{suffix}"
  path.write_bytes(data[:-100])
  for call in (metaformer_jax.load, metaformer_jax.load_pretrained):
    line = line_of(lambda call=call: call("tiny"), errors.WeightsError)
    assert line.startswith(f"{path}: ")
    assert line.endswith(f"; delete {path} to download it again")
  # Not if it is the user's own.
  own = folder.parent / f"own{suffix}"
  path.rename(own)
  assert "delete" not in line_of(lambda: metaformer_jax.load_pretrained(
      "tiny", own))


def test_places_that_cannot_be_used_are_one_line(tiny, folder, server,
                                                 without_hub, monkeypatch):
  path, data, _ = tiny("https")
  server.give(File(data), path=path)
  folder.mkdir()
  for make, name in ((os.mkfifo, "tiny.pth"), (os.mkdir, "tiny.safetensors"),
                     (os.mkdir, "tiny.safetensors.partial")):
    make(folder / name)
    line = line_of(lambda: metaformer_jax.load("tiny"))
    assert f"{folder / name}: is not a file; remove it" in line
    (folder / name).rename(folder.parent / f"other {name}")
  for where in (folder.parent / "other tiny.pth", "x" * 300,
                "/proc/cannot-be-written"):
    monkeypatch.setenv("METAFORMER_JAX_WEIGHTS", str(where))
    line = line_of(lambda: metaformer_jax.load("tiny"))
    assert str(where) in line and "METAFORMER_JAX_WEIGHTS" in line


def test_a_full_disk_is_one_line(tiny, folder, server, without_hub):
  path, data, variables = tiny("https")
  big = tensors_of("resnet18", "timm", num_classes=1000)
  files.write_safetensors(folder.parent / "big", big, {})
  server.give(File((folder.parent / "big").read_bytes()), path=path)
  folder.mkdir()
  with small_disk.mounted(folder):
    line = line_of(lambda: metaformer_jax.load("tiny"))
    assert "No space left on device" in line and str(folder) in line
    (folder / "tiny.safetensors.partial").unlink()
    server.give(File(data), path=path)
    check_equal(metaformer_jax.load("tiny").variables, variables)


def test_a_path_wins_over_a_name(tiny, folder, server, without_hub):
  path, data, variables = tiny("https")
  server.give(File(data), path=path)
  line = line_of(lambda: metaformer_jax.load("./tiny"))
  assert line == "./tiny: does not exist"
  assert "does not exist" in line_of(
      lambda: metaformer_jax.load(pathlib.Path("tiny")))
  line = line_of(lambda: metaformer_jax.load("tinny"))
  assert line == ("tinny: does not exist, and no model has this name; did you "
                  "mean tiny?")
  line = line_of(lambda: metaformer_jax.load("tiny.pth"))
  assert "did you mean tiny?" in line
  pathlib.Path("tiny").write_bytes(data[:-1])
  line = line_of(lambda: metaformer_jax.load_pretrained("tiny", "tiny"))
  assert line.startswith("tiny: ") and "delete" not in line
  pathlib.Path("tiny").unlink()
  pathlib.Path("tiny").symlink_to("nowhere")
  assert "tiny: does not exist" in line_of(lambda: metaformer_jax.load("tiny"))
  assert not server.asked
  check_equal(metaformer_jax.load_pretrained("tiny"), variables)


def test_a_model_without_published_weights():
  name = "resmlp_big_24_patch16_224"
  for call in (metaformer_jax.load, metaformer_jax.load_pretrained):
    assert f"{name}: has no published weights" in line_of(
        lambda call=call: call(name))
  assert "has no published weights" in line_of(
      lambda: metaformer_jax.load_pretrained("my_models:Net"))
  with pytest.raises(ValueError, match="did you mean resnet18"):
    metaformer_jax.load_pretrained("resnet19")


def test_every_row_has_a_place(monkeypatch):
  """On the hub, the file of the repository that needs no pickle."""
  monkeypatch.delenv("HF_ENDPOINT", raising=False)
  found = {name: published.place(name) for name in registry.list_models()}
  assert [name for name, place in found.items() if place is None] == [
      "resmlp_big_24_patch16_224"]
  del found["resmlp_big_24_patch16_224"]
  for name, place in found.items():
    assert place.url.startswith(("https://github.com/",
                                 "https://huggingface.co/"))
    assert place.name.removeprefix(name) in published.SUFFIXES
    assert (place.on_hub is None) == ("github.com" in place.url)
    if place.on_hub:
      assert place.url == huggingface_hub.hf_hub_url(**place.on_hub)
  assert found["caformer_s18"].on_hub == {
      "repo_id": "sail/dl", "revision": "main",
      "filename": "caformer/caformer_s18.pth"}
  assert found["poolformer_s12"].name == "poolformer_s12.pth.tar"
  assert found["resnet18"].on_hub["repo_id"] == "timm/resnet18.a2_in1k"


CFG = schema.Experiment(
    init="tiny", model=schema.Model(name="tiny"),
    task=tasks.Classification(num_classes=10, image_size=32),
    data=schema.Data(source="digits"),
    optim=schema.Optim(base_lr=1e-30, warmup_epochs=0.0, min_lr=0.0),
    train=schema.Train(batch_size=16, steps=1), mesh=schema.Mesh(data=1),
    log=schema.Log(tensorboard=False, compilation_cache=""))


def test_a_run_starts_from_a_name_and_resumes_without_it(
    tiny, folder, server, without_hub, tmp_path):
  path, data, variables = tiny("https")
  server.give(File(data), path=path)
  main_lib.main(CFG, tmp_path / "run")
  got = metaformer_jax.load(tmp_path / "run").variables["params"]
  assert got["head"]["kernel"].shape == (4, 10)
  check_equal(got["stem"], variables["params"]["stem"])
  server.give(status(404), path=path)
  (folder / "tiny.safetensors").unlink()
  main_lib.main(CFG, tmp_path / "run")
  assert len(server.asked) == 1
  line = line_of(lambda: main_lib.main(CFG, tmp_path / "other"))
  assert line.startswith("tiny: its weights cannot be downloaded (HTTP 404 ")


def test_config_init_takes_a_name(tiny, folder, tmp_path):
  """The model and its preprocessing are those of the name."""
  tiny("https")
  data = {"source": "digits"}
  cfg = resolve.resolve({"init": "tiny", "data": data})
  assert cfg.model == schema.Model(name="tiny")
  assert cfg.data.mean == (0.1, 0.2, 0.3) and cfg.task.image_size == 32
  for init, words in (
      ("tinny", "'tinny' does not exist, and no model has this name; did you "
       "mean tiny?"),
      ("./tiny", "'./tiny' does not exist"),
      ("resmlp_big_24_patch16_224", "has no published weights")):
    for model in ({}, {"name": "tiny"}):
      line = line_of(lambda init=init, model=model: resolve.resolve(
          {"init": init, "data": data, "model": model}))
      assert "config.init" in line and words in line


def test_the_tools_take_a_name(tiny, folder, server, without_hub, tmp_path,
                               monkeypatch):
  path, data, variables = tiny("https")
  server.give(File(data), path=path)
  out = tmp_path / "out.safetensors"
  monkeypatch.setattr("sys.argv", ["convert", "--input=tiny", f"--output={out}",
                                   "--layout=timm"])
  convert.main(convert.parse())
  check_equal(metaformer_jax.load(out).variables, variables)
  monkeypatch.setattr("sys.argv", ["convert", "--input=tiny",
                                   "--model=resnet18", f"--output={out}"])
  assert "tiny is of tiny, not resnet18" in line_of(
      lambda: convert.main(convert.parse()))
