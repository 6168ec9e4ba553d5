"""What the pages say and show of systems, recipes and pipelines is what their configs and results give."""

import json

import pytest

from bench import pictures, pipeline, recipes, systems
from bench.tables import read


def test_the_table_of_systems_is_current() -> None:
    assert read("systems") == systems.table(), "write it anew: python -m bench.systems write"


def test_the_table_of_pipelines_is_current() -> None:
    assert read("pipeline") == pipeline.table(), "write it anew: python -m bench.pipeline write"


@pytest.mark.prove
def test_the_table_of_recipes_is_current() -> None:
    assert read("recipes") == recipes.table(), "write it anew: python -m bench.recipes write"


def test_the_pictures_are_those_of_the_results() -> None:
    drawn = pictures.pictures()
    assert {path.name for path in pictures.PICTURES.iterdir()} == set(drawn)
    for name, text in drawn.items():
        assert (pictures.PICTURES / name).read_text() == text, "draw them anew: python -m bench.pictures"


def test_the_caches_are_those_of_the_plan() -> None:
    assert json.loads(pictures.CACHE.read_text()) == pictures.caches(), "python -m bench.pictures count"


def test_a_curve_is_drawn_from_the_files_of_a_run(tmp_path) -> None:
    held_out = {"tokens": 110, "documents": 10, "gzip_bytes": 80, "xz_bytes": 60}
    lines = [{"step": step, "loss": loss} for step, loss in ((1, 4.0), (2, None), (3, 2.0))]
    config = {"train": {"steps": 3}, "data": {"directory": str(tmp_path)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "card.json").write_text(json.dumps({"held_out": held_out}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"step": 3, "loss": 2.5}) + "\n")
    curve = pictures.curve_of(tmp_path)
    # 80 bytes are 640 bits for 100 targets.
    assert (curve["gzip"], curve["loss"], curve["held_out"]) == (4.4361, [4.0, None, 2.0], [[3, 2.5]])
    assert "The default run<" in pictures.loss(curve)
