"""The reader of PyTorch checkpoints reads values and runs no code."""

import argparse
import collections
import copyreg
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_format as tf

from metaformer_jax import errors
from metaformer_jax.convert import pickles

FORMATS = {"zip": tf.zipped, "legacy": tf.legacy}
formats = pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS.keys())
VALUES = np.random.default_rng(0).normal(size=24).astype(np.float32)


def read(path, data: bytes):
  path.write_bytes(data)
  return pickles.read(path)


def refused(path, data: bytes) -> str:
  with pytest.raises(errors.WeightsError) as error:
    read(path, data)
  message = str(error.value)
  assert message.startswith(f"{path}: ") and message.isprintable()
  return message


@pytest.fixture
def file(tmp_path):
  return tmp_path / "weights.pth"


def checkpoint() -> dict:
  state = collections.OrderedDict(
      {f"tensor.{dtype}": tf.tensor(VALUES.astype(dtype).reshape(2, 3, 4))
       for dtype in tf.STORAGES})
  state["parameter"] = tf.parameter(VALUES)
  state["scalar"] = tf.tensor(np.float32(3))
  state["empty"] = tf.tensor(np.zeros((0, 3), np.float32))
  state._metadata = {"": {"version": 1}}
  return {
      "state_dict": state, "epoch": 3, "lr": [1e-3, (None, True, -2**70)],
      "args": argparse.Namespace(model="poolformer_s12", betas=(0.9, 0.999)),
      "metric": np.float64(0.77), "size": tf.Object(
          tf.Global("torch", "Size"), ((1, 2),))}


@pytest.mark.parametrize("data", [
    tf.zipped(checkpoint()), tf.zipped(checkpoint(), protocol=4),
    tf.zipped(checkpoint(), order="big"),
    tf.zipped(checkpoint(), byteorder=None), tf.legacy(checkpoint()),
], ids=["zip", "protocol 4", "big endian", "before byteorder", "legacy"])
def test_reads_every_dtype_and_what_lies_beside_the_weights(file, data):
  content = read(file, data)
  state = content.pop("state_dict")
  for dtype in tf.STORAGES:
    expected = VALUES.astype(dtype).reshape(2, 3, 4)
    array = state.pop(f"tensor.{dtype}")
    assert array.dtype == dtype and array.shape == (2, 3, 4)
    assert array.tobytes() == expected.tobytes()
    assert array.flags.owndata and array.flags.c_contiguous
    assert array.flags.writeable
  np.testing.assert_array_equal(state.pop("parameter"), VALUES)
  assert state.pop("scalar") == np.array(3, np.float32)
  assert state.pop("empty").shape == (0, 3) and not state
  assert content == {
      "epoch": 3, "lr": [1e-3, (None, True, -2**70)],
      "args": pickles.Inert("argparse.Namespace"), "size": (1, 2),
      "metric": pickles.Inert(f"{np.float64(0).__reduce__()[0].__module__}"
                              ".scalar")}


@formats
def test_views_of_a_shared_storage_become_arrays_of_their_own(file, save):
  storage = tf.Storage(VALUES)
  content = read(file, save({
      "all": tf.tensor(storage, 0, (4, 6), (6, 1)),
      "transposed": tf.tensor(storage, 0, (6, 4), (1, 6), v1=True),
      "sliced": tf.tensor(storage, 7, (2, 3), (6, 2)),
      "expanded": tf.tensor(storage, 5, (2, 3), (0, 1)),
      "end": tf.tensor(storage, 24, (0,), (1,))}))
  square = VALUES.reshape(4, 6)
  for name, expected in {
      "all": square, "transposed": square.T, "sliced": square[1:3, 1:6:2],
      "expanded": np.stack([VALUES[5:8]] * 2), "end": VALUES[:0]}.items():
    np.testing.assert_array_equal(content[name], expected, err_msg=name)
    assert content[name].flags.c_contiguous
  content["all"][:] = 0
  np.testing.assert_array_equal(content["transposed"], square.T)


def test_legacy_views_of_storages(file):
  storage = tf.Storage(VALUES, view=("7", 4, 10))
  content = read(file, tf.legacy([tf.tensor(storage, 1, (3, 3), (3, 1))]))
  np.testing.assert_array_equal(content[0], VALUES[5:14].reshape(3, 3))
  for view in [("7", 4, 9), ("7", 20, 10), ("7", -1, 10), ("7", 4), "7",
               ("7", [], [])]:
    storage.view = view
    refused(file, tf.legacy([tf.tensor(storage, 1, (3, 3), (3, 1))]))


