"""Reads loops and collectives from the text of a compiled program.

The compiler's own counts include the body of a loop only once, and say nothing
about communication; the text has the trip counts and the collectives.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Bits per value.
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64,
         "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_LAYOUT = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]"
                     r"(?:\{([\d,]*)(?::([^}]*))?\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition|body|true_computation|"
                     r"false_computation)=%?([\w.\-]+)|"
                     r"branch_computations=\{([^}]*)\}")
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute",
                "ragged-all-to-all", "reduce-scatter")
# Instructions that move no data themselves.
_FREE = {"after-all", "bitcast", "call", "conditional", "constant",
         "get-tuple-element", "parameter", "tuple", "while"}


class Instruction(NamedTuple):
  """One line of the text: name = type opcode(operands), attributes."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  line: str


class Collective(NamedTuple):
  """A collective operation, with the number of times it runs in a step.

  Attributes:
    kind: "all-reduce", ...
    dtype: of most of its bytes.
    count: how often it runs in a step.
    n_bytes: size of a chip's operands in one run.
    group: number of chips that communicate with each other.
  """

  kind: str
  dtype: str
  count: int
  n_bytes: int
  group: int

  @property
  def sent_bytes(self) -> float:
    """A lower bound on the bytes that a chip sends in a step."""
    others = (self.group - 1) / self.group
    factor = {"all-gather": self.group - 1, "all-reduce": 2 * others,
              "collective-permute": 1.0}.get(self.kind, others)
    return self.count * factor * self.n_bytes


class Module:
  """A compiled program, parsed from `compiled.as_text()`."""

  def __init__(self, text: str):
    self._computations, self._entry = _parse(text)

  def instructions(self) -> dict[str, Instruction]:
    """All instructions by name, those inside fusions and loops included."""
    return {i.name: i for computation in self._computations.values()
            for i in computation}

  def fused(self, i: Instruction) -> Iterator[Instruction]:
    """An instruction, and those of what it calls, if anything."""
    yield i
    for name in _called(i):
      for inner in self._computations.get(name, ()):
        yield from self.fused(inner)

  def loop_factor(self) -> float:
    """Ratio of the bytes accessed in a step to those with each loop run once.

    Both are counted from the types of operands and results in the text, outside
    of fusions. A loop without a constant trip count counts once; of branches,
    the mean counts.
    """
    once = every = 0
    for i, operands, turns, share in self.moves():
      amount = share * sum(map(type_bytes, (i.type, *operands)))
      once, every = once + amount, every + turns * amount
    return every / once if once else 1.0

  def moves(self) -> Iterator[tuple[Instruction, list[str], int, float]]:
    """Instructions that read or write memory, outside of fusions.

    Yields:
      The instruction, the types of its operands, how often it runs in a step,
      and how probable that is: below 1 within branches.
    """
    for name, turns, share in self._runs(within_fusions=False):
      types = {i.name: i.type for i in self._computations[name]}
      for i in self._computations[name]:
        if i.opcode not in _FREE and not i.opcode.endswith("-done"):
          yield i, [types[o] for o in i.operands if o in types], turns, share

  def collectives(self, n_devices: int) -> list[Collective]:
    """All collectives; those of the same kind and size are one entry."""
    found = {}
    for name, turns, _ in self._runs(within_fusions=True):
      computation = self._computations[name]
      types = {i.name: i.type for i in computation}
      for i in computation:
        kind = i.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
          continue
        operands = " ".join(types.get(o, "") for o in i.operands)
        key = (kind, _widest_dtype(operands), type_bytes(operands),
               _group_size(i.line, n_devices))
        found[key] = found.get(key, 0) + turns
    return sorted(Collective(kind, dtype, count, n_bytes, group)
                  for (kind, dtype, n_bytes, group), count in found.items())

  def _runs(self, within_fusions: bool) -> Iterator[tuple[str, int, float]]:
    """Each computation, once for each call site.

    Yields:
      Its name, how often it runs in a step if all branches do, and how probable
      that is if each branch is as probable.
    """
    waiting = [(self._entry, 1, 1.0)]
    while waiting:
      name, turns, share = waiting.pop()
      yield name, turns, share
      for i in self._computations[name]:
        if i.opcode == "fusion" and not within_fusions:
          continue
        inner = turns * (self._trip_count(i) if i.opcode == "while" else 1)
        branches = list(_called(i))
        part = share / len(branches) if i.opcode == "conditional" else share
        for called in branches:
          if called in self._computations and not (
              i.opcode in _COLLECTIVES or "reduce" in i.opcode):
            waiting.append((called, inner, part))

  def _trip_count(self, loop: Instruction) -> int:
    """Trip count of a `while` that counts to a constant; 1 for others."""
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    lines = {i.name: i for i in self._computations.get(
        condition[1] if condition else "", ())}
    root = next(reversed(lines.values()), None)
    if root is None or root.opcode != "compare" or (
        "direction=LT" not in root.attributes):
      return 1
    limits = [lines[o] for o in root.operands if o in lines]
    for limit in limits:
      value = re.search(r"constant\((\d+)\)", limit.line)
      if limit.opcode == "constant" and value:
        return int(value[1])
    return 1


