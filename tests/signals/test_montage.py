"""Lead names and the arithmetic of limb leads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from physio_dist.signals.montage import (
    ECG_12,
    EEG_19,
    ELECTRODES,
    LEAD_MATRIX,
    LIMB,
    canonical,
    channel_key,
    derivation,
    ecg_name,
    electrode,
    identity_error,
    lead_layouts,
    mask_groups,
    select,
)
from physio_dist.signals.recording import RecordError, Signal


def limb_leads(seed: int = 0, length: int = 200) -> np.ndarray:
    two = np.random.default_rng(seed).normal(0, 300, (2, length))
    return np.array([LEAD_MATRIX[lead] for lead in LIMB]) @ two


def signal(data: np.ndarray, channels: tuple[str, ...]) -> Signal:
    return Signal(data.astype(np.float32), 500.0, channels)


@pytest.mark.parametrize(
    ("name", "lead"),
    [
        ("AVR", "aVR"),
        ("avf", "aVF"),
        (" ii ", "II"),
        ("lead I", "I"),
        ("Lead_III", "III"),
        ("ECG V5", "V5"),
        ("EKG lead aVL", "aVL"),
        ("DI", "I"),
        ("D2", "II"),
        ("DIII", "III"),
        ("v6", "V6"),
        ("MLII", None),
        ("ECG", None),
        ("V7", None),
        ("A2-A1", None),
        ("IV", None),
        ("", None),
    ],
)
def test_names_of_leads(name: str, lead: str | None) -> None:
    assert canonical(name) == lead


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("EEG Fp1", "Fp1"),
        ("EEG FP1-REF", "Fp1"),
        ("EEG T3-LE", "T7"),
        ("t8", "T8"),
        ("T5", "P7"),
        ("EEG T6", "P8"),
        ("Fc5.", "FC5"),
        ("Cz..", "Cz"),
        ("EEG C3-A2", "C3"),
        ("C4 - M1", "C4"),
        ("eeg_POz", "POz"),
        ("F10", "F10"),
        ("EEG A2-A1", None),
        ("EEG A1-REF", None),
        ("Fp1-F7", None),
        ("EEG Fpz-Cz", None),
        ("EEG T1-REF", None),
        ("EEG 20-REF", None),
        ("EEG EKG1-REF", None),
        ("ECG V1", None),
        ("EOG left", None),
        ("EEG", None),
        ("", None),
    ],
)
def test_names_of_electrodes(name: str, site: str | None) -> None:
    assert electrode(name) == site


@pytest.mark.parametrize(
    ("name", "lead"),
    [
        ("ECG ECG", "ECG"),
        ("ekg", "ECG"),
        ("EEG EKG1-REF", "ECG"),
        ("ECG EKG-REF", "ECG"),
        ("ECG 1", "ECG"),
        ("ECG V2", "V2"),
        ("EKG Lead II", "II"),
        ("ECG 2", None),
        ("lead", None),
        ("EEG Cz", None),
        ("", None),
    ],
)
def test_an_ecg_without_a_lead_has_a_name_of_its_own(name: str, lead: str | None) -> None:
    assert ecg_name(name) == lead


def test_no_name_means_two_channels() -> None:
    assert [electrode(name) for name in ELECTRODES] == list(ELECTRODES)
    assert len({name.lower() for name in (*ELECTRODES, *ECG_12, "ECG")}) == len(ELECTRODES) + 13
    assert not any(ecg_name(name) for name in ELECTRODES)
    assert not any(electrode(lead) for lead in (*ECG_12, "ECG"))
    assert set(EEG_19) < set(ELECTRODES)


def test_the_order_of_electrodes_is_that_of_cbramods_pretraining() -> None:
    theirs = "FP1 FP2 F3 F4 C3 C4 P3 P4 O1 O2 F7 F8 T3 T4 T5 T6 FZ CZ PZ"
    assert tuple(electrode(f"EEG {name}-REF") for name in theirs.split()) == EEG_19


def test_two_channels_at_one_electrode_are_no_choice() -> None:
    assert channel_key("EEG T3-REF") == channel_key("T7") == "T7"
    with pytest.raises(RecordError, match=r"two channels are electrode T7: 'EEG T3' and 'T7'"):
        select(signal(np.ones((2, 5)), ("EEG T3", "T7")), ["T7"])
    with pytest.raises(RecordError, match=r"two channels have the same name$"):
        select(signal(np.ones((2, 5)), ("Haagse Harry", "haagse harry")), ["T7"])


def test_matrix_says_what_einthoven_and_goldberger_say() -> None:
    rng = np.random.default_rng(1)
    right, left, leg = rng.normal(size=3)
    one, two = left - right, leg - right
    truth = {
        "I": one,
        "II": two,
        "III": leg - left,
        "aVR": right - (left + leg) / 2,
        "aVL": left - (right + leg) / 2,
        "aVF": leg - (right + left) / 2,
    }
    for lead in LIMB:
        assert np.dot(LEAD_MATRIX[lead], (one, two)) == pytest.approx(truth[lead])


@given(st.permutations(LIMB), st.integers(2, 6))
def test_any_two_limb_leads_give_the_others(order: list[str], kept: int) -> None:
    leads = limb_leads()
    names = tuple(order[:kept])
    data, missing = select(signal(leads[[LIMB.index(name) for name in names]], names), LIMB)
    assert missing == []
    np.testing.assert_allclose(data, leads, atol=0.01)


def test_leads_are_chosen_by_name_whatever_their_order_and_case() -> None:
    data = np.arange(12.0)[:, None] * np.ones(5)
    mimic = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")
    chosen, missing = select(signal(data, tuple(name.upper() for name in mimic)), ECG_12)
    assert missing == []
    assert chosen[:, 0].tolist() == [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 11]


def test_what_cannot_be_had_is_named_and_nan() -> None:
    data, missing = select(signal(np.ones((2, 5)), ("I", "V1")), ("I", "II", "V1", "V2"))
    assert missing == ["II", "V2"]
    assert np.isnan(data[[1, 3]]).all()
    assert not np.isnan(data[[0, 2]]).any()


def test_a_lead_given_twice_is_no_choice_of_ours() -> None:
    with pytest.raises(RecordError, match="two channels are lead II"):
        select(signal(np.ones((2, 5)), ("II", "Lead II")), ("II",))


def test_dead_leads_derive_nothing_while_others_are_alive() -> None:
    leads = limb_leads()
    leads[0] = 0.0
    three = signal(leads[[0, 1, 3]], ("I", "II", "aVR"))
    assert derivation(three) == ("II", "aVR")
    np.testing.assert_allclose(select(three, ("III",))[0][0], limb_leads()[2], atol=0.01)


def test_identity_error_is_zero_only_for_true_limb_leads() -> None:
    leads = limb_leads()
    assert identity_error(leads, LIMB) == pytest.approx(0.0, abs=1e-7)
    assert identity_error(leads, ("I", "II", "III", "aVR", "aVF", "aVL")) > 0.2
    # The size of the residual: white noise of a tenth of the leads' norm on all six leaves 4 of 6 dimensions of it.
    noise = np.random.default_rng(2).normal(size=leads.shape)
    noise *= 0.1 * np.linalg.norm(leads) / np.linalg.norm(noise)
    assert identity_error(leads + noise, LIMB) == pytest.approx(0.1 * np.sqrt(4 / 6), rel=0.1)


def test_identity_error_leaves_out_what_is_nan() -> None:
    leads = limb_leads()
    leads[3, :50] = np.nan
    leads[1, 100:120] = 1e6
    leads[0, 100:120] = np.nan
    leads[4] = np.nan
    assert identity_error(leads, LIMB) == pytest.approx(0.0, abs=1e-7)
    assert identity_error(leads[:2], LIMB[:2]) == 0.0
    assert identity_error(np.full((6, 5), np.nan), LIMB) == 0.0
    assert identity_error(np.zeros((6, 5)), LIMB) == 0.0


def test_limb_leads_are_masked_together() -> None:
    assert mask_groups(ECG_12) == [[0, 1, 2, 3, 4, 5], [6], [7], [8], [9], [10], [11]]
    assert mask_groups(("V1", "AVR", "V2", "di")) == [[0], [1, 3], [2]]
    assert mask_groups(("Fp1", "Cz")) == [[0], [1]]
    assert mask_groups(()) == []


def test_what_recorders_with_fewer_leads_would_have_taken() -> None:
    alone = tuple((i,) for i in range(12))
    assert lead_layouts(ECG_12) == (((0, 1, 6, 7, 8, 9, 10, 11),), ((0, 1),), alone)
    eight = ("V1", "V2", "V3", "V4", "V5", "V6", "DII", "lead I")
    assert lead_layouts(eight) == (((7, 6),), tuple((i,) for i in range(8)))
    assert lead_layouts(("II", "V5")) == (((0,), (1,)),)
    assert lead_layouts(("II",)) == lead_layouts(("Fz", "Cz")) == lead_layouts(()) == ()
