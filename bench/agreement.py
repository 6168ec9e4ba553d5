"""Whether this device trains as a CPU in float32 does, within what bfloat16 rounds.

`python -m bench.agreement [key=value]` trains a small hybrid three times from the same weights on the same
rows: on the CPU in float32 and in bfloat16, plain; and in bfloat16 on this machine's device, with its kernels
and compiled. It prints their losses and writes bench/results/agreement-DEVICE.json. The device agrees if its
losses are at most twice as far from float32 as those of plain bfloat16; if not, the exit status is 1.
"""

import json
from pathlib import Path

import torch

from bench.origin import origin
from bench.synthetic import Reading, train_on_rows
from conf.help import Page, run
from parallel.mesh.world import World, open_world
from train.config.load import load_config
from train.track.report import print_table

STEPS = 60
KEYS = (
    "model=qwen3_next_small",
    "data.sequence_length=256",
    "train.global_batch=8",
    "train.micro_batch=4",
    f"train.steps={STEPS}",
    "schedule.warmup_steps=10",
)
WIDE, NARROW, DEVICE = "CPU, float32", "CPU, bfloat16", "device, bfloat16, compiled"


def main(overrides: list[str]) -> bool:
    """Prints and writes the comparison; whether the device agrees. Raises ConfigError."""
    losses: dict[str, list[float]] = {}
    for name, keys in {WIDE: ["precision=fp32"], NARROW: ["precision=bf16"]}.items():
        config = load_config([*KEYS, *keys, "kernels=reference", *overrides], 1)
        losses[name] = losses_of(list(train_on_rows(config, World.alone(torch.device("cpu")), STEPS)))
    config = load_config([*KEYS, "precision=bf16", "parallel.compile=true", *overrides], 1)
    with open_world(config.parallel, 0, 1, 0) as world:
        losses[DEVICE] = losses_of(list(train_on_rows(config, world, STEPS)))
        is_gpu = world.device.type == "cuda"
    noise, found = (furthest(losses[name], losses[WIDE]) for name in (NARROW, DEVICE))
    agrees = found <= 2 * noise
    rows = {name: ", ".join(f"{loss:.4f}" for loss in each[:: STEPS // 6]) for name, each in losses.items()}
    rows["furthest from float32"] = f"plain bfloat16 {noise:.4f}, device {found:.4f}"
    rows["verdict"] = "agrees" if agrees else "does NOT agree: more than twice as far"
    device = torch.cuda.get_device_name() if is_gpu else "CPU"
    print_table(f"Losses of every {STEPS // 6}th step, {device}", rows)
    head = origin("one device", device) if is_gpu else origin(f"{torch.get_num_threads()} threads")
    path = Path(f"bench/results/agreement-{device.lower().replace(' ', '-')}.json")
    described = {"losses": losses, "noise": noise, "found": found, "agrees": agrees}
    path.write_text(json.dumps(head | described, indent=1) + "\n")
    return agrees


def losses_of(readings: list[Reading]) -> list[float]:
    """Nats per target, step by step."""
    return [reading.loss for reading in readings]


def furthest(losses: list[float], expected: list[float]) -> float:
    """The largest difference of any step."""
    return max(abs(one - other) for one, other in zip(losses, expected, strict=True))


if __name__ == "__main__":
    run(
        lambda arguments: 0 if main(arguments) else 1,
        Page(__doc__ or "", ("python -m bench.agreement", "python -m bench.agreement train.seed=1")),
    )
