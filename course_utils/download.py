"""Files from the network: fetched with retries, checked by their hash, kept in a cache folder.

`COURSE_CACHE` moves the cache. `COURSE_MIRROR` is the address of a folder that holds the files and an `index.json`
(`{"resnet18": {"file": "resnet18.pth", "sha256": "…"}, …}`): so one laptop serves a class that has no internet.
torch.hub's downloader is not used: it never times out, and cannot tell a file cut short from a wrong one.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

from tqdm.auto import tqdm

TIMEOUT = 30.0  # seconds without a byte
PAUSE = 1.0  # seconds before the second attempt; twice that before the third
T = TypeVar("T")


class OfflineError(RuntimeError):
    """There is no network, or the server cannot be reached."""


class DownloadError(RuntimeError):
    """A file that is not at its address, does not arrive whole, is not the one expected, or finds the disk full."""


def cache_folder() -> Path:
    """Where fetched files are kept: `COURSE_CACHE`, else a folder in the user's own cache."""
    chosen = os.environ.get("COURSE_CACHE")
    return Path(chosen).expanduser().resolve() if chosen else Path.home() / ".cache" / "transfer-learning-measured"


@contextmanager
def disk_space(folder: Path) -> Iterator[None]:
    """Turn a full disk into one clear `DownloadError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DownloadError(f"the disk of {folder} is full: free some space, or set COURSE_CACHE to another disk") from None


def _get(url: str, attempts: int, take: Callable[[HTTPResponse], T]) -> T:
    """What `take` makes of the answer. A server that falters is asked again; one that cannot be reached is not."""
    fault = ""
    for attempt in range(attempts):
        time.sleep(PAUSE * attempt)
        try:
            with urlopen(Request(url, headers={"User-Agent": "transfer-learning-measured"}), timeout=TIMEOUT) as answer:
                return take(answer)
        except HTTPError as error:
            fault = f"the server answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except URLError as error:
            if isinstance(error.reason, TimeoutError | ConnectionResetError) and attempt + 1 < attempts:
                continue
            raise OfflineError(f'{url} cannot be reached ({error.reason}). Without a network, use PROFILE = "embedded"') from None
        except (ConnectionError, TimeoutError, HTTPException) as error:
            fault = f"{error or type(error).__name__}, at attempt {attempt + 1}"
    raise DownloadError(f"{url} could not be fetched: {fault}")


def _matches(path: Path, digest: str) -> bool:
    algorithm, _, expected = digest.partition(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest().startswith(expected)


def fetch(url: str, digest: str, folder: Path, attempts: int = 3) -> Path:
    """The file at `url`, from `folder` if it is there unaltered; `digest` is "sha256:<first digits>" or "md5:<…>".

    Raises `OfflineError` where the server cannot be reached, `DownloadError` for every other fault. What stands in
    `folder` is replaced only by a file that is whole and has the right hash.
    """
    if len(digest.partition(":")[2]) < 8:
        raise ValueError(f"a digest reads sha256:<8 digits or more>, not {digest!r}")
    path = folder / Path(unquote(urlparse(url).path)).name
    if path.exists() and _matches(path, digest):
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")

    def save(answer: HTTPResponse) -> None:
        size = int(answer.headers["Content-Length"] or 0)
        with partial.open("wb") as file, tqdm(total=size or None, desc=path.name, unit="B", unit_scale=True) as bar:
            while chunk := answer.read(1 << 17):
                bar.update(file.write(chunk))
            if file.tell() < size:
                raise ConnectionError(f"cut short, {file.tell()} of {size} bytes came")

    with disk_space(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _get(url, attempts, save)
            if not _matches(partial, digest):
                raise DownloadError(f"{url} is not the file expected: its hash does not begin with {digest}")
            return partial.replace(path)
        except OfflineError as error:
            raise OfflineError(f"{path} has been altered, and {error}" if path.exists() else str(error)) from None
        finally:
            partial.unlink(missing_ok=True)


def locate(key: str, url: str, digest: str) -> tuple[str, str]:
    """Address and digest of a file: the mirror's under `key` where `COURSE_MIRROR` is set, else the given ones.

    Raises `DownloadError` where the mirror does not hold it.
    """
    mirror = os.environ.get("COURSE_MIRROR", "").rstrip("/")
    if not mirror:
        return url, digest
    try:
        entry = _get(f"{mirror}/index.json", 3, json.load)[key]
        return f"{mirror}/{entry['file']}", f"sha256:{entry['sha256']}"
    except KeyError:
        raise DownloadError(f"the mirror {mirror} lists no file and sha256 for {key!r} in its index.json") from None
    except ValueError as error:
        raise DownloadError(f"the mirror {mirror} (COURSE_MIRROR) has no valid address or index.json: {error}") from None
