"""Wrong input of pretraining: one clear message, the documented exit status, no partial files."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from physio_dist import pretrain
from physio_dist.errors import UserError
from tests.conftest import disk_of
from tests.data.format.test_tar import BOMB, packed
from tests.data.test_bad_sets import publish_empty
from tests.system.launching import CONFIG, Run, free_port, physio

Make = Callable[..., Run]


def told(run: Run, status: int, *words: str) -> None:
    """One message of all ranks holds the words and ``status``."""
    text = run.said()
    messages = [line for line in text.splitlines() if "(exit status" in line and line.startswith("physio-dist: ")]
    assert len(messages) == 1, text
    assert f"exit status {status}" in messages[0]
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("model.preset=tinny", ("tinny", "tiny")),
        ("train.steps=many", ("train.steps", "many")),
        ("train.precision=fp8", ("fp8", "bf16")),
        ("zero.stage=4", ("zero.stage", "3")),
        ("mask.intra_ratio=1.5", ("mask.intra_ratio", "1.5")),
        ("mask.intra_ratio=1.0", ("mask.intra_ratio",)),
        ("nonsense", ("nonsense", "key=value")),
    ],
)
def test_wrong_option_is_refused_before_ranks_meet(new_run: Make, option: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        pretrain.main(["--config", CONFIG, *new_run(option).words()])
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("train.stepz=3", ("train.stepz", "train.steps")),
        ("train.global_batch=100000", ("100000", "smaller train.global_batch")),
        ("train.global_batch=1", ("2 ranks",)),
        ("data.index=/no/such/place", ("/no/such/place", "index.json")),
        ("data.signal=eeg", ("eeg", "ecg")),
        ("resume=/no/such/run", ("/no/such/run", "checkpoint")),
    ],
)
def test_wrong_option_ends_the_run_with_one_message(new_run: Make, option: str, words: tuple[str, ...]) -> None:
    run = new_run(option)
    # One rank is quicker where the number of ranks has no part in it.
    assert (run(launcher="deepspeed") if "ranks" in words[0] else run(1, "python")) == 2, run.said()
    told(run, 2, *words)
    assert not list(run.path.glob("checkpoints/*"))


def test_missing_configuration_file_is_named(tmp_path: Path, simulated: str) -> None:
    from tests.system.launching import BIN, ROOT

    done = subprocess.run(
        [str(BIN / "python"), str(ROOT / "physio_dist" / "pretrain.py"), "--config", str(tmp_path / "none.yaml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "none.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def odd_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shard sets that the model cannot train on, or not together."""
    folder = tmp_path_factory.mktemp("odd")
    sets = {
        "rate": ("window.rate=100",),
        "leads": ("leads=I,II,V1",),
        "length": ("window.seconds=9.5",),
    }
    for name, options in sets.items():
        done = physio("shard", "simulate", "people=12,windows=3,seed=1", "--out", str(folder / name), *options)
        assert done.returncode == 0, done.stderr
    return {name: str(folder / name) for name in sets}


def test_run_refuses_sampling_rate_of_another_patch_length(odd_sets: dict[str, str], new_run: Make) -> None:
    run = new_run(f"data.index={odd_sets['rate']}")
    assert run(launcher="deepspeed") == 2
    told(run, 2, "100 Hz", "200", odd_sets["rate"])


def test_run_refuses_window_with_partial_patch(odd_sets: dict[str, str], new_run: Make) -> None:
    run = new_run(f"data.index={odd_sets['length']}")
    assert run() == 2
    told(run, 2, "1900 samples")


def test_mixture_refuses_sets_with_different_leads(odd_sets: dict[str, str], new_run: Make, simulated: str) -> None:
    run = new_run(f"data.index=[{{url: {simulated}, weight: 1}}, {{url: {odd_sets['leads']}, weight: 1}}]")
    assert run() == 2
    told(run, 2, "channels", odd_sets["leads"])


def test_resume_refuses_checkpoint_with_other_leads(odd_sets: dict[str, str], new_run: Make, undisturbed: Make) -> None:
    other = new_run(f"data.index={odd_sets['leads']}", f"resume={undisturbed().url}")
    assert other() == 2
    told(other, 2, "channels")


