"""Storage on a real disk and a real S3 server, with real faults."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from physio_dist import storage
from physio_dist.storage import NotFoundError, StorageError
from tests.conftest import S3
from tests.tiers import require_root


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.integration)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, on each kind of storage."""
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3_here").bucket)


def in_child(code: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """A process of its own that has imported storage."""
    words = [sys.executable, "-c", f"import sys\nfrom pathlib import Path\nfrom physio_dist import storage\n{code}"]
    return subprocess.Popen(
        words, env={**os.environ, **env}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip


def test_bytes_come_back_whole_and_in_ranges(place: str) -> None:
    url = storage.join(place, "a", "b.bin")
    data = os.urandom(300_000)
    storage.write_bytes(url, data)
    assert storage.read_bytes(url) == data
    assert storage.read_bytes(url, 10, 20) == data[10:20]
    assert storage.read_bytes(url, 299_000) == data[299_000:]
    assert storage.size(url) == 300_000
    storage.write_bytes(url, b"")
    assert storage.read_bytes(url) == b""
    assert storage.size(url) == 0


def test_json_comes_back_and_equal_documents_have_equal_bytes(place: str) -> None:
    storage.write_json(storage.join(place, "a.json"), {"b": [1, None], "a": "\u00b5"})
    storage.write_json(storage.join(place, "b.json"), {"a": "\u00b5", "b": [1, None]})
    assert storage.read_json(storage.join(place, "a.json")) == {"a": "\u00b5", "b": [1, None]}
    assert storage.read_bytes(storage.join(place, "a.json")) == storage.read_bytes(storage.join(place, "b.json"))
    for text in (b"{", b"\xff", b""):
        storage.write_bytes(storage.join(place, "a.json"), text)
        with pytest.raises(StorageError, match=r"a\.json is not a JSON document"):
            storage.read_json(storage.join(place, "a.json"))


def test_files_are_put_and_fetched(place: str, tmp_path: Path) -> None:
    data = os.urandom(9_000_000)
    (tmp_path / "source").write_bytes(data)
    url = storage.join(place, "deep", "er", "x.tar")
    storage.put_file(tmp_path / "source", url)
    storage.get_file(url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


@pytest.mark.parametrize("name", ["a#b c.bin", "q?x=1", "100%25", "[1]*.x", "\u00e4\u00f6", "a:b", "~x", "x@y"])
def test_odd_names_are_names_and_never_patterns(place: str, name: str) -> None:
    for other in ("1.x", "[1]other.x", "plain"):
        storage.write_bytes(storage.join(place, "f", other), b"other")
    url = storage.join(place, "f", name)
    storage.write_bytes(url, b"mine")
    assert storage.read_bytes(url) == b"mine"
    assert storage.exists(url)
    assert storage.names(storage.join(place, "f")) == sorted([name, "1.x", "[1]other.x", "plain"])
    storage.remove(url)
    assert storage.names(storage.join(place, "f")) == ["1.x", "[1]other.x", "plain"]


def test_folders_with_odd_names_are_removed_alone(place: str) -> None:
    for name in ("run1", "run[1]", "run10", "run*"):
        storage.write_bytes(storage.join(place, name, "x"), b"1")
        storage.write_bytes(storage.join(place, name, "deep", "y"), b"1")
    storage.remove(storage.join(place, "run[1]"), recursive=True)
    storage.remove(storage.join(place, "run*"), recursive=True)
    assert storage.names(place) == ["run1", "run10"]
    storage.remove(storage.join(place, "run1"), recursive=True)
    assert storage.names(place) == ["run10"]
    assert storage.names(storage.join(place, "run10")) == ["deep", "x"]


def test_what_is_not_there_is_said_to_be_not_there(place: str) -> None:
    url = storage.join(place, "none")
    for act in (storage.read_bytes, storage.size, storage.read_json):
        with pytest.raises(NotFoundError, match=r"none.*: there is nothing there"):
            act(url)
    with pytest.raises(NotFoundError):
        storage.get_file(url, Path(os.devnull))
    assert not storage.exists(url)
    assert storage.names(url) == []
    storage.remove(url)
    storage.remove(url, recursive=True)


def test_a_file_has_no_names_in_it(place: str) -> None:
    storage.write_bytes(storage.join(place, "file"), b"x")
    assert storage.names(storage.join(place, "file")) == []
    assert storage.exists(place if "://" not in place else storage.join(place, "file"))


def test_local_urls_of_every_form_are_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes("sub dir/x", b"1")
    for url in (f"{tmp_path}/sub dir/x", f"file://{tmp_path}/sub dir/x", f"local://{tmp_path}/sub dir/x", "~/sub dir/x",
                "./sub dir/x", "sub dir//x"):  # fmt: skip
        assert storage.read_bytes(url) == b"1", url
        assert storage.is_local(url)
        assert storage.exists(url)
    assert storage.absolute("sub dir/") == f"{tmp_path}/sub dir"
    assert storage.absolute("~/x") == f"{tmp_path}/x"
    assert storage.absolute("s3://b/x/") == "s3://b/x"
    assert not storage.is_local("s3://b/x")


@pytest.mark.parametrize(
    ("parts", "whole"),
    [(("/", "a"), "/a"), (("", "a", "b"), "a/b"), (("s3://b/", "/x/", "y"), "s3://b/x/y"), (("a",), "a"),
     (("a/", "", "b"), "a/b"), ((".", "x"), "./x"), (("/",), "/")],
)  # fmt: skip
def test_urls_are_joined(parts: tuple[str, ...], whole: str) -> None:
    assert storage.join(*parts) == whole


@given(
    st.from_regex(r"(s3://b|/|/a/|x)(/?[a-z]{1,3}){0,3}/?", fullmatch=True),
    st.from_regex(r"[a-z]{1,5}", fullmatch=True),
)
def test_joining_one_by_one_equals_joining_at_once(url: str, name: str) -> None:
    assert storage.join(storage.join(url, name), "x") == storage.join(url, name, "x")


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(StorageError, match="no way to open nonsense:// URLs"):
        storage.read_bytes("nonsense://a/b")


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda p: storage.write_bytes(f"{p}/file/x", b""), "cannot write .*/file/x: File exists"),
        (lambda p: storage.read_bytes(f"{p}/file/x"), "cannot read .*/file/x: Not a directory"),
        (lambda p: storage.write_bytes(f"{p}/folder", b""), "cannot write .*/folder: Is a directory"),
        (lambda p: storage.read_bytes(f"{p}/folder"), "cannot read .*/folder: Is a directory"),
        (lambda p: storage.read_bytes(f"{p}/{'x' * 300}"), "File name too long"),
    ],
)
def test_local_faults_that_stay_are_told_at_once_in_one_line(
    tmp_path: Path, act: Callable[[Path], object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # If it were tried again, this test would take its time out.
    monkeypatch.setattr(storage.files, "OUTAGE_S", 1e6)
    monkeypatch.setattr(storage.files, "FIRST_CONTACT_S", 1e6)
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=told) as caught:
        act(tmp_path)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tiny_disk: Path, tmp_path: Path) -> None:
    storage.write_bytes(f"{tiny_disk}/x", b"old")
    (tmp_path / "big").write_bytes(bytes(200_000))
    for act in (
        lambda: storage.write_bytes(f"{tiny_disk}/x", bytes(200_000)),
        lambda: storage.put_file(tmp_path / "big", f"{tiny_disk}/x"),
    ):
        with pytest.raises(StorageError, match="the disk is full; free some space and start again"):
            act()
        assert [path.name for path in tiny_disk.iterdir()] == ["x"]
        assert (tiny_disk / "x").read_bytes() == b"old"


