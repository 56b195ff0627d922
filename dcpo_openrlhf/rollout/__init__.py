"""From prompt to response: prompts, vLLM engines as Ray actors, the generator over them, checks, replay.

Door: tasks, chat, devices, pool, generator, checks, replay.
"""
