import gzip
import hashlib
import json
import lzma
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from conf.compose import CONF_DIR
from conf.errors import DataError, StorageError
from data.card import read_card
from data.config import DataConfig
from data.documents import read_documents
from data.prepare import Prepared, prepare, summary
from data.shards import is_held_out
from data.token_file import TokenFile
from data.tokenizer.files import load_tokenizer

MakeConfig = Callable[..., DataConfig]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def usable(config: DataConfig) -> Iterator[tuple[str, bytes]]:
    for name in sorted(config.corpora):
        for document in read_documents(name, config.corpora[name]):
            if document.content and not document.fault:
                yield name, document.content


def files_of(tmp_path: Path, documents: dict[str, bytes]) -> dict[str, Any]:
    """Corpora of one corpus with these files."""
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    for name, content in documents.items():
        (source / name).write_bytes(content)
    return {"mine": {"kind": "text", "source": str(source)}}


def plain_files(count: int = 12) -> dict[str, bytes]:
    return {f"{n:02}.txt": f"the value of number {n} is {n * n * 7919}\n".encode() * 20 for n in range(count)}


def fails(config: DataConfig, match: str, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind, match=match) as error:
        prepare(config, progress=False)
    assert "\n" not in str(error.value)
    return str(error.value)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: a full disk, even for root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def other_process(config: DataConfig, shard_bytes: int) -> Iterator[psutil.Process]:
    """Another process that prepares the same config. It is gone afterwards."""
    code = (
        "import sys\nfrom data.config import DataConfig\nfrom data.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        "    config = DataConfig.model_validate_json(sys.argv[1], strict=False)\n"
        f"    prepare(config, progress=False, shard_bytes={shard_bytes})\n"
    )
    script = Path(config.directory).parent / "other.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(CONF_DIR.parent)}
    process = subprocess.Popen([sys.executable, str(script), config.model_dump_json()], env=environment)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def wait_for(what: Callable[[], bool], process: psutil.Process) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert process.status() != psutil.STATUS_ZOMBIE, "it ended too early"
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def test_every_usable_document_is_on_one_side_with_its_bytes(
    dataset: Prepared, make_config: MakeConfig
) -> None:
    config = make_config(dataset.directory)
    tokenizer = load_tokenizer(dataset.directory / "tokenizer.model")
    expected: dict[str, list[bytes]] = {"code": [], "more": [], "held_out": []}
    for name, content in usable(config):
        digest = hashlib.sha256(content).digest()
        expected["held_out" if is_held_out(digest, config.held_out) else name].append(content)
    for name, contents in expected.items():
        file = TokenFile(dataset.directory / name)
        documents = [file.document(index).tolist() for index in range(file.num_documents)]
        assert [tokenizer.decode(document) for document in documents] == contents
        assert all(d[0] == tokenizer.bos and d[-1] == tokenizer.eos for d in documents)
        assert all(tokenizer.eos not in d[1:-1] and tokenizer.bos not in d[1:-1] for d in documents)
    assert (dataset.directory / "held_out.txt").read_bytes() == b"".join(expected["held_out"])
    assert all(expected.values())


def test_the_card_counts_what_is_there(dataset: Prepared, make_config: MakeConfig) -> None:
    card = read_card(dataset.directory)
    assert card == dataset.card
    contents: dict[str, list[bytes]] = {"code": [], "more": []}
    for name, content in usable(make_config(dataset.directory)):
        contents[name].append(content)
    for name, part in card.corpora.items():
        hashes = sorted(hashlib.sha256(content).digest() for content in contents[name])
        assert part.source_digest == hashlib.sha256(b"".join(hashes)).hexdigest()
        assert (part.source_documents, part.source_bytes) == (len(hashes), sum(map(len, contents[name])))
    assert card.corpora["code"].empty == 2
    assert card.corpora["code"].bad == 0
    for name, part in card.token_files():
        file = TokenFile(dataset.directory / name)
        assert (part.documents, part.tokens) == (file.num_documents, file.num_tokens)
    held_out = (dataset.directory / "held_out.txt").read_bytes()
    assert (
        card.held_out.bytes
        == len(held_out)
        == sum(sum(map(len, found)) for found in contents.values())
        - sum(part.bytes for part in card.corpora.values())
    )
    assert card.held_out.gzip_bytes == len(gzip.compress(held_out, 9))
    assert card.held_out.xz_bytes == len(lzma.compress(held_out, preset=9))
    assert (
        card.tokenizer.digest
        == hashlib.sha256((dataset.directory / "tokenizer.model").read_bytes()).hexdigest()
    )
    assert set(card.versions) == {"python", "numpy", "sentencepiece", "tokenizers", "megatron-core"}
    assert any("gzip -9" in line for line in summary(dataset))


