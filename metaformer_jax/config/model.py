"""The section `config.model`, generated from the families' hyper-parameters.

It is flat: the union of the dataclasses in `models.settings`. If families
declare a name differently, the family of the named model decides.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from metaformer_jax.models import options, registry, settings


@dataclasses.dataclass(frozen=True)
class _Named:
  """The network. Hyper-parameters left at None are as the named model's."""

  name: str | None = options.option(
      None, "a name of metaformer_jax.list_models(), or an import path, "
      "module:name; None: that of config.init")
  dtype: str = options.option(
      "float32", "of the computation; parameters are float32",
      choices=("float32", "bfloat16"))

  def overrides(self) -> dict[str, Any]:
    """The hyper-parameters that are set: keywords for `create_model`.

    Without drop_path_rate if it is 0.
    """
    named = {f.name for f in dataclasses.fields(_Named)}
    return {k: v for k, v in vars(self).items()
            if k not in named and v is not None
            and (k, v) != ("drop_path_rate", 0)}


def _declarations() -> dict[str, dict[str, dataclasses.Field]]:
  """{hyper-parameter: {family: its declaration}}."""
  found: dict[str, dict[str, dataclasses.Field]] = {}
  for family, cls in settings.FAMILIES.items():
    for f in dataclasses.fields(cls):
      found.setdefault(f.name, {})[family] = f
  return found


def _union(declared: Mapping[str, dataclasses.Field]) -> tuple[Any, Any]:
  """Type and field of a hyper-parameter that several families may declare.

  The type has one alternative for each different type; limits that differ are
  omitted. The help says which families have the hyper-parameter.
  """
  types: list[Any] = list(dict.fromkeys(f.type for f in declared.values()))
  limits, *others = ({k: v for k, v in f.metadata.items() if k != "help"}
                     for f in declared.values())
  if any(other != limits for other in others):
    limits = dict.fromkeys(limits)
  owners: dict[str, list[str]] = {}
  for family, f in declared.items():
    owners.setdefault(f.metadata["help"], []).append(family)
  help_text = "; ".join(
      text if len(families) == len(settings.FAMILIES)
      else f"{text} ({', '.join(families)})"
      for text, families in owners.items())
  return (functools.reduce(operator.or_, types) | None,
          dataclasses.field(default=None, metadata={
              **limits, "help": help_text}))


def _section(declarations: Mapping[str, Mapping[str, dataclasses.Field]],
             ) -> type[_Named]:
  """A dataclass of these hyper-parameters: {name: {family: declaration}}."""
  fields = []
  for name, declared in declarations.items():
    kind, field = _union(declared)
    if name == "drop_path_rate":  # 0, not None: no model's own is published.
      first, *_ = declared.values()
      kind, field.default = first.type, first.default
    fields.append((name, kind, field))
  return dataclasses.make_dataclass(
      "Model", fields, bases=(_Named,), frozen=True,
      namespace={"__module__": __name__, "__doc__": _Named.__doc__})


_DECLARATIONS = _declarations()

if TYPE_CHECKING:  # Its other attributes are those of `_DECLARATIONS`.
  @dataclasses.dataclass(frozen=True, init=False)
  class Model(_Named):
    def __init__(self, **hyper_parameters: Any): ...

    def __getattr__(self, name: str) -> Any: ...
else:
  Model = _section(_DECLARATIONS)

_FIELDS_OF = {
    cls: {f.name: f for f in dataclasses.fields(_section({
        name: {family: declared[family]}
        for name, declared in _DECLARATIONS.items() if family in declared}))}
    for family, cls in settings.FAMILIES.items()}


def fields(model_name: Any) -> dict[str, dataclasses.Field]:
  """The fields of `Model`, where known as the named model's family has them."""
  union = {f.name: f for f in dataclasses.fields(Model)}
  try:
    family = type(registry.get_spec(model_name).settings)
  except (ValueError, TypeError):  # `checks` reports an unknown name.
    return union
  return union | _FIELDS_OF[family]
