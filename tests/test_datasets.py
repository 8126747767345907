"""Maps to try gpuroi on: those of a server that misbehaves, and synthetic ones."""

import gzip
import inspect
import json
import logging
import re
import subprocess
import sys
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import nilearn.datasets
import numpy as np
import pytest
from scipy import ndimage
from urllib3.exceptions import ProtocolError

from gpuroi import datasets, extract_regions
from gpuroi.datasets import _download, _neurovault, make_stat_map
from gpuroi.errors import DownloadError, GpuroiError, MissingExtraError
from tests.conftest import AFFINES

fetch = datasets.fetch_neurovault_auditory_computation_task

API = "/api/images/32980/?format=json"
IMAGE = "/media/images/1952/auditory.nii.gz"


def compressed_map(seed):
    """Return a .nii.gz file of about 120 KB, as bytes."""
    noise = np.random.default_rng(seed).standard_normal((32, 32, 32)).astype(np.float32)
    return gzip.compress(nib.Nifti1Image(noise, np.eye(4)).to_bytes(), 1, mtime=0)


BODY, NEWER_BODY = compressed_map(0), compressed_map(1)
HALF = len(BODY) // 2


# A server, and what it does to a request ----------------------------------------------------------


@dataclass
class Vault:
    """What a server holds, how it answers the next requests, and what it was asked."""

    body: bytes = BODY
    tag: str | None = '"1"'
    date: str | None = None
    api: deque = field(default_factory=deque)
    image: deque = field(default_factory=deque)
    asked: list = field(default_factory=list)  # (path, headers)
    sent: list = field(default_factory=list)  # (status, bytes of the body)
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def versions(self):
        named = {"ETag": self.tag, "Last-Modified": self.date}
        return {name: value for name, value in named.items() if value is not None}

    def ranges(self):
        """Return the Range headers of the requests for the image."""
        return [headers["Range"] for path, headers in self.asked if path != API]


def send(handler, status, body, headers, announced=None):
    handler.vault.sent.append((status, len(body)))
    handler.send_response(status)
    handler.send_header("Content-Length", str(announced or len(body)))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def answer(body, status=200, announced=None, **headers):
    return lambda handler: send(handler, status, body, headers, announced)


def about(handler):
    """Answer as the API does."""
    file = f"http://127.0.0.1:{handler.server.server_port}{IMAGE}"
    answer = {"id": 32980, "file": file, "map_type": "T map", "collection_id": 1952}
    send(handler, 200, json.dumps(answer).encode(), {})


def serve(handler, limit=None, knows_ranges=True, heeds_versions=True):
    """Send the image or the rest that is asked for (RFC 9110, 13.1.5 and 14.2), cut at `limit`."""
    vault, body, status, headers = handler.vault, handler.vault.body, 200, handler.vault.versions
    first = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    is_same = handler.headers["If-Range"] in headers.values() or not heeds_versions
    if first and knows_ranges and is_same:
        held = int(first[1])
        if held >= len(body):
            send(handler, 416, b"", {"Content-Range": f"bytes */{len(body)}"})
            return
        headers["Content-Range"] = f"bytes {held}-{len(body) - 1}/{len(body)}"
        body, status = body[held:], 206
    vault.sent.append((status, len(body[:limit])))
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[:limit])


def cut(limit, **how):
    return lambda handler: serve(handler, limit, **how)


def stall(n_bytes):
    """Send some bytes and then nothing."""

    def answer(handler):
        cut(n_bytes)(handler)
        handler.vault.closing.wait(10)

    return answer


def hush(handler):
    handler.vault.closing.wait(10)


class Handler(BaseHTTPRequestHandler):
    vault: Vault

    def do_GET(self):
        self.vault.asked.append((self.path, self.headers))
        is_api = self.path.startswith("/api/")
        script, usual = (self.vault.api, about) if is_api else (self.vault.image, serve)
        (script.popleft() if script else usual)(self)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


