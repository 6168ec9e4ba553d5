"""The system may take fewer bytes than it was given: nothing is lost, and the digest is of all that was."""

import io
from pathlib import Path

import pytest
import xxhash

from train.checkpoint.storage import DigestingStream
from train.track.metrics_file import MetricsFile, read


class Slow(io.FileIO):
    """A file that takes three bytes at a time."""

    def write(self, data, /) -> int:
        return super().write(bytes(data)[:3])


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda path, mode="r", **_: Slow(path, mode.replace("b", "")))


def test_a_shard_is_written_to_its_end(tmp_path: Path) -> None:
    path, content = tmp_path / "shard", bytes(range(100))
    with DigestingStream(path) as stream:
        assert stream.write(content) == 100
    with io.FileIO(path) as file:
        assert file.read() == content
    assert stream.entry() == {"size": 100, "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def test_a_line_is_written_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    for line in lines:
        file.append(line)
    file.close()
    monkeypatch.undo()
    assert read(file.path) == lines


def test_a_line_without_its_end_is_torn_also_where_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.path.write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}')
    assert [line["step"] for line in read(file.path)] == [1]
    file.truncate_after(2)
    file.append({"step": 2, "loss": 2.0})
    file.close()
    assert read(file.path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]
