"""Downloads of weights files, from a server in this process that behaves as servers do on bad days."""

from __future__ import annotations

import fcntl
import hashlib
import http.server
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmark import weights
from benchmark.cli import main_guard
from benchmark.errors import RunError
from benchmark.networks import __main__ as command
from benchmark.networks import fetch as module
from benchmark.networks.fetch import UnreachableError, fetch
from benchmark.progress import Progress
from benchmark.weights import Download

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 2000  # 512 kB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server does, and what it was asked for."""

    address: str = ""
    content: bytes = CONTENT
    status: int = 200
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)  # bytes of each answer before the connection closes
    announce: bool = True  # Content-Length
    shifted: bool = False  # answers with another part than asked for
    stall_after: int | None = None  # bytes; then silence until ``go_on``
    go_on: threading.Event = field(default_factory=threading.Event)
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            state.asked.append(wanted)
            start, size = 0, len(state.content)
            if wanted and state.ranges and state.status == 200:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) - (10 if state.shifted else 0)  # type: ignore[index]
                if start >= size:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{size}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            else:
                self.send_response(state.status)
            if state.announce:
                self.send_header("Content-Length", str(size - start))
            self.end_headers()
            end = start + state.cut_after.pop(0) if state.cut_after else size
            if state.stall_after is not None:
                self.wfile.write(state.content[start : state.stall_after])
                state.go_on.wait()
                return
            self.wfile.write(state.content[start:end])

        def log_message(self, *_: object) -> None: ...

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{httpd.server_port}/net.pth"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield state
    state.go_on.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


Fetch = Callable[..., str]


@pytest.fixture
def get(server: Server, tmp_path: Path) -> Fetch:
    """Fetch ``net.pth`` from the server into ``tmp_path / "w"``."""

    def run(sha256: str = SHA256, url: str | None = None) -> str:
        download = Download("net.pth", "A network", url or server.address, 0.5, sha256, "MIT")
        return fetch(download, tmp_path / "w", Progress(enabled=False), pause_s=0)

    return run


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "w" / "net.pth"


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "w" / "net.pth.part"


def test_a_file_arrives_whole_and_alone(get: Fetch, target: Path) -> None:
    assert get() == SHA256
    assert target.read_bytes() == CONTENT and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("sha256", [SHA256[:8], ""])
def test_as_many_digits_are_compared_as_are_published(get: Fetch, target: Path, sha256: str) -> None:
    assert get(sha256) == SHA256 and target.read_bytes() == CONTENT


def test_a_download_goes_on_where_an_earlier_one_stopped(get: Fetch, server: Server, target: Path, part: Path) -> None:
    part.parent.mkdir()
    part.write_bytes(CONTENT[:1000])
    get()
    assert server.asked == ["bytes=1000-"] and target.read_bytes() == CONTENT and not part.exists()


def test_a_cut_connection_is_taken_up_again(get: Fetch, server: Server, target: Path) -> None:
    server.cut_after = [70_000, 0, 200_000]
    get()
    assert server.asked == [None, "bytes=70000-", "bytes=70000-", "bytes=270000-"]
    assert target.read_bytes() == CONTENT


def test_what_arrived_survives_giving_up(get: Fetch, server: Server, target: Path, part: Path) -> None:
    server.cut_after = [70_000, 0, 0, 0, 0, 0]
    with pytest.raises(UnreachableError) as caught:
        get()
    assert part.read_bytes() == CONTENT[:70_000] and not target.exists()
    assert str(caught.value).startswith(f"{server.address}: not received (the connection was cut); 0 MB are kept")
    assert f"copy it to {target}" in str(caught.value) and len(str(caught.value).splitlines()) == 2
    server.cut_after, server.asked = [], []
    get()
    assert server.asked == ["bytes=70000-"] and target.read_bytes() == CONTENT


@pytest.mark.parametrize("cut", [[], [300_000]])
def test_a_server_without_ranges_sends_the_whole_again(
    get: Fetch, server: Server, target: Path, part: Path, cut: list[int]
) -> None:
    server.ranges, server.cut_after = False, cut
    part.parent.mkdir()
    part.write_bytes(b"?" * 1000)
    get()
    assert target.read_bytes() == CONTENT, "what was there before is not kept in front"


