"""A run from its config to its last report: build, resume, train, evaluate, save, show."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conf.errors import STOPPED, ConfigError, NumericsError, Violation
from conf.names import shortened
from data.loader import Loader
from data.tokenizer.tokenizer import Tokenizer
from model.count import count
from parallel.apply import StepShape, build_parallel
from parallel.block.compile import describe as describe_compiled
from parallel.mesh.world import World, open_world
from train.checkpoint.atomic import write_atomically
from train.checkpoint.foreign_ids import Ids, compare_ids
from train.checkpoint.lock import RunLock
from train.checkpoint.run_files import CHECKPOINTS, RunFiles
from train.checkpoint.run_tokenizer import keep_tokenizer
from train.checkpoint.store import CheckpointStore
from train.config.environment import Environment, prepare_deepspeed, read_launch
from train.config.run_config import RunConfig
from train.config.show import show_config
from train.loop.claim import claim
from train.loop.hooks import GarbageCollection, Profiler, Saved, StepHook
from train.loop.initial_weights import begin
from train.loop.interrupt import REQUEUE, Interrupt, Stopped
from train.loop.kernel_check import prepare_kernels
from train.loop.metrics import Metrics
from train.loop.notice import Notice
from train.loop.out_of_memory import memory_explained
from train.loop.report import finish, score
from train.loop.same_ranks import compare_data, facts_of, refuse_not_finite
from train.loop.sampler import Sampler
from train.loop.state import TrainState
from train.loop.step import StepResult, train_step
from train.optim.param_groups import build_optimizer
from train.track.tracker import Tracker

# Where ranks leave what they were at when another one was lost.
STACKS = "stacks"


def run_checked(config: RunConfig, environment: Environment) -> int:
    """Shows a checked config and trains; the exit code. Raises as `run` does."""
    if environment.rank == 0:
        show_config(config, environment.world_size)
    with memory_explained(config, environment.rank):
        return run(config, environment)


def run(config: RunConfig, environment: Environment) -> int:
    """Trains from the newest checkpoint of the run directory, or from step 0, to the last step.

    Gives the exit code: 0, or STOPPED after a request to stop, which saves and leaves the file REQUEUE in the
    run directory.

    Raises the errors of conf.errors, each with the exit code for the launcher.
    """
    directory = Path(config.run.dir)
    is_first = environment.rank == 0
    lock = RunLock(directory, slurm_job_id=environment.slurm_job) if is_first else nullcontext()
    ranks = (environment.rank, environment.world_size, environment.local_rank)
    with lock:
        files = claim(directory, config) if is_first else None
        # Before anything slow: from here on a request to stop is heard.
        interrupt = Interrupt(directory, is_first=is_first)
        if config.parallel.data == "zero":
            prepare_deepspeed(environment.local_rank)
        facts = facts_of(config) if environment.world_size > 1 else None
        launch = read_launch(environment) if is_first else {}
        with open_world(config.parallel, *ranks, environment.rendezvous, facts, directory / STACKS) as world:
            return run_in_world(config, world, interrupt, files, launch)


def run_in_world(
    config: RunConfig, world: World, interrupt: Interrupt, files: RunFiles | None, launch: Mapping[str, Any]
) -> int:
    """The run on its processes, its directory claimed; the exit code. files and launch are rank 0's."""
    directory = Path(config.run.dir)
    loader = open_data(config, world.rank)
    compare_data(loader, world)
    if world.rank == 0:
        print(loader.describe(), flush=True)
    state = build_state(config, world)
    kernels = prepare_kernels(config, state.built.modules(), world)
    if world.rank == 0:
        print(kernels, flush=True)
    if config.parallel.compile and world.rank == 0:
        print(describe_compiled(state.built.modules()), flush=True)
    store = CheckpointStore(
        directory / CHECKPOINTS,
        keep=config.checkpoint.keep,
        rank=world.rank,
        size=world.size,
        group=world.storage,
        run_files=files,
    )
    start = time.monotonic()
    resumed_from = resume(state, store, loader, world)
    resume_seconds = time.monotonic() - start
    store.probe(checkpoint_bytes(config))
    # Not before the data is known to be the run's: that of another would replace what an export needs.
    if world.rank == 0:
        keep_tokenizer(directory, loader.tokenizer, loader.card.tokenizer)
    if resumed_from is None and config.train.start is not None:
        lines = begin(state.built, config, loader)
        fix = "export or import them again from weights that are whole"
        refuse_not_finite(state.built.state(), config.train.start, fix, world)
        if world.rank == 0:
            print("\n".join(lines), flush=True)
    tracker = Tracker(
        config.track,
        directory,
        "" if files is None else files.id,
        config.model_dump(),
        launch,
        world.rank,
        config.train.steps,
    )
    code = 0
    # The tracker is closed last, whatever a hook raises on its way out.
    with ExitStack() as stack:
        stack.push(lambda kind, error, trace: tracker.close(error))
        tracker.resume(state.step, resumed_from, resume_seconds)
        hooks = hooks_of(config, tracker, loader.tokenizer, world)
        for hook in hooks:
            stack.callback(hook.close)
        try:
            check = partial(stop_if_asked, interrupt, world)
            train(state, loader, store, hooks, check, config, world)
            world.progress.enter("the last evaluation", state.step)
            finish(state, loader, tracker, config, world, check)
        except Stopped:
            code = STOPPED
            if world.rank == 0:
                write_atomically(directory / REQUEUE, f"stopped at step {state.step}\n".encode())
            tracker.stop()
    return code