@pytest.fixture
def vault(monkeypatch):
    vault = Vault()
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"vault": vault}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(_neurovault, "SERVER", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(_download, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield vault
    vault.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "neurovault" / "image_32980.nii.gz"


def names(path):
    """Return the files beside `path`, without the lock."""
    return sorted(p.name for p in path.parent.iterdir() if not p.name.endswith(".lock"))


WHOLE = ["image_32980.json", "image_32980.nii.gz"]


# Downloads that work ------------------------------------------------------------------------------


def test_the_first_call_downloads_image_and_metadata(vault, tmp_path, path):
    dataset = fetch(tmp_path)
    assert dataset.images == [str(path)]
    assert path.read_bytes() == BODY
    assert nib.load(dataset.images[0]).shape == (32, 32, 32)
    (metadata,) = dataset.images_meta
    assert metadata["map_type"] == "T map"
    assert metadata["absolute_path"] == str(path)
    assert "32980" in dataset.description
    assert [asked for asked, _ in vault.asked] == [API, IMAGE]
    assert vault.asked[1][1]["Accept-Encoding"] == "identity"
    assert names(path) == WHOLE


def test_the_second_call_asks_for_nothing(vault, tmp_path):
    first = fetch(tmp_path)
    vault.asked.clear()
    assert fetch(str(tmp_path)) == first
    assert vault.asked == []


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:HALF] + b"?" * 9])
def test_a_damaged_copy_is_downloaded_again(vault, tmp_path, path, damage):
    fetch(tmp_path)
    path.write_bytes(damage(BODY))
    fetch(tmp_path)
    assert path.read_bytes() == BODY
    assert vault.ranges() == [None, None]


def test_a_copy_put_there_by_hand_will_do(vault, tmp_path, path):
    path.parent.mkdir()
    path.write_bytes(BODY)
    assert fetch(tmp_path).images_meta == [{"id": 32980, "absolute_path": str(path)}]
    assert vault.asked == []


def test_a_relative_address_of_the_image(vault, tmp_path, path):
    vault.api.append(answer(json.dumps({"file": IMAGE}).encode()))
    fetch(tmp_path)
    assert path.read_bytes() == BODY


def test_a_body_declared_to_be_encoded_is_kept_as_it_was_sent(vault, tmp_path, path):
    vault.image.append(answer(BODY, **{"Content-Encoding": "gzip"}))
    fetch(tmp_path)
    assert path.read_bytes() == BODY


# Failures that pass -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 503, 429, 408])
@pytest.mark.parametrize("what", ["api", "image"])
def test_a_failure_of_the_server_is_followed_by_another_attempt(
    vault, tmp_path, path, what, status
):
    getattr(vault, what).extend([answer(b"no", status)] * 2)
    fetch(tmp_path)
    assert path.read_bytes() == BODY
    assert len(vault.asked) == 4
    assert vault.ranges() == [None] * (3 if what == "image" else 1)


def test_a_body_cut_short_is_completed_by_its_rest_only(vault, tmp_path, path):
    vault.image.extend([cut(HALF), cut(1000)])
    fetch(tmp_path)
    assert path.read_bytes() == BODY
    assert vault.ranges() == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]
    assert [headers["If-Range"] for _, headers in vault.asked[2:]] == ['"1"', '"1"']
    assert vault.sent[1:] == [(200, HALF), (206, 1000), (206, len(BODY) - HALF - 1000)]
    assert names(path) == WHOLE


def test_a_later_call_goes_on_where_the_last_one_ended(vault, tmp_path, path):
    vault.image.extend([cut(HALF), cut(0), cut(0)])
    with pytest.raises(DownloadError, match=r"tried 3 times"):
        fetch(tmp_path)
    assert not path.exists()
    vault.sent.clear()
    fetch(tmp_path)
    assert path.read_bytes() == BODY
    assert vault.ranges()[-1] == f"bytes={HALF}-"
    assert vault.sent[-1] == (206, len(BODY) - HALF)


def test_a_server_that_falls_silent_is_asked_again_for_the_rest(vault, tmp_path, path):
    vault.image.append(stall(HALF))
    fetch(tmp_path, timeout=0.2)
    assert path.read_bytes() == BODY
    _, (status, n_rest) = vault.sent[1:]
    assert status == 206
    assert len(BODY) - HALF <= n_rest < len(BODY) - HALF + _download._BLOCK_BYTES


