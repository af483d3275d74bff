"""Where the time of a program goes, from a profile of jax.

A profile has the times of the instructions of the compiled program. The
program's text says what each of them computes, and `jax.named_scope` of which
part of the model: Flax opens a scope of a module's name.
"""

import collections
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from metaformer_jax import errors
from metaformer_jax.preflight import hlo


class Operation(NamedTuple):
  """An instruction of the program, and its time in a call.

  Attributes:
    name: of the instruction; empty for what belongs to none, as copies between
      the host and a GPU.
    kind: a key of `_KINDS` or `_CUSTOM`, "grouped convolution", "copy",
      "elementwise", "control" or "other".
    phase: "forward", "backward" or "update"; of a prediction "forward".
    part: of the model, as "stage1/mlp", blocks summed; or "augment",
      "optimizer", "average"; or "other".
    ms: milliseconds of a call, without those of instructions within it.
  """

  name: str
  kind: str
  phase: str
  part: str
  ms: float


# The first kind of which an instruction, or anything that is fused into it, has
# an opcode. Those that compute nothing else only move data.
_KINDS = {
    "collective": {"all-gather", "all-reduce", "all-to-all",
                   "collective-permute", "reduce-scatter",
                   "ragged-all-to-all"},
    "convolution": {"convolution"},
    "matrix product": {"dot", "ragged-dot"},
    "pooling": {"reduce-window", "select-and-scatter"},
    "sort, gather, scatter": {"sort", "gather", "scatter", "topk"},
    "reduction": {"reduce"},
}
_MOVES = {"bitcast", "bitcast-convert", "broadcast", "concatenate", "constant",
          "copy", "copy-done", "copy-start", "dynamic-slice",
          "dynamic-update-slice", "fusion", "get-tuple-element", "iota", "pad",
          "parameter", "reshape", "reverse", "slice", "transpose", "tuple"}
# Libraries that custom calls name.
_CUSTOM = {"attention": "fmha", "convolution": "conv",
           "matrix product": "gemm|matmul|dot|blas",
           "sort, gather, scatter": "sort|topk"}

# Scopes that are not parts: functions, and what jax adds.
_NO_PART = re.compile(
    r"[A-Z_].*|.*[.<(].*|cond|while|body|scan|pjit|closed_call|checkpoint|remat"
    r"|rematted_computation|custom_[jv]*p_call.*|branch_\d+_fun|shard_map")


