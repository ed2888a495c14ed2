"""Options: recipes, budgets, shapes, and refusals that name the option."""

from pathlib import Path

import pytest

from tolkit.errors import UsageError
from tolkit.model import preset
from tolkit.train.shape import check_init, model_config
from tolkit.train.spec import RECIPES, TrainSpec, recipe_of

OUT = Path("out")


def test_every_preset_has_a_recipe_and_numbers_given_win() -> None:
    for name in RECIPES:
        recipe = recipe_of(TrainSpec(OUT, preset=name, steps=7, batch=8, micro_batch=2))
        assert (recipe.steps, recipe.batch, recipe.micro_batch) == (7, 8, 2)
    assert recipe_of(TrainSpec(OUT, preset="1b", steps=1)).learning_rate == 1e-4


def test_tokens_become_whole_steps() -> None:
    spec = TrainSpec(OUT, tokens=1000, sequence=10, batch=8)
    assert recipe_of(spec).steps == 13
    assert recipe_of(TrainSpec(OUT, minutes=1)).steps is None


def test_a_small_batch_needs_no_micro_batch() -> None:
    assert recipe_of(TrainSpec(OUT, batch=3)).micro_batch == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 1, "minutes": 2}, "budget: steps and minutes given"),
        ({"preset": "250m"}, "budget: preset 250m has no default length"),
        ({"preset": "huge"}, "preset: expected one of tiny"),
        ({"steps": 0}, "steps: expected a positive number"),
        ({"tokens": -5}, "tokens: expected a positive number"),
        ({"minutes": float("nan")}, "minutes: expected a positive number"),
        ({"sequence": 0}, "sequence: expected at least 1"),
        ({"tokens": 9, "sequence": 0}, "sequence: expected at least 1"),
        ({"batch": 8, "micro_batch": 3}, "micro_batch: expected a divisor of the batch of 8"),
        ({"micro_batch": 0}, "micro_batch: expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a positive number"),
        ({"clip_norm": -1.0}, "clip_norm: expected a positive number"),
        ({"weight_decay": -0.1}, "weight_decay: expected at least 0"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_of(TrainSpec(OUT, **options))  # type: ignore[arg-type]  # wrong on purpose
    assert said in caught.value.message


@pytest.mark.parametrize(("arch", "beta"), [("memory", None), ("dense", None), ("flex", 2)])
def test_a_preset_unchanged_is_the_models_own(arch: str, beta: int | None) -> None:
    spec = TrainSpec(OUT, preset="250m", arch=arch, beta=beta)
    assert model_config(spec, 128_256, 2048) == preset("250m", arch, beta or 3)


def test_overrides_keep_the_paper_s_split() -> None:
    def at(arch: str, **options: object) -> tuple[int, int]:
        spec = TrainSpec(OUT, arch=arch, hidden_size=512, layers=12, **options)  # type: ignore[arg-type]
        config = model_config(spec, 8192, 256)
        assert (config.hidden_size, config.num_hidden_layers) == (512, 12)
        assert config.hidden_size % (2 * config.num_attention_heads) == 0
        return config.intermediate_size, config.memory_intermediate_size

    assert at("memory") == (0, 1368)
    assert at("dense") == (1368, 0)
    assert at("flex", beta=3) == (512, 856)
    assert at("flex", beta=1) == (171, 1200)
    assert at("memory", memory_size=100) == (0, 100)
    assert at("dense", memory_size=100) == (100, 0)


def test_a_longer_window_widens_the_positions() -> None:
    assert model_config(TrainSpec(OUT), 300, 1024).max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 2}, "beta: only a flex model has one"),
        ({"arch": "flex", "beta": 4}, "beta: expected 1, 2 or 3"),
        ({"arch": "moe"}, "arch: expected one of"),
        ({"hidden_size": 33}, "hidden_size: expected an even number"),
        ({"hidden_size": 36, "heads": 4}, "hidden_size: expected a multiple of twice the heads"),
        ({"layers": 0}, "layers: expected at least 1"),
    ],
)
def test_shapes_that_make_no_model(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        model_config(TrainSpec(OUT, **options), 300, 16)  # type: ignore[arg-type]  # on purpose
    assert said in caught.value.message


@pytest.mark.parametrize(
    "options", [{"arch": "dense"}, {"layers": 3}, {"vocab_size": 77}, {"memory_size": 8}]
)
def test_an_init_checkpoint_fixes_the_model(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"^{name}: "):
        check_init(TrainSpec(OUT, **options), preset("tiny", "memory"))  # type: ignore[arg-type]
    check_init(TrainSpec(OUT, arch="memory", layers=8), preset("tiny", "memory"))


def test_a_preset_that_is_not_the_init_model_is_refused() -> None:
    check_init(TrainSpec(OUT, preset="tiny"), preset("tiny", "flex"))
    with pytest.raises(UsageError, match=r"^preset: 250m has 24 layers of width 960"):
        check_init(TrainSpec(OUT, preset="250m"), preset("tiny", "memory"))
