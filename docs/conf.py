"""How Sphinx builds the site of these pages.

    pip install '.[docs]'
    python -m sphinx -W --keep-going docs docs/_build

The pages are plain Markdown, which GitHub shows, too. Mathematics is text: a
renderer would be loaded from elsewhere.
"""

import dataclasses

from sphinx.util import rst

import metaformer_jax

project = "metaformer_jax"
author = "The metaformer_jax authors"
copyright = f"2026, {author}"
version = release = metaformer_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = False  # Types of other packages have no page here.

# Markdown: anchors for headings, as GitHub's, which links are checked against.
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # Pages may skip a level of headings.

# Docstrings: Google's sections; `name` is code.
default_role = "code"
autodoc_class_signature = "separated"  # Fields are listed below.
autodoc_default_options = {"exclude-members": "__init__, __new__"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"metaformer_jax {release}"
html_copy_source = False
html_show_sphinx = False


def _list_options(app, what, name, obj, options, lines):
  """Adds to the docstring of a section what --help says of its keys."""
  if what == "class" and dataclasses.is_dataclass(obj):
    lines += ["", *(
        f"* ``{f.name}`` = ``{f.default!r}``: "
        + rst.escape(f.metadata["help"])
        for f in dataclasses.fields(obj) if "help" in f.metadata)]


def setup(app):
  app.connect("autodoc-process-docstring", _list_options)
