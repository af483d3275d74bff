"""The experiment as typed data; imports neither jax nor data code.

Config files begin with `default()`; it is loaded on first use, so that the
dataclasses can be imported without ml_collections.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from metaformer_jax.config.typed import default

__all__ = ["default"]


def __getattr__(name: str) -> Any:
  if name == "default":
    from metaformer_jax.config import typed  # noqa: PLC0415

    return typed.default
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
