"""A run is read on several processes in any layout: the scores, logits and text of one process."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from data.card import read_card
from data.tokenizer.files import load_tokenizer
from parallel.mesh.axes import open_axes
from parallel.mesh.world import World
from parallel.next_token import next_logits
from tests.parallel.layouts import EVEN
from tests.train.runs import free_port, overrides_of, spawn
from tests.train.saved_runs import save_run
from tests.worlds import run_world
from train.config.reading import open_to_read
from train.eval.heldout import Evaluation, evaluate
from train.eval.restored import restore
from train.loop.report import sample_text
from train.loop.run import open_data

# Both ends of a pipeline hold the table, and MTP modules read it. Two stages of a rank want four layers.
KEYS = (
    *(*EVEN, "layout.pattern=gdn attn", "model.depth=4", "layout.ffn.pattern=moe dense", "model.width=32"),
    *("moe=sigmoid", "moe.num_experts=8", "precision=fp64", "model.mtp.depth=1", "sample.tokens=12"),
    *("sample.temperature=1.0", "model.logit_cap=20.0", "train.micro_batch=1"),
)
TABLES = {"tied": "model.has_tied_embeddings=true", "apart": "model.has_tied_embeddings=false"}
LAYOUTS = {
    "shard2": (),
    "replicate2": ("parallel.dp_replicate=2",),
    "ep2": ("parallel.ep=2",),
    "tp2": ("parallel.tp=2",),
    "cp2": ("parallel.cp=2",),
    "pp2": ("parallel.pp=2",),
    "pp2, both ends on a rank": ("parallel.pp=2", "parallel.pp_schedule=dualpipe_v"),
}
CASES = [*(("tied", name) for name in LAYOUTS), ("apart", "tp2"), ("apart", "pp2")]
MORE_LAYOUTS = {
    "cp2-tp2-ep4": ("parallel.cp=2", "parallel.tp=2", "parallel.ep=4"),
    "pp2-tp2": ("parallel.pp=2", "parallel.tp=2"),
    "pp2-cp2": ("parallel.pp=2", "parallel.cp=2"),
    "shard2-ep2-pp2": ("parallel.pp=2", "parallel.ep=2"),
}
# More than a chunk of a rank, an odd number, and one.
PROMPTS = ((5,), (7, 1, 30, 2, 11), tuple(range(1, 24)))
# In float64: four layers with sums of a hundred numbers are some hundred roundings of 2.2e-16, 1e-13.
LIMIT = 1e-12


class Read(NamedTuple):
    """What a rank found."""

    score: Evaluation
    logits: list[Tensor]
    text: str


def read(rank: int, size: int, directory: Path, layout: tuple[str, ...]) -> Read:
    """Reads a run as the commands do."""
    config = open_to_read(str(directory), None, layout, size)
    axes = open_axes(config.parallel.degrees(size), rank)
    world = World(rank, size, torch.device("cpu"), axes)
    loader = open_data(config, rank)
    runner = restore(str(directory), config, world, rows=3).built.runner
    context = config.data.sequence_length
    logits = [next_logits(runner, torch.tensor(prompt), world, context) for prompt in PROMPTS]
    # After them: what a score has gathered of the weights would be there.
    score = evaluate(runner, loader, world, rows=7, micro_batch=3, mtp_depth=config.model.mtp.depth)
    tokenizer = load_tokenizer(Path(config.data.directory))
    # Ranks that draw other tokens still take those of the first.
    train = config.train.model_copy(update={"seed": config.train.seed + rank})
    config = config.model_copy(update={"train": train})
    return Read(score, logits, sample_text(runner, tokenizer, config, world))


@pytest.fixture(scope="module", params=TABLES)
def run(request: pytest.FixtureRequest, short_documents: Path, tmp_path_factory: pytest.TempPathFactory):
    """The directory of a run, and what one process finds in it."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    overrides = overrides_of(short_documents, short_documents, directory, *KEYS, TABLES[request.param])
    (model,) = save_run(overrides, tokenizer=read_card(short_documents).tokenizer.digest).values()
    (alone,) = run_world(1, read, directory, ())
    # Of the model itself: what reading gives on one process is no measure of its own.
    with torch.no_grad():
        for prompt, logits in zip(PROMPTS, alone.logits, strict=True):
            expected = model.eval()(torch.tensor([prompt]))[0, -1]
            torch.testing.assert_close(logits, expected, rtol=LIMIT, atol=LIMIT)
    return directory, alone


def check(run: tuple[Path, Read], layout: tuple[str, ...], size: int) -> None:
    directory, alone = run
    for found in run_world(size, read, directory, layout):
        assert found.score.targets == alone.score.targets
        assert found.score.loss == pytest.approx(alone.score.loss, rel=LIMIT)
        for logits, expected in zip(found.logits, alone.logits, strict=True):
            torch.testing.assert_close(logits, expected, rtol=LIMIT, atol=LIMIT)
        assert found.text == alone.text
    assert len(alone.text) > len("def ") + 5


@pytest.mark.parametrize(("run", "layout"), CASES, indirect=["run"])
def test_two_ranks_read_what_one_process_reads(run: tuple[Path, Read], layout: str) -> None:
    check(run, LAYOUTS[layout], 2)


@pytest.mark.prove
@pytest.mark.parametrize("run", ["tied"], indirect=True)
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_four_ranks_do_too(run: tuple[Path, Read], layout: str) -> None:
    check(run, MORE_LAYOUTS[layout], 4)


def command_here(name: str, arguments: list[str], rank: int, size: int, port: int, log: str) -> None:
    """A command in this process as torchrun starts it, its output in a file."""
    import importlib

    from conf.errors import exit_on_error

    file = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with exit_on_error():
        importlib.import_module(name).main(arguments)
    sys.stdout.flush()


def printed(name: str, arguments: list[str], size: int, log: Path) -> list[str]:
    """What each rank of a command printed."""
    port = free_port()
    ranks = [spawn(command_here, name, arguments, rank, size, port, str(log)) for rank in range(size)]
    try:
        for rank, process in enumerate(ranks):
            process.join(60)
            assert process.exitcode == 0, Path(f"{log}.{rank}").read_text()
    finally:
        for process in ranks:
            process.kill()
    return [Path(f"{log}.{rank}").read_text() for rank in range(size)]


@pytest.mark.parametrize("run", ["apart"], indirect=True)
def test_commands_open_their_ranks_and_the_first_speaks(run: tuple[Path, Read], tmp_path: Path) -> None:
    directory, alone = run
    arguments = [f"run={directory}", "rows=7", "parallel.tp=2"]
    first, second = printed("train.evaluate", arguments, 2, tmp_path / "evaluate")
    assert f"{alone.score.loss:.4f}" in first
    assert second == ""
    arguments = [f"run={directory}", 'prompt="def "', "tokens=12", "temperature=1.0", "parallel.ep=2"]
    first, second = printed("train.sample", arguments, 2, tmp_path / "sample")
    assert alone.text in first
    assert second == ""
    arguments = [f"run={directory}", f"to={tmp_path}/hub", "model_type=weft", "shard_gb=1e-4"]
    first, second = printed("train.export", arguments, 2, tmp_path / "export")
    assert first.endswith(f"wrote step 4 of {directory} to {tmp_path}/hub as weft\n")
    assert second == ""
