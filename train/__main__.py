"""`python -m train [group=option] [key=value]`: trains; the same command goes on after any stop.

With -m every combination of values with commas is a run of its own, in run.dir/0, run.dir/1 and so on.
A run that fails does not keep the others from starting.
"""

from conf.help import run
from train.config.help import run_page

PAGE = run_page(
    __doc__,
    (
        "python -m train layout=kda_3to1 optim.lr=3e-4",
        'python -m train model=mixtral_small layout.pattern="2*gdn swa attn" run.dir=runs/mixed',
        "torchrun --nproc-per-node 8 -m train recipe=smoke",
        "python -m train -m optim.lr=1e-3,3e-3",
        "python -m train recipe=smoke --cfg job",
    ),
    {
        "-m, --multirun": "a sweep: values with commas are tried one after the other",
        "--cfg job": "print the composed config and do nothing; --hydra-help lists Hydra's other flags",
    },
)


def main(arguments: list[str]) -> int:
    """The exit code of what is asked, its config checked before anything slow.

    Raises the errors of conf.errors.
    """
    from train.config.environment import share_processors

    share_processors()
    if any(argument.startswith("-") for argument in arguments):
        from train.loop.sweep import flagged

        return flagged(arguments)
    return start(arguments)


def start(arguments: list[str]) -> int:
    """One run from its overrides; the exit code. Raises the errors of conf.errors."""
    from train.config.environment import read_environment
    from train.config.load import load_config

    environment = read_environment()
    config = load_config(arguments, environment.world_size)
    from train.loop.run import run_checked

    return run_checked(config, environment)


if __name__ == "__main__":
    run(main, PAGE)
