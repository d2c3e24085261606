"""Encoders by folder and by URL, and whom they may be tested on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from physio_dist import storage
from physio_dist.errors import DataError, UserError
from physio_dist.evaluation.backbones import Backbone, open_backbone, refuse_overlap, untrained
from physio_dist.models import cbramod
from physio_dist.models.cbramod import CBRAMOD_BYTES, cbramod_name
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, EncoderConfig, MaskedModel, preset
from physio_dist.models.export import save_encoder
from physio_dist.storage import user_cache
from tests.conftest import Web

ABOUT = {"signal": "ecg", "channels": ["I", "II"], "rate": 200, "unit_uv": 100.0, "simulated": True}
HUB = "weighting666/CBraMod/resolve/main/pretrained_weights.pth"


def export(folder: Path, people: object = (3, 2**64 - 1), **about: Any) -> CrissCrossEncoder:
    """An export's folder; an entry of ``about`` that is None is left out."""
    torch.manual_seed(0)
    encoder = CrissCrossEncoder(preset("tiny"))
    folder.mkdir(parents=True, exist_ok=True)
    facts = {name: value for name, value in {**ABOUT, **about}.items() if value is not None}
    for name, data in save_encoder(encoder, facts).items():
        (folder / name).write_bytes(data)
    if people is not None:
        listed = [f"{one:016x}" for one in people] if isinstance(people, tuple) else people
        (folder / "people.json").write_text(json.dumps(listed))
    return encoder.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MaskedModel]:
    """A checkpoint of the published one's shape, and the model that is in it."""
    torch.manual_seed(1)
    model = MaskedModel(preset("base"))
    with torch.no_grad():
        model.encoder.embedding.norm1.weight.mul_(1.5)
    path = tmp_path_factory.mktemp("published") / "weights.pth"
    torch.save({cbramod_name(name): value for name, value in model.state_dict().items()}, path)
    return path, model.eval()


def features(encoder: CrissCrossEncoder) -> torch.Tensor:
    x = torch.randn(2, 3, 4, 200, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        result: torch.Tensor = encoder(x, valid=torch.ones(2, 3, 4, dtype=torch.bool))
    return result


def test_an_export_tells_what_it_is(tmp_path: Path) -> None:
    encoder = export(tmp_path / "enc")
    opened = open_backbone(f"{tmp_path}/enc/", "ecg")
    assert torch.equal(features(opened.module), features(encoder))
    assert not opened.module.training
    weights = (tmp_path / "enc" / "encoder.safetensors").read_bytes()
    assert replace(opened, module=encoder) == Backbone(
        module=encoder, signal="ecg", sha256=hashlib.sha256(weights).hexdigest(), rate=200.0, unit_uv=100.0,
        channels=("I", "II"), people=frozenset({3, 2**64 - 1}), simulated=True, url=f"{tmp_path}/enc",
    )  # fmt: skip
    for url in (f"{tmp_path}/enc/encoder.safetensors", f"file://{tmp_path}/enc"):
        assert open_backbone(url).sha256 == opened.sha256


def test_an_export_without_people_says_nothing_of_them(tmp_path: Path) -> None:
    export(tmp_path, people=None)
    opened = open_backbone(str(tmp_path), "ecg")
    assert opened.people is None
    refuse_overlap(opened, [3], "0")


@pytest.mark.parametrize("people", [{}, [3], ["3"], ["000000000000000g"], ["00000000000000003"], ["000000000000000A"]])
def test_people_that_are_none_are_refused(tmp_path: Path, people: object) -> None:
    export(tmp_path, people)
    with pytest.raises(DataError, match=r"people\.json is not a list of pseudonyms"):
        open_backbone(str(tmp_path), "ecg")


def test_an_encoder_of_the_other_signal_is_refused(tmp_path: Path, data_dir: Path) -> None:
    export(tmp_path)
    with pytest.raises(UserError, match=r"this encoder is for ecg signals, and eeg was asked for.*data.signal=eeg"):
        open_backbone(str(tmp_path), "eeg")
    published = data_dir / "cbramod-reference" / "two_layers.pth"
    with pytest.raises(UserError, match="CBraMod checkpoints are for eeg signals, and ecg was asked for"):
        open_backbone(str(published), "ecg")


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({"signal": None}, "config.json: .*KeyError.'signal'.*export it again"),
        ({"rate": "fast"}, "config.json: .*fast"),
        ({"channels": 3}, "config.json: .*export it again"),
        ({"signal": "emg"}, "config.json: signal 'emg' at 200 Hz in units of 100 uV is none of ours"),
        ({"rate": 0}, "at 0 Hz"),
        ({"rate": float("inf")}, "at inf Hz"),
        ({"unit_uv": -1}, "units of -1 uV"),
        ({"unit_uv": float("nan")}, "units of nan uV"),
    ],
)
def test_an_export_that_does_not_say_what_it_takes_is_refused(
    tmp_path: Path, about: dict[str, object], told: str
) -> None:
    export(tmp_path, **about)
    with pytest.raises(UserError, match=told):
        open_backbone(str(tmp_path))


