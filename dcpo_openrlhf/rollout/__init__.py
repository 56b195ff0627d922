"""From prompt to response: prompts, vLLM engines as Ray actors, the generator that feeds them, checks, replay.

Door: tasks, pool, generator, replay, checks.
"""
