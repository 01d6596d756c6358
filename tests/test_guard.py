"""The network guard: nothing leaves this machine, in the test session and inside notebook kernels."""

import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tools.engine import execute

GUARD = Path(__file__).parent / "guard"
MESSAGE = "the course runs without a network; {} was asked for"
REQUEST = 'import urllib.request\nurllib.request.urlopen("http://example.com", timeout=5)'


def test_this_session_cannot_connect() -> None:
    with pytest.raises(OSError, match=MESSAGE.format("example.com")):
        urllib.request.urlopen("http://example.com", timeout=5)
    with socket.socket() as connection, pytest.raises(OSError, match=MESSAGE.format("192.0.2.1:80")):
        connection.connect(("192.0.2.1", 80))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        pytest.raises(OSError, match=MESSAGE.format("192.0.2.1:53")),
    ):
        datagrams.sendto(b"question", ("192.0.2.1", 53))
    with pytest.raises(OSError, match=MESSAGE.format("example.com")):
        socket.gethostbyname("example.com")


def test_loopback_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("localhost", "127.0.0.1"):
            with socket.create_connection((host, port), timeout=5) as connection:
                assert connection.getpeername() == ("127.0.0.1", port)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_sockets_that_cannot_leave_the_machine_work(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "s"))
        server.listen()
        client.connect(str(tmp_path / "s"))


def test_a_notebook_kernel_cannot_connect(tmp_path: Path) -> None:
    outcome = execute(new_notebook(cells=[new_code_cell("1 + 1"), new_code_cell(REQUEST)]), tmp_path, timeout=60)
    assert outcome.error is not None and outcome.error.startswith("cell In [2]")
    assert MESSAGE.format("example.com") in outcome.error


def test_another_sitecustomize_runs_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text('print("the other one ran")\n')
    paths = {"PYTHONPATH": f"{GUARD}{':' if sys.platform != 'win32' else ';'}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", REQUEST], env=paths, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "the other one ran\n"
    assert MESSAGE.format("example.com") in done.stderr
