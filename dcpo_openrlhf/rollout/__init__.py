"""From prompt to response: problems, prompts, vLLM engines as Ray actors, the generator, also ahead, checks, replay.

Door: problems, data, tasks, room, chat, devices, pool, generator, ahead, checks, replay.
"""
