"""`longwave fetch`: against a host on this machine that answers whole, in part, too short, wrongly or not at all."""

import errno
import gzip
import hashlib
import io
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from longwave.cli import download, sources
from longwave.cli.download import Unreachable, WrongFile, unpack
from longwave.cli.main import main
from longwave.cli.sources import SOURCES, File, Source
from longwave.cli.tasks import task_files

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SUM = hashlib.md5(CONTENT).hexdigest()


class Host(ThreadingHTTPServer):
    """Serves CONTENT. `cut`: bytes after which the next connections break; `ranges`: whether it can give parts."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut, self.ranges, self.status, self.asked = CONTENT, [], True, None, []
        self.shift = 0  # of a part, against what was asked for

    def file(self, checksum=f"md5:{SUM}", size=len(CONTENT)):
        return File(path="folder/file.bin", url=f"http://127.0.0.1:{self.server_port}/f", size=size, checksum=checksum)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        host, asked = self.server, self.headers.get("Range")
        host.asked.append(asked)
        if host.status:
            return self.send_error(host.status)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and host.ranges else 0
        if start >= len(host.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(host.content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = host.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + host.shift}-{len(host.content) - 1}/{len(host.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: host.cut.pop(0)] if host.cut else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Host() as host:
        thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield host
        host.shutdown()
        thread.join()


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_arrives_once(host, tmp_path):
    path = download.download(host.file(), tmp_path)
    assert path == tmp_path / "folder/file.bin"
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["folder/file.bin"]
    download.download(host.file(), tmp_path)
    assert host.asked == [None]  # what is there and right is not asked for again


def test_a_broken_connection_is_taken_up_where_it_broke(host, tmp_path):
    host.cut = [1000, 5000]
    assert download.download(host.file(), tmp_path).read_bytes() == CONTENT
    assert host.asked == [None, "bytes=1000-", "bytes=6000-"]


def test_a_later_command_goes_on(host, tmp_path):
    host.cut = [300_000] + [0] * download._ATTEMPTS
    with pytest.raises(Unreachable, match="after 300,000 of 1,048,576 bytes; 300,000 bytes are kept"):
        download.download(host.file(), tmp_path)
    assert names(tmp_path) == ["folder/file.bin.partial"]
    host.asked.clear()
    assert download.download(host.file(), tmp_path).read_bytes() == CONTENT
    assert host.asked == ["bytes=300000-"]


def test_a_host_that_cannot_give_parts_gives_all(host, tmp_path):
    host.cut, host.ranges = [1000], False
    assert download.download(host.file(), tmp_path).read_bytes() == CONTENT
    assert host.asked == [None, "bytes=1000-"]


def test_another_part_than_asked_for_is_refused(host, tmp_path):
    host.cut, host.shift = [1000], 1
    with pytest.raises(Unreachable, match="asked for bytes from 1000 on, the host gives 'bytes 1001-"):
        download.download(host.file(), tmp_path)
    assert (tmp_path / "folder/file.bin.partial").read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("kept", [CONTENT, CONTENT + b"more"])
def test_a_partial_file_that_is_whole_or_too_long(host, tmp_path, kept):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file.bin.partial").write_bytes(kept)
    assert download.download(host.file(), tmp_path).read_bytes() == CONTENT
    assert host.asked[0] == f"bytes={len(kept)}-"


def test_a_wrong_checksum_names_both_and_keeps_the_file(host, tmp_path):
    host.content = CONTENT[::-1]
    with pytest.raises(WrongFile) as error:
        download.download(host.file(), tmp_path)
    assert SUM in str(error.value)
    assert hashlib.md5(CONTENT[::-1]).hexdigest() in str(error.value)
    assert names(tmp_path) == ["folder/file.bin.wrong"]
    assert (tmp_path / "folder/file.bin.wrong").read_bytes() == CONTENT[::-1]


def test_a_file_of_another_size_is_not_fetched(host, tmp_path):
    host.content = b"<html>please log in</html>"
    with pytest.raises(WrongFile, match="has 26 bytes, expected 1,048,576: nothing was fetched"):
        download.download(host.file(), tmp_path)
    assert names(tmp_path) == []


def test_a_file_that_is_there_but_wrong_stays(host, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file.bin").write_bytes(b"mine")
    with pytest.raises(WrongFile, match=r"file\.bin is there, but it has 4 bytes, expected 1,048,576; move it away"):
        download.download(host.file(), tmp_path)
    assert (tmp_path / "folder/file.bin").read_bytes() == b"mine"
    assert host.asked == []


def test_a_full_disk(host, tmp_path, monkeypatch):
    def full(answer, out, bar, task):
        out.write(answer.read(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download, "_copy", full)
        with pytest.raises(OSError, match="No space left"):
            download.download(host.file(), tmp_path)
    assert (tmp_path / "folder/file.bin.partial").read_bytes() == CONTENT[:1000]
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1234}))
        with pytest.raises(OSError, match="room for 1,234 bytes, 1,047,576 are to come"):
            download.download(host.file(), tmp_path)
    assert download.download(host.file(), tmp_path).read_bytes() == CONTENT


def tar(members):
    """A .tar.gz of (name, content); content None: a symbolic link to /etc."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc"
            info.size, info.mtime = len(content or b""), 0
            archive.addfile(info, io.BytesIO(content or b""))
    return packed.getvalue()


