"""Pickles that take minutes, or hundreds of times their size, of a reader.

One that has no limits, such as `pickle` or ours before it had them.
"""

import struct


def make() -> dict[str, bytes]:
  """{name: program}; none has a state dict."""
  prime = 2**61 - 1  # Its multiples all have the hash 0.

  def long(value):
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)

  def put(i):
    return b"r" + struct.pack("<I", i)

  def get(i):
    return b"j" + struct.pack("<I", i)

  def text(value, n=1):
    return b"X" + struct.pack("<I", n * len(value)) + value * n

  n = 50_000
  colliding = [long(i * prime) for i in range(n)]
  huge = b"\x8b" + struct.pack("<i", 2**22) + b"\x7f" * 2**22
  tensor = (b"ctorch._utils\n_rebuild_tensor_v2\n((" + text(b"storage")
            + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu")
            + b"K\x06tQK\x00(%st(%stt")
  return {
      "collisions": b"}(" + b"N".join(colliding) + b"Nu.",
      "memo collisions": b"N" + b"".join(b"p%d\n" % (i * prime)
                                        for i in range(n)) + b".",
      "lists": b"]" * 2 * 10**7 + b".",
      "marks": b"(" * 10**7 + b".",
      "names": b"(" + b"ctorch\nSize\n" * n + b"l.",
      # Its text has 2^99 characters.
      "laughing name": b"]q\x00" + b"".join(
          b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(99)) + b"]\x93.",
      "huge key": huge + put(0) + b"}(" + (get(0) + b"N") * n + b"u.",
      # Equal texts are compared character by character.
      "long keys": (text(b"a", 10**6) + put(0) + text(b"a", 10**6) + put(1)
                    + b"}(" + (get(0) + b"N" + get(1) + b"N") * n + b"u."),
      "wide calls": (b"(" + b"N" * 5 * 10**5 + b"t" + put(0)
                     + b"cargparse\nNamespace\n" + put(1)
                     + (get(1) + get(0) + b"R") * n + b"."),
      "wide storages": (b"(" + text(b"storage") + b"ctorch\nFloatStorage\n"
                        + text(b"0") + text(b"cpu") + b"K\x06"
                        + b"N" * 5 * 10**5 + b"t" + put(0)
                        + (get(0) + b"Q") * n + b"."),
      "huge sides": huge + put(0) + tensor % (get(0) * 16, b"K\x01" * 16)
                    + b"R.",
      "many sides": tensor % (b"K\x01" * 10**5, b"K\x01" * 10**5) + b"R.",
      "no stride": tensor % (long(10**12), b"K\x00") + b"R.",
      "empty tensors": (
          tensor.partition(b"\n((")[0] + b"\n" + put(0) + b"(("
          + (tensor % (b"K\x00" * 16, b"K\x00" * 16)).partition(b"\n((")[2]
          + put(1) + (get(0) + get(1) + b"R") * n + b"."),
  }
