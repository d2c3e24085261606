"""Reading over http from a real server, with real faults."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from physio_dist import storage
from physio_dist.storage import NotFoundError, StorageError
from tests.conftest import Web


def test_bytes_ranges_json_and_names_come_over_http(web: Web, tmp_path: Path) -> None:
    data = os.urandom(7_000_000)
    (web.folder / "a b.bin").write_bytes(data)
    (web.folder / "x.json").write_text(json.dumps({"a": 1}))
    url = f"{web.url}/a b.bin"
    assert storage.read_bytes(url) == data
    # The server answers each of these with the whole file.
    assert storage.read_bytes(url, 10, 20) == data[10:20]
    assert storage.read_bytes(url, 6_999_990) == data[-10:]
    assert storage.read_bytes(url, 6_999_990, 8_000_000) == data[-10:]
    assert storage.read_bytes(url, None, 5) == data[:5]
    assert storage.read_json(f"{web.url}/x.json") == {"a": 1}
    storage.get_file(url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert storage.exists(url)
    assert storage.size(url) == len(data)
    assert "x.json" in storage.names(web.url)


def test_what_is_not_on_a_server_is_said_to_be_not_there(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/none"
    for act in (storage.read_bytes, storage.read_json, lambda u: storage.get_file(u, tmp_path / "x")):
        with pytest.raises(NotFoundError, match=r"http://127.0.0.1:\d+/none: there is nothing there$"):
            act(url)
    assert not storage.exists(url)
    assert storage.names(url) == []


@pytest.mark.parametrize("name", ["read_bytes", "exists", "names"])
def test_a_server_that_is_not_up_is_a_clear_error(web: Web, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(storage.files, "FIRST_CONTACT_S", 1.0)
    # Another server has answered; this one's silence is no outage to be sat out.
    monkeypatch.setattr(storage.files, "OUTAGE_S", 1e6)
    monkeypatch.setattr(storage.files, "reachable_hosts", {"http", "https", "http://127.0.0.1:1"})
    web.stop()
    with pytest.raises(StorageError) as caught:
        getattr(storage, name)(f"{web.url}/x")
    told = str(caught.value)
    assert "\n" not in told
    assert f"{web.url}/x: ClientConnectorError: Cannot connect to host" in told
    assert told.endswith("; check the address and that the server is up")
    assert not isinstance(caught.value, NotFoundError)


def test_a_server_that_has_answered_is_waited_for(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.files, "FIRST_CONTACT_S", 0.0)
    monkeypatch.setattr(storage.files, "OUTAGE_S", 60.0)
    (web.folder / "x").write_bytes(b"1")
    with pytest.raises(NotFoundError):
        storage.read_bytes(f"{web.url}/none")
    web.faults["/x"] = [503]
    assert storage.read_bytes(f"{web.url}/x") == b"1"


def test_half_a_body_is_fetched_again_and_never_taken_for_the_whole(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(300_000)
    (web.folder / "x").write_bytes(data)
    web.faults["/x"] = ["cut"]
    assert storage.read_bytes(f"{web.url}/x") == data
    web.faults["/x"] = ["cut"]
    storage.get_file(f"{web.url}/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data
    assert len(web.asked) == 4
    monkeypatch.setattr(storage.files, "OUTAGE_S", 1.0)
    web.faults["/x"] = ["cut", ...]
    for act in (storage.read_bytes, lambda u: storage.get_file(u, tmp_path / "y")):
        with pytest.raises(StorageError, match=r"/x: ClientPayloadError: .*the server is up$") as caught:
            act(f"{web.url}/x")
        assert "\n" not in str(caught.value)


def test_faults_that_pass_are_waited_for(web: Web) -> None:
    (web.folder / "x").write_bytes(b"1")
    web.faults["/x"] = [503, 429]
    assert storage.read_bytes(f"{web.url}/x") == b"1"
    assert len(web.asked) == 3


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (403, r"access denied \(403 Forbidden\); over http only what is open to everybody can be read$"),
        (410, "the server answers 410 Gone$"),
        (501, "the server answers 501 "),
    ],
)
def test_what_a_server_refuses_for_good_is_told_at_once(
    web: Web, monkeypatch: pytest.MonkeyPatch, fault: int, told: str
) -> None:
    monkeypatch.setattr(storage.files, "FIRST_CONTACT_S", 1e6)
    monkeypatch.setattr(storage.files, "OUTAGE_S", 1e6)
    # As hubs do: the file itself lies elsewhere, under an address that carries a signature.
    web.faults = {"/x": [f"{web.url}/y?signature=secret", ...], "/y?signature=secret": [fault, ...]}
    with pytest.raises(StorageError, match=f"cannot read {web.url}/x: {told}") as caught:
        storage.read_bytes(f"{web.url}/x")
    assert "secret" not in str(caught.value)


def test_a_redirection_is_followed(web: Web) -> None:
    (web.folder / "y").write_bytes(b"1")
    web.faults["/x"] = [f"{web.url}/y?signature=1"]
    assert storage.read_bytes(f"{web.url}/x") == b"1"


ACTS: list[Callable[[str], object]] = [
    lambda url: storage.write_bytes(url, b""),
    lambda url: storage.put_file(Path(__file__), url),
]


@pytest.mark.parametrize("act", ACTS)
def test_writing_to_a_plain_server_is_refused_at_once(
    web: Web, monkeypatch: pytest.MonkeyPatch, act: Callable[[str], object]
) -> None:
    monkeypatch.setattr(storage.files, "FIRST_CONTACT_S", 1e6)
    with pytest.raises(StorageError, match=r"cannot write .*/x: the server answers 501"):
        act(f"{web.url}/x")


@pytest.mark.parametrize("url", ["http://", "http:///x"])
def test_an_address_that_is_none_is_told_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.files, "FIRST_CONTACT_S", 1e6)
    with pytest.raises(StorageError, match="cannot read http://"):
        storage.read_bytes(url)