MEMBERS = [("a/b/want/x.tsv", b"1"), ("./a/want", b"no folder"), ("a/other/y", b"2"), ("want/deep/z.png", b"3" * 5000)]


def test_only_the_wanted_folder_is_unpacked(tmp_path):
    (tmp_path / "a.gz").write_bytes(tar([*MEMBERS, ("want/link", None)]))
    assert unpack(tmp_path / "a.gz", "want", tmp_path / "out/want") == 2
    assert names(tmp_path) == ["a.gz", "out/want/deep/z.png", "out/want/x.tsv"]
    assert unpack(tmp_path / "a.gz", "b/want", tmp_path / "two") == 1
    assert unpack(tmp_path / "a.gz", "", tmp_path / "all") == 4
    assert (tmp_path / "all/a/b/want/x.tsv").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar(MEMBERS)[:-12], "is damaged"),  # cut short
        (tar(MEMBERS)[:-8] + b"12345678", "is damaged: CRC"),
        (b"<html>", "is damaged"),
        (gzip.compress(b"no archive" * 100, mtime=0), "is damaged"),
        (tar([("other/x", b"1")]), "holds no file in a folder want"),
        (tar([("want/../../../x", b"1")]), r"want/\.\./\.\./\.\./x would lie outside"),
    ],
)
def test_nothing_is_left_of_a_bad_archive(tmp_path, content, message):
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(WrongFile, match=rf"a\.gz.*{message}"):
        unpack(tmp_path / "a.gz", "want", tmp_path / "data/want")
    assert names(tmp_path) == ["a.gz"]


def fetch(argv):
    return main(["fetch", *argv])


def test_the_command_fetches_and_unpacks(host, tmp_path, monkeypatch, capsys):
    host.content = tar(MEMBERS)
    checksum = f"sha256:{hashlib.sha256(host.content).hexdigest()}"
    source = Source(files=(host.file(checksum, None),), unpack=("want", "release/want"), use="a.setting")
    monkeypatch.setitem(sources.SOURCES, "retrieval", source)
    assert fetch(["retrieval", "--data_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/folder/file.bin is there, its sha256 sum right" in out
    assert f"{tmp_path}/release/want is there\na run takes it by a.setting" in out
    assert names(tmp_path / "release") == ["want/deep/z.png", "want/x.tsv"]
    host.asked.clear()
    assert fetch(["retrieval", "--data_dir", str(tmp_path)]) == 0
    assert host.asked == []


def test_without_a_network_it_says_what_to_put_where(host, tmp_path, monkeypatch, capsys):
    file = host.file()
    monkeypatch.setitem(sources.SOURCES, "image", Source(files=(file,)))
    host.status = 404
    assert fetch(["image", "--data_dir", str(tmp_path)]) == 1
    assert "answers 404 Not Found" in capsys.readouterr().err
    closed = File(path=file.path, url="http://127.0.0.1:9/f", size=file.size, checksum=file.checksum)
    monkeypatch.setitem(sources.SOURCES, "image", Source(files=(closed,)))
    assert fetch(["image", "--data_dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "127.0.0.1:9 cannot be reached" in error
    for line in (f"from {closed.url}\n", f"to   {tmp_path}/folder/file.bin\n", f"1,048,576 bytes, md5:{SUM}\n"):
        assert line in error


def test_a_task_that_generates_says_so(tmp_path, monkeypatch, capsys):
    assert fetch(["pathx", "--data_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "longwave fetch pathx --generate\n" in out
    assert "longwave fetch pathx --official\n" in out
    assert names(tmp_path) == []


def test_generate_builds_the_data(tmp_path, monkeypatch, capsys):
    made = []

    class Task:
        splits = {"train": 96_000, "valid": 2_000}

        def fingerprint(self):
            made.append("built")

    monkeypatch.setattr("longwave.cli.tasks.task_of", lambda name, values: made.append((name, values)) or Task())
    assert fetch(["listops", "--generate", "--data_dir", str(tmp_path)]) == 0
    assert made == [("listops", {"data_dir": str(tmp_path)}), "built"]
    assert "listops is ready: train 96,000, valid 2,000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["imgae"], "TASK 'imgae': expected one of listops, text"),
        (["imgae"], "did you mean 'image'?"),
        (["text", "--generate"], "--generate: text is not generated"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    assert fetch(argv) == 2
    assert message in capsys.readouterr().err


def test_every_task_of_the_benchmark_has_a_source_and_sums_are_sums():
    benchmark = {name for name, file in task_files().items() if file.startswith("configs/lra/")}
    assert benchmark <= set(SOURCES)
    for file in (file for source in SOURCES.values() for file in source.files):
        kind, _, digits = (file.checksum or "md5:" + "0" * 32).partition(":")
        assert re.fullmatch(rf"[0-9a-f]{{{2 * hashlib.new(kind).digest_size}}}", digits)
        assert file.url.startswith("https://")
