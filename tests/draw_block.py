"""Draws the MetaFormer block and its mixers: docs/block.svg.

    python tests/draw_block.py docs/block.svg

Mid-tone fills with dark text, and lines of a grey that reads on white and on
black: the picture has no background, and is shown in light and dark themes.
"""

import pathlib
import sys

GREY, INK = "#808a94", "#10161c"
NORM, MIXER, MLP = "#b9c2cc", "#f2b84b", "#7fb2e5"
# Of each model, the mixers of its four stages.
MODELS = {
    "PoolFormer": ["pool"] * 4,
    "IdentityFormer": ["identity"] * 4,
    "RandFormer": ["identity"] * 2 + ["random"] * 2,
    "ConvFormer": ["conv"] * 4,
    "CAFormer": ["conv"] * 2 + ["attention"] * 2,
    "yours": ["?"] * 4,
}
COLOURS = {"pool": "#f2b84b", "identity": "#cfd6dd", "random": "#c9a7e8",
           "conv": "#8fd0a5", "attention": "#ef9a9a", "?": "#ffffff"}


def text(x, y, words, size=15, colour=INK, weight="normal", anchor="middle"):
  return (f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" '
          f'font-weight="{weight}" text-anchor="{anchor}">{words}</text>')


def box(x, y, width, height, colour, words, **kwargs):
  return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" '
          f'fill="{colour}" stroke="{GREY}" stroke-width="1.5"/>'
          + text(x + width / 2, y + height / 2 + 5, words, **kwargs))


def line(points, arrow=True):
  path = "M" + " L".join(f"{x} {y}" for x, y in points)
  end = ' marker-end="url(#tip)"' if arrow else ""
  return (f'<path d="{path}" fill="none" stroke="{GREY}" '
          f'stroke-width="2.2"{end}/>')


def plus(x, y):
  return (f'<circle cx="{x}" cy="{y}" r="12" fill="#ffffff" stroke="{GREY}" '
          'stroke-width="2"/>' + text(x, y + 6, "+", 20))


def branch(y, names, name, colour, equation):
  """A shortcut around a norm and a module, and its equation."""
  return [
      text(16, y + 5, names[0], 16, GREY, "bold"),
      line([(30, y), (82, y)]), box(82, y - 20, 70, 40, NORM, "Norm"),
      line([(152, y), (182, y)]),
      box(182, y - 24, 136, 48, colour, name, weight="bold"),
      line([(318, y), (358, y)]),
      line([(52, y), (52, y - 52), (371, y - 52), (371, y - 14)]),
      plus(371, y), line([(383, y), (424, y)]),
      text(440, y + 5, names[1], 16, GREY, "bold"),
      text(212, y + 46, equation, 14, GREY)]


def models(y):
  """The rows of models, a cell for each stage."""
  parts = [text(122 + 84 * i + 40, y, f"stage {i + 1}", 13, GREY)
           for i in range(4)]
  for row, (name, mixers) in enumerate(MODELS.items()):
    top = y + 12 + 32 * row
    parts.append(text(112, top + 18, name, 14, GREY, "bold", "end"))
    parts += [box(122 + 84 * i, top, 80, 26, COLOURS[mixer], mixer, size=14)
              for i, mixer in enumerate(mixers)]
  return parts


def draw() -> str:
  parts = [
      *branch(72, "XY", "Token mixer", MIXER, "Y = X + TokenMixer(Norm(X))"),
      *branch(198, "YZ", "Channel MLP", MLP, "Z = Y + MLP(Norm(Y))"),
      *models(288)]
  return "\n".join([
      '<svg xmlns="http://www.w3.org/2000/svg" width="476" height="500" '
      'viewBox="-14 0 476 500" '
      'font-family="system-ui, Helvetica, Arial, sans-serif" role="img">',
      "<title>The MetaFormer block, and the token mixers of each model"
      "</title>",
      '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" '
      'markerWidth="6" markerHeight="6" orient="auto">'
      f'<path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker></defs>',
      *parts, "</svg>\n"])


if __name__ == "__main__":
  pathlib.Path(sys.argv[1]).write_text(draw())
