"""Importing the room first lets megatron-core be imported without triton."""

import dcpo_openrlhf.policy.megatron  # noqa: F401