def type_bytes(text: str) -> int:
  """Size of one or several types: "(f32[8,4]{1,0}, s32[])" has 132 bytes."""
  total = 0
  for kind, shape in _ARRAY.findall(text):
    bits = _BITS.get(kind)
    if bits is None:  # s32, u8, f8e4m3fn, s4, ...
      width = re.match(r"[a-z]+(\d+)", kind)
      bits = int(width[1]) if width else 0
    total += bits * math.prod(int(n) for n in shape.split(",") if n) // 8
  return total


def hbm_bytes(i: Instruction, operands: Sequence[str]) -> int:
  """Bytes that an instruction reads from and writes to the chip's main memory.

  What the compiler has placed in the memory next to the cores (S(1) in a
  layout) is left out, and arrays count with the padding of their tiles. Of a
  copy or a slice that is started, as those into that memory, the part that is
  copied counts, once at either end.

  Args:
    i: an instruction outside of fusions.
    operands: the types of its operands.
  """
  if i.opcode in ("copy-start", "slice-start"):
    found = list(_LAYOUT.finditer(i.type))
    source, copied = (found[1], found[0]) if i.opcode == "copy-start" else (
        found[0], found[-2])
    return _padded_bytes(copied) * sum(
        "S(" not in (end[4] or "") for end in (source, copied))
  return sum(_padded_bytes(array) for text in (i.type, *operands)
             for array in _LAYOUT.finditer(text)
             if "S(" not in (array[4] or ""))


def _padded_bytes(array: re.Match) -> int:
  """Size of an array with its layout: kind[shape]{minor to major:T(tile)}."""
  kind, shape, order, tiles = array.groups()
  shape = [int(n) for n in shape.split(",") if n]
  tile = re.match(r"T\(([\d,]+)\)", tiles or "")
  if tile and order and shape:
    minor = [int(axis) for axis in order.split(",")]
    sides = [int(n) for n in tile[1].split(",")][::-1]
    for axis, side in zip(minor, sides):
      shape[axis] = -(-shape[axis] // side) * side
  return type_bytes(f"{kind}[{','.join(map(str, shape))}]")


def _widest_dtype(types: str) -> str:
  """The dtype with most of the bytes."""
  amounts = {}
  for kind, shape in _ARRAY.findall(types):
    amounts[kind] = amounts.get(kind, 0) + type_bytes(f"{kind}[{shape}]")
  return max(amounts, key=amounts.get, default="")


def _group_size(line: str, n_devices: int) -> int:
  """Devices per group, in any of the three notations."""
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return match[1].count(",") + 1
  if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
    return int(match[2])
  if match := re.search(
      r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
    return math.prod(int(sizes.get(axis, 1)) for axis in
                     re.findall(r"'([^']+)'", match[2])) or n_devices
  return n_devices


def _called(i: Instruction) -> Iterator[str]:
  for one, several in _CALLED.findall(i.attributes):
    yield from [one] if one else _NAME.findall(several)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns the computations by name, and the name of the entry computation."""
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
    if header and not line.startswith("HloModule"):
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and (parsed := _instruction(line)):
      current.append(parsed)
  return computations, entry


def _instruction(line: str) -> Instruction | None:
  match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
  if not match:
    return None
  rest = re.sub(r"/\*.*?\*/", "", line[match.end():])
  end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _closing("(" + rest) - 1
  return Instruction(match[1], kind, opcode,
                     tuple(_NAME.findall(rest[:end])), rest[end + 1:], line)


def _closing(text: str) -> int:
  """Index of the parenthesis that closes the one at the start of the text."""
  depth = 0
  for match in re.finditer(r"[()]", text):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.start()
  return len(text) - 1
