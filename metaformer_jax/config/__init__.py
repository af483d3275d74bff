"""The experiment as typed data; imports neither jax nor data code.

Config files begin with `default()`; it is loaded on first use, so that the
dataclasses can be imported without ml_collections.
"""


def __getattr__(name):
  if name == "default":
    from metaformer_jax.config import typed  # noqa: PLC0415

    return typed.default
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