def test_a_disk_that_cannot_be_written_is_said_to_be(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StorageError, match=r"cannot write .*: Read-only file system"):
        storage.write_bytes(f"{tiny_disk}/x", b"")


@pytest.mark.integration
def test_a_file_of_somebody_else_is_said_to_be_denied(tmp_path: Path) -> None:
    # Root may do everything, so another user tries.
    require_root()
    tmp_path.chmod(0o755)
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "secret").chmod(0o600)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    code = (
        "import os; os.setgid(65534); os.setuid(65534)\n"
        f"read = lambda: storage.read_bytes('{tmp_path}/secret')\n"
        f"write = lambda: storage.write_bytes('{tmp_path}/y', b'')\n"
        "for act in (read, write):\n"
        "    try: act()\n"
        "    except storage.StorageError as error: print(error)\n"
    )
    out, err = in_child(code, {}).communicate(timeout=60)
    assert err == ""
    assert [line.split(":")[0] for line in out.splitlines()] == [
        f"cannot read {tmp_path}/secret", f"cannot write {tmp_path}/y",
    ]  # fmt: skip
    assert out.count("access denied") == out.count("check the file's permissions") == 2


@pytest.mark.integration
def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new(place: str, request: pytest.FixtureRequest) -> None:
    env = request.getfixturevalue("s3").env if "://" in place else {}
    url = storage.join(place, "x.bin")
    olds = [bytes([i]) * 3_000_000 for i in (0, 1)]
    storage.write_bytes(url, olds[0])
    code = f"print('on', flush=True)\nfor i in range(10**9): storage.write_bytes({url!r}, bytes([i % 2]) * 3_000_000)"
    for delay in (0.0, 0.013, 0.05, 0.11):
        child = in_child(code, env)
        assert child.stdout is not None
        assert child.stdout.readline() == "on\n"
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert storage.read_bytes(url) in olds


