"""From prompt to response: problems, prompts, vLLM engines as Ray actors, the generator over them, checks, replay.

Door: problems, data, tasks, room, chat, devices, pool, generator, checks, replay.
"""
