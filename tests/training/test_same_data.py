"""A run and its data set: between processes, and after a restart."""

import line_task
import numpy as np
import pytest
import small_runs
import thread_pods

from metaformer_jax import errors
from metaformer_jax.checkpoints import manager, steps
from metaformer_jax.training import same_data


class Points(line_task.Points):
  """The points of the line task with a fingerprint."""

  def __init__(self, n=10, **facts):
    self.n_examples, self._facts = n, facts

  def fingerprint(self):
    return {key.replace("_", " "): value for key, value in self._facts.items()}


class Task(line_task.LineTask):

  def __init__(self, train=None, evaluation=None):
    self._data = {"train": train or Points(), "eval": evaluation or Points()}

  def make_data(self, split):
    return self._data[split]


def line(**sections):
  return small_runs.line(train={"steps": 10}, **sections)


FACTS = {"classes": ["cat", "dog"], "file_names": "sha256:1",
         "sizes_of_files": "sha256:2"}
CHANGES = {
    "one-more": ({"n": 11},
                 "number of examples of the training data: 10 -> 11"),
    "renamed": ({"classes": ["cat", "eel"]},
                "classes of the training data: ['cat', 'dog'] -> ['cat', "
                "'eel']"),
    "names": ({"file_names": "sha256:3", "sizes_of_files": "sha256:4"},
              "other file names of the training data;"),
    "sizes": ({"sizes_of_files": "sha256:4"},
              "other sizes of files of the training data;")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "run"
  small_runs.run(line(), Task(Points(**FACTS), Points(**FACTS)), workdir)
  return workdir


@pytest.mark.parametrize("name", CHANGES)
def test_other_data_is_refused_on_resume(trained, name):
  changed, reason = CHANGES[name]
  with pytest.raises(errors.ConfigError) as e:
    small_runs.run(line(), Task(Points(**FACTS | changed), Points(**FACTS)),
                   trained)
  message = str(e.value)
  assert "\n" not in message and reason in message
  assert "--config.checkpoint.allow_other_data=True" in message
  assert ("sizes" in message) == (name == "sizes")
  with pytest.raises(errors.ConfigError, match="of the evaluation data"):
    small_runs.run(line(), Task(Points(**FACTS), Points(**FACTS | changed)),
                   trained)
  small_runs.run(line(), Task(Points(**FACTS), Points(**FACTS)), trained)


def test_other_data_can_be_allowed_and_is_then_kept(tmp_path, caplog):
  small_runs.run(line(), Task(), tmp_path)
  # A source may have a fingerprint only now.
  small_runs.run(line(), Task(Points(**FACTS)), tmp_path)
  longer = Task(Points(12), Points(**FACTS))
  with pytest.raises(errors.ConfigError, match="10 -> 12"):
    small_runs.run(line(), longer, tmp_path)
  cfg = line(checkpoint={"allow_other_data": True})
  # As after an interruption: the last steps are done again.
  checkpoints = manager.Checkpoints(tmp_path, cfg.checkpoint, cfg.best_measure)
  for step in checkpoints.steps()[1:]:
    steps.remove(checkpoints.directory / str(step))
  small_runs.run(cfg, longer, tmp_path)
  assert "10 -> 12; config.checkpoint.allow_other_data is on" in caplog.text
  assert checkpoints.read(10).data == {
      "training": {"number of examples": 12},
      "evaluation": {"number of examples": 10, **longer.make_data(
          "eval").fingerprint()}}
  checkpoints.close()
  small_runs.run(line(), longer, tmp_path)  # No longer other data.


def test_less_data_ends_in_one_line(tmp_path):
  """A run of epochs, of which half of the images are gone, or nearly all."""
  cfg = small_runs.line(
      train={"steps": None, "epochs": 8.0},
      checkpoint={"allow_other_data": True, "every_steps": 2})
  small_runs.run(cfg, Task(), tmp_path)
  for n in (1, 2, 5):
    with pytest.raises(errors.ConfigError, match=(
        f"is at step 10, but with the data as it is the run has {n} steps")):
      small_runs.run(cfg, Task(Points(n)), tmp_path)


def test_a_fingerprint_that_is_not_json_is_an_error(tmp_path):
  for value in (np.arange(3), float("nan"), {1, 2}):
    with pytest.raises(errors.ConfigError, match="the training data is not "):
      small_runs.run(line(), Task(Points(date=value)), tmp_path)


def test_hosts_with_other_data_are_named(monkeypatch):
  rng = np.random.default_rng(0)
  for _ in range(20):
    n = int(rng.integers(2, 5))
    odd, split = int(rng.integers(n)), int(rng.integers(2))
    changed, _ = CHANGES[rng.choice(list(CHANGES))]

    def act(i, odd=odd, split=split, changed=changed):
      data = [Points(**FACTS | changed)
              if i == odd and split == j else Points(**FACTS) for j in (0, 1)]
      return same_data.agree(training=data[0], evaluation=data[1])

    found = thread_pods.run(monkeypatch, n, act)
    assert all(isinstance(e, errors.ConfigError) for e in found)
    assert len({str(e) for e in found}) == 1
    assert f"the {('training', 'evaluation')[split]} data" in str(found[0])
    who = "process 1" if odd == 0 else f"process {odd}"
    assert str(found[0]).startswith(who)