@pytest.mark.parametrize(("workers", "shard_bytes"), [(0, 1), (2, 3000)])
def test_workers_and_shards_leave_no_trace(
    dataset: Prepared, make_config: MakeConfig, tmp_path: Path, workers: int, shard_bytes: int
) -> None:
    config = make_config(tmp_path / "again", workers=workers, sequence_length=64)
    prepared = prepare(config, progress=False, shard_bytes=shard_bytes)
    assert prepared.is_new
    assert digests(prepared.directory) == digests(dataset.directory)
    assert not (tmp_path / "again.partial").exists()


def test_a_finished_dataset_is_found_at_once(
    dataset: Prepared, make_config: MakeConfig, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.directory.iterdir()}
    # Neither the weights, the window nor the workers are in the files.
    corpora = {name: corpus.model_dump() for name, corpus in make_config(tmp_path).corpora.items()}
    corpora["more"]["weight"] = 7.0
    config = make_config(dataset.directory, sequence_length=99, workers=3, corpora=corpora)
    found = prepare(config, progress=False)
    assert found == dataset._replace(is_new=False)
    assert {path: path.stat().st_mtime_ns for path in dataset.directory.iterdir()} == before


def test_other_settings_are_refused_by_key(dataset: Prepared, make_config: MakeConfig) -> None:
    before = digests(dataset.directory)
    fails(
        make_config(dataset.directory, held_out=0.2),
        r"data\.held_out=0\.2, prepared with 0\.15; choose another",
    )
    tokenizer = {"vocab_size": 430, "train_bytes": 60_000}
    fails(make_config(dataset.directory, tokenizer=tokenizer), r"vocab_size=430, prepared with 440")
    corpora = {"code": make_config(dataset.directory).corpora["code"].model_dump()}
    fails(
        make_config(dataset.directory, corpora=corpora), r"data\.corpora\.more\.kind=None, prepared with text"
    )
    assert digests(dataset.directory) == before


def test_a_directory_with_other_things_is_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    fails(make_config(tmp_path), "exists and is not a prepared dataset; choose another")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("mine")
    fails(make_config(tmp_path / "file"), "exists and is not a prepared dataset")
    fails(make_config(Path("/")), "not the name of a new directory")