def test_without_a_length_the_digest_tells_whether_all_is_there(get: Fetch, server: Server, target: Path) -> None:
    server.announce = False
    assert get() == SHA256
    target.unlink()
    server.content = CONTENT[:-1]
    with pytest.raises(RunError, match="not the published file"):
        get()
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more"], ids=["whole", "longer"])
def test_a_part_that_needs_no_more(get: Fetch, server: Server, target: Path, part: Path, left: bytes) -> None:
    part.parent.mkdir()
    part.write_bytes(left)
    get()
    assert target.read_bytes() == CONTENT
    assert server.asked == ([f"bytes={len(CONTENT)}-"] if left == CONTENT else [f"bytes={len(left)}-", None])


def test_another_part_than_asked_for_is_not_appended(get: Fetch, server: Server, target: Path, part: Path) -> None:
    server.shifted = True
    part.parent.mkdir()
    part.write_bytes(CONTENT[:5000])
    get()
    assert server.asked == ["bytes=5000-", None] and target.read_bytes() == CONTENT


@pytest.mark.parametrize("sha256", ["0" * 64, "0" * 8])
def test_a_wrong_file_is_thrown_away(get: Fetch, server: Server, target: Path, sha256: str) -> None:
    with pytest.raises(RunError) as caught:
        get(sha256)
    message = str(caught.value)
    assert message.startswith(f"{server.address}: what arrived is not the published file (SHA-256 {SHA256[:12]}...")
    assert len(message.splitlines()) == 2 and not list(target.parent.iterdir())


def test_a_damaged_part_does_not_come_through(get: Fetch, part: Path, target: Path) -> None:
    part.parent.mkdir()
    part.write_bytes(b"?" * 1000)
    with pytest.raises(RunError, match="not the published file"):
        get()
    assert not part.exists() and not target.exists(), "the same command begins anew"
    assert get() == SHA256


@pytest.mark.parametrize("status", [404, 403, 500])
def test_a_refusal_is_told_and_nothing_is_left(get: Fetch, server: Server, target: Path, status: int) -> None:
    server.status = status
    with pytest.raises(RunError, match=f"net.pth: the server answers {status} ") as caught:
        get()
    assert not isinstance(caught.value, UnreachableError) and len(server.asked) == 1
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize("name", ["no-such-host.invalid", "127.0.0.1:1"])
def test_no_internet(get: Fetch, target: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if name.endswith(".invalid"):
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UnreachableError) as caught:
        get(url=f"http://{name}/net.pth")
    message = str(caught.value)
    assert re.match(
        rf"http://{name}/net\.pth: not received \((Name or service not known|Connection refused)\);", message
    )
    assert f"without internet here, download that address on another machine and copy it to {target}" in message
    assert not list(target.parent.iterdir())