def test_a_server_that_knows_no_ranges_sends_the_whole_again(vault, tmp_path, path):
    vault.image.extend([cut(HALF), cut(None, knows_ranges=False)])
    fetch(tmp_path)
    assert path.read_bytes() == BODY
    assert vault.ranges() == [None, f"bytes={HALF}-"]
    assert vault.sent[-1] == (200, len(BODY))


def after_a_change(handler):
    handler.vault.body, handler.vault.tag = NEWER_BODY, '"2"'
    serve(handler)


def test_two_versions_of_a_file_are_not_joined(vault, tmp_path, path):
    vault.image.extend([cut(HALF), after_a_change])
    fetch(tmp_path)
    assert path.read_bytes() == NEWER_BODY
    assert vault.sent[-1] == (200, len(NEWER_BODY))


def test_two_versions_are_not_joined_though_the_server_would(vault, tmp_path):
    """Checked without the checksum of the whole, which would find it too."""
    url, part, whole = _neurovault.SERVER + IMAGE, tmp_path / "part", tmp_path / "whole"

    def receive():
        _download.receive(url, part, whole, 1, lambda path: None)

    vault.image.append(cut(HALF))
    with pytest.raises(ProtocolError):
        receive()
    vault.body, vault.tag = NEWER_BODY, '"2"'
    vault.image.append(cut(None, heeds_versions=False))
    with pytest.raises(_download.UnusableAnswerError, match=f"from byte {HALF} on, got status 206"):
        receive()
    receive()
    assert whole.read_bytes() == NEWER_BODY
    assert vault.ranges() == [None, f"bytes={HALF}-", None]


def test_two_files_are_not_joined(vault, tmp_path, path):
    """By the next call, the API names another file, whose entity tag happens to be the same."""
    vault.api.append(answer(json.dumps({"file": f"{IMAGE}?old"}).encode()))
    vault.image.extend([cut(HALF), cut(0), cut(0)])
    with pytest.raises(DownloadError, match=r"nii.gz\?old: "):
        fetch(tmp_path)
    vault.body = NEWER_BODY
    fetch(tmp_path)
    assert path.read_bytes() == NEWER_BODY
    assert vault.ranges() == [None, f"bytes={HALF}-", f"bytes={HALF}-", None]


def test_redirections_are_followed_for_the_rest_too(vault, tmp_path, path):
    """NeuroVault's API gives addresses that begin with http, and sends them on to https."""
    elsewhere = answer(b"", 301, Location=f"{IMAGE}?elsewhere")
    vault.image.extend([elsewhere, cut(HALF), elsewhere])
    fetch(tmp_path)
    assert path.read_bytes() == BODY
    assert vault.ranges() == [None, None, f"bytes={HALF}-", f"bytes={HALF}-"]


@pytest.mark.parametrize(
    "wrong_part",
    [
        answer(BODY[:100], 206, ETag='"1"', **{"Content-Range": f"bytes 0-99/{len(BODY)}"}),
        answer(BODY[HALF:], 206, ETag='"1"'),
        answer(b"", 416, **{"Content-Range": f"bytes */{len(BODY)}"}),
    ],
    ids=["from another byte", "from an unknown byte", "not satisfiable"],
)
def test_another_part_than_asked_for_makes_it_start_again(vault, tmp_path, path, wrong_part):
    vault.image.extend([cut(HALF), wrong_part])
    fetch(tmp_path)
    assert path.read_bytes() == BODY
    assert vault.ranges() == [None, f"bytes={HALF}-", None]


def test_a_part_that_nobody_asked_for_is_refused(vault, tmp_path, path):
    part = answer(BODY, 206, **{"Content-Range": f"bytes 0-9/{len(BODY)}"})
    vault.image.extend([part] * 3)
    with pytest.raises(DownloadError, match=r"byte 0 on, got status 206 with bytes 0-9/"):
        fetch(tmp_path)
    assert names(path) == ["image_32980.json"]


def test_an_answer_without_a_body_is_refused(vault, tmp_path):
    vault.image.extend([answer(b"", 204)] * 3)
    with pytest.raises(DownloadError, match=r"got status 204 with no range"):
        fetch(tmp_path)