@pytest.mark.parametrize("moment", ["code-000001.json", "more-000004.json"])
def test_a_killed_run_is_continued_to_the_same_bytes(
    dataset: Prepared, make_config: MakeConfig, tmp_path: Path, moment: str
) -> None:
    config = make_config(tmp_path / "small")
    partial = tmp_path / "small.partial"
    with other_process(config, 2000) as other:
        wait_for((partial / "shards" / moment).exists, other)
        other.suspend()
        # While it lives, even asleep, nobody else may touch the directory.
        message = fails(config, r"small\.partial: is being prepared by process \d+ on ")
        assert f"process {other.pid} on" in message
        other.send_signal(signal.SIGKILL)
    kept = {path.name: path.stat().st_mtime_ns for path in (partial / "shards").glob("*.json")}
    assert moment in kept
    assert not (tmp_path / "small").exists()
    # A shard that is damaged meanwhile is made again, and not believed.
    damaged = partial / "shards" / "code-000000.npz"
    damaged.write_bytes(damaged.read_bytes()[:-7])

    touched: dict[str, int] = {}
    original = shutil.rmtree

    def look_first(path: Path, *args: Any, **kwargs: Any) -> None:
        if path == partial:
            touched.update({p.name: p.stat().st_mtime_ns for p in (partial / "shards").glob("*.json")})
        original(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", look_first)
        prepare(config, progress=False, shard_bytes=2000)
    assert digests(tmp_path / "small") == digests(dataset.directory)
    assert not partial.exists()
    redone = {name for name, changed in kept.items() if touched[name] != changed}
    assert redone == {"code-000000.json"}


def test_workers_end_with_a_killed_run(dataset: Prepared, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "small", workers=2)
    with other_process(config, 500) as other:
        wait_for((tmp_path / "small.partial" / "shards" / "code-000000.json").exists, other)
        children = other.children(recursive=True)
        assert len(children) >= 2
        other.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, f"{len(gone)} ended, {alive} did not"
    prepare(config, progress=False, shard_bytes=500)
    assert digests(tmp_path / "small") == digests(dataset.directory)


def test_a_full_disk_at_any_moment_is_one_line_and_costs_no_work(
    dataset: Prepared, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "small")
    largest = max(path.stat().st_size for path in dataset.directory.iterdir())
    failures = set()
    for size in (0, 300, 2000, 4000, 8000, 12_000, 20_000, largest // 2, largest - 1):
        try:
            with (
                largest_file(size),
                pytest.raises(StorageError, match="cannot write: File too large") as error,
            ):
                prepare(config, progress=False, shard_bytes=4000)
        except pytest.fail.Exception:
            raise AssertionError(f"a limit of {size} bytes went unnoticed") from None
        assert "\n" not in str(error.value)
        named = Path(str(error.value).split(":")[0])
        assert tmp_path / "small.partial" in named.parents
        failures.add(named.name)
        assert not (tmp_path / "small").exists()
    assert {"lock", "tokenizer.model", "code.bin"} <= failures
    assert any(name.endswith(".npz") for name in failures)
    prepare(config, progress=False, shard_bytes=4000)
    assert digests(tmp_path / "small") == digests(dataset.directory)


def test_a_place_that_cannot_be_written_is_one_line(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fails(make_config(tmp_path / "file" / "deeper"), "cannot write: Not a directory", StorageError)
    fails(make_config(Path("/proc/weft/deeper")), "/proc/weft.*cannot write", StorageError)


def test_empty_documents_are_counted_and_bad_ones_named(make_config: MakeConfig, tmp_path: Path) -> None:
    files = plain_files() | {"e1.txt": b"", "b1.txt": b"ab\0c", "b2.txt": b"good \xff", "e2.txt": b""}
    corpora = files_of(tmp_path, files)
    settings = {"corpora": corpora, "tokenizer": {"vocab_size": 384}, "held_out": 0.0}
    config = make_config(tmp_path / "out", **settings, max_bad_documents=1)
    message = fails(config, r"b2\.txt: invalid UTF-8 at byte 5 \(0xff\)")
    assert "found 2, allowed data.max_bad_documents=1" in message
    fails(make_config(tmp_path / "out", **settings), r"b1\.txt: binary: NUL at byte 2")
    card = prepare(make_config(tmp_path / "out", **settings, max_bad_documents=2), progress=False).card
    mine = card.corpora["mine"]
    assert (mine.documents, mine.empty, mine.bad) == (12, 2, 2)
    assert [Path(example.split(":")[0]).name for example in mine.bad_examples] == ["b1.txt", "b2.txt"]
    assert [Path(example).name for example in mine.empty_examples] == ["e1.txt", "e2.txt"]
    assert card.held_out.documents == card.held_out.bytes == 0


def test_what_is_not_read_is_named_when_it_is_prepared_and_when_it_is_found(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    names = {"notes.md": b"x", ".hidden.txt": b"x", "e1.txt": b"", "part.txt.gz": b"x"}
    corpora = files_of(tmp_path, plain_files() | names)
    corpora["mine"]["suffixes"] = [".txt"]
    (tmp_path / "source" / "more").symlink_to(tmp_path / "source")
    settings = {"corpora": corpora, "tokenizer": {"vocab_size": 384}, "held_out": 0.0}
    config = make_config(tmp_path / "out", **settings)
    for is_new in (True, False):
        prepared = prepare(config, progress=False)
        assert prepared.is_new == is_new
        lines = summary(prepared)
        assert f"  mine: left out 1 empty documents, such as {tmp_path}/source/e1.txt" in lines
        assert "  mine: passed over 1 folders read already under another name: more" in lines
        assert "  mine: passed over 1 hidden: .hidden.txt" in lines
        assert "  mine: passed over 2 not ending in .txt: notes.md, part.txt.gz" in lines


def test_a_card_of_before_opens(dataset: Prepared, tmp_path: Path) -> None:
    card = json.loads((dataset.directory / "card.json").read_text())
    del card["sha256"]
    for corpus in card["corpora"].values():
        del corpus["passed_over"], corpus["empty_examples"]
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert read_card(tmp_path).fingerprint == dataset.card.fingerprint


def test_an_empty_split_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    corpora = files_of(tmp_path, {"a.txt": b"", "b.txt": b""})
    config = make_config(tmp_path / "out", corpora=corpora)
    fails(config, r"data\.corpora\.mine\.source=.* no training documents: found 0 held out, 2 empty, 0 bad")
    corpora = files_of(tmp_path, plain_files(3))
    config = make_config(tmp_path / "out", corpora=corpora, held_out=0.0001)
    fails(config, r"data\.held_out=0\.0001 picks none of 3 documents; raise it or set it to 0")


def test_a_given_tokenizer_is_used_as_it_is(
    dataset: Prepared, make_config: MakeConfig, tmp_path: Path
) -> None:
    model = shutil.copy(dataset.directory / "tokenizer.model", tmp_path / "mine.model")
    config = make_config(tmp_path / "out", tokenizer={"vocab_size": 440, "model": str(model)})
    prepared = prepare(config, progress=False)
    assert prepared.card.tokenizer == dataset.card.tokenizer
    assert prepared.card.fingerprint == dataset.card.fingerprint
    moved = Path(shutil.move(model, tmp_path / "moved.model"))
    again = make_config(tmp_path / "out", tokenizer={"vocab_size": 440, "model": str(moved)})
    assert not prepare(again, progress=False).is_new
    # The size is of one that is trained.
    other = make_config(tmp_path / "out", tokenizer={"vocab_size": 500, "model": str(moved)})
    assert not prepare(other, progress=False).is_new
    absent = make_config(tmp_path / "new", tokenizer={"vocab_size": 440, "model": str(model)})
    fails(absent, r"data\.tokenizer\.model=.*mine\.model: no such file")


def test_documents_that_change_between_the_passes_are_noticed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    corpora = files_of(tmp_path, plain_files())
    config = make_config(tmp_path / "out", corpora=corpora, tokenizer={"vocab_size": 384}, held_out=0.0)
    with largest_file(4096):  # enough for the first pass
        fails(config, "cannot write", StorageError)
    # The tokenizer model is larger than that, so let it through and stop at the shards.
    with largest_file(9000):
        fails(config, "cannot write", StorageError)
    assert (tmp_path / "out.partial" / "scan.json").exists()
    (tmp_path / "source" / "05.txt").write_bytes(b"something else\n")
    fails(config, r"data\.corpora\.mine\.source=.* changed while they were prepared; delete .*out\.partial")
    shutil.rmtree(tmp_path / "out.partial")
    assert prepare(config, progress=False).is_new


def test_other_settings_start_the_partial_work_over(
    dataset: Prepared, make_config: MakeConfig, tmp_path: Path
) -> None:
    other = make_config(tmp_path / "small", held_out=0.3)
    with largest_file(10_000), pytest.raises(StorageError):
        prepare(other, progress=False, shard_bytes=2000)
    assert (
        json.loads((tmp_path / "small.partial" / "scan.json").read_text())["settings"]["data.held_out"] == 0.3
    )
    prepare(make_config(tmp_path / "small"), progress=False, shard_bytes=2000)
    assert digests(tmp_path / "small") == digests(dataset.directory)


def test_shards_of_other_documents_are_made_again(
    dataset: Prepared, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "small")
    largest = max(path.stat().st_size for path in dataset.directory.iterdir())
    with largest_file(largest - 1), pytest.raises(StorageError, match=r"code\.bin"):
        prepare(config, progress=False, shard_bytes=2000)
    # The same names, cut elsewhere.
    assert (tmp_path / "small.partial" / "shards" / "code-000000.json").exists()
    prepare(config, progress=False, shard_bytes=5000)
    assert digests(tmp_path / "small") == digests(dataset.directory)