def test_a_file_that_is_there_is_not_fetched_again(get: Fetch, server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    assert get() == SHA256 and server.asked == []


def test_another_file_under_that_name_is_left_as_it_is(get: Fetch, server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"my own")
    with pytest.raises(RunError, match=r"left as it is\nmove it away"):
        get()
    assert target.read_bytes() == b"my own" and server.asked == []


def test_two_processes_do_not_write_into_one_file(get: Fetch, part: Path, server: Server) -> None:
    part.parent.mkdir()
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is downloading it"):
            get()
    assert server.asked == []
    assert get() == SHA256


def test_a_folder_that_cannot_be_written_to(get: Fetch, target: Path, server: Server) -> None:
    target.parent.write_bytes(b"a file in the folder's place")
    with pytest.raises(RunError, match=f"^{re.escape(str(target.parent))}: cannot be written"):
        get()
    assert server.asked == []


def test_killed_and_taken_up_again(server: Server, tmp_path: Path, get: Fetch, target: Path, part: Path) -> None:
    """A process that dies without a chance to tidy up leaves what the next one goes on from."""
    server.content = CONTENT * 10
    server.stall_after = 3 << 20
    code = f"""
from pathlib import Path
from benchmark.networks.fetch import fetch
from benchmark.progress import Progress
from benchmark.weights import Download
fetch(Download("net.pth", "", {server.address!r}, 5, "", ""), Path({str(tmp_path / "w")!r}), Progress(enabled=False))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size >= 1 << 20) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    arrived = part.stat().st_size
    assert not target.exists() and 1 << 20 <= arrived <= 3 << 20
    server.stall_after = None
    get(hashlib.sha256(server.content).hexdigest())
    assert server.asked == [None, f"bytes={arrived}-"] and target.read_bytes() == server.content


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def two(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks in place of the real ones, at the local server."""
    downloads = {
        "one": Download("one.pth", "Network one", server.address, 0.5, SHA256, "MIT"),
        "two": Download("two.pt", "Network two", server.address + "?two", 0.5, "", "CC BY-NC 4.0"),
        "large": Download("large.pt", "Not a judge", server.address + "?large", 9.0, SHA256, "MIT", group="targets"),
    }
    monkeypatch.setattr(weights, "DOWNLOADS", downloads)
    monkeypatch.setattr(command, "DOWNLOADS", downloads)
    monkeypatch.setattr(module, "_ATTEMPTS", 1)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            code = main_guard(lambda: command.main([str(a) for a in arguments]))
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_fetch_fills_the_folder_and_says_what_it_costs(two: None, run: Run, tmp_path: Path, server: Server) -> None:
    code, out, err = run("fetch", tmp_path)
    assert (code, err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"one.pth", "two.pt"}, "the judges alone"
    assert f"one.pth: Network one, 0.5 MB, MIT\n  from {server.address}\n" in out
    assert f"  {tmp_path / 'one.pth'}: SHA-256 {SHA256} (as published)\n" in out
    assert f"SHA-256 {SHA256} (none is published to compare with)" in out
    assert run("fetch", tmp_path, "--only", "targets,one")[0] == 0
    assert (tmp_path / "large.pt").read_bytes() == CONTENT and len(server.asked) == 3


def test_list_tells_published_files_from_others(two: None, run: Run, tmp_path: Path) -> None:
    code, out, err = run("list", tmp_path)
    assert (code, err) == (0, "") and out.count("missing") == 3
    assert out.endswith(f"next: python -m benchmark.networks fetch {tmp_path} --only one,two\n")
    (tmp_path / "one.pth").write_bytes(b"other")
    (tmp_path / "two.safetensors").write_bytes(CONTENT)
    (tmp_path / "large.pt.part").write_bytes(b"." * 3_000_000)
    _, out, _ = run("list", tmp_path)
    lines = {name: next(line for line in out.splitlines() if f" {name} " in line) for name in ("one", "two", "large")}
    assert (
        "wrong (not the published file)" in lines["one"] and hashlib.sha256(b"other").hexdigest()[:12] in lines["one"]
    )
    assert "present, unchecked" in lines["two"] and SHA256[:12] in lines["two"] and "CC BY-NC 4.0" in lines["two"]
    assert "missing, 3 MB of it there" in lines["large"]
    (tmp_path / "one.pth").write_bytes(CONTENT)
    _, out, _ = run("list", tmp_path)
    assert "wrong" not in out and "next:" not in out


def test_one_refusal_does_not_keep_the_others_from_coming(two: None, run: Run, tmp_path: Path, server: Server) -> None:
    (tmp_path / "one.pth").write_bytes(b"my own")
    code, out, err = run("fetch", tmp_path)
    assert code == 1 and (tmp_path / "two.pt").read_bytes() == CONTENT
    assert err.startswith(f"error: {tmp_path / 'one.pth'}: there already, but not the published file")
    assert len(err.splitlines()) == 2 and "Traceback" not in err


def test_without_internet_the_first_failure_is_enough(two: None, run: Run, tmp_path: Path, server: Server) -> None:
    server.cut_after = [0]
    code, _, err = run("fetch", tmp_path)
    assert code == 1 and err.startswith(f"error: {server.address}: not received") and len(server.asked) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "DIR", "--only", "tow"], "--only: no weights file 'tow' (did you mean 'two'?)"),
        (["fetch", "DIR", "--only", ","], "--only names no network; there are scoring, targets, one, two, large"),
        (["fetch", "DIR/file"], "DIR/file is a file; name the folder of the weights files"),
        (["fecth", "DIR"], "unknown command 'fecth' (did you mean 'fetch'?)"),
    ],
)
def test_slips(two: None, run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    code, _, err = run(*(a.replace("DIR", str(tmp_path)) for a in arguments))
    assert (code, err) == (2, f"error: {message.replace('DIR', str(tmp_path))}\n")


def test_the_folder_may_come_from_the_environment(
    two: None, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAIN_IT_WEIGHTS", str(tmp_path / "there"))
    assert run("fetch", "--only", "one")[0] == 0
    assert (tmp_path / "there" / "one.pth").read_bytes() == CONTENT


def test_help_answers_at_once_and_the_published_digests_are_in_the_addresses() -> None:
    code = "import sys, benchmark.networks.__main__; print('torch' in sys.modules, 'rich' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["False", "False"]
    for download in weights.DOWNLOADS.values():
        assert download.url.startswith("https://")
        if in_name := re.search(r"-([0-9a-f]{8})\.pth$", download.url) or re.search(r"/([0-9a-f]{64})/", download.url):
            assert download.sha256.startswith(in_name[1])
