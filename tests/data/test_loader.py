import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError
from data.loader import IGNORED, Batch, Loader
from data.mixture import BLOCK
from data.prepare import Prepared
from data.token_file import TokenFile
from data.tokenizer.files import write_files
from data.tokenizer.training import train_tokenizer

WEIGHTS = {"code": 1.0, "more": 0.25}


def open_loader(directory: Path, **changes: Any) -> Loader:
    settings: dict[str, Any] = {"sequence_length": 32, "seed": 7, "weights": WEIGHTS, "vocab_size": 440}
    return Loader(directory, **(settings | changes))


def windows_of(loader: Loader) -> list[int]:
    """Whole windows of 32 tokens, and the target after each, in every corpus."""
    files = [TokenFile(loader.directory / name) for name in loader.card.corpora]
    return [(file.num_tokens - 1) // 32 for file in files]


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


@pytest.fixture(scope="module")
def loader(dataset: Prepared) -> Loader:
    return open_loader(dataset.directory)


@pytest.fixture
def copy(dataset: Prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.directory, tmp_path / "copy"))


def slow_stream(file: TokenFile) -> list[tuple[int, int, int]]:
    """Every token with its document and its position there."""
    documents = [file.document(index).tolist() for index in range(file.num_documents)]
    return [
        (token, number, token_position)
        for number, d in enumerate(documents)
        for token_position, token in enumerate(d)
    ]


def slow_row(stream: list[tuple[int, int, int]], start: int, length: int) -> dict[str, list[int]]:
    """One window, token by token."""
    row: dict[str, list[int]] = {"tokens": [], "targets": [], "document": [], "position": []}
    _, first_document, first_position = stream[start]
    for here, after in itertools.pairwise(stream[start : start + length + 1]):
        token, number, token_position = here
        row["tokens"].append(token)
        row["targets"].append(after[0] if after[1] == number else IGNORED)
        row["document"].append(number - first_document)
        row["position"].append(
            token_position - first_position if number == first_document else token_position
        )
    return row


@pytest.mark.parametrize(("sequence_length", "rows"), [(32, 300), (701, 30)])
def test_batches_are_what_a_slow_reading_gives(dataset: Prepared, sequence_length: int, rows: int) -> None:
    batch = open_loader(dataset.directory, sequence_length=sequence_length).batch(40, rows)
    assert all(part.dtype == torch.int64 for part in batch)
    streams = [slow_stream(TokenFile(dataset.directory / name)) for name in dataset.card.corpora]
    seen = set()
    for row in range(rows):
        corpus, window = divmod(int(batch.sample_ids[row]), 1 << 48)
        for key, expected in slow_row(streams[corpus], window * sequence_length, sequence_length).items():
            assert getattr(batch, key)[row].tolist() == expected, key
        seen.add(corpus)
    assert seen == {0, 1}
    assert int(batch.document.max()) >= (1 if sequence_length == 32 else 2), "no document begins in the batch"


def test_targets_never_cross_a_document(loader: Loader) -> None:
    eos, bos = loader.tokenizer.eos, loader.tokenizer.bos
    batch = loader.batch(0, 2000)
    assert int((batch.tokens == eos).sum()) > 20
    assert (batch.targets[batch.tokens == eos] == IGNORED).all()
    assert not (batch.targets == bos).any()
    assert (batch.position[batch.tokens == bos] == 0).all()
    assert (batch.position[:, 0] == 0).all()
    assert (batch.document[:, 0] == 0).all()
    assert (batch.document.diff(dim=1) == (batch.tokens[:, 1:] == bos)).all()
    inside = batch.targets[:, :-1] != IGNORED
    assert (batch.targets[:, :-1][inside] == batch.tokens[:, 1:][inside]).all()


@given(
    seed=st.integers(0, 2**63 - 1),
    cursor=st.integers(0, 10**9),
    ranks=st.sampled_from([1, 2, 3, 4, 6]),
    micro=st.sampled_from([1, 2]),
)
def test_ranks_and_chunks_see_the_same_stream(
    dataset: Prepared, seed: int, cursor: int, ranks: int, micro: int
) -> None:
    whole = open_loader(dataset.directory, seed=seed).batch(cursor, 12)
    per_rank = 12 // ranks
    parts = []
    for rank in range(ranks):
        mine = open_loader(dataset.directory, seed=seed)
        step = per_rank // micro if per_rank % micro == 0 else per_rank
        begin = cursor + rank * per_rank
        parts += [mine.batch(at, step) for at in range(begin, begin + per_rank, step)]
    assert same(joined(parts), whole)