def test_folders_that_are_no_exports_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent/config\.json.*there is nothing there.*`physio-dist export RUN OUT`"):
        open_backbone(str(tmp_path / "absent"), "ecg")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=f"this is a run: `physio-dist export {tmp_path}/run OUT`"):
        open_backbone(str(tmp_path / "run"), "ecg")
    export(tmp_path / "enc")
    (tmp_path / "enc" / "encoder.safetensors").write_bytes(b"altered")
    with pytest.raises(DataError, match="sha256"):
        open_backbone(str(tmp_path / "enc"), "ecg")


def test_a_checkpoint_of_the_published_shape_and_size_comes_by_url(
    published: tuple[Path, MaskedModel], web: Web
) -> None:
    path, model = published
    size = path.stat().st_size
    assert abs(size / CBRAMOD_BYTES - 1) < 0.01
    shutil.copy(path, web.folder / "weights.pth")
    url = f"{web.url}/weights.pth"
    opened = open_backbone(url, "eeg")
    assert torch.equal(features(opened.module), features(model.encoder))
    assert not opened.module.training
    assert replace(opened, loaded="", module=model.encoder) == Backbone(
        module=model.encoder, signal="eeg", sha256=hashlib.sha256(path.read_bytes()).hexdigest(), rate=200.0,
        unit_uv=100.0, channels=(), people=None, simulated=False, url=url,
    )  # fmt: skip


