"""Files that try to run code, to write elsewhere or to use all memory.

`make(folder, canary)` writes them. Each is (name of a loader in
test_security.py, path); a payload that ran would create the canary, or write
outside the folder.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib

import costly_pickles
import numpy as np
import torch_format as tf

from metaformer_jax.checkpoints import manifest

VALUES = np.arange(6, dtype=np.float32)


def live(module, name, *args, state=None):
  return tf.Object(tf.Global(module, name), args, state)


class Shell:
  """Runs a command when it is unpickled."""

  def __init__(self, command: str):
    self._command = command

  def __reduce__(self):
    return os.system, (self._command,)


def pickles(canary: pathlib.Path) -> dict:
  """Objects and programs that pickle would run."""
  touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
  shell = live("os", "system", touch)
  inner = pickle.dumps(Shell(touch))
  tensor = tf.tensor(VALUES)
  return {
      "system": shell,
      "posix": live("posix", "system", touch),
      "eval": live("builtins", "eval", code),
      "exec": live("__builtin__", "exec", code),
      "popen": live("subprocess", "Popen", ["touch", str(canary)]),
      "import": live("importlib", "import_module", "antigravity"),
      "getattr": live("builtins", "getattr", live("os", "path"), "os"),
      "nested": {"state_dict": {"a": [tensor, ({"b": shell},)]}},
      "state": live("argparse", "Namespace", state={"a": shell}),
      "metadata": live("collections", "OrderedDict", state={"_m": shell}),
      "pairs": live("collections", "OrderedDict", [["a", shell]]),
      "hooks": live("torch._utils", "_rebuild_tensor_v2", tensor.args[0], 0,
                    (6,), (1,), False, shell),
      "parameter": live("torch._utils", "_rebuild_parameter", shell, True, {}),
      "size": live("torch", "Size", (shell,)),
      "from bytes": live("torch.storage", "_load_from_bytes", inner),
      "loads": live("pickle", "loads", inner),
      "numpy scalar": live("numpy.core.multiarray", "scalar",
                           live("numpy", "dtype", "O"), shell),
      "numpy object": np.array([Shell(touch)], object),
      "reconstructor": live("copyreg", "_reconstructor",
                            tf.Global("os", "system"), touch, touch),
      "dunder": live("argparse", "Namespace.__init__.__globals__"),
      "partial": live("functools", "partial", tf.Global("os", "system"), touch),
      "storage": tf.tensor(tf.Storage(VALUES, pid=(
          "storage", shell, "0", "cpu", 6)), 0, (6,), (1,)),
      "key": tf.tensor(tf.Storage(VALUES, pid=(
          "storage", tf.Global("torch", "FloatStorage"),
          f"../../..{canary}", "cpu", 6)), 0, (6,), (1,)),
      "INST": f"(S'{touch}'\nios\nsystem\n.".encode(),
      "OBJ": b"(cos\nsystem\nX" + struct.pack("<I", len(touch))
             + touch.encode() + b"o.",
      "EXT": b"\x82\x01)R.",
      "PERSID": b"P" + touch.encode() + b"\n.",
      "huge tensor": tf.tensor(tf.Storage(VALUES, claimed_size=2**50), 0,
                               (2**50,), (1,)),
      "expanded": tf.tensor(tf.Storage(VALUES), 0, (2**20, 2**20), (0, 0)),
      "huge string": b"\x8d" + b"\xff" * 7 + b"\x7fa.",
      "deep": b")" + b"\x85" * 10**5 + b".",
      "laughs": b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1)
                                     for i in range(250)) + b".",
  }


def archives(canary: pathlib.Path) -> dict[str, bytes]:
  """Zip archives like those of torch.save, with members that it never has."""
  data = tf.dumps({"a": tf.tensor(VALUES)})
  up = "../" * 20 + str(canary)[1:]
  link = zipfile.ZipInfo("a/data/0")
  link.external_attr = 0o120777 << 16

  def made(*members, kind=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(
        buffer, "w", kind) as archive:
      warnings.simplefilter("ignore")  # About duplicate names.
      for name, content in members:
        archive.writestr(name, content)
    return buffer.getvalue()

  def overlapping(n):
    """n entries of a MiB, all of them the same bytes of the file."""
    one = made(("a/data/100", bytes(2**20)))
    start, end = one.rindex(b"PK\x01\x02"), one.rindex(b"PK\x05\x06")
    entries = b"".join(one[start:end].replace(b"100", b"%d" % (100 + i))
                       for i in range(n))
    return one[:start] + entries + struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, n, n, len(entries), start, 0)

  def directory(n):
    """n empty entries, all of them the same bytes of the file."""
    one = made(("a/000000", b""))
    start, end = one.rindex(b"PK\x01\x02"), one.rindex(b"PK\x05\x06")
    entries = b"".join(one[start:end].replace(b"000000", b"%06d" % i)
                       for i in range(n))
    return one[:start] + entries + struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, n % 2**16, n % 2**16, len(entries),
        start, 0)

  whole = made(("a/data.pkl", data), ("a/data/0", VALUES.tobytes()))
  lying = bytearray(whole)
  at = lying.rindex(b"PK\x01\x02")
  lying[at + 20:at + 28] = b"\xfe\xff\xff\xff" * 2  # Its sizes.
  zeros = bytes(2**22)
  return {
      "slip": made((f"{up}/data.pkl", data), (up, b"1")),
      "slip beside": made(("a/data.pkl", data), (up, b"1")),
      "absolute": made((f"{canary}/data.pkl", data), (str(canary), b"1")),
      "link": made(("a/data.pkl", data), (link, str(canary))),
      "twice": made(("a/data.pkl", tf.dumps(1)), ("a/data.pkl", data)),
      "two": made(("a/data.pkl", data), ("b/data.pkl", data)),
      "bomb": made(("a/data.pkl", zeros), kind=zipfile.ZIP_DEFLATED),
      "bomb beside": made(("a/data.pkl", data), ("a/data/0", zeros),
                          kind=zipfile.ZIP_BZIP2),
      "overlapping": overlapping(800).replace(b"data/100", b"data.pkl"),
      "lying": bytes(lying),
      "cut": whole[:-30],
      "many": made(*((f"a/{i}", b"") for i in range(3000))),
      "directory": directory(300_000),
      "npz": _npz(np.array([Shell(f"touch {canary}")], object)),
  }


def _npz(array):
  buffer = io.BytesIO()
  np.savez(buffer, a=array)
  return buffer.getvalue()


def _npy(array):
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


def tensors(canary: pathlib.Path) -> dict[str, bytes]:
  """Safetensors files with false headers."""

  def made(header, data=b"\0" * 24, size=None):
    if not isinstance(header, bytes):
      header = json.dumps(header).encode()
    return struct.pack(
        "<Q", len(header) if size is None else size) + header + data

  def one(dtype="F32", shape=(6,), offsets=(0, 24), name="a"):
    return {name: {"dtype": dtype, "shape": list(shape),
                   "data_offsets": list(offsets)}}

  return {
      "endless header": made(one(), size=2**60),
      "long header": made(b"{" + b" " * 1000, size=99_000_000),
      "deep header": made(b'{"a":' * 10_000),
      "overlap": made(one() | one(name="b")),
      "beyond": made(one(shape=(2**20,), offsets=(0, 2**22))),
      "before": made(one(offsets=(-24, 0))),
      "backwards": made(one(offsets=(24, 0))),
      "hole": made(one(shape=(3,), offsets=(12, 24))),
      "overflow": made(one(shape=(2**32, 2**32, 2**10))),
      "many sides": made(one(shape=(1,) * 10_000, offsets=(0, 4))),
      "objects": made(one(dtype="O")),
      "one name": made(json.dumps(one())[:-1].encode() + b", "
                    + json.dumps(one())[1:].encode()),
      "nothing": made(b"{}", size=2),
      "list": made(b'{"a": []}'),
      "path": made(one(name="../" * 9 + str(canary))),
  }


def others(canary: pathlib.Path) -> dict[str, bytes]:
  """Files that are not weights."""
  tar = io.BytesIO()
  with tarfile.open(fileobj=tar, mode="w") as archive:
    for name, kind in ((f"../../{canary.name}", tarfile.REGTYPE),
                       (str(canary), tarfile.REGTYPE),
                       ("link", tarfile.SYMTYPE)):
      info = tarfile.TarInfo(name)
      info.type, info.linkname = kind, str(canary)
      archive.addfile(info)
  return {
      "tar": tar.getvalue(), "tar.gz": gzip.compress(tar.getvalue()),
      "npy": _npy(np.array([Shell(f"touch {canary}")], object)),
      "pickle": pickle.dumps(Shell(f"touch {canary}")),
      "script": f"#!/bin/sh\ntouch {canary}\n".encode(),
      "python": f"open({str(canary)!r}, 'w')\n".encode(),
  }


def configs(canary: pathlib.Path) -> dict[str, bytes]:
  """JSON files that are not experiments."""
  code = f"__import__('os').system('touch {canary}')"
  texts = {
      "class": '{"__class__": {"__reduce__": ["os.system", "touch"]}}',
      "py/object": json.dumps({"py/object": "os.system", "model": code}),
      "key": json.dumps({"model": {code: 1}}),
      "code": json.dumps({"seed": code}),
      "depths": json.dumps({"model": {"depths": code}}),
      "task": json.dumps({"task": "os"}),
      "model": json.dumps({"model": {"name": "os:system"}}),
      "rules": json.dumps({"mesh": {"rules": [[code, code]]}}),
      "source": json.dumps({"data": {"source": str(canary)}}),
      "python": f"def get_config():\n  return {code}\n",
      "deep": "[" * 100_000, "deep object": '{"a":' * 500_000,
      "large": '{"seed": ' + " " * 2**21 + "1}",
      "digits": '{"seed": ' + "9" * 10**5 + "}",
      "NaN": '{"optim": {"base_lr": NaN}}',
      "infinite": '{"optim": {"base_lr": 1e999}}',
      "twice": '{"seed": 1, "seed": 2}', "cut": '{"seed": 1', "empty": "",
      "NUL": '{"data": {"path": "a\\u0000b"}}',
      "escape": '{"data": {"source": "\\u001b]0;title\\u0007"}}',
  }
  return {name: text.encode() for name, text in texts.items()} | {
      "latin": b'{"seed": "\xff"}', "utf-16": '{"seed": 1}'.encode("utf-16")}


def pictures(canary: pathlib.Path) -> dict[str, bytes]:
  """Images that need too much memory, or a program to render them."""

  def png(width, height, *chunks):
    def chunk(kind, data):
      return (struct.pack(">I", len(data)) + kind + data
              + struct.pack(">I", zlib.crc32(kind + data)))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*c) for c in [(b"IHDR", head), *chunks, (b"IEND", b"")])

  zeros = zlib.compress(bytes(2**24))
  return {
      "bomb": png(50_000, 50_000, (b"IDAT", zeros)),
      "line": png(2**31 - 1, 1, (b"IDAT", zeros)),
      "text": png(4, 4, (b"zTXt", b"a\0\0" + zeros), (b"IDAT", zeros)),
      "profile": png(4, 4, (b"iCCP", b"a\0\0" + zeros)),
      "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
             + f"(%pipe%touch {canary}) (w) file\n".encode(),
      "svg": f'<svg><script href="{canary}"/></svg>'.encode(),
  }


def steps(folder: pathlib.Path, canary: pathlib.Path) -> list[pathlib.Path]:
  """Saved steps with paths outside their folder, or false manifests."""

  def made(name, **changes):
    step = folder / name
    (step / "params").mkdir(parents=True)
    (step / "params" / "data").write_bytes(VALUES.tobytes())
    found = manifest.write(
        step, step=1, record={"position": 1}, metrics={}, data={},
        tree={})
    facts = {**dataclasses.asdict(found), **changes,
             "version": manifest.VERSION}
    text = json.dumps(facts, indent=1, sort_keys=True)  # Its digest is known.
    facts["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (step / manifest.NAME).write_text(
        json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return step

  sound = made("1")
  link = folder / "2"
  link.symlink_to(sound)
  inside, pipe, deep = made("file link"), made("step pipe"), made("deep step")
  (inside / "params" / "data").unlink()
  (inside / "params" / "data").symlink_to("/etc/hostname")
  (pipe / "params" / "data").unlink()
  os.mkfifo(pipe / "params" / "data")
  (deep / manifest.NAME).write_text("[" * 100_000)
  above = made("folder link")
  (above / "state").symlink_to("/etc")
  names = {"params/data": [24, "0"], f"../../../{canary}": [0, ""]}
  return [link, inside, pipe, deep, above, made("names", files=names),
          made("code", step="__import__('os').getpid()"),
          made("sizes", files={"params/data": [-1, "0"]}),
          made("types", tree=[["os.system"]])]


def annotations(canary: pathlib.Path) -> dict[str, bytes]:
  """JSON files that are not COCO's, or name files elsewhere."""

  def coco(name="a.jpg", box=(1, 1, 2, 2), more=""):
    tree = {"images": [{"id": 1, "file_name": name, "width": 9, "height": 9}],
            "categories": [{"id": 1, "name": "a"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1,
                             "bbox": box}]}
    return (json.dumps(tree)[:-3] + more + "}]}").encode()

  outline = ', "segmentation": '
  return configs(canary) | {
      "path absolute": coco(str(canary)), "path up": coco("../" * 9 + "x"),
      "deep outline": coco(more=outline + "[" * 10**6),
      "wide image": coco().replace(b'"width": 9', b'"width": 1e18'),
      "wide box": coco(box=(0, 0, 1e308, 1e308)),
      "long polygon": coco(more=outline + f"[[{'9e99,' * 99_999}1]]"),
      "many images": b'{"images": [' + b"{}," * 10**5 + b"{}]}",
      "twice inside": coco(more=', "bbox": [0, 0, 1, 1]')}


