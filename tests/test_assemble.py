"""From the recipe to the trainer's parts: what they are given, where a mistake would be silent."""

from pathlib import Path

from transformers import AutoTokenizer

from dcpo_openrlhf.assemble import make_generator
from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
from dcpo_openrlhf.recipe.schema import Recipe
from tests.tiny import PAD, TURN_END, TURN_START, make_tiny_model


def test_responses_end_at_eos_at_the_end_of_turn_and_where_the_recipe_says(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"eos_token": PAD, "additional_special_tokens": [TURN_START, TURN_END]})
    pad, start, end = tokenizer.convert_tokens_to_ids([PAD, TURN_START, TURN_END])
    values = {"run": {"device": "cpu"}, "model": {"path": model}, "task": {"kind": "arithmetic"}}
    for changes, stops in (
        ({}, [pad, end]),
        ({"rollout": {"stop": [TURN_START]}}, [pad, end, start]),
        ({"task": {"kind": "arithmetic", "chat": False}}, [pad]),
    ):
        generator = make_generator(RecipeStrategy(Recipe.model_validate(values | changes)), [], tokenizer).generator
        params = generator._sampling_params(seed=1, max_tokens=2, temperature=1.0, top_p=1.0, top_k=-1)
        assert params.stop_token_ids == stops
