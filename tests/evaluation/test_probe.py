"""The probe on signals whose classes are known, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from physio_dist import config, storage
from physio_dist.config.probe import ProbeConfig
from physio_dist.data.format.people import pseudonym
from physio_dist.errors import UserError
from physio_dist.evaluation import probe, reconstruction
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, MaskedModel, preset
from physio_dist.models.export import save_encoder
from tests.evaluation.study_samples import publish_set, waves

pytestmark = pytest.mark.integration

PEOPLE, WINDOWS = 24, 2


def quiet(_: str) -> None:
    pass


def export(folder: Path, people: tuple[int, ...] = (3,), **about: Any) -> str:
    torch.manual_seed(0)
    facts = {"signal": "ecg", "channels": ["I", "II"], "rate": 200, "unit_uv": 100.0, "simulated": False, **about}
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in save_encoder(CrissCrossEncoder(preset("tiny")), facts).items():
        (folder / name).write_bytes(data)
    (folder / "people.json").write_text(json.dumps([f"{one:016x}" for one in people]))
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise that is twice as large in the class ``loud``, and an encoder."""
    folder = tmp_path_factory.mktemp("probe")
    number = np.arange(PEOPLE * WINDOWS) // WINDOWS
    loud = number % 3 == 0
    values = waves(len(number))
    values[~loud] //= 2
    facts = [
        {
            "person": f"p{n}", "record": f"r{n}", "source": "built",
            "labels": {"volume": "loud" if big else "soft", "same": 1, "rare": int(n == 0), "level": 0.5 * n},
        }
        for n, big in zip(number.tolist(), loud.tolist(), strict=True)
    ]  # fmt: skip
    split = [0, 0, 0, 2] * (len(number) // 4)
    publish_set(str(folder / "set"), facts, {"ecg": (values, ("I", "II"), 1.0)}, split=split)
    export(folder / "encoder")
    return folder


def options(place: Path, *words: str) -> ProbeConfig:
    given = [f"run.dir={place / 'runs'}", f"probe.data={place / 'set'}", f"probe.encoder={place / 'encoder'}"]
    few = ["probe.label=volume", "probe.folds=3", "probe.val_folds=2", "probe.seeds=2", "probe.fractions=[0.1,1.0]"]
    return config.load(ProbeConfig, None, [*given, *few, *words])


def test_every_row_is_there_with_its_spread_and_the_same_again(place: Path) -> None:
    results = probe.probe(options(place, "run.name=all"), quiet)
    rows = {(row["name"], row["fraction"]): row for row in results["rows"]}
    assert list(rows) == [(name, fraction) for name in probe.ROWS for fraction in (0.1, 1.0)]
    assert rows["majority", 1.0]["auc"] == rows["validity", 1.0]["auc"] == 0.5
    for name in ("handmade", "encoder", "untrained"):
        assert rows[name, 1.0]["auc"] > 0.9, name
    for row in rows.values():
        areas = [one["auc"] for one in row["per_seed"]]
        assert [one["seed"] for one in row["per_seed"]] == [0, 1]
        assert row["auc"] == pytest.approx(np.mean(areas), abs=1e-6)
        assert row["sd"]["auc"] == pytest.approx(np.std(areas, ddof=1), abs=1e-6)
        # Of 24 people 16 train in each of three folds; a tenth are two, and two of the other class join them.
        assert row["train_people"] == 16 if row["fraction"] == 1.0 else 2 < row["train_people"] <= 5
    assert (results["windows"], results["people"], results["windows_of_class"]) == (48, 24, [16, 32])
    files = {name: (place / "runs" / "all" / name).read_bytes() for name in ("config.yaml", "results.json")}
    probe.probe(options(place, "run.name=all"), quiet)
    assert all((place / "runs" / "all" / name).read_bytes() == data for name, data in files.items())
    table = list(probe.table_of(results))
    assert "48 test windows of 24 people (16 loud, 32 soft)" in table[0] and len(table) == 2 + len(rows)
    with pytest.raises(UserError, match=r"probe\.label: volume there, same now"):
        probe.probe(options(place, "run.name=all", "probe.label=same"), quiet)


def test_seeds_differ_in_people_and_in_the_untrained_encoder(place: Path) -> None:
    results = probe.probe(options(place, "run.name=seeds", "probe.fractions=[1.0]", "probe.pooling=mean"), quiet)
    per_seed = {row["name"]: row["per_seed"] for row in results["rows"]}
    assert per_seed["untrained"][0] != per_seed["untrained"][1]
    folders = [name for name in storage.names(str(place / "runs" / "features")) if name.startswith("ecg-")]
    assert len(folders) == 3, "the encoder and two untrained ones"


def test_finetuned_rows_learn_and_leave_the_encoder_alone(place: Path) -> None:
    words = ("run.name=tuned", "probe.finetune=true", "probe.epochs=8", "probe.lr=0.001", "probe.batch=8")
    some = ("probe.fractions=[1.0]", "probe.protocol=holdout", "probe.seeds=1", "probe.label=kept")
    before = (place / "encoder" / "encoder.safetensors").read_bytes()
    # A person's windows are all in one split here.
    held = publish_held(place)
    results = probe.probe(options(place, *words, *some, f"probe.data={held}"), quiet)
    rows = {row["name"]: row for row in results["rows"]}
    assert set(rows) == {*probe.ROWS, *probe.FINETUNED}
    assert rows["finetuned"]["auc"] > 0.75 and rows["finetuned_untrained"]["auc"] > 0.75
    assert 1 <= rows["finetuned"]["per_seed"][0]["chosen"][0]["epoch"] <= 8
    assert rows["finetuned"]["sd"]["auc"] is None, "one seed has no spread"
    assert (place / "encoder" / "encoder.safetensors").read_bytes() == before


def publish_held(place: Path) -> str:
    number = np.arange(40)
    values = waves(len(number), seed=4)
    values[number % 2 == 0] //= 2
    facts = [
        {"person": f"h{n}", "record": f"h{n}", "source": "built", "labels": {"kept": int(n % 2)}} for n in range(40)
    ]
    split = np.where(number < 28, 0, 2).tolist()
    publish_set(str(place / "held"), facts, {"ecg": (values, ("I", "II"), 1.0)}, split=split)
    return str(place / "held")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["probe.label=volum"], "probe.label=volum: no window of .* has that label.*did you mean 'volume'"),
        (["probe.label=same"], "probe.label=same: .* has only the value 1 of it"),
        (["probe.label=rare"], "probe.label=rare: class 1 is found in 1 person, and a probe needs three"),
        (["probe.label=level"], "probe.label=level is no class label: its values are numbers with a fraction"),
        (["probe.encoder={place}/known"], "was pretrained on 1 of the .* people of fold .* probe.protocol=holdout"),
        (["probe.encoder={place}/fast"], "is sampled at 200 Hz and .* was trained at 250 Hz"),
        (["probe.encoder={place}/eeg"], "holds no eeg signal"),
        (["probe.encoder={place}/none"], "give the folder that `physio-dist export RUN OUT` wrote"),
        (["probe.data={place}/none"], "holds no index.json"),
        (["probe.protocol=holdout"], "probe.protocol=holdout: .* people of the test split are also in another split"),
        (["probe.folds=25"], "probe.folds=25: only 24 people have the label"),
        (["probe.fractions=[1.5]"], "probe.fractions=1.5: it must lie between"),
        (["probe.fractions=[]"], "probe.fractions is empty"),
        (["probe.seeds=0"], "probe.seeds=0: it must be at least 1"),
        (["probe.encoder="], "probe.task=labels needs probe.encoder"),
        (["probe.pooling=max"], "probe.pooling=max: it must be one of"),
        (["probe.task=reconstruct"], "did you mean 'reconstruction'"),
        (["probe.task=reconstruction"], "needs probe.runs"),
        (["probe.task=reconstruction", "probe.runs=x", "probe.masks=[chst]"], "did you mean 'chest'"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_message(place: Path, words: list[str], told: str) -> None:
    export(place / "known", people=(pseudonym("built", "p5"),))
    export(place / "fast", rate=250)
    export(place / "eeg", signal="eeg", channels=["C3"])
    with pytest.raises(UserError, match=told) as caught:
        probe.probe(options(place, "run.name=refused", *(word.format(place=place) for word in words)), quiet)
    assert "\n" not in str(caught.value)
    assert not (place / "runs" / "refused").exists()


Read = Callable[[str], reconstruction.PretrainedRun]


def trained(people: frozenset[int] | None = frozenset(), rate: float = 200.0) -> Read:
    def read(url: str) -> reconstruction.PretrainedRun:
        torch.manual_seed(len(url))
        model = MaskedModel(preset("tiny"))
        about = {"signal": "ecg", "channels": list(LEADS), "rate": rate, "unit_uv": 100.0, "simulated": False}
        return reconstruction.PretrainedRun(url, 7, model.config.to_dict(), about, model.state_dict(), people)

    return read


LEADS = ("I", "II", "V1", "V2")


@pytest.fixture(scope="module")
def four_leads(tmp_path_factory: pytest.TempPathFactory) -> str:
    """V1 = I + II without noise, V2 noise alone; the test split is louder."""
    folder = str(tmp_path_factory.mktemp("leads") / "set")
    rng = np.random.default_rng(0)
    x = rng.integers(-300, 300, (40, 4, 2000))
    x[:, 2] = x[:, 0] + x[:, 1]
    x[30:] *= 2
    facts = [{"person": f"p{i}", "record": f"r{i}", "source": "built"} for i in range(40)]
    valid = np.ones((40, 4), dtype=bool)
    valid[[0, 35], 2] = False
    x[[0, 35], 2] = 0
    split = [0] * 30 + [2] * 10
    publish_set(folder, facts, {"ecg": (x.astype(np.int16), LEADS, 1.0)}, split=split, valid={"ecg": valid})
    return folder


def recon(tmp_path: Path, data: str, *words: str) -> ProbeConfig:
    given = [f"run.dir={tmp_path}", "probe.task=reconstruction", f"probe.data={data}", "probe.runs=[one,other]"]
    return config.load(ProbeConfig, None, [*given, *words])


def test_reconstruction_is_measured_lead_by_lead_against_its_rivals(tmp_path: Path, four_leads: str) -> None:
    results = reconstruction.reconstruction(recon(tmp_path, four_leads), trained(), quiet)
    rows = {(row["mask"], row["predictor"]): row for row in results["rows"]}
    assert {mask for mask, _ in rows} == {"chest", "chest_lead", "limb", "time"}
    assert (results["windows"], results["train_windows"]) == (10, 30)
    ridge = rows["chest", "ridge"]
    assert ridge["r2_leads"]["V1"] == pytest.approx(1.0, abs=1e-3)
    assert ridge["r2_leads"]["V2"] == pytest.approx(0.0, abs=0.01)
    assert ridge["r2"] == pytest.approx(0.5, abs=0.01)
    assert set(rows["limb", "ridge"]["r2_leads"]) == {"II"}
    limb = rows["limb", "ridge"]
    assert limb["r2_median"] == pytest.approx(1.0, abs=1e-3), "II = V1 - I"
    assert limb["r2"] == pytest.approx(0.9, abs=0.02), "in one window of ten V1 is not valid, and nothing tells II"
    assert set(rows["time", "zero"]["r2_leads"]) == set(LEADS)
    for mask in ("chest", "time"):
        assert rows[mask, "zero"]["r2"] == pytest.approx(0.0, abs=0.01)
        assert rows[mask, "zero"]["r2_sd"] is None
    assert rows["time", "interpolation"]["r2"] < -0.2, "a line through noise"
    assert rows["chest", "interpolation"]["r2"] == pytest.approx(0.0, abs=0.01)
    model = rows["chest", "model"]
    assert model["r2"] < 0.1 and model["r2_sd"] > 0
    written = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert written == results and (tmp_path / "probe" / "config.yaml").exists()
    assert any("chest" in line for line in reconstruction.table_of(results))


@pytest.mark.parametrize(
    ("words", "read", "told"),
    [
        (["probe.split=val"], trained(), "no windows in its val split"),
        ([], trained(frozenset({pseudonym("built", "p33")})), "pretrained on 1 of the 10 test people.*same split.val"),
        ([], trained(rate=100.0), "was trained at 100 Hz"),
    ],
)
def test_reconstruction_refuses_what_would_say_nothing(
    tmp_path: Path, four_leads: str, words: list[str], read: Read, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        reconstruction.reconstruction(recon(tmp_path, four_leads, *words), read, quiet)
    assert not (tmp_path / "probe").exists()


def test_masks_that_the_leads_do_not_allow_are_refused() -> None:
    with pytest.raises(UserError, match=r"probe\.masks=chest needs limb leads and V leads"):
        list(reconstruction.hidden_leads("chest", ["I", "II"]))
    assert list(reconstruction.hidden_leads("time", ["I"])) == [None]
