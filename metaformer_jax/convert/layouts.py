"""Converts PyTorch tensors to Flax variables and back, by `rules`.

Our flat names are like "params/stage1/block1/norm1/scale": the collection, then
the path of the module and its leaf.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from metaformer_jax import errors
from metaformer_jax.convert import rules

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
    "1chw": Laying(lambda x: x.squeeze(0).transpose(1, 2, 0),
                   lambda x: x.transpose(2, 0, 1)[None]),
    "11c": Laying(lambda x: x.reshape(-1), lambda x: x[None, None]),
    "count": Laying(lambda x: x.astype(np.int32), lambda x: x.astype(np.int64)),
}


class Entry(NamedTuple):
  """Name and axes of one of our leaves in a layout."""

  key: str
  laying: str


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
  attention = _stages_with(r"block1/token_mixer/qkv", paths.values())
  found = {}
  for rule in rules.RULES[family][layout]:
    leaves = rules.KINDS.get(rule.kind)
    for ours, theirs, laying in leaves or ((None, None, rule.kind),):
      template = rule.path if ours is None else f"{rule.path}/{ours}"
      pattern = re.compile(re.sub(r"{(\w)}", r"(?P<\1>\\d+)", template))
      key = rule.key if theirs is None else f"{rule.key}.{theirs}"
      for name, path in paths.items():
        match = pattern.fullmatch(path)
        if not match or name in found:
          continue
        numbers = {k: int(v) for k, v in match.groupdict().items()}
        is_attention = numbers.get("s") in attention
        if rule.where == ("other" if is_attention else "attention"):
          continue
        found[name] = Entry(
            key.format(**_derived(numbers, embedded)), laying)
  return found


def _stages_with(what: str, paths: Iterable[str]) -> set[int]:
  matches = (re.match(rf"stage(\d+)/{what}\b", path) for path in paths)
  return {int(match[1]) for match in matches if match}


def _derived(numbers: dict[str, int], embedded: set[int]) -> dict[str, int]:
  """The numbers that a key may use: s, b, i, and s0, b0 counted from 0.

  In the official PoolFormer's list `network`, `embed` is the index of stage s's
  position embedding, if it has one, `blocks` that of its blocks, and `down`
  that of the downsampling before it.
  """
  derived = dict(numbers)
  if "b" in numbers:
    derived["b0"] = numbers["b"] - 1
  if "s" in numbers:
    s = numbers["s"]
    before = sum(stage < s for stage in embedded)
    derived |= {"s0": s - 1, "down": 2 * s - 3 + before,
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
  for layout in _rules(family):
    theirs = {e.key for e in entries(family, layout, names).values()}
    shared[layout] = len(keys & theirs)
  best = max(shared, key=shared.get)
  if not shared[best]:
    shown = ", ".join(sorted(keys)[:3])
    raise errors.WeightsError(
        f"no tensor has a name that this model uses; its layouts are "
        f"{', '.join(sorted(shared))}, the file has {shown}, ...")
  return best


def to_flax(family: str | None, tensors: Tensors, target: Mapping[str, Any],
            adapt: Adapt = lambda name, value, shape: value, *,
            unwanted: Collection[str] = ()) -> dict[str, Any]:
  """Converts a whole model; each tensor is used once, each target filled.

  Args:
    family: `ModelSpec.family`; None for weights with our names only.
    tensors: named as in any layout of the family.
    target: variables of the model, or their shapes and dtypes.
    adapt: called with each flat name, converted array and shape in the target.
      If it returns None, the result omits the array.
    unwanted: flat names of the target that the result omits; the tensors may
      have them.

  Returns:
    Variables of numpy arrays.

  Raises:
    WeightsError: one line that lists every tensor that is missing, unknown, or
      of another shape or type.
  """
  target = flatten(target)
  layout = recognize(family, tensors, target)
  if layout == "flax":
    where = {name: Entry(name, "same") for name in target}
  else:
    where = entries(family, layout, target)
  unnamed = target.keys() - where
  if unnamed:
    raise errors.WeightsError(
        f"the {layout} layout has no name for {', '.join(sorted(unnamed))}")
  used = {entry.key for entry in where.values()}
  unused = [f"{key} has no place" for key in sorted(tensors.keys() - used)]
  problems, made = [], {}
  for name, want in target.items():
    key, laying = where[name]
    if name in unwanted:
      continue
    if key not in tensors:
      if laying == "count":  # PyTorch before 0.4.1 did not save it.
        made[name] = np.zeros(want.shape, want.dtype)
      else:
        problems.append(f"{key} is missing")
      continue
    tensor, laying = tensors[key], LAYINGS[laying]
    if tensor.dtype.kind != np.dtype(want.dtype).kind:
      problems.append(f"{key} is {tensor.dtype}, not {np.dtype(want.dtype)}")
      continue
    try:
      value = adapt(name, laying.to_flax(tensor), want.shape)
      fits = value is None or value.shape == want.shape
    except ValueError:  # The tensor has another rank.
      fits = False
    if not fits:
      need = laying.to_torch(_placeholder(want)).shape
      problems.append(f"{key} is {list(tensor.shape)}, not {list(need)}")
    elif value is not None:
      made[name] = np.asarray(value, want.dtype, order="C")
  if problems or unused:
    raise errors.WeightsError(
        f"in the {layout} layout, {len(problems) + len(unused)} tensors do not "
        f"fit the model: {'; '.join(problems + unused)}")
  return unflatten(made)


def _rules(family: str | None) -> Mapping[str, Any]:
  return {} if family is None else rules.RULES[family]


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
      where[name].key: np.asarray(
          LAYINGS[where[name].laying].to_torch(np.asarray(value)), order="C")
      for name, value in flat.items()}


def _placeholder(like) -> np.ndarray:
  """An array with this shape that needs no memory."""
  return np.broadcast_to(np.zeros((), like.dtype), like.shape)