def hooks_of(config: RunConfig, tracker: Tracker, tokenizer: Tokenizer, world: World) -> list[StepHook]:
    """What runs beside the steps, in the order in which it is called."""
    options, hooks = config.train, list[StepHook]()
    if options.gc_every is not None:
        hooks.append(GarbageCollection(options.gc_every))
    if options.profile.first_step is not None and world.rank in options.profile.ranks:
        hooks.append(Profiler(options.profile, Path(config.run.dir), world.rank))
    if world.rank == 0:
        hooks.append(Notice(Path(config.run.dir)))
    # After those whose time after a step is part of it.
    hooks.append(Metrics(config, tracker, world))
    if config.sample.every is not None:
        hooks.append(Sampler(config, tracker, tokenizer, world))
    return hooks


def train(
    state: TrainState,
    loader: Loader,
    store: CheckpointStore,
    hooks: Sequence[StepHook],
    check: Callable[[], None],
    config: RunConfig,
    world: World,
) -> None:
    """The loop. `check` raises Stopped where that was asked for; the step is saved before it is raised on."""
    rows, _ = config.rank_rows(world.axes.batch.size)
    first, saved = world.axes.batch.rank * rows, state.step
    upcoming = loader.prefetch(state.cursor + first, rows)
    while state.step < config.train.steps:
        try:
            check()
            # After the save of the step, so that a run which goes on from there makes up for what is dropped.
            evaluate_if_due(state, loader, hooks, check, config, world)
        except Stopped:
            if saved != state.step:
                save(state, store, loader, world, hooks)
            raise
        world.progress.enter("training", state.step + 1)
        for hook in hooks:
            hook.before_data(state)
        batch = upcoming.result()
        # Read while this step computes.
        upcoming = loader.prefetch(state.cursor + config.train.global_batch + first, rows)
        for hook in hooks:
            hook.before_step(state, batch)
        result = train_step(state, batch, config, world)
        for hook in hooks:
            hook.after_step(state, result)
        check_numerics(state, result, config, saved)

        if state.step == config.train.steps or state.step % config.checkpoint.every == 0:
            save(state, store, loader, world, hooks)
            saved = state.step


def evaluate_if_due(
    state: TrainState,
    loader: Loader,
    hooks: Sequence[StepHook],
    check: Callable[[], None],
    config: RunConfig,
    world: World,
) -> None:
    """Scores held-out documents where the step asks for it. `check` may end it before its end."""
    is_due = state.step > 0 and state.step % config.train.evaluate_every == 0
    if is_due and loader.held_out_rows > 0:
        world.progress.enter("evaluation", state.step)
        start = time.monotonic()
        held_out = score(state, loader, config, world, config.train.evaluate_rows, check)
        seconds = time.monotonic() - start
        for hook in hooks:
            hook.after_evaluation(state, held_out, seconds)


def open_data(config: RunConfig, rank: int) -> Loader:
    """The loader of the prepared dataset.

    Raises DataError when it does not fit the model, or, where data.verify asks for it, is not what was
    prepared.
    """
    loader = Loader(
        Path(config.data.directory),
        sequence_length=config.data.sequence_length,
        seed=config.train.seed,
        weights=config.data.weights,
        epochs=config.data.epochs,
        vocab_size=config.model.vocab_size,
    )
    if loader.unused and rank == 0:
        unused = shortened(loader.unused)
        print(f"{loader.directory}: passes over {unused}, which data.corpora does not name", flush=True)
    if config.data.verify and rank == 0:
        loader.verify()
    return loader