@pytest.mark.parametrize(
    ("tag", "date", "expected"),
    [
        ('"1"', "Mon, 05 Jan 2026 10:00:00 GMT", '"1"'),
        ('W/"1"', "Mon, 05 Jan 2026 10:00:00 GMT", "Mon, 05 Jan 2026 10:00:00 GMT"),
        (None, "Mon, 05 Jan 2026 10:00:00 GMT", "Mon, 05 Jan 2026 10:00:00 GMT"),
        ('W/"1"', None, None),
        (None, None, None),
    ],
)
def test_only_what_changes_with_each_byte_vouches_for_a_part(
    vault, tmp_path, path, tag, date, expected
):
    vault.tag, vault.date = tag, date
    vault.image.append(cut(HALF))
    fetch(tmp_path)
    assert path.read_bytes() == BODY
    assert vault.asked[-1][1]["If-Range"] == expected
    assert vault.ranges()[-1] == (None if expected is None else f"bytes={HALF}-")


def test_damage_on_the_way_is_found_and_mended(vault, tmp_path, path):
    damaged = BODY[:HALF] + bytes([BODY[HALF] ^ 1]) + BODY[HALF + 1 :]
    vault.image.append(answer(damaged, ETag='"1"'))
    fetch(tmp_path)
    assert path.read_bytes() == BODY
    assert vault.ranges() == [None, None]


# Failures that stay -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 404, 410])
@pytest.mark.parametrize("what", ["api", "image"])
def test_a_refusal_is_final(vault, tmp_path, path, what, status):
    getattr(vault, what).append(answer(b"no", status))
    with pytest.raises(DownloadError, match=rf"{status} Client Error.*\(tried once\)") as caught:
        fetch(tmp_path)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, GpuroiError)
    assert len(vault.asked) == (1 if what == "api" else 2)
    assert not path.exists()


@pytest.mark.parametrize("what", ["api", "image"])
def test_a_server_that_keeps_failing(vault, tmp_path, path, what):
    getattr(vault, what).extend([answer(b"no", 500)] * 3)
    with pytest.raises(DownloadError) as caught:
        fetch(tmp_path)
    message = str(caught.value)
    assert message.startswith(_neurovault.SERVER + (API if what == "api" else IMAGE))
    assert "500 Server Error" in message
    assert "(tried 3 times)" in message
    assert "load_sample_motor_activation_image()" in message
    assert message.endswith(f"put a copy of NeuroVault's image 32980 at {path}.")
    assert len(vault.asked) == (3 if what == "api" else 4)


def test_no_network(vault, tmp_path, path, monkeypatch):
    monkeypatch.setattr(_neurovault, "SERVER", "http://127.0.0.1:1")
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(DownloadError, match=r"http://127.0.0.1:1/api/.*refused.*tried 3 times"):
        fetch(tmp_path)
    assert pauses == [0.001, 0.002]
    assert names(path) == []


@pytest.mark.parametrize("what", ["api", "image"])
def test_a_silent_server(vault, tmp_path, what):
    getattr(vault, what).extend([stall(0) if what == "image" else hush] * 3)
    with pytest.raises(DownloadError, match=r"timed out.*tried 3 times"):
        fetch(tmp_path, timeout=0.1)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"<html>", "line 1 column 1"),
        (b"[1, 2]", r"\"file\" is a URL, found \[1, 2\]"),
        (b'{"id": 32980}', r"\"file\" is a URL, found {'id': 32980}"),
        (b'{"file": null}', r"\"file\" is a URL, found {'file': None}"),
        (b'{"file": "ftp://example.org/image.nii.gz"}', "No connection adapters"),
    ],
)
def test_metadata_that_make_no_sense(vault, tmp_path, path, body, expected):
    vault.api.extend([answer(body)] * 3)
    with pytest.raises(DownloadError, match=rf"{expected}.*tried 3 times"):
        fetch(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"<html>Be right back</html>", "expected a NIfTI header"),
        (gzip.compress(b"<html>Be right back</html>"), "expected a NIfTI header"),
        (gzip.decompress(BODY), "found one without the gz"),
        (BODY[:HALF], "damaged, cut short"),
        (b"", "an empty file"),
    ],
    ids=["text", "compressed text", "not compressed", "a part that claims to be all", "nothing"],
)
def test_a_body_that_is_no_whole_image(vault, tmp_path, path, body, expected):
    vault.image.extend([answer(body, ETag='"1"')] * 3)
    with pytest.raises(DownloadError, match=rf"{expected}.*tried 3 times") as caught:
        fetch(tmp_path)
    assert ". (tried" not in str(caught.value)
    assert names(path) == ["image_32980.json"]
    assert vault.ranges() == [None] * 3


