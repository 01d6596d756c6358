"""Files from the network: every fault of a server gives its own clear error, and the cache never holds half a file."""

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from course_utils import download
from course_utils.download import DownloadError, OfflineError, cache_folder, fetch, locate
from tests.mirror import Mirror, sha256

CONTENT = bytes(range(256)) * 2000  # more than one chunk
DIGEST = f"sha256:{sha256(CONTENT)[:8]}"


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("COURSE_MIRROR", raising=False)
    with Mirror() as serving:
        yield serving


def message(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None  # the learner sees no chain of tracebacks
    return text


def test_whole_file_then_cache(mirror: Mirror, tmp_path: Path) -> None:
    url = mirror.put("folder/net.pth", CONTENT)
    path = fetch(url, DIGEST, tmp_path / "new" / "cache")
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert fetch(url, DIGEST, path.parent) == path
    assert mirror.requests == ["/folder/net.pth"]


def test_md5_of_data_sets(mirror: Mirror, tmp_path: Path) -> None:
    url = mirror.put("images.tar.gz", CONTENT)
    assert fetch(url, f"md5:{hashlib.md5(CONTENT).hexdigest()}", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("faults", [[500], [500, 503], [429], ["cut"], ["cut", "reset"], ["reset", 502]], ids=str)
def test_transient_faults_are_retried(mirror: Mirror, tmp_path: Path, faults: list[int | str]) -> None:
    url = mirror.put("net.pth", CONTENT, faults)
    assert fetch(url, DIGEST, tmp_path).read_bytes() == CONTENT
    assert len(mirror.requests) == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [(500, "500"), ("cut", f"{len(CONTENT) // 2} of {len(CONTENT)} bytes"), ("reset", "closed"), ("stall", "timed out")],
)
def test_faults_that_stay(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int | str, said: str) -> None:
    if fault == "stall":
        monkeypatch.setattr(download, "TIMEOUT", 0.2)
    url = mirror.put("net.pth", CONTENT, [fault] * 4)
    with pytest.raises(DownloadError) as error:
        fetch(url, DIGEST, tmp_path)
    assert url in message(error)
    assert said in message(error)
    assert len(mirror.requests) == 3
    assert not list(tmp_path.iterdir())


def test_pauses_grow(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(download, "PAUSE", 1.0)
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    fetch(mirror.put("net.pth", CONTENT, [500, 500]), DIGEST, tmp_path)
    assert pauses == [0, 1, 2]


def test_missing_file_is_asked_for_once(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as error:
        fetch(f"{mirror.url}/gone.pth", DIGEST, tmp_path)
    assert "gone.pth" in message(error)
    assert "404" in message(error)
    assert len(mirror.requests) == 1


def test_wrong_hash_is_not_kept(mirror: Mirror, tmp_path: Path) -> None:
    url = mirror.put("net.pth", CONTENT[::-1])
    with pytest.raises(DownloadError) as error:
        fetch(url, DIGEST, tmp_path)
    assert url in message(error)
    assert DIGEST in message(error)
    assert len(mirror.requests) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("digest", ["", "sha256:", "abc", "sha256:12"])
def test_no_file_without_a_digest(mirror: Mirror, tmp_path: Path, digest: str) -> None:
    with pytest.raises(ValueError, match="digest"):
        fetch(mirror.put("net.pth", CONTENT), digest, tmp_path)


def test_altered_file_is_fetched_again(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(CONTENT[:-1])
    assert fetch(mirror.put("net.pth", CONTENT), DIGEST, tmp_path).read_bytes() == CONTENT


def test_altered_file_stays_until_a_whole_one_comes(mirror: Mirror, tmp_path: Path) -> None:
    old = tmp_path / "net.pth"
    old.write_bytes(b"old")
    with pytest.raises(DownloadError):
        fetch(mirror.put("net.pth", CONTENT, ["cut"] * 3), DIGEST, tmp_path)
    assert [(path, path.read_bytes()) for path in tmp_path.iterdir()] == [(old, b"old")]


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Mirror() as stopped:
        url = stopped.put("net.pth", CONTENT)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(OfflineError) as error:
        fetch(url, DIGEST, tmp_path)
    assert url in message(error)
    assert 'PROFILE = "embedded"' in message(error)
    (tmp_path / "net.pth").write_bytes(b"altered")
    with pytest.raises(OfflineError, match=r"net\.pth has been altered, and .* cannot be reached") as error:
        fetch(url, DIGEST, tmp_path)
    assert 'PROFILE = "embedded"' in message(error)
    (tmp_path / "net.pth").write_bytes(CONTENT)
    assert fetch(url, DIGEST, tmp_path).read_bytes() == CONTENT  # what is in the cache needs no network


def test_no_name_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unresolved(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(OfflineError) as error:
        fetch("http://example.invalid/net.pth", DIGEST, tmp_path)
    assert "name resolution" in message(error)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("size", [10, 1 << 20], ids=["found at closing", "found at writing"])
def test_full_disk(mirror: Mirror, tmp_path: Path, size: int) -> None:
    (tmp_path / f"net.pth.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(DownloadError) as error:
        fetch(mirror.put("net.pth", bytes(size)), DIGEST, tmp_path)
    assert "full" in message(error)
    assert "COURSE_CACHE" in message(error)
    assert not list(tmp_path.iterdir())


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path.resolve()
    monkeypatch.delenv("COURSE_CACHE")
    assert cache_folder().is_relative_to(Path.home())


def test_locate(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("https://example.invalid/net.pth", "sha256:01234567")
    assert locate("net", *given) == given
    mirror.put("own.pth", CONTENT)
    mirror.put_index({"net": "own.pth"})
    monkeypatch.setenv("COURSE_MIRROR", f"{mirror.url}/")
    assert locate("net", *given) == (f"{mirror.url}/own.pth", f"sha256:{sha256(CONTENT)}")
    with pytest.raises(DownloadError, match="lists no file and sha256 for 'other'") as error:
        locate("other", *given)
    assert message(error)


@pytest.mark.parametrize("index", [b"{", b'{"net": {"file": "net.pth"}}', b"\xff\xfe"])
def test_locate_in_a_broken_index(mirror: Mirror, monkeypatch: pytest.MonkeyPatch, index: bytes) -> None:
    mirror.put("index.json", index)
    monkeypatch.setenv("COURSE_MIRROR", mirror.url)
    with pytest.raises(DownloadError, match=r"index\.json") as error:
        locate("net", "https://example.invalid/net.pth", DIGEST)
    assert mirror.url in message(error)


def test_mirror_without_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_MIRROR", "laptop/files")
    with pytest.raises(DownloadError, match="COURSE_MIRROR"):
        locate("net", "https://example.invalid/net.pth", DIGEST)


def test_mirror_on_a_stick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.pth").write_bytes(CONTENT)
    (tmp_path / "index.json").write_text(f'{{"net": {{"file": "net.pth", "sha256": "{sha256(CONTENT)}"}}}}')
    monkeypatch.setenv("COURSE_MIRROR", tmp_path.as_uri())
    url, digest = locate("net", "https://example.invalid/net.pth", DIGEST)
    assert fetch(url, digest, tmp_path / "cache").read_bytes() == CONTENT


def test_the_server_stops() -> None:
    with Mirror() as served:
        assert served.thread.is_alive()
    assert not served.thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", served.server.server_port))