def test_wrong_and_missing_credentials_are_named(s3_here: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "WRONGWRONGWRONG")):
        monkeypatch.setenv(name, value)
        storage.forget_clients()
        for act in (storage.read_bytes, storage.names, storage.exists, lambda url: storage.write_bytes(url, b"")):
            with pytest.raises(
                StorageError, match=r"access denied .*check the credentials .AWS_ACCESS_KEY_ID"
            ) as caught:
                act(s3_here.bucket + "/x")
            assert "wrong" not in str(caught.value)
            assert s3_here.env["AWS_ENDPOINT_URL"] in str(caught.value)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    storage.forget_clients()
    with pytest.raises(StorageError, match="check the credentials"):
        storage.read_bytes(s3_here.bucket + "/x")


def test_what_a_server_refuses_for_good_is_told_at_once(s3_here: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.files, "OUTAGE_S", 1e6)
    storage.write_bytes(s3_here.bucket + "/x", b"short")
    with pytest.raises(StorageError, match="InvalidRange"):
        storage.read_bytes(s3_here.bucket + "/x", 100, 200)


def test_a_bucket_that_does_not_exist_is_named(s3_here: S3) -> None:
    for act in (storage.names, lambda url: storage.write_bytes(url, b""), storage.read_bytes):
        with pytest.raises(NotFoundError, match="there is no bucket 'nobucket'; create it or change the URL"):
            act("s3://nobucket/x")


@pytest.mark.parametrize("kind", ["refused", "silent", "malformed"])
@pytest.mark.integration
def test_an_endpoint_that_does_not_answer_is_a_clear_error(kind: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            # A full queue: whoever connects waits, as behind a firewall that drops packets.
            listener.listen(0)
            stuffed = [socket.socket() for _ in range(3)]
            for one in stuffed:
                one.setblocking(False)
                one.connect_ex(listener.getsockname())
        address = "nonsense" if kind == "malformed" else f"http://127.0.0.1:{listener.getsockname()[1]}"
        env = {**S3(Path()).env, "AWS_ENDPOINT_URL": address, "PHYSIO_DIST_STORAGE_FIRST_CONTACT_S": "2"}
        code = "try: storage.read_bytes('s3://b/x')\nexcept storage.StorageError as error: print(error)"
        # An outage's budget of five minutes, were it taken, would run into the time out.
        out, err = in_child(code, env).communicate(timeout=100)
    assert err == ""
    assert out.count("\n") == 1
    assert out.startswith(f"cannot read s3://b/x (endpoint {address})")
    assert "check AWS_ENDPOINT_URL and that the server is up" in out


@pytest.mark.parametrize("act", ["read", "write", "list", "fetch"])
def test_a_server_that_comes_back_after_seconds_is_waited_for(s3_here: S3, tmp_path: Path, act: str) -> None:
    url = s3_here.bucket + "/f/x"
    storage.write_bytes(url, b"before")
    s3_here.stop()
    back = threading.Timer(2.5, s3_here.start)
    back.start()
    try:
        if act == "read":
            assert storage.read_bytes(url) == b"before"
        elif act == "write":
            storage.write_bytes(url, b"after")
        elif act == "list":
            assert storage.names(s3_here.bucket + "/f") == ["x"]
        else:
            storage.get_file(url, tmp_path / "x")
            assert (tmp_path / "x").read_bytes() == b"before"
    finally:
        back.join()
    assert storage.read_bytes(url) == (b"after" if act == "write" else b"before")


def test_an_outage_longer_than_the_budget_is_a_clear_error(s3_here: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.files, "OUTAGE_S", 2.0)
    storage.write_bytes(s3_here.bucket + "/x", b"1")
    s3_here.stop()
    with pytest.raises(StorageError, match=r"cannot write .*check AWS_ENDPOINT_URL and that the server is up"):
        storage.write_bytes(s3_here.bucket + "/x", b"2")
    s3_here.start()
    assert storage.read_bytes(s3_here.bucket + "/x") == b"1"


def test_threads_share_the_client(s3_here: S3) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(5):
                url = f"{s3_here.bucket}/{number}/{i}"
                storage.write_bytes(url, bytes([number]) * 1000)
                assert storage.read_bytes(url) == bytes([number]) * 1000
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_forked_process_gets_a_client_of_its_own(s3_here: S3) -> None:
    code = (
        f"import os\nstorage.write_bytes('{s3_here.bucket}/x', b'1')\npid = os.fork()\n"
        f"if pid == 0:\n    os._exit(0 if storage.read_bytes('{s3_here.bucket}/x') == b'1' else 9)\n"
        "print(os.waitpid(pid, 0)[1])"
    )
    out, _ = in_child(code, s3_here.env).communicate(timeout=60)
    assert out == "0\n"