def test_without_a_network_a_damaged_copy_is_left_alone(vault, tmp_path, path, monkeypatch):
    monkeypatch.setattr(_neurovault, "SERVER", "http://127.0.0.1:1")
    path.parent.mkdir()
    path.write_bytes(BODY[:HALF])
    with pytest.raises(DownloadError, match="refused"):
        fetch(tmp_path)
    assert path.read_bytes() == BODY[:HALF]


def test_a_full_disk_is_no_reason_to_try_again(vault, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    url = _neurovault.SERVER + IMAGE
    monkeypatch.setattr(_download.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _download.insist(
            lambda: _download.receive(url, tmp_path / "part", tmp_path / "whole", 1, print), url, ""
        )
    assert len(vault.asked) == 1


# Several at once, and sudden ends -----------------------------------------------------------------


def refuse(*_):
    raise OSError(37, "No locks available")


@pytest.mark.parametrize("locks", ["there", "unknown to the system", "refused by the folder"])
def test_two_at_once(vault, tmp_path, path, monkeypatch, locks):
    if locks == "unknown to the system":  # as on Windows
        monkeypatch.setitem(sys.modules, "fcntl", None)
    elif locks == "refused by the folder":
        monkeypatch.setattr("fcntl.flock", refuse)
    together = threading.Barrier(2)

    def call(_):
        together.wait(5)
        return fetch(tmp_path)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(call, range(2))
    assert first == second
    assert path.read_bytes() == BODY
    assert names(path) == WHOLE
    assert len(vault.ranges()) in ([1] if locks == "there" else [1, 2])


def test_without_locks_attempts_go_on_but_later_calls_do_not(vault, tmp_path, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    vault.image.extend([cut(HALF), cut(0), cut(0)])
    with pytest.raises(DownloadError):
        fetch(tmp_path)
    assert names(path) == ["image_32980.json"]
    fetch(tmp_path)
    assert vault.ranges() == [None, f"bytes={HALF}-", f"bytes={HALF}-", None]


def test_a_killed_process_leaves_a_part_that_the_next_one_completes(vault, tmp_path, path):
    vault.image.append(stall(HALF))
    code = (
        "import sys; from gpuroi.datasets import _neurovault as n; n.SERVER = sys.argv[1];"
        "n.fetch_neurovault_auditory_computation_task(sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, _neurovault.SERVER, tmp_path])
    part = path.with_name(f"part-{path.name}")
    deadline = time.monotonic() + 20
    n_bytes = 0
    while n_bytes == 0 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        n_bytes = part.stat().st_size if part.exists() else 0
    process.kill()
    assert process.wait() < 0
    n_bytes = part.stat().st_size
    assert 0 < n_bytes <= HALF
    assert not path.exists()
    fetch(tmp_path)
    assert path.read_bytes() == BODY
    assert vault.ranges() == [None, f"bytes={n_bytes}-"]
    assert names(path) == WHOLE


@pytest.mark.parametrize("state", [b"", b'{"url": "http', None])
def test_a_part_of_unknown_origin_is_not_used(vault, tmp_path, path, state):
    path.parent.mkdir()
    part = path.with_name(f"part-{path.name}")
    part.write_bytes(b"?" * 100)
    if state is not None:
        part.with_name(f"{part.name}.json").write_bytes(state)
    fetch(tmp_path)
    assert path.read_bytes() == BODY
    assert vault.ranges() == [None]


# Where, with what, and how it is called -----------------------------------------------------------


def test_the_folder(vault, tmp_path, monkeypatch):
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.delenv("GPUROI_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def folder(*arguments):
        return Path(fetch(*arguments).images[0]).parents[1]

    assert folder() == tmp_path / "cache" / "gpuroi"
    monkeypatch.setenv("GPUROI_DATA", "")
    assert folder() == tmp_path / "cache" / "gpuroi"
    monkeypatch.setenv("GPUROI_DATA", str(tmp_path / "variable"))
    assert folder() == tmp_path / "variable"
    assert folder(tmp_path / "argument") == tmp_path / "argument"
    assert folder("~/data") == tmp_path / "home" / "data"
    monkeypatch.chdir(tmp_path)
    assert folder("here") == tmp_path / "here"


@pytest.mark.parametrize("package", ["pooch", "requests"])
def test_without_the_extra(vault, tmp_path, path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gpuroi\[datasets\]'") as caught:
        fetch(tmp_path)
    assert str(path) in str(caught.value)
    assert not path.parent.exists()
    path.parent.mkdir()
    path.write_bytes(BODY)
    assert fetch(tmp_path).images == [str(path)]


def test_without_the_extra_there_is_no_default_folder(monkeypatch):
    monkeypatch.delenv("GPUROI_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(MissingExtraError, match=r"at \$GPUROI_DATA/neurovault/image_32980.nii.gz"):
        fetch()


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_timeouts_are_finite_and_above_zero(tmp_path, timeout):
    with pytest.raises(ValueError, match=rf"timeout={timeout}: expected seconds above zero"):
        fetch(tmp_path, timeout=timeout)


@pytest.mark.parametrize(("verbose", "level"), [(0, logging.DEBUG), (1, logging.INFO)])
def test_downloads_are_told_to_the_log_and_to_nobody_else(
    vault, tmp_path, path, caplog, capfd, verbose, level
):
    caplog.set_level(logging.DEBUG, "gpuroi.datasets")
    fetch(tmp_path, verbose=verbose)
    told = [record for record in caplog.records if record.name == "gpuroi.datasets"]
    assert {record.levelno for record in told} == {level}
    assert str(path) in told[-1].getMessage()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name", ["fetch_neurovault_auditory_computation_task", "load_sample_motor_activation_image"]
)
def test_parameters_are_nilearns(name):
    def parameters(module):
        found = inspect.signature(getattr(module, name)).parameters.values()
        return [(parameter.name, parameter.default) for parameter in found]

    assert parameters(datasets) == parameters(nilearn.datasets)


def test_the_result_is_a_record_and_a_mapping():
    dataset = datasets.NeuroVaultDataset(["a.nii.gz"], [{"id": 1}], "A map.")
    assert dict(dataset) == {
        "images": ["a.nii.gz"],
        "images_meta": [{"id": 1}],
        "description": "A map.",
    }
    with pytest.raises(KeyError, match="keys"):
        dataset["keys"]
    with pytest.raises(FrozenInstanceError):
        dataset.images = []


def test_the_sample_is_nilearns(monkeypatch):
    expected = nilearn.datasets.load_sample_motor_activation_image()
    assert datasets.load_sample_motor_activation_image() == str(expected)
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gpuroi\[sample\]'"):
        datasets.load_sample_motor_activation_image()


def test_importing_datasets_loads_nothing_heavy():
    code = "import gpuroi.datasets, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"nibabel", "nilearn", "pooch", "requests", "scipy", "pandas"}


# Synthetic maps -----------------------------------------------------------------------------------


def voxels(img):
    return np.asarray(img.dataobj)


GRIDS = {
    "3 mm": ((53, 63, 46), None, 6.0, 6),
    "2 mm": ((60, 66, 50), np.diag([2.0, 2, 2, 1]), 4.0, 10),
    "crowded": ((36, 36, 36), None, 4.0, 10),
    "smallest": ((8, 8, 8), None, 3.0, 1),
    "coarse": ((16, 17, 18), np.diag([12.0, 12, 12, 1]), 6.0, 12),
    "flat": ((60, 50, 9), np.diag([2.0, 2, 4, 1]), 4.0, 5),
    **{name: ((40, 50, 60), affine, 5.0, 5) for name, affine in AFFINES.items()},
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", range(6))
def test_any_threshold_between_noise_and_regions_recovers_them(grid, seed):
    shape, affine, fwhm, n_regions = GRIDS[grid]
    peak = (6.0, 7.3, 8.0, 30.0)[seed % 4]
    dtype = (np.float32, np.float64)[seed % 2]
    truth = make_stat_map(
        shape, seed, affine=affine, n_regions=n_regions, peak=peak, fwhm=fwhm, dtype=dtype
    )
    values, labels = voxels(truth.img), voxels(truth.labels_img)
    assert values.dtype == dtype
    assert labels.dtype == np.int32
    for threshold in (0.5001 * peak, truth.threshold, 0.7499 * peak):
        for connectivity in (1, 3):
            # SciPy numbers by first voxel in C order too; signs are not kept apart.
            structure = ndimage.generate_binary_structure(3, connectivity)
            found, n_found = ndimage.label(np.abs(values) >= threshold, structure)
            assert n_found == n_regions
            np.testing.assert_array_equal(found, labels)


def test_extract_regions_finds_them():
    truth = make_stat_map(seed=3)
    regions = extract_regions(truth.img, threshold=truth.threshold, connectivity=26)
    np.testing.assert_array_equal(voxels(regions.labels_img), voxels(truth.labels_img))
    np.testing.assert_array_equal(regions.labels_img.affine, truth.labels_img.affine)


def test_noise_is_smooth_and_of_unit_variance():
    truth = make_stat_map((60, 70, 60), n_regions=0, fwhm=9)
    values = voxels(truth.img)
    head = values != 0
    assert truth.peaks.shape == (0, 3)
    assert not voxels(truth.labels_img).any()
    # Exact before values are bent, which takes 1%.
    assert values[head].mean() == pytest.approx(0, abs=0.01)
    assert values[head].std() == pytest.approx(1, abs=0.02)
    sigma_voxels = 3 / np.sqrt(8 * np.log(2))
    both = head[1:] & head[:-1]
    neighbours = np.corrcoef(values[1:][both], values[:-1][both])[0, 1]
    assert neighbours == pytest.approx(np.exp(-1 / (4 * sigma_voxels**2)), abs=0.02)


def test_the_head_is_an_ellipsoid_in_the_middle():
    shape = (40, 50, 60)
    head = voxels(make_stat_map(shape).img) != 0
    assert head.mean() == pytest.approx(4 / 3 * np.pi * 0.46**3, rel=0.02)
    np.testing.assert_allclose(
        [axis.mean() for axis in np.nonzero(head)], (np.array(shape) - 1) / 2, atol=0.01
    )
    assert not head[[0, -1]].any()


@pytest.mark.parametrize("seed", range(5))
def test_regions_have_both_signs_and_peaks_of_the_asked_height(seed):
    truth = make_stat_map(seed=seed, peak=12, affine=AFFINES["oblique"])
    values, labels = voxels(truth.img), voxels(truth.labels_img)
    indices = np.linalg.solve(AFFINES["oblique"], np.c_[truth.peaks, np.ones(6)].T)[:3].T
    signs = []
    for label, index in enumerate(np.rint(indices).astype(int), start=1):
        np.testing.assert_allclose(indices[label - 1], index, atol=1e-9)
        inside = values[labels == label]
        at_peak = values[tuple(index)]
        assert abs(at_peak) == np.abs(inside).max()
        assert labels[tuple(index)] == label
        assert 9 < abs(at_peak) < 12 + 5  # noise is on top
        assert (np.sign(inside) == np.sign(at_peak)).all()
        signs.append(np.sign(at_peak))
    assert sorted(signs) == [-1, -1, -1, 1, 1, 1]


def test_blobs_fade_around_their_regions():
    """A region's border is no cliff: values outside rise towards it."""
    truth = make_stat_map()
    values, labels = voxels(truth.img), voxels(truth.labels_img)
    distance = ndimage.distance_transform_edt(labels == 0)
    near, far = (np.abs(values[(distance >= d) & (distance < d + 0.5)]).mean() for d in (1, 3))
    assert near > 2 * far


def test_regions_have_the_asked_extent():
    truth = make_stat_map((90, 90, 90), affine=np.eye(4), fwhm=6.0, n_regions=5)
    for region in ndimage.find_objects(voxels(truth.labels_img)):
        assert all(2 * 6 - 1 <= axis.stop - axis.start <= 2 * 9 + 1 for axis in region)


def test_regions_span_voxels_though_voxels_are_large():
    shape, affine, fwhm, n_regions = GRIDS["coarse"]
    truth = make_stat_map(shape, affine=affine, fwhm=fwhm, n_regions=n_regions)
    assert np.bincount(voxels(truth.labels_img).ravel())[1:].tolist() == [7] * n_regions


def test_the_same_seed_gives_the_same_map():
    first, again, other = make_stat_map(seed=5), make_stat_map(seed=5), make_stat_map(seed=6)
    for name in ("img", "labels_img"):
        assert voxels(getattr(first, name)).tobytes() == voxels(getattr(again, name)).tobytes()
        assert voxels(getattr(first, name)).tobytes() != voxels(getattr(other, name)).tobytes()
    np.testing.assert_array_equal(first.peaks, again.peaks)


def test_the_map_of_a_seed_stays_what_it_is():
    """What was written down here once, with NumPy 2.4.6 and SciPy 1.17.1."""
    truth = make_stat_map()
    labels, values = voxels(truth.labels_img), voxels(truth.img)
    assert zlib.crc32(labels.astype("<i4").tobytes()) == 3648524736
    expected = [-2.5184309, -1.7178625, -1.0358061, -0.5133528]
    np.testing.assert_allclose(values[20:24, 30, 20], expected, rtol=1e-5)


def test_regions_depend_on_neither_height_nor_dtype():
    first, other = make_stat_map(seed=2), make_stat_map(seed=2, peak=20, dtype=np.float64)
    np.testing.assert_array_equal(voxels(first.labels_img), voxels(other.labels_img))


@pytest.mark.parametrize("affine", [None, AFFINES["oblique"]], ids=["default", "oblique"])
def test_images_say_where_they_are(affine):
    truth = make_stat_map((20, 21, 22), affine=affine, n_regions=1)
    expected = affine
    if affine is None:
        expected = np.array([[3.0, 0, 0, -30], [0, 3, 0, -48], [0, 0, 3, -24], [0, 0, 0, 1]])
    for img in (truth.img, truth.labels_img):
        np.testing.assert_array_equal(img.affine, expected)
        assert img.shape == (20, 21, 22)
        assert img.header.get_xyzt_units()[0] == "mm"
    assert truth.labels_img.header.get_intent()[0] == "label"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (53, 63)}, r"shape=\(53, 63\): expected three whole numbers, 8 or more"),
        ({"shape": (53, 63, 7)}, r"shape=\(53, 63, 7\)"),
        ({"shape": (53, 63, 46.5)}, r"shape=\(53, 63, 46.5\)"),
        ({"n_regions": -1}, r"n_regions=-1: expected 0 or more"),
        ({"peak": 5.9}, r"peak=5.9: expected 6 to 1000"),
        ({"peak": float("nan")}, r"peak=nan"),
        ({"fwhm": 0}, r"fwhm=0: expected millimetres above zero"),
        ({"fwhm": float("inf")}, r"fwhm=inf"),
        ({"dtype": np.int16}, r"dtype=.*int16.*: expected float32 or float64"),
        ({"affine": np.eye(3)}, r"affine=.*: expected a 4 x 4 matrix"),
        ({"affine": np.zeros((4, 4))}, r"affine is singular"),
        ({"seed": -1}, r"non-negative"),
        ({"n_regions": 1000}, r"n_regions=1000: only \d+ found a place.*ask for fewer regions"),
        ({"shape": (8, 8, 8)}, r"n_regions=6: only \d found a place.*\(8, 8, 8\)"),
        ({"fwhm": 100.0}, r"n_regions=6: only 0 found a place.*smaller fwhm"),
    ],
)
def test_impossible_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_stat_map(**arguments)
