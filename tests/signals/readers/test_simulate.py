"""The simulated recordings: lawful, reproducible, and with known truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from physio_dist.errors import UserError
from physio_dist.signals.montage import ECG_12, identity_error
from physio_dist.signals.readers import reader
from physio_dist.signals.recording import RecordError, Recording
from physio_dist.signals.simulators import ecg
from physio_dist.signals.windows import WindowSpec, waveform_hash, windows_of

SOURCE = "people=60,windows=4,seed=5"


@pytest.fixture(scope="module")
def people() -> list[Recording]:
    simulate = reader("simulate")
    return [simulate.read(SOURCE, record) for record in simulate.records(SOURCE)]


def test_records_say_what_they_are(people: list[Recording]) -> None:
    assert reader("simulate").simulated
    assert [p.record for p in people] == [f"sim-{i:06d}" for i in range(60)]
    for person in people:
        assert person.labels["simulated"] is True
        assert person.person == f"seed 5 {person.record}"
        assert person.signals["ecg"].channels == ECG_12
        assert person.signals["ecg"].data.shape == (12, 4 * 2000)
        assert person.signals["ecg"].data.dtype == np.float32
        assert np.isfinite(person.signals["ecg"].data).all()


def test_limb_leads_obey_einthoven_in_every_record_faults_included(people: list[Recording]) -> None:
    assert any(p.labels["faults"] for p in people)
    for person in people:
        data = person.signals["ecg"].data
        assert identity_error(data, ECG_12) < 1e-6
        np.testing.assert_allclose(data[2], data[1] - data[0], atol=0.02)
        np.testing.assert_allclose(data[3:6].sum(axis=0), 0.0, atol=0.02)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 500))
def test_a_record_depends_on_seed_and_person_alone(seed: int, person: int) -> None:
    simulate = reader("simulate")
    source, record = f"people=501,windows=1,seed={seed}", f"sim-{person:06d}"
    alone = simulate.read(source, record)
    simulate.read(source, "sim-000007")
    again = simulate.read(f"seed={seed} , people={person + 1},windows=1", record)
    assert alone.signals["ecg"].data.tobytes() == again.signals["ecg"].data.tobytes()
    assert alone.labels == again.labels
    other = simulate.read(f"people=501,windows=1,seed={seed + 1}", record)
    assert waveform_hash(other) != waveform_hash(alone)


def test_persons_differ(people: list[Recording]) -> None:
    assert len({waveform_hash(p) for p in people}) == len(people)
    rates = [p.labels["heart_rate"] for p in people]
    assert 40 < min(rates) < 65 < 80 < max(rates) < 130
    assert 0.05 < np.mean([p.labels["ectopic_beats"] > 0 for p in people]) < 0.5


def test_heart_rate_label_is_the_rate_in_the_signal(people: list[Recording]) -> None:
    for person in people[:20]:
        if person.labels["ectopic_beats"] or person.labels["faults"]:
            continue
        beat = np.abs(np.diff(person.signals["ecg"].data[6:], axis=1)).max(axis=0)
        energy = np.convolve(beat**2, np.ones(25) / 25, "same")
        energy -= energy.mean()
        spectrum = np.correlate(energy, energy, "full")[len(energy) - 1 :]
        lag = 80 + int(np.argmax(spectrum[80:300]))
        assert 60 * 200 / lag == pytest.approx(person.labels["heart_rate"], rel=0.08)


def test_windows_are_fit_but_for_faults(people: list[Recording]) -> None:
    unusable, kinds = 0, set()
    for person in people:
        faults = {int(f.split(":")[0]): f.split(":")[1:] for f in person.labels["faults"]}
        for i, window in enumerate(windows_of(person, WindowSpec(signals=("ecg",)))):
            electrode, kind = faults.get(i, ("", ""))
            near = {i - 1, i, i + 1} & set(faults)
            if not near:
                assert window.usable, window.reasons
                assert window.valid["ecg"].all(), window.reasons
            if kind == "flat":
                wanted = {"RA": "I", "LA": "III", "LL": "II"}.get(electrode, electrode)
                assert not window.valid["ecg"][ECG_12.index(wanted)]
            if kind == "rail":
                limb = electrode in ecg.ELECTRODES[:3]
                assert window.usable is not limb
                assert limb or not window.valid["ecg"][ECG_12.index(electrode)]
            kinds.add(kind)
            unusable += not window.usable
    assert {"flat", "rail", "drift"} <= kinds
    assert 0 < unusable < 0.1 * len(people) * 4


def test_ectopic_beats_are_early_and_wide() -> None:
    rng = np.random.default_rng(0)
    one = ecg.draw_heart(rng)
    duration = [np.count_nonzero(np.abs(table).max(axis=1) > 0.2 * np.abs(table).max()) for table in one.qrs]
    assert duration[1] > 1.5 * duration[0]
    assert not one.p[1].any()
    assert one.p[0].any()
    often = ecg.Heart(**{**one.__dict__, "ectopic_share": 0.3})
    beats, ectopic = ecg.draw_beats(often, 100.0, np.random.default_rng(1))
    assert beats[0] < beats[1] < 0.0 < 100.0 < beats[-1]
    assert not (ectopic[1:] & ectopic[:-1]).any()
    intervals = np.diff(beats)
    assert intervals[ectopic[1:]].mean() < 0.8 * intervals[~ectopic[1:]].mean()
    assert 5 < ectopic.sum() < len(beats) / 2


def test_drive_makes_a_heart_faster_and_more_regular_within_what_hearts_do() -> None:
    one = ecg.draw_heart(np.random.default_rng(3))
    assert ecg.under(one, 0.0) == one
    drives = np.linspace(-6.0, 6.0, 49)
    moved = [ecg.under(one, drive) for drive in drives]
    rates = np.array([60 / each.rr for each in moved])
    assert (np.diff(rates) >= 0).all()
    assert rates[0] == pytest.approx(38.0)
    assert rates[-1] == pytest.approx(165.0)
    middle = np.abs(drives) <= 1.0
    np.testing.assert_allclose(np.diff(np.log(rates[middle])), ecg.RATE_EFFECT / 4, rtol=1e-6)
    for name, most in (("sinus", 0.12), ("jitter", 0.025)):
        values = np.array([getattr(each, name) for each in moved])
        assert (np.diff(values) <= 0).all()
        assert values[0] == most
        np.testing.assert_allclose(np.diff(np.log(values[-10:])), ecg.VARIABILITY_EFFECT / 4, rtol=1e-6)
    assert {each.slow for each in moved} == {one.slow}


def test_wilsons_terminal_is_the_zero_of_the_electrodes() -> None:
    np.testing.assert_allclose(ecg.ELECTRODE_MATRIX[:3].sum(axis=0), 0.0, atol=1e-12)
    right, left, leg = ecg.ELECTRODE_MATRIX[:3]
    np.testing.assert_allclose(left - right, [0.632, -0.235, 0.059])
    np.testing.assert_allclose(leg - right, [0.235, 1.066, -0.132])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("peple=3", "unknown key 'peple'.*did you mean 'people'"),
        ("people=0", "people=0 has to be at least 1"),
        ("windows=-2", "at least 1"),
        ("seed=-1", "at least 0"),
        ("people=many", "not a whole number"),
        ("people=1.5", "not a whole number"),
        ("people=3,people=4", "twice"),
        ("trials=0", "trials=0 has to be at least 1"),
        ("/some/folder", "unknown key"),
    ],
)
def test_wrong_specifications_are_told(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reader("simulate").records(source)


def test_defaults_and_unknown_records() -> None:
    simulate = reader("simulate")
    assert len(simulate.records("")) == 64
    for wrong in ("sim-000002", "sim-2", "sim-", "2", "../sim-000001", "sim-00000²"):
        with pytest.raises(RecordError, match="no record"):
            simulate.read("people=2", wrong)
    for wrong in ("sim-000001", "sim-000001-02", "sim-000001-1", "sim-000001-", "sim--00", "sim-000001-00-00"):
        with pytest.raises(RecordError, match="no record"):
            simulate.read("people=2,trials=2", wrong)
    for wrong in ("sim-000001-00", "sim-000001-"):
        with pytest.raises(RecordError, match="no record"):
            simulate.read("people=2", wrong)
