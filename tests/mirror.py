"""A server on loopback that serves what a test makes, and the handful of files that stand in for the imagenet world."""

import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

BREEDS = ("Abyssinian", "beagle", "Birman", "great_pyrenees")


class Mirror:
    """`with Mirror() as mirror`: an HTTP server at `mirror.url`, and `mirror.requests`, the paths asked for so far.

    The faults given to `put` are served first, one a request: a status, "cut" (half of the file), "reset" (no answer)
    or "stall" (no answer, and the connection stays open).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes | Path] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.requests: list[str] = []
        self.stopped = threading.Event()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror._answer(self)

            def log_message(self, *message: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "Mirror":
        self.thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def put(self, name: str, content: bytes | Path, faults: Sequence[int | str] = ()) -> str:
        """Serve `content` at the address that comes back, after the `faults`."""
        self.files[f"/{name}"], self.faults[f"/{name}"] = content, list(faults)
        return f"{self.url}/{name}"

    def put_folder(self, folder: Path) -> None:
        """Serve every file of a folder."""
        for path in folder.rglob("*.*"):
            self.put(path.relative_to(folder).as_posix(), path)

    def put_index(self, entries: dict[str, str]) -> None:
        """Serve an index.json that lists, under each key, a file put before."""
        index = {key: {"file": name, "sha256": sha256(self.files[f"/{name}"])} for key, name in entries.items()}
        self.put("index.json", json.dumps(index).encode())

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(request.path)
        waiting = self.faults.get(request.path)
        fault = waiting.pop(0) if waiting else None
        if fault == "stall":
            self.stopped.wait(20)
        if fault in ("stall", "reset"):
            request.close_connection = True
        elif request.path not in self.files or isinstance(fault, int):
            request.send_error(fault if isinstance(fault, int) else 404)
        else:
            content = self.files[request.path]
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            request.send_response(200)
            request.send_header("Content-Length", str(size))
            request.end_headers()
            with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
                shutil.copyfileobj(io.BytesIO(file.read(size // 2)) if fault == "cut" else file, request.wfile)


def sha256(content: bytes | Path) -> str:
    return hashlib.sha256(content.read_bytes() if isinstance(content, Path) else content).hexdigest()


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """A gzipped tar archive of `files`."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def jpeg(label: int, rng: np.random.Generator) -> bytes:
    """A noisy picture of its class's own colour, 40 to 79 pixels a side."""
    height, width = rng.integers(40, 80, size=2)
    colour = np.random.default_rng(label).integers(0, 256, size=3)
    pixels = np.clip(colour + rng.normal(0, 40, size=(height, width, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def serve_handful(folder: Path, networks: Sequence[str] = ("resnet18",), trainval: int = 12, test: int = 6) -> None:
    """Fill `folder` as a mirror: random torchvision networks, and four breeds in the form of the Oxford-IIIT Pet data set.

    `trainval` and `test` count the pictures of a breed in each of the data set's own splits.
    """
    torch.manual_seed(0)
    for name in networks:
        torch.save(torchvision.models.get_model(name, weights=None).state_dict(), folder / f"{name}.pth")
    rng = np.random.default_rng(0)
    pictures: dict[str, bytes] = {}
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    for label, breed in enumerate(BREEDS):
        for number in range(trainval + test):
            pictures[f"images/{breed}_{number + 1}.jpg"] = jpeg(label, rng)
            species = 1 if breed[0].isupper() else 2  # the data set's own sign: cats are capitals
            lists["trainval" if number < trainval else "test"].append(f"{breed}_{number + 1} {label + 1} {species} {label + 1}")
    pack(folder / "images.tar.gz", pictures)
    pack(folder / "annotations.tar.gz", {f"annotations/{name}.txt": "\n".join(rows).encode() for name, rows in lists.items()})
    keys = {name: f"{name}.pth" for name in networks}
    keys |= {f"oxford-iiit-pet/{name}": name for name in ("images.tar.gz", "annotations.tar.gz")}
    index = {key: {"file": name, "sha256": sha256(folder / name)} for key, name in keys.items()}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