def build_state(config: RunConfig, world: World) -> TrainState:
    """The state before the first step: the same weights for every layout."""
    dtypes = (getattr(torch, config.precision.parameters), getattr(torch, config.precision.compute))
    rows, micro = config.rank_rows(world.axes.batch.size)
    step_shape = StepShape(rows // micro, micro, config.data.sequence_length)
    built = build_parallel(config.architecture, dtypes, config.parallel, world, config.train.seed, step_shape)
    # Dropout differs between ranks, weights do not.
    torch.manual_seed((config.train.seed * 100_003 + world.rank) % 2**63)
    if config.parallel.data == "zero":
        from train.loop.zero import build_zero_state

        return build_zero_state(built, config, step_shape, world)
    return TrainState(built, build_optimizer(built, config.optim), config.optim)


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of weights in a checkpoint, and of moments where every parameter has them; a lower bound."""
    has_frozen = not all(config.optim.lr_scales.values())
    copies = 1 if has_frozen else 1 + len(config.optim.slots)
    return count(config.architecture).total * getattr(torch, config.precision.parameters).itemsize * copies


def save(
    state: TrainState, store: CheckpointStore, loader: Loader, world: World, hooks: Sequence[StepHook] = ()
) -> None:
    """Commits a checkpoint of the state. Raises StorageError."""
    tokenizer = loader.card.tokenizer.digest
    extra = {"counters": state.counters(), "data": loader.fingerprint, "tokenizer": tokenizer}
    world.progress.enter("save", state.step)
    start = time.monotonic()
    store.save(state.step, state.tensors(world), extra)
    saved = Saved(time.monotonic() - start, store.saved_bytes)
    for hook in hooks:
        hook.after_save(state, saved)


def resume(state: TrainState, store: CheckpointStore, loader: Loader, world: World) -> Path | None:
    """Takes over the newest good checkpoint, and gives its path; None when there is none. Mutates the state.

    Raises CheckpointError when none is usable, ConfigError when the data is other than the run's.
    """
    tensors = state.tensors(world)
    loaded = store.load_latest(tensors, optional=("random",))
    if loaded is None:
        # Asking for the optimizer's tensors made it allocate them; the first step must find none.
        state.optimizer.state.clear()
        return None
    fix = "point it back to the dataset of the run"
    # Older checkpoints have no digest of their own: that of the dataset covers its tokenizer too.
    if "tokenizer" in loaded.extra:
        found = Ids(str(loader.directory), loader.card.tokenizer.digest)
        compare_ids(Ids(str(loaded.path), loaded.extra["tokenizer"]), found, "data.directory", fix)
    if loaded.extra["data"] != loader.fingerprint:
        message = f"{loaded.path} was trained on {loaded.extra['data']}; found {loader.fingerprint}"
        raise ConfigError([Violation("data.directory", f"{message}; {fix}")])
    fix = "move it away, and go on from an older one with checkpoint.accept_step"
    refuse_not_finite({name: tensors[name] for name in ("model", "optimizer")}, str(loaded.path), fix, world)
    state.restore(tensors, loaded.extra["counters"], world)
    if loaded.skipped and world.rank == 0:
        print(
            f"{loaded.path}: no random state of rank {world.rank} of {world.size}, as it was saved by other "
            "ranks; dropout goes on with other masks",
            flush=True,
        )
    return loaded.path


def stop_if_asked(interrupt: Interrupt, world: World) -> None:
    """Raises Stopped on all ranks where any of them was asked to stop. Collective."""
    flag = torch.tensor(float(interrupt.is_requested), device=world.device)
    if world.sum(flag) > 0:
        raise Stopped


def check_numerics(state: TrainState, result: StepResult, config: RunConfig, saved: int) -> None:
    """Raises NumericsError after too many steps in a row without a finite loss and gradient norm.

    saved is the step of the newest checkpoint, 0 where there is none.
    """
    if state.skipped <= config.train.max_skipped:
        return
    first = state.cursor - state.skipped * config.train.global_batch
    advice = "start again in another run.dir with a lower optim.lr"
    if saved:
        weights = f"{config.run.dir}-step-{saved}"
        advice = (
            f"take the weights of step {saved} (python -m train.export run={config.run.dir} to={weights} "
            f"model_type=weft) and start from them in another run.dir (train.start={weights}) with a lower "
            "optim.lr"
        )
    raise NumericsError(
        f"step {state.step}: loss {result.loss}, gradient norm {result.grad_norm}, for {state.skipped} "
        f"steps in a row (sequences {first} to {state.cursor - 1}); the weights are those before; {advice}, "
        f"or go on with train.max_skipped={config.train.max_skipped + 10}"
    )
