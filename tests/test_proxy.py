"""The proxy of the fault tests: what it passes on is what the server says, and each fault is one."""

from __future__ import annotations

import http.client
import os
import time
from pathlib import Path

import pytest

from physio_dist import storage
from tests.conftest import Proxied

DATA = os.urandom(300_000)


def test_proxy_passes_and_counts_requests(proxied_here: Proxied, tmp_path: Path) -> None:
    url = f"{proxied_here.bucket}/set/a b+c.tar"
    storage.write_bytes(url, DATA)
    (tmp_path / "there").write_bytes(DATA[:1000])
    storage.put_file(tmp_path / "there", f"{proxied_here.bucket}/set/small")
    assert (proxied_here.folder / "set" / "a b+c.tar").read_bytes() == DATA
    assert storage.names(f"{proxied_here.bucket}/set") == ["a b+c.tar", "small"]
    assert storage.size(url) == len(DATA)
    assert not storage.exists(f"{proxied_here.bucket}/none")
    assert storage.read_bytes(url) == DATA
    assert storage.read_bytes(url, 1000, 2000) == DATA[1000:2000]
    storage.get_file(url, tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == DATA
    storage.remove(f"{proxied_here.bucket}/set", recursive=True)
    assert storage.names(f"{proxied_here.bucket}/set") == []
    assert proxied_here.proxy.sent() == {"a%20b%2Bc.tar": 2 * len(DATA) + 1000}


def test_proxy_passes_wrong_credentials_to_server(proxied_here: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(storage.StorageError, match="access denied"):
        storage.write_bytes(f"{proxied_here.bucket}/a", b"")


@pytest.mark.parametrize("fault", [503, 429, 403, 404, "reset", "short", "stall", "flip"])
def test_proxy_injects_each_fault(proxied: Proxied, fault: int | str) -> None:
    (proxied.folder / "open").write_bytes(DATA)
    rule = proxied.proxy.inject(fault, match="^GET .*/open$", times=1, stall_s=0.5)
    for disturbed in (True, False):
        # Without signature the server answers 403 with a body of its own, which serves as well.
        client = http.client.HTTPConnection(proxied.proxy.url.removeprefix("http://"), timeout=10)
        client.request("GET", f"/{proxied.folder.name}/open")
        answer = client.getresponse()
        begun = time.monotonic()
        if not disturbed:
            clean, status = answer.read(), answer.status
        elif fault == "reset":
            with pytest.raises(ConnectionResetError):
                answer.read()
        elif fault == "short":
            with pytest.raises(http.client.IncompleteRead):
                answer.read()
        else:
            spoilt, told = answer.read(), answer.status
            took = time.monotonic() - begun
        client.close()
    assert rule.met == 1
    assert proxied.proxy.seen[1].sent == len(clean)
    if fault in ("reset", "short"):
        assert proxied.proxy.seen[0].sent == len(clean) // 2
    if fault == "flip":
        differing = [a ^ b for a, b in zip(spoilt, clean, strict=True) if a != b]
        assert differing == [4]
    elif fault == "stall":
        assert spoilt == clean
        assert took >= 0.4
    elif isinstance(fault, int):
        assert told == fault != status or fault == 403
        assert b"<Code>" in spoilt
