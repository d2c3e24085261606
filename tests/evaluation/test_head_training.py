"""Many heads at once are each of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from physio_dist.evaluation import head_training as module
from physio_dist.evaluation.head_training import Heads, Job
from tests.evaluation.study_samples import CONFIG, features_of, job_of

N = 300
LABEL = np.random.default_rng(5).integers(0, 2, N)
INPUTS = {"ecg": features_of(LABEL, 1.0, 4, 1), "eeg": features_of(LABEL, 0.0, 60, 2)}
OTHER = {"ecg": features_of(LABEL, 3.0, 4, 3), "eeg": features_of(LABEL, 1.0, 60, 4)}
VALID = [np.arange(0, 50), np.arange(40, 47), np.arange(290, 300)]


def jobs() -> list[Job]:
    return [
        job_of(INPUTS, LABEL, np.arange(60, 290), "0/a"),
        job_of(INPUTS, LABEL, np.arange(100, 220), "0/b"),
        job_of(OTHER, 1 - LABEL, np.arange(0, 290, 3), "0/c"),
    ]


def trained(some: list[Job], valid: list[np.ndarray], epochs: int = 3, **more: Any) -> list[np.ndarray]:
    heads = Heads(some, 2, {**CONFIG, **more})
    for _ in range(epochs):
        heads.epoch()
    return heads.probability(valid)


@pytest.mark.parametrize("more", [{}, {"depth": 0}, {"depth": 2, "label_smoothing": 0.1}], ids=str)
def test_together_as_alone(more: dict[str, Any]) -> None:
    together = trained(jobs(), VALID, **more)
    for i, job in enumerate(jobs()):
        (alone,) = trained([job], [VALID[i]], **more)
        assert alone.shape == (len(VALID[i]), 2)
        np.testing.assert_allclose(together[i], alone, atol=2e-5)


def test_standardised_in_every_step_as_standardised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    once = trained(jobs(), VALID)
    monkeypatch.setattr(module, "_MAX_REDUCED_VALUES", 0)
    monkeypatch.setattr(module, "_MAX_VALUES", 300)  # a few rows at a time
    for a, b in zip(once, trained(jobs(), VALID), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_it_is_plain_adamw_on_cross_entropy() -> None:
    """One step on all rows, done again with torch alone."""
    label, rows = LABEL[:100], np.arange(100)
    inputs = {"ecg": INPUTS["ecg"][:100]}
    config = {**CONFIG, "depth": 1, "dropout": 0.0, "label_smoothing": 0.1, "weight_decay": 0.3}
    heads = Heads([job_of(inputs, label, rows, "x")], 2, config)
    assert heads.steps == 1
    model = Heads([job_of(inputs, label, rows, "x")], 2, config)._heads[0]
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, 0.01)
    x = {"ecg": torch.from_numpy(inputs["ecg"])}
    for _ in range(3):
        heads.epoch()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.from_numpy(label), label_smoothing=0.1).backward()
        optimizer.step()
    wanted = model(x).softmax(1).detach().numpy()
    np.testing.assert_allclose(heads.probability([rows])[0], wanted, atol=1e-5)


def test_the_same_again_and_other_draws_for_another_purpose() -> None:
    first = trained(jobs()[:1], VALID[:1])[0]
    assert np.array_equal(first, trained(jobs()[:1], VALID[:1])[0])
    job = jobs()[0]
    other = trained([job_of(job.inputs, job.label, job.rows, "0/z")], VALID[:1])[0]
    assert not np.allclose(first, other, atol=1e-3)


def test_heads_start_from_weights_of_their_own() -> None:
    job = jobs()[0]
    both = [job, job_of(job.inputs, job.label, job.rows, "0/z")]
    first, second = trained(both, [VALID[0]] * 2, epochs=0)
    assert not np.allclose(first, second, atol=1e-2)


class Watched(Heads):
    """Heads that note the rows of every step."""

    def _step(self, rows: Sequence[np.ndarray]) -> None:
        self.seen = [*getattr(self, "seen", []), [mine.tolist() for mine in rows]]
        super()._step(rows)


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    heads = Watched(jobs(), 2, CONFIG)
    epochs = []
    for _ in range(2):
        heads.seen = []
        heads.epoch()
        assert len(heads.seen) == heads.steps == 3
        epochs.append([[row for step in heads.seen for row in step[i]] for i in range(3)])
        sizes = [len(step[0]) for step in heads.seen]
        assert max(sizes) - min(sizes) <= 1
    for i, job in enumerate(jobs()):
        assert sorted(epochs[0][i]) == sorted(epochs[1][i]) == job.rows.tolist()
        assert epochs[0][i] != epochs[1][i] != job.rows.tolist() != epochs[0][i]
    assert epochs[0][0][:20] != epochs[0][1][:20]


def test_dropout_is_drawn() -> None:
    without, some = (trained(jobs()[:1], VALID[:1], dropout=p)[0] for p in (0.0, 0.5))
    assert not np.allclose(without, some, atol=1e-3)
    rows = [np.arange(90), np.arange(60), np.arange(1)]
    config = {**CONFIG, "depth": 2, "width": 64, "dropout": 0.2}
    keep = Heads(jobs(), 2, config)._keep(rows, 90)
    assert keep is not None and [tuple(layer.shape) for layer in keep] == [(3, 90, 64)] * 2
    for layer in keep:
        assert set(layer[0].unique().tolist()) == {0.0, 1.25}
        # On average nothing is lost, and rows, heads and layers differ.
        assert float(layer[0].mean()) == pytest.approx(1.0, abs=0.02)
        assert not torch.equal(layer[0, 0], layer[0, 1]) and not torch.equal(layer[0, :60], layer[1, :60])
    assert not torch.equal(keep[0], keep[1])


def test_it_learns_and_the_number_of_threads_stays() -> None:
    threads = torch.get_num_threads()
    (found,) = trained(jobs()[2:], [np.arange(1, 290, 3)], epochs=15)
    assert ((found[:, 1] > 0.5) == (1 - LABEL)[1:290:3]).mean() > 0.8
    assert torch.get_num_threads() == threads
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


def test_a_head_that_diverged_says_nothing() -> None:
    heads = Heads(jobs()[:1], 2, CONFIG)
    with torch.no_grad():
        heads.parameters["head.out.weight"].fill_(torch.nan)
    assert (heads.probability(VALID[:1])[0] == 0.5).all()


def test_more_rows_make_larger_batches_but_not_ever_more_steps() -> None:
    def steps(n: int) -> int:
        label = np.arange(n) % 2
        return Heads([job_of({"ecg": np.zeros((n, 1), np.float32)}, label, np.arange(4), "x")], 2, CONFIG).steps

    assert [steps(n) for n in (10, 128, 129, 1280, 50_000)] == [1, 1, 2, 10, 64]