def live(module, name, *args):
  return tf.Object(tf.Global(module, name), args)


def attacks(canary) -> dict:
  """Objects that create, or try to create, the canary when unpickled."""
  touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
  opened = live("builtins", "getattr", live("pathlib", "Path", str(canary)),
                "touch")
  return {
      "os.system": live("os", "system", touch),
      "posix.system": live("posix", "system", touch),
      "builtins.eval": live("builtins", "eval", code),
      "builtins.exec": live("builtins", "exec", code),
      "__builtin__.eval": live("__builtin__", "eval", code),
      "subprocess.check_call": live("subprocess", "check_call", touch.split()),
      "subprocess.Popen": live("subprocess", "Popen", touch.split()),
      "importlib.import_module": live("importlib", "import_module", "os"),
      "functools.partial": live("functools", "partial", opened),
      "operator.attrgetter": live("operator", "attrgetter", "system"),
      "operator.methodcaller": live("operator", "methodcaller", "system"),
      "builtins.getattr": opened,
      "runpy.run_path": live("runpy", "run_path", str(canary)),
      "pickle.loads": live("pickle", "loads", b"N."),
      "numpy.load": live("numpy", "load", str(canary)),
      "numpy.core.multiarray._reconstruct": live(
          "numpy.core.multiarray", "_reconstruct", b"", (0,), b"b"),
      "torch.load": live("torch", "load", str(canary)),
      "torch.hub.load": live("torch.hub", "load", "a/b", "c"),
      "torch.FloatTensor": live("torch", "FloatTensor"),
      "torch._utils.os.system": live("torch._utils", "os.system", touch),
      "collections.OrderedDict.fromkeys": live(
          "collections", "OrderedDict.fromkeys", "a"),
      "argparse.Namespace.__init__.__globals__": live(
          "argparse", "Namespace.__init__.__globals__"),
      "torch._utils._rebuild_tensor_v2.__globals__": live(
          "torch._utils", "_rebuild_tensor_v2.__globals__"),
      "metaformer_jax.errors.UserError": live(
          "metaformer_jax.errors", "UserError"),
  }


@formats
@pytest.mark.parametrize("name", attacks("canary"))
def test_no_global_is_called_but_those_of_the_table(file, save, name):
  canary = file.with_name("canary")
  attack = attacks(canary)[name]
  for content in (attack, {"state_dict": {"a": tf.tensor(VALUES), "b": attack}},
                  argparse.Namespace(a=attack), {1: (attack,)}):
    assert name in refused(file, save(content))
  assert name in refused(file, tf.zipped(attack, protocol=4))
  assert not canary.exists()


@pytest.mark.parametrize("name", [
    "os.system", "builtins.eval", "subprocess.check_call"])
def test_the_attacks_would_work_on_pickle(tmp_path, name):
  canary = tmp_path / "canary"
  pickle.loads(tf.dumps(attacks(canary)[name]))
  assert canary.exists()


class Canary:
  """What an extension of copyreg's registry may name."""

  touched = False

  def __init__(self, *_):
    Canary.touched = True


DICT = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize("program, reason", {
    b"(S'true'\nios\nsystem\n.": "INST",
    b"(iargparse\nNamespace\n.": "INST",
    b"(" + DICT + b"o.": "OBJ",
    DICT + b")}\x92.": "NEWOBJ_EX",
    b"\x82\xf0)R.": "EXT1",
    b"\x83\xf0\x00)R.": "EXT2",
    b"P0\n.": "PERSID",
    b"K\x012.": "DUP",
    b"K\x01K\x020.": "POP",
    b"\x8f.": "EMPTY_SET",
    b"K\x01}b.": "attributes",
    b"cos\nsystem\nb.": "os.system",
    b"\x8c\x02os\x8c\x06system\x93.": "os.system",
    b"K\x01K\x02\x93.": "without a name",
    b"K\x01)R.": "unusual arguments",
    DICT + b"(]K\x01atR.": "unusual arguments",
    DICT + b"(K\x01tR.": "unusual arguments",
    b"ctorch._utils\n_rebuild_tensor_v2\n)R.": "unusual arguments",
    b"ctorch._utils\n_rebuild_parameter\n(K\x01tR.": "unusual arguments",
    b"ctorch\nFloatStorage\n)R.": "unusual arguments",
    b"ctorch\nSize\n(K\x01tR.": "unusual arguments",
    b"K\x01Q.": "unusual reference",
    b"(X\x06\x00\x00\x00moduleNNNtQ.": "unusual reference",
    b"K\x01K\x02a.": "not a list",
    b"]K\x01K\x02s.": "not a dictionary",
    b"}(K\x01u.": "not a dictionary",
    b"}]K\x01s.": "a list as a key",
    b".": "IndexError",
    b"t.": "IndexError",
    b"K\x01\x86.": "IndexError",
    b"h\x05.": "KeyError",
    b"}": "exhausted",
    b"\xff.": "opcode",
    b"I" + b"1" * 5000 + b"\n.": "digits",
    b"X\xff\xff\xff\x7fabc.": "expected",
    b"\x8d" + b"\xff" * 7 + b"\x7fabc.": "expected",
}.items())
def test_no_opcode_runs_but_those_of_plain_data(file, program, reason):
  Canary.touched = False
  copyreg.add_extension(__name__, "Canary", 240)
  try:
    pickle.loads(b"\x82\xf0.")  # Now C's unpickler has it in its cache.
    assert reason in refused(file, tf.zipped(program))
    refused(file, tf.legacy(program))
  finally:
    copyreg.remove_extension(__name__, "Canary", 240)
    copyreg.clear_extension_cache()
  assert not Canary.touched


