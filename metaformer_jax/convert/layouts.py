"""Converts PyTorch tensors to Flax variables and back, by `rules`.

Our flat names are like "params/stage1/block1/norm1/scale": the collection, then
the path of the module and its leaf.
"""

import re
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Mapping,
  Sequence,
)
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from metaformer_jax import errors
from metaformer_jax.convert import detection, rules, segmentation, torchvision

Tensors = Mapping[str, np.ndarray]
# (flat name, array, shape of the target) -> adapted array, or None to omit it.
Adapt = Callable[[str, np.ndarray, tuple[int, ...]], np.ndarray | None]


class Laying(NamedTuple):
  """How the axes of a leaf differ in PyTorch; the functions are inverses."""

  to_flax: Callable[[np.ndarray], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]


def _matrix(x: np.ndarray) -> np.ndarray:
  """[out, in], or [out, in, 1, 1] of a convolution, -> [in, out]."""
  return x.reshape(x.shape[:2]).T if x.shape[2:] == (1, 1) else x.T


LAYINGS: dict[str, Laying] = {
    "same": Laying(lambda x: x, lambda x: x),
    "oihw": Laying(lambda x: x.transpose(2, 3, 1, 0),
                   lambda x: x.transpose(3, 2, 0, 1)),
    "oi": Laying(_matrix, lambda x: x.T),
    "oi11": Laying(_matrix, lambda x: x.T[:, :, None, None]),
    "oc77": Laying(
        lambda x: x.reshape(len(x), -1, 7, 7).transpose(2, 3, 1, 0).reshape(
            -1, len(x)),
        lambda x: x.reshape(7, 7, -1, x.shape[1]).transpose(3, 2, 0, 1).reshape(
            x.shape[1], -1)),
    "1chw": Laying(lambda x: x.squeeze(0).transpose(1, 2, 0),
                   lambda x: x.transpose(2, 0, 1)[None]),
    "11c": Laying(lambda x: x.reshape(-1), lambda x: x[None, None]),
    "count": Laying(lambda x: x.astype(np.int32), lambda x: x.astype(np.int64)),
}


