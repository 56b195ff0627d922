"""What a run is, what forbids it, what it takes.

Door: schema (Recipe, its sections, RecipeError), load, preflight, resume, memory, moving, families, model_config,
packages, processor, weights.
"""