def test_state_is_set_on_nothing(file):
  before = dict(vars(argparse.Namespace)), dict(vars(pickles.Inert))
  state = {"__class__": 1, "__setstate__": 2, "keys": 3, "name": "os.system"}
  odd = collections.OrderedDict(a=1)
  vars(odd).update(state)
  content = read(file, tf.zipped([
      odd, tf.Object(tf.Global("argparse", "Namespace"), (1, 2), state),
      tf.Object(tf.Global("torch", "device"), ("cpu",), (None, state))]))
  assert content == [{"a": 1}, pickles.Inert("argparse.Namespace"),
                     pickles.Inert("torch.device")]
  assert type(content[0]) is dict
  program = b"cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb."
  assert read(file, tf.zipped(program)) == pickles.Inert("argparse.Namespace")
  assert before == (vars(argparse.Namespace), vars(pickles.Inert))


def test_bombs_end_soon(file):
  laughs = b"]q\x00" + b"".join(
      b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1])
      for i in range(200))
  assert len(read(file, tf.zipped(laughs + b"."))) == 2
  deep = b")" + b"\x85" * 200_000
  assert len(read(file, tf.zipped(deep + b"."))) == 1
  assert "a tuple as a key" in refused(file, tf.zipped(b"}" + deep + b"Ns."))
  refused(file, tf.zipped(DICT + deep + b"R."))
  refused(file, tf.zipped(deep + b"Q."))
  # A memo that C's unpickler would make as long as its highest index.
  assert read(file, tf.zipped(b"Nr\xff\xff\xff\xff.")) is None
  endless = read(file, tf.zipped(b"]q\x00h\x00a."))
  assert endless[0] is endless
  keys = [[], []]
  for _ in range(200):
    keys = [[key, key] for key in keys]
  refused(file, tf.legacy([tf.tensor(VALUES)], keys=keys))


def view(start, shape, strides, values=VALUES, **storage):
  return tf.tensor(tf.Storage(values, **storage), start, shape, strides)


LARGE = tf.Storage(np.zeros(10_000, np.float32))
KIND = tf.Global("torch", "FloatStorage")