def test_a_download_is_kept_verified_and_fetched_again_when_damaged(
    data_dir: Path, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.files, "OUTAGE_S", 0.5)
    source = data_dir / "cbramod-reference" / "two_layers.pth"
    shutil.copy(source, web.folder / "a.pth")
    (web.folder / "b.pth").write_bytes(b"not a checkpoint")
    first = open_backbone(f"{web.url}/a.pth", "eeg")
    assert open_backbone(f"{web.url}/a.pth", "eeg").sha256 == first.sha256
    assert web.asked == ["/a.pth"]
    (copy,) = (tmp_path / "xdg" / "physio-dist" / "weights").iterdir()
    assert copy.read_bytes() == source.read_bytes()
    # Another URL is another file.
    with pytest.raises(UserError, match=r"b\.pth: not a checkpoint of tensors alone"):
        open_backbone(f"{web.url}/b.pth", "eeg")
    for damage in (b"", copy.read_bytes()[:-1] + b"x"):
        copy.write_bytes(damage)
        web.asked.clear()
        assert open_backbone(f"{web.url}/a.pth", "eeg").sha256 == first.sha256
        assert web.asked == ["/a.pth"]
        assert copy.read_bytes() == source.read_bytes()
    # A new file at the old address takes the place of what is damaged.
    copy.write_bytes(b"")
    shutil.copy(source.with_suffix(".safetensors"), web.folder / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth"):
        open_backbone(f"{web.url}/a.pth", "eeg")
    assert not copy.exists()
    shutil.copy(source, web.folder / "a.pth")
    for path in copy.parent.iterdir():
        path.write_bytes(b"")
    assert open_backbone(f"{web.url}/a.pth", "eeg").sha256 == first.sha256
    assert sum(path.name.startswith(copy.name[:32]) for path in copy.parent.iterdir()) == 1
    web.stop()
    assert open_backbone(f"{web.url}/a.pth", "eeg").sha256 == first.sha256
    copy.unlink()
    with pytest.raises(UserError, match=r"a\.pth.*Cannot connect.*give the path of a copy"):
        open_backbone(f"{web.url}/a.pth", "eeg")


def test_the_cache_lies_where_users_keep_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for base, folder in (("/a", "/a"), ("", f"{tmp_path}/.cache"), ("relative", f"{tmp_path}/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert str(user_cache.user_cache_dir("weights")) == f"{folder}/physio-dist/weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(user_cache.user_cache_dir("weights")) == f"{tmp_path}/.cache/physio-dist/weights"


def test_a_cache_that_cannot_be_written_does_not_stop_anybody(
    data_dir: Path, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(data_dir / "cbramod-reference" / "two_layers.pth", web.folder / "a.pth")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        open_backbone(f"{web.url}/a.pth", "eeg")
    assert web.asked == ["/a.pth", "/a.pth"]


def test_a_missing_checkpoint_and_half_of_one_are_clear_errors(
    data_dir: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"none\.pth: there is nothing there"):
        open_backbone(f"{web.url}/none.pth", "eeg")
    with pytest.raises(UserError, match=r"cannot read /no/where\.pth: there is nothing there$"):
        open_backbone("/no/where.pth", "eeg")
    monkeypatch.setattr(storage.files, "OUTAGE_S", 0.5)
    shutil.copy(data_dir / "cbramod-reference" / "two_layers.pth", web.folder / "a.pth")
    web.faults["/a.pth"] = ["cut", ...]
    with pytest.raises(UserError, match=r"a\.pth: ClientPayloadError"):
        open_backbone(f"{web.url}/a.pth", "eeg")
    web.faults.clear()
    assert open_backbone(f"{web.url}/a.pth", "eeg").module.config.layers == 2


@pytest.mark.parametrize("where", ["web", "short", "local"])
def test_what_is_not_the_published_checkpoint_is_refused(
    published: tuple[Path, MaskedModel], web: Web, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    mirror = web.folder / HUB
    mirror.parent.mkdir(parents=True)
    monkeypatch.setattr(cbramod, "CBRAMOD_URL", f"{web.url}/{HUB}")
    url = {"web": f"{web.url}/{HUB}", "short": "cbramod", "local": str(mirror)}[where]
    data = published[0].read_bytes()
    mirror.write_bytes(data)
    got = hashlib.sha256(data).hexdigest()
    with pytest.raises(DataError, match=f"{HUB} is not the published .*: {len(data)} bytes instead of 19775842.*{got}"):
        open_backbone(url, "eeg")
    # Of the published size, and yet another.
    data = (data + bytes(CBRAMOD_BYTES))[:CBRAMOD_BYTES]
    mirror.write_bytes(data)
    got = hashlib.sha256(data).hexdigest()
    with pytest.raises(DataError, match=f"sha256 {got} instead of 0792cb808c14e6b7"):
        open_backbone(url, "eeg")


def test_the_published_checkpoint_opens_by_its_short_name(
    published: tuple[Path, MaskedModel], web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = published
    mirror = web.folder / HUB
    mirror.parent.mkdir(parents=True)
    shutil.copy(path, mirror)
    monkeypatch.setattr(cbramod, "CBRAMOD_URL", f"{web.url}/{HUB}")
    monkeypatch.setattr(cbramod, "CBRAMOD_BYTES", path.stat().st_size)
    monkeypatch.setattr(cbramod, "CBRAMOD_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    opened = open_backbone("cbramod", "eeg")
    assert opened.url == f"{web.url}/{HUB}"
    assert torch.equal(features(opened.module), features(model.encoder))
    assert open_backbone("cbramod").sha256 == opened.sha256
    assert len(web.asked) == 1
    # What is kept is held against the published hash, not against its own.
    monkeypatch.setattr(cbramod, "CBRAMOD_SHA256", "0" * 64)
    with pytest.raises(DataError, match="is not the published CBraMod checkpoint"):
        open_backbone("cbramod", "eeg")
    assert len(web.asked) == 2


def test_the_published_checkpoints_name_is_its_url() -> None:
    assert f"https://huggingface.co/{HUB}" == cbramod.CBRAMOD_URL
    assert cbramod._PUBLISHED.search(cbramod.CBRAMOD_URL)
    assert cbramod._PUBLISHED.search("s3://b/weighting666/CBraMod/resolve/0123abc/pretrained_weights.pth")
    assert not cbramod._PUBLISHED.search("/home/me/finetuned/pretrained_weights.pth")


@pytest.mark.parametrize("name", ["two_layers.pth", "two_layers.safetensors"])
def test_features_are_the_reference_implementations(data_dir: Path, name: str) -> None:
    folder = data_dir / "cbramod-reference"
    opened = open_backbone(str(folder / name), "eeg")
    assert opened.module.config == EncoderConfig(d=200, layers=2, heads=8, ffn=800, dropout=0.1)
    with np.load(folder / "two_layers_cases.npz") as cases, torch.no_grad():
        result = opened.module(torch.from_numpy(cases["0.input"]).float())
        assert float((result.double() - torch.from_numpy(cases["0.features"])).abs().max()) <= 1e-4


def test_a_checkpoint_of_something_else_is_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=rf"^{tmp_path}/other\.pth: not a CBraMod checkpoint: "):
        open_backbone(str(tmp_path / "other.pth"), "eeg")
    torch.save({"weight": torch.zeros(2), "epoch": slice(3)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=rf"^{tmp_path}/more\.pth: not a "):
        open_backbone(str(tmp_path / "more.pth"), "eeg")


def test_an_untrained_encoder_is_of_the_same_shape_and_the_same_every_time(tmp_path: Path) -> None:
    export(tmp_path)
    trained = open_backbone(str(tmp_path), "ecg")
    torch.manual_seed(11)
    state = torch.get_rng_state()
    fresh = untrained(trained, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    again = untrained(trained, 3)
    assert fresh.module.config == trained.module.config
    assert not fresh.module.training
    assert torch.equal(features(fresh.module), features(again.module))
    assert (fresh.sha256, fresh.people, fresh.simulated, fresh.channels) == (again.sha256, frozenset(), False, ())
    assert (fresh.signal, fresh.rate, fresh.unit_uv) == (trained.signal, trained.rate, trained.unit_uv)
    others = [untrained(trained, 4), untrained(replace(trained, signal="eeg"), 3), trained]
    assert len({fresh.sha256, *(other.sha256 for other in others)}) == 4
    for other in others:
        assert not torch.equal(features(fresh.module), features(other.module))
    # Features are kept by this hash.
    config = replace(trained.module.config, dropout=0.3)
    assert untrained(replace(trained, module=CrissCrossEncoder(config)), 3).sha256 != fresh.sha256


def test_people_of_pretraining_may_not_be_tested(tmp_path: Path) -> None:
    export(tmp_path)
    opened = open_backbone(str(tmp_path), "ecg")
    refuse_overlap(opened, [], "0")
    refuse_overlap(opened, np.array([1, 2, 4], dtype=np.uint64), "0")
    makes: list[Callable[[], object]] = [
        lambda: iter([3, 3, 4, 2**64 - 1]),
        lambda: np.array([3, 4, 2**64 - 1, 3], dtype=np.uint64),
    ]
    for make in makes:
        with pytest.raises(UserError) as caught:
            refuse_overlap(opened, make(), "7")  # type: ignore[arg-type]
        told = str(caught.value)
        assert f"{tmp_path} was pretrained on 2 of the 3 test people of fold 7" in told
        assert "tune.encoders.ecg='{7: FOLDER}'" in told
        assert "split.test" in told
    refuse_overlap(untrained(opened, 0), [3], "7")