class Entry(NamedTuple):
  """Names and axes of one of our leaves in a layout.

  Several names are its equal parts along the last axis; none, if the layout
  does not have it.
  """

  keys: tuple[str, ...]
  laying: str

  def to_flax(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
    """Our leaf of the tensors; ValueError if their shapes do not fit."""
    parts = [LAYINGS[self.laying].to_flax(tensor) for tensor in tensors]
    if len({part.shape for part in parts}) > 1:
      raise ValueError("the parts have different shapes")
    return parts[0] if len(parts) == 1 else np.concatenate(parts, -1)

  def to_torch(self, leaf: np.ndarray) -> dict[str, np.ndarray]:
    """Inverse of `to_flax`: the tensors by their names."""
    parts = np.split(leaf, len(self.keys), -1) if self.keys[1:] else [leaf]
    return {key: LAYINGS[self.laying].to_torch(part)
            for key, part in zip(self.keys, parts)}


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
  """{"params": {"norm": {"scale": x}}} -> {"params/norm/scale": x}."""
  return traverse_util.flatten_dict(variables, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `flatten`."""
  return traverse_util.unflatten_dict(flat, sep="/")


def entries(family: str, layout: str, names: Iterable[str]) -> dict[str, Entry]:
  """The layout's entry for each of our flat names that it has."""
  paths = {name: name.partition("/")[2] for name in names}
  embedded = _stages_with("pos_embed", paths.values())
  found = {}
  for rule in _readable(family)[layout]:
    leaves = rules.KINDS.get(rule.kind)
    for ours, theirs, laying in leaves or ((None, None, rule.kind),):
      template = rule.path if ours is None else f"{rule.path}/{ours}"
      pattern = re.compile(re.sub(r"{(\w)}", r"(?P<\1>\\d+)", template))
      keys = (rule.key,) if isinstance(rule.key, str) else rule.key
      if theirs is not None:
        keys = tuple(f"{key}.{theirs}" for key in keys)
      for name, path in paths.items():
        match = pattern.fullmatch(path)
        if not match or name in found:
          continue
        numbers = {k: int(v) for k, v in match.groupdict().items()}
        if rule.where and not _holds(rule.where, numbers, paths.values()):
          continue
        numbers = _derived(numbers, embedded)
        found[name] = Entry(tuple(key.format(**numbers) for key in keys),
                            laying)
  return found


def _holds(where: str, numbers: Mapping[str, int],
           paths: Iterable[str]) -> bool:
  """Whether a model with these paths fulfils `Rule.where`."""
  path = where.removeprefix("not ").format(**numbers)
  found = any(p == path or p.startswith(f"{path}/") for p in paths)
  return found != where.startswith("not ")


def _stages_with(what: str, paths: Iterable[str]) -> set[int]:
  pattern = re.compile(rf"(?:.*/)?stage(\d+)/{what}\b")
  matches = map(pattern.match, paths)
  return {int(match[1]) for match in matches if match}


def _derived(numbers: dict[str, int], embedded: set[int]) -> dict[str, int]:
  """The numbers that a key may use: s, b, i, and s0, b0, i0 counted from 0.

  In the official PoolFormer's list `network`, `embed` is the index of stage s's
  position embedding, if it has one, `blocks` that of its blocks, and `down`
  that of the downsampling before it.
  """
  derived = numbers | {f"{key}0": n - 1 for key, n in numbers.items()}
  if "s" in numbers:
    s = numbers["s"]
    before = sum(stage < s for stage in embedded)
    derived |= {"down": 2 * s - 3 + before,
                "embed": 2 * s - 2 + before,
                "blocks": 2 * s - 2 + before + (s in embedded)}
  return derived


def recognize(family: str | None, keys: Iterable[str],
              names: Iterable[str]) -> str:
  """The layout that has most of the keys; "flax" for our own flat names.

  `family` None has our own names only.

  Raises:
    WeightsError: no layout has any of the keys.
  """
  keys, names = set(keys), list(names)
  shared = {"flax": len(keys.intersection(names))}
  for layout in _readable(family):
    theirs = {key for entry in entries(family, layout, names).values()
              for key in entry.keys}
    shared[layout] = len(keys & theirs)
  best = max(shared, key=shared.get)
  if not shared[best]:
    shown = ", ".join(sorted(keys)[:3])
    raise errors.WeightsError(
        f"no tensor has a name that this model uses; its layouts are "
        f"{', '.join(sorted(['flax', *_rules(family)]))}, the file has "
        f"{shown}, ...")
  return best


def to_flax(family: str | None, tensors: Tensors, target: Mapping[str, Any],
            adapt: Adapt = lambda name, value, shape: value, *,
            unwanted: Collection[str] = (),
            optional: Collection[str] = ()) -> dict[str, Any]:
  """Converts a whole model; each tensor is used once, each target filled.

  Args:
    family: `ModelSpec.family`; None for weights with our names only.
    tensors: named as in any layout of the family.
    target: variables of the model, or their shapes and dtypes.
    adapt: called with each flat name, converted array and shape in the target.
      If it returns None, the result omits the array.
    unwanted: flat names of the target that the result omits; the tensors may
      have them.
    optional: flat names of a head, which the result omits if the tensors have
      none of them, with what else belongs to the head in their layout.

  Returns:
    Variables of numpy arrays.

  Raises:
    WeightsError: one line that lists every tensor that is missing, unknown, or
      of another shape or type.
  """
  target = flatten(target)
  layout = recognize(family, tensors, target)
  if layout == "flax":
    where = {name: Entry((name,), "same") for name in target}
  else:
    where = entries(family, layout, target)
  if layout.startswith("huggingface"):
    tensors = {key: tensor for key, tensor in tensors.items()
               if not rules.UNUSED.fullmatch(key)}
  elif layout == "torchvision":
    tensors = torchvision.arranged(tensors, target)
  unnamed = target.keys() - where
  if unnamed:
    raise errors.WeightsError(
        f"the {layout} layout has no name for {', '.join(sorted(unnamed))}")
  used = {key for entry in where.values() for key in entry.keys}
  unused = [f"{key} has no place" for key in sorted(tensors.keys() - used)]
  omitted = {*unwanted, *_head(where, tensors, optional)}
  problems, made = [], {}
  for name, want in target.items():
    if name in omitted:
      continue
    value, wrong = _leaf(name, where[name], tensors, want, adapt)
    problems += wrong
    if value is not None:
      made[name] = np.asarray(value, want.dtype, order="C")
  if problems or unused:
    raise errors.WeightsError(
        f"in the {layout} layout, {len(problems) + len(unused)} tensors do not "
        f"fit the model: {'; '.join(problems + unused)}")
  return unflatten(made)


def _head(where: Mapping[str, Entry], tensors: Tensors,
          optional: Collection[str]) -> set[str]:
  """The names of a head that the tensors do not have; see `to_flax`."""
  if not optional or any(key in tensors for name in optional
                         for key in where[name].keys):
    return set()
  return {*optional, *(name for name, entry in where.items() if not entry.keys)}


def _leaf(name: str, entry: Entry, tensors: Tensors, want: Any,
          adapt: Adapt) -> tuple[np.ndarray | None, list[str]]:
  """One array of the result, or None to omit it; and what is wrong."""
  missing = [key for key in entry.keys or [name] if key not in tensors]
  if missing and entry.laying == "count":  # PyTorch before 0.4.1 had none.
    return np.zeros(want.shape, want.dtype), []
  if missing:
    return None, [f"{key} is missing" for key in missing]
  found = {key: tensors[key] for key in entry.keys}
  dtype = np.dtype(want.dtype)
  wrong = [f"{key} is {tensor.dtype}, not {dtype}"
           for key, tensor in found.items() if tensor.dtype.kind != dtype.kind]
  if wrong:
    return None, wrong
  try:
    value = adapt(name, entry.to_flax(list(found.values())), want.shape)
    fits = value is None or value.shape == want.shape
  except ValueError:  # A tensor has another rank, or the parts differ.
    fits = False
  if fits:
    return value, []
  need = entry.to_torch(_placeholder(want))
  return None, [
      f"{key} is {list(tensor.shape)}, not {list(need[key].shape)}"
      for key, tensor in found.items() if tensor.shape != need[key].shape]


def _rules(family: str | None) -> Mapping[str, Any]:
  known = rules.RULES | segmentation.RULES | detection.RULES
  return known.get(family, {})  # Others have our own names only.


def _readable(family: str | None) -> Mapping[str, Any]:
  read_only = rules.READ_ONLY | torchvision.READ_ONLY
  return {**_rules(family), **read_only.get(family, {})}


def check_layout(family: str | None, layout: str) -> None:
  """Raises WeightsError if the family's weights have no such layout."""
  known = [*_rules(family), "flax"]
  if layout not in known:
    raise errors.WeightsError(
        f"layout {layout!r} is not known for this model"
        f"{errors.did_you_mean(layout, known)}")


def to_torch(family: str | None, variables: Mapping[str, Any], layout: str,
             ) -> dict[str, np.ndarray]:
  """Inverse of `to_flax`: tensors by the names of a layout.

  Raises:
    WeightsError: the family has no such layout, or the layout has no name for
      some of the variables.
  """
  flat = flatten(variables)
  if layout == "flax":
    return {name: np.asarray(value) for name, value in flat.items()}
  check_layout(family, layout)
  where = entries(family, layout, flat)
  unnamed = flat.keys() - where
  if unnamed:
    raise errors.WeightsError(
        f"the {layout} layout has no name for {', '.join(sorted(unnamed))}")
  return {
      key: np.asarray(tensor, order="C") for name, value in flat.items()
      for key, tensor in where[name].to_torch(np.asarray(value)).items()}


def _placeholder(like) -> np.ndarray:
  """An array with this shape that needs no memory."""
  return np.broadcast_to(np.zeros((), like.dtype), like.shape)