def test_resume_refuses_changed_options_and_names_them(undisturbed: Make, tmp_path: Path) -> None:
    run = undisturbed().copied(tmp_path)
    assert run(extra=("train.lr=0.1", "mask.inter_ratio=0.4")) == 2
    told(run, 2, "train.lr", "mask.inter_ratio", "another run.name")
    run.log.unlink()
    assert run(extra=("resume=none",)) == 2
    told(run, 2, "exists already")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_shard_ends_run_with_status_3_and_is_named(
    simulated: str, new_run: Make, tmp_path: Path, damage: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(simulated, copy)
    victim = copy / "ecg-000001.tar"
    data = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    else:
        data[5000] ^= 4
        victim.write_bytes(data[:-512] if damage == "truncated" else data)
    run = new_run(f"data.index={copy}")
    assert run(launcher="deepspeed" if damage == "altered" else "ranks") == 3, run.said()
    told(run, 3, "ecg-000001.tar")
    done = physio("verify", str(copy))
    assert done.returncode == 3
    assert "ecg-000001.tar" in done.stdout


@pytest.mark.parametrize("fault", ["pickled", "future", "empty"])
def test_foreign_shard_set_is_refused(simulated: str, new_run: Make, tmp_path: Path, fault: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(simulated, copy)
    index = copy / "index.json"
    if fault == "pickled":
        (copy / "ecg-000001.tar").write_bytes(packed(("a.ecg.npy", BOMB)))
    elif fault == "future":
        index.write_text(index.read_text().replace('"format": 2', '"format": 99'))
    else:
        shutil.rmtree(copy)
        publish_empty(copy)
    run = new_run(f"data.index={copy}")
    status = {"pickled": 3, "future": 2, "empty": 2}[fault]
    assert run(1, "python") == status, run.said()
    words = {"pickled": "ecg-000001.tar", "future": "index.json has format 99", "empty": "holds 0 samples, fewer than"}
    told(run, status, words[fault])
    assert "unpickled" not in run.said()
    assert not list(run.path.glob("checkpoints/*"))


def test_unreachable_endpoint_is_named(new_run: Make) -> None:
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    run = new_run("data.index=s3://bucket/set")
    run.env = env
    assert run() == 2
    told(run, 2, env["AWS_ENDPOINT_URL"], "AWS_ENDPOINT_URL")


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    with disk_of("3m", tmp_path / "small") as folder:
        yield folder


def test_full_disk_leaves_no_committed_partial_checkpoint(new_run: Make, small_disk: Path) -> None:
    run = new_run()
    run.run_dir = str(small_disk)
    assert run() == 2, run.said()
    told(run, 2, "disk is full")
    for folder in (run.path / "checkpoints").iterdir():
        if (folder / "manifest.json").exists():
            manifest = json.loads((folder / "manifest.json").read_text())
            for name, facts in manifest["files"].items():
                assert (folder / name).stat().st_size == facts["bytes"]


def test_nonfinite_loss_ends_run_with_status_1(new_run: Make) -> None:
    run = new_run("train.lr=1e30", "train.min_lr=1e30", "train.save_every=1000", "train.precision=fp32")
    assert run(launcher="deepspeed") == 1
    told(run, 1, "not", "finite", "train.lr")


def test_shipped_pretrain_configurations_load(simulated: str) -> None:
    from physio_dist.config import PretrainConfig, load

    folder = Path(CONFIG).parent
    for file in folder.glob("*.yaml"):
        options = load(PretrainConfig, str(file), [f"data.index={simulated}"])
        assert [source.url for source in options.data.index] == [simulated]


def test_occupied_master_port_is_named(new_run: Make) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = new_run()
        run.env = {**run.env, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        run.env = {**run.env, "MASTER_PORT": port}
        assert run(1, "python") == 2, run.said()
    told(run, 2, f"port {port}", "--master_port")
    assert not (run.path / "config.yaml").exists()
