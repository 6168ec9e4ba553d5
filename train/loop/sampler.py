"""Text samples on the way of a run."""

from data.tokenizer.tokenizer import Tokenizer
from parallel.mesh.world import World
from train.config.run_config import RunConfig
from train.loop.hooks import StepHook
from train.loop.report import sample_text
from train.loop.state import TrainState
from train.loop.step import StepResult
from train.track.tracker import Tracker


class Sampler(StepHook):
    """Continues the prompt every `sample.every` steps, without effect on what the steps compute; collective.

    The last step has the sample of the end.
    """

    def __init__(self, config: RunConfig, tracker: Tracker, tokenizer: Tokenizer, world: World) -> None:
        assert config.sample.every is not None, f"{config.sample=}"
        self._every, self._config = config.sample.every, config
        self._tracker, self._tokenizer, self._world = tracker, tokenizer, world

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Samples where the step asks for it. Raises StorageError."""
        if state.step % self._every or state.step == self._config.train.steps:
            return
        text = sample_text(state.built.runner, self._tokenizer, self._config, self._world)
        self._tracker.log_sample(state.step, self._config.sample.prompt, text)
