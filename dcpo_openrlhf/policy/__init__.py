"""The policy: Ray actors over one of two trainers, and what these share; megatron-core and DeepSpeed stay in theirs.

Door: actor, deaths, group, rows.
"""