def make(folder: pathlib.Path, canary: pathlib.Path) -> list[tuple[str, str]]:
  """Writes them all: (loader, path)."""
  files = {}
  for name, program in pickles(canary).items():
    files["weights", f"{name}.zip.pth"] = tf.zipped(program)
    if name != "numpy object" and not isinstance(program, bytes):
      files["weights", f"{name}.4.pth"] = tf.zipped(program, protocol=4)
    files["weights", f"{name}.pth"] = tf.legacy(program)
  for name, program in costly_pickles.make().items():
    files["weights", f"{name}.zip.pth"] = tf.zipped(program)
  for kind, contents in (
      ("weights", archives(canary)), ("weights", tensors(canary)),
      ("weights", others(canary)), ("config", configs(canary)),
      ("coco", annotations(canary)),
      ("picture", pictures(canary))):
    files |= {(kind, f"{name}.{len(files)}"): data
              for name, data in contents.items()}
  made = []
  for (kind, name), data in files.items():
    path = folder / kind / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    made.append((kind, str(path)))
  made += [("step", str(path)) for path in steps(folder / "steps", canary)]
  for kind in ("weights", "config", "coco"):
    pipe = folder / kind / "pipe"
    os.mkfifo(pipe)
    (folder / kind / "device").symlink_to("/dev/zero")
    made += [(kind, str(pipe)), (kind, str(pipe.with_name("device")))]
  return made