@settings(max_examples=3)
@given(seed=st.integers(0, 2**63 - 1))
def test_each_window_comes_once_per_epoch(dataset: Prepared, seed: int) -> None:
    loader = open_loader(dataset.directory, seed=seed)
    served: dict[int, list[int]] = {0: [], 1: []}
    for cursor in range(0, 2 * BLOCK, 512):
        for id in loader.batch(cursor, 512).sample_ids.tolist():
            served[id >> 48].append(id & (1 << 48) - 1)
    assert len(served[0]) == round(2 * BLOCK * 0.8)
    for corpus, windows in enumerate(windows_of(loader)):
        assert len(served[corpus]) > 2 * windows
        for epoch in range(len(served[corpus]) // windows):
            ids = served[corpus][epoch * windows : (epoch + 1) * windows]
            # Windows of every second epoch begin later, and are named otherwise.
            assert sorted(ids) == [epoch % 2 * windows + window for window in range(windows)]


def test_a_stage_with_other_weights_repeats_and_skips_nothing(dataset: Prepared) -> None:
    first = open_loader(dataset.directory)
    consumed = first.consumed(100)
    second = open_loader(dataset.directory, weights={"code": 1.0, "more": 3.0}, begin=100, consumed=consumed)
    alone = open_loader(dataset.directory, weights={"more": 1.0})
    assert (second.unused, alone.unused) == ([], ["code"])
    staged = [*first.batch(0, 100).sample_ids.tolist(), *second.batch(100, 300).sample_ids.tolist()]
    more = [id for id in staged if id >> 48 == 1]
    assert len(more) == second.consumed(400)["more"]
    assert more == alone.batch(0, len(more)).sample_ids.tolist()


def test_without_weights_corpora_count_by_their_tokens(dataset: Prepared) -> None:
    loader = open_loader(dataset.directory, weights=None)
    tokens = {name: card.tokens for name, card in dataset.card.corpora.items()}
    share = loader.consumed(BLOCK)["code"] / BLOCK
    assert share == pytest.approx(tokens["code"] / sum(tokens.values()), abs=1 / BLOCK)


@pytest.mark.parametrize("sequence_length", [8, 32, 500, "longer"])
@pytest.mark.parametrize("rows", [1, 7])
def test_every_held_out_token_is_a_target_once(
    dataset: Prepared, sequence_length: int | str, rows: int
) -> None:
    card = dataset.card.held_out
    length = card.tokens + 5 if isinstance(sequence_length, str) else sequence_length
    loader = open_loader(dataset.directory, sequence_length=length, weights={"code": 1.0})
    targets: list[int] = []
    ids: list[int] = []
    for start in range(0, loader.held_out_rows + rows, rows):
        batch = loader.held_out(start, rows)
        assert batch.tokens.shape == (rows, length)
        targets += batch.targets[batch.targets != IGNORED].tolist()
        ids += batch.sample_ids.tolist()
    assert len(targets) == card.tokens - card.documents
    assert loader.tokenizer.decode(targets) == (dataset.directory / "held_out.txt").read_bytes()
    assert Counter(targets)[loader.tokenizer.eos] == card.documents
    assert len(set(ids)) == len(ids)
    assert not set(ids) & set(loader.batch(0, 50).sample_ids.tolist())
    assert card.bytes == len((dataset.directory / "held_out.txt").read_bytes())


def test_padding_is_a_document_of_its_own(loader: Loader) -> None:
    last = loader.held_out(loader.held_out_rows - 1, 2)
    eos = loader.tokenizer.eos
    size = loader.card.held_out.tokens - (loader.held_out_rows - 1) * 32
    assert 2 <= size <= 32, "the fixture has a partial last window"
    assert last.tokens[0, size - 1] == eos
    assert (last.tokens[0, size:] == eos).all()
    assert (last.targets[0, size - 1 :] == IGNORED).all()
    assert (last.document[0, size:] == last.document[0, size - 1] + 1).all()
    assert last.position[0, size:].tolist() == list(range(32 - size))
    assert (last.tokens[1] == eos).all()
    assert (last.targets[1] == IGNORED).all()
    assert (last.document[1] == 0).all()


def test_prefetched_batches_are_the_same(loader: Loader) -> None:
    futures = [loader.prefetch(cursor, 4) for cursor in range(0, 40, 4)]
    for cursor, future in zip(range(0, 40, 4), futures, strict=True):
        assert same(future.result(), loader.batch(cursor, 4))


def test_verifying_finds_a_changed_token(copy: Path, loader: Loader) -> None:
    loader.verify()
    tokens = np.memmap(copy / "code.bin", np.uint16, mode="r+")
    tokens[3] ^= 1
    tokens.flush()
    one_line(r"code\.bin: digest \w+, expected \w+; prepare", open_loader(copy).verify)


def test_the_fingerprint_follows_the_content(dataset: Prepared, loader: Loader, copy: Path) -> None:
    assert open_loader(copy).fingerprint == loader.fingerprint == dataset.card.fingerprint
    card = json.loads((copy / "card.json").read_text())
    del card["sha256"]
    card["corpora"]["code"]["bin_digest"] = "0" * 32
    (copy / "card.json").write_text(json.dumps(card))
    assert open_loader(copy).fingerprint != loader.fingerprint


def one_line(match: str, action: Callable[[], object]) -> None:
    with pytest.raises(DataError, match=match) as error:
        action()
    assert "\n" not in str(error.value)


def test_a_directory_that_is_not_prepared_says_what_to_run(tmp_path: Path) -> None:
    one_line(r"card\.json: cannot read: .* run python -m data\.prepare", lambda: open_loader(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": 2}', b"\xff", b'{"sha256": NaN}'])
def test_a_damaged_card_is_named(copy: Path, content: bytes) -> None:
    (copy / "card.json").write_bytes(content)
    one_line(rf"{copy}/card\.json: damaged card", lambda: open_loader(copy))


def test_a_card_changed_by_hand_is_refused(copy: Path) -> None:
    card = json.loads((copy / "card.json").read_text())
    # Of no file, so that nothing else would show it, and bits per byte would follow.
    card["held_out"]["bytes"] += 1
    (copy / "card.json").write_text(json.dumps(card))
    one_line(r"card\.json: damaged card, or changed by hand", lambda: open_loader(copy))


def test_another_tokenizer_is_refused_with_both_digests(copy: Path, loader: Loader) -> None:
    other = train_tokenizer(["def other(values): return values\n" * 30], 390)
    write_files(other.files, copy)
    digests = f"{other.digest}.*{loader.card.tokenizer.digest}"
    one_line(rf"its tokenizer has sha256 {digests}; put that", lambda: open_loader(copy))


def test_a_model_with_too_few_embeddings_is_refused(dataset: Prepared, loader: Loader) -> None:
    one_line(
        r"440 ids, but the model has vocab_size=439; set model\.vocab_size to 440", lambda: loader.check(439)
    )
    one_line("vocab_size=439", lambda: open_loader(dataset.directory, vocab_size=439))
    loader.check(512)


@pytest.mark.parametrize("name", ["code", "held_out"])
@pytest.mark.parametrize("vocab_size", [440, 512])
def test_a_token_beyond_the_vocabulary_is_found(copy: Path, name: str, vocab_size: int) -> None:
    tokens = np.memmap(copy / f"{name}.bin", np.uint16, mode="r+")
    token_position = len(tokens) // 2
    tokens[token_position] = 500
    tokens.flush()
    loader = open_loader(copy, vocab_size=vocab_size, weights={"code": 1.0})

    def read_all() -> None:
        loader.batch(0, windows_of(loader)[0])
        loader.held_out(0, loader.held_out_rows)

    one_line(
        rf"{name}\.bin: token {token_position} \(byte {2 * token_position}\) is 500, expected 0 to 439",
        read_all,
    )


def test_a_file_cut_short_is_refused(copy: Path) -> None:
    path = copy / "code.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    one_line(
        rf"{path}: cut short: found {len(whole) - 2} bytes, expected {len(whole)}; prepare",
        lambda: open_loader(copy),
    )


def test_files_of_another_dataset_are_refused(copy: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(copy / f"more{suffix}", copy / f"code{suffix}")
    one_line(r"code\.idx: found .* it is of another dataset", lambda: open_loader(copy))


def test_one_flipped_bit_is_found_by_verify(copy: Path) -> None:
    loader = open_loader(copy)
    loader.verify()
    for path in (copy / "more.bin", copy / "held_out.idx"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
        one_line(rf"{path}: digest \w+, expected \w+; prepare", loader.verify)
        path.write_bytes(whole)
    loader.verify()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"absent": 1.0}, r"data\.corpora\.absent: not in .* which has code, more"),
        ({"code": -1.0}, "code is -1.0"),
        ({"code": 0.0}, "every weight is 0"),
        ({"code": float("nan")}, "code is nan"),
        ({"code": 1.0, "more": 1e-9}, "less than one sequence in 4096"),
    ],
)
def test_weights_that_cannot_be_used_are_named(
    dataset: Prepared, weights: dict[str, float], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        open_loader(dataset.directory, weights=weights)


def test_a_sequence_longer_than_a_corpus_is_refused(dataset: Prepared) -> None:
    one_line(
        r"data\.sequence_length \+ 1 = 1000001", lambda: open_loader(dataset.directory, sequence_length=10**6)
    )


def test_a_run_says_what_an_epoch_leaves_out(loader: Loader) -> None:
    corpora = {name: card.tokens for name, card in loader.card.corpora.items()}
    left_out = {name: (tokens - 1) % 32 for name, tokens in corpora.items()}
    share, most = max((left_out[name] / corpora[name], name) for name in corpora)
    said = loader.describe()
    assert (
        f"{sum(corpora.values()):,} tokens in windows of 32; an epoch leaves out {sum(left_out.values())},"
        in said
    )
    assert f"(at most {share:.2%} of a corpus, {most})" in said
