"""Every block of code in README.md and docs/ is executed, parsed, or marked."""

import re

import page_commands
import pages
import pytest

NOT_CODE = {"text", "bibtex", "json", "{eval-rst}", "{toctree}"}
# Pages whose Python blocks are executed in order, by which test.
EXECUTED = {
    "README.md": "tests/docs/test_readme.py",
    "comparing.md": "tests/docs/test_first_day.py",
    "design.md": "tests/docs/test_readme.py",
    "detection.md": "tests/test_mask_rcnn_runs.py",
    "extending.md": "tests/test_extending.py",
    "first_day.md": "tests/docs/test_first_day.py",
    "nnx.md": "tests/docs/test_nnx.py",
    "own_images.md": "tests/test_own_images.py",
    "quickstart.md": "tests/docs/test_first_day.py",
    "segmentation.md": "tests/test_segmentation_runs.py",
}
BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]


def test_every_block_says_what_it_is():
  for block in BLOCKS:
    is_code = re.search("^(python|pip|metaformer-|import|from) ?", block.text,
                        re.MULTILINE)
    assert block.language in NOT_CODE | {"python", "bash"} or (
        not block.language and not is_code), (
            f"{block}: name the language; text if it is none")
    assert not block.mark or block.why.strip(), block


def test_every_python_block_is_covered():
  for block in BLOCKS:
    if block.language != "python" or block.mark == "not run":
      continue
    if block.mark == "source":
      code = (pages.ROOT / block.why).read_text()
      assert _dedented(block.text) in _dedented(code), (
          f"{block}: differs from {block.why}")
      continue
    test = EXECUTED.get(block.page.name)
    assert test, f"{block}: nothing executes it; see tests/pages.py"
    assert block.page.name in (pages.ROOT / test).read_text(), block


def _dedented(text):
  return re.sub(r"^[ ]+", "", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """For each page, a folder with the repository's and the page's own files."""
  found = {}
  for page in pages.PAGES:
    folder = found[page] = tmp_path_factory.mktemp("page")
    for name in ("configs", "tests", "launch", "docs"):
      (folder / name).symlink_to(pages.ROOT / name)
    pages.write_files(page, folder)
  return found


# Command lines that are wrong, but for the first.
_CONFIG = "--config=configs/quickstart.py"
_MISTAKES = (
    ("metaformer_jax.main", [_CONFIG]),
    ("metaformer_jax.main", [_CONFIG, "--config.train.batch=1"]),
    ("metaformer_jax.main", ["--config=configs/quickstarted.py"]),
    ("metaformer_jax.tools.predict", ["--weigths=a", "b"]),
    ("metaformer_jax.tools.evaluate", ["--workdir=a", "--per_clas"]),
    ("metaformer_jax.tools.study", [_CONFIG, "--workdir=a"]),
)


def test_every_command_can_be_parsed(folders):
  """Its flags exist, its files are here, and its experiment is a valid one."""
  work = {}
  for block in BLOCKS:
    if block.language != "bash" or block.mark == "not run":
      continue
    for command in page_commands.split(block):
      for module, arguments in page_commands.parts(command):
        line = (str(folders[block.page]), module, tuple(arguments))
        work.setdefault(line, f"{block}: {' '.join(command)}")
  assert len(work) > 60
  home = str(folders[pages.PAGES[0]])
  found = page_commands.problems([
      *work, *((home, module, flags) for module, flags in _MISTAKES)])
  wrong = [f"{command}\n  {problem}"
           for command, problem in zip(work.values(), found) if problem]
  assert not wrong, "\n".join(wrong)
  # The check is one that can fail.
  right, *mistakes = found[len(work):]
  assert not right and all(mistakes), mistakes


def test_commands_are_taken_apart():
  block = pages.Block(
      pages.ROOT / "README.md", 1, "bash",
      'a="python x.py"  # Comment.\n$a --b \\\n  \'c d\' && e\n')
  assert page_commands.split(block) == [
      ["python", "x.py", "--b", "c d"], ["e"]]
  for command in (["python", "tests/none.py"], ["pip", "install", ".[none]"],
                  ["unknown"], ["python", "launch/tpu_vm.py", "--none"]):
    with pytest.raises(AssertionError):
      list(page_commands.parts(command))