@formats
@pytest.mark.parametrize("tensor, reason", [
    (view(1, (24,), (1,)), "beyond"),
    (view(0, (25,), (1,)), "beyond"),
    (view(0, (2, 12), (13, 1)), "beyond"),
    (view(2**62, (1,), (1,)), "beyond"),
    (view(0, (2,), (2**62,)), "beyond"),
    (view(0, (2**40, 2**40), (0, 0)), "expands"),
    (view(0, (10**6,), (0,)), "expands"),
    (view(-1, (2,), (1,)), "unusual"),
    (view(5, (2,), (-1,)), "unusual"),
    (view(0, (-1,), (1,)), "unusual"),
    (view(0, (-2, -3), (1, 1)), "unusual"),
    (view(0, (2.0,), (1,)), "unusual"),
    (view(0, (2,), ()), "unusual"),
    (view(0, (1,) * 65, (1,) * 65), "unusual"),
    (view(0, "12", "11"), "unusual"),
    (view(0, {1: 2}, (1,)), "TypeError"),
    (view(0, None, None), "TypeError"),
    (view(0, (2**62, 0, 2**62), (1, 1, 1)), "ValueError"),
    (tf.Object(tf.Global("torch._utils", "_rebuild_tensor"),
               (1, 0, (1,), (1,))), "unusual"),
    (view(0, (2,), (1,), claimed_size=2**50), "larger than the file"),
    (view(0, (2,), (1,), claimed_size=-1), "larger than the file"),
    (view(0, (2,), (1,), claimed_size=25), "size"),
    (view(0, (2,), (1,), claimed_size=23), "size"),
    (view(0, (2,), (1,), claimed_size="24"), "unusual reference"),
    (view(0, (2,), (1,), location="meta"), "meta"),
    (view(0, (2,), (1,), pid=("storage", KIND, "0")), "unusual reference"),
    (view(0, (2,), (1,), pid=("storage", "os", "0", "cpu", 24)), "unusual"),
    (view(0, (2,), (1,), pid=("storage", tf.Global("torch", "Size"), "0", "cpu",
                              24)), "KeyError"),
    (view(0, (2,), (1,), pid=("storage", KIND, "../0", "cpu", 24)), ""),
    ([view(0, (1,), (1,), pid=("storage", KIND, "0", "cpu", n))
      for n in (24, 12)], "two ways"),
    ([tf.tensor(LARGE, 0, (10_000,), (1,)) for _ in range(20)], "expands"),
    (tf.tensor(VALUES, metadata={"neg": True}), "negative"),
])
def test_tensors_are_checked_before_they_are_made(file, save, tensor, reason):
  assert reason in refused(file, save(tensor))


def test_zip_archives_that_torch_does_not_write(file, tmp_path):
  tensor = {"a": tf.tensor(VALUES)}
  for changes, reason in [
      ({"data/0": None}, "no item"), ({"data/0": b"123"}, "size"),
      ({"byteorder": b"middle"}, "byte order"),
      ({"data.pkl": None}, "not one that torch.save"),
      ({"b/data.pkl": b"N."}, "not one that torch.save")]:
    assert reason in refused(file, tf.zipped(tensor, **changes))
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("a/data.pkl", tf.dumps([0] * 10_000))
  assert "compressed" in refused(file, file.read_bytes())
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("a/data.pkl", tf.dumps([0]))
    with pytest.warns(UserWarning, match="Duplicate"):
      archive.writestr("a/data.pkl", tf.dumps([1]))
  assert "repeated" in refused(file, file.read_bytes())
  for field, bits in {8: 1, 10: zipfile.ZIP_DEFLATED}.items():
    data = bytearray(tf.zipped(tensor))
    data[data.index(b"PK\x01\x02") + field] |= bits
    assert "encrypted, repeated" in refused(file, bytes(data))
  np.savez(tmp_path / "a.npz", a=VALUES)
  assert "not one" in refused(file, (tmp_path / "a.npz").read_bytes())


def test_legacy_files_that_torch_does_not_write(file):
  tensor = {"a": tf.tensor(VALUES)}
  assert "not one that torch.save" in refused(file, pickle.dumps({"a": 1}))
  assert "not one" in refused(file, tf.legacy(tensor, magic=1))
  assert "protocol" in refused(file, tf.legacy(tensor, protocol=1000))
  for keys in ([], ["0", "0"], ["1"], [0], 3, {"0": 0, "1": 0}):
    refused(file, tf.legacy(tensor, keys=keys))


def test_a_damaged_zip_file_is_refused_or_read_right(file):
  data = tf.zipped({"a": tf.tensor(VALUES), "h": tf.tensor(
      VALUES.astype(ml_dtypes.bfloat16))})
  expected = read(file, data)
  for end in range(0, len(data), 5):
    refused(file, data[:end])
  read_right = 0
  for i in range(0, len(data), 2):
    damaged = bytearray(data)
    damaged[i] ^= 1 << i // 2 % 8
    try:
      content = read(file, bytes(damaged))
    except errors.WeightsError:
      continue
    read_right += 1
    assert {k: v.tobytes() for k, v in content.items()} == {
        k: v.tobytes() for k, v in expected.items()}, i
  assert 0 < read_right < len(data) / 4


def test_a_damaged_legacy_file_never_ends_in_a_traceback(file):
  """The format has no checksum: damaged values are not detected."""
  data = tf.legacy({"a": tf.tensor(VALUES), "b": tf.tensor(VALUES[:3])})
  for end in range(0, len(data), 2):
    refused(file, data[:end])
  for i in range(len(data)):
    damaged = bytearray(data)
    damaged[i] ^= 1 << i % 8
    try:
      read(file, bytes(damaged))
    except errors.WeightsError as error:
      assert str(error).isprintable()