def read(folder: pathlib.Path, text: str, n_calls: int) -> list[Operation]:
  """The operations of a profile, the slowest ones first.

  Args:
    folder: of the profile, which has one.
    text: of the compiled program.
    n_calls: of the program in the profile.

  Raises:
    ConfigError: the profile has no times of the program, as where the device's
      profiler cannot be used.
  """
  path = max(folder.rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
  module = hlo.Module(text)
  known, total = module.instructions(), collections.Counter()
  name = re.match(r"HloModule ([\w.\-]+)", text)[1]
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      total.update(_own_times(_events(plane.name, line, name)))
  if not total:
    raise errors.ConfigError(f"--trace: {path} has no times of {name}: the "
                             "device's profiler is not available")
  training = is_training(text)
  return sorted(
      (Operation(op, *classify(module, known.get(op), training),
                 ns / 1e6 / n_calls)
       for op, ns in total.items()), key=lambda o: -o.ms)


def by(operations: Iterable[Mapping[str, Any]], *keys: str,
       unit: str = "ms") -> list[dict[str, Any]]:
  """Sums: rows with the keys, the unit and "share", the largest first.

  Args:
    operations: as `Operation._asdict`.
    *keys: fields of an operation to group by.
    unit: the field that is summed.
  """
  total = collections.Counter()
  for operation in operations:
    total[tuple(operation[key] for key in keys)] += operation[unit]
  whole = sum(total.values())
  return [dict(zip(keys, values)) | {unit: amount, "share": amount / whole}
          for values, amount in total.most_common()]


def _events(plane: str, line: Any,
            module: str) -> Iterator[tuple[float, float, str]]:
  """(start, end, instruction) of the events of a module on a line, in ns."""
  for event in line.events:
    stats = dict(event.stats)
    if "hlo_op" in stats:  # CPU and GPU.
      if stats.get("hlo_module", module) != module:
        continue
      name = stats["hlo_op"]
    elif line.name == "XLA Ops":  # TPU: "%fusion.1 = ...".
      name = re.match(r"%?([\w.\-]*)", event.name)[1]
    elif plane.startswith("/device:GPU") and line.name.startswith("Stream"):
      name = ""
    else:
      continue
    yield event.start_ns, event.start_ns + event.duration_ns, name


def _own_times(events: Iterable[tuple[float, float, str]]) -> dict[str, float]:
  """Times of instructions, without those of the ones that run within them.

  Kernels of a GPU's stream overlap a little: the later one has this time.
  """
  own, open_events = collections.Counter(), []
  for start, end, name in sorted(events, key=lambda e: (e[0], -e[1])):
    own[name] += end - start
    while open_events and open_events[-1][0] <= start:
      open_events.pop()
    if open_events:
      last, outer = open_events[-1]
      own[outer] -= min(end, last) - start
    open_events.append((end, name))
  return own


def classify(module: hlo.Module, instruction: hlo.Instruction | None,
             training: bool) -> tuple[str, str, str]:
  """(kind, phase, part) of an instruction, as in `Operation`.

  Args:
    module: the compiled program.
    instruction: one of it; None for what belongs to none.
    training: whether the program is a training step (`is_training`).
  """
  if instruction is None:
    return "other", "update" if training else "forward", "other"
  inside = list(module.fused(instruction))
  scope = next(filter(None, map(_scope, (instruction, *reversed(inside)))), "")
  return _kind(instruction, inside), *_place(scope, training)


def is_training(text: str) -> bool:
  """Whether the text of a program is that of a training step."""
  return "transpose(jvp(" in text


def _scope(i: hlo.Instruction) -> str:
  found = re.search(r'op_name="([^";]*)', i.line)
  return found[1] if found else ""


def _kind(i: hlo.Instruction, inside: list[hlo.Instruction]) -> str:
  if i.opcode in ("conditional", "while"):  # What is in them is apart.
    return "control"
  if i.opcode == "custom-call":
    target = re.search(r'custom_call_target="([^"]*)"', i.line)
    return next((kind for kind, pattern in _CUSTOM.items() if target
                 and re.search(pattern, target[1], re.IGNORECASE)), "other")
  opcodes = {inner.opcode.removesuffix("-start").removesuffix("-done")
             for inner in inside}
  kind = next((kind for kind, names in _KINDS.items() if opcodes & names), None)
  if kind == "convolution" and any(
      re.search(r"(feature|batch)_group_count=(?!1\b)", inner.line)
      for inner in inside):
    return "grouped convolution"
  if kind == "pooling" and not any(
      re.search(r"reduce_window|select_and", _scope(inner))
      for inner in inside):
    return "reduction"  # XLA divides large ones into windows.
  if kind:
    return kind
  return "copy" if opcodes <= _MOVES else "elementwise"


def _place(scope: str, training: bool) -> tuple[str, str]:
  """The phase and the part of an operation's scope.

  "jit(step)/transpose(jvp(MetaFormer))/stage1/block1/mlp/fc1/dot_general" is
  ("backward", "stage1/mlp").
  """
  if "transpose(" in scope:
    phase = "backward"
  else:
    phase = "forward" if "jvp(" in scope or not training else "update"
  parts = []
  for name in scope.split("/")[:-1]:  # The last one is the operation.
    while wrapped := re.fullmatch(r"(?:transpose|jvp|vmap|remat)\((.*)\)",
                                  name):
      name = wrapped[1]
    if name and not _NO_PART.fullmatch(name):
      parts.append(name)
  parts = [name for name in parts
           if name != "backbone" and not re.fullmatch(r"block\d+", name)]
  return phase, "/".join(parts[:2]) or "other"
