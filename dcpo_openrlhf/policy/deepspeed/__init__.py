"""The deepspeed backend: OpenRLHF's DeepSpeed ZeRO trains. Imports no megatron-core."""

CHECKPOINT_FOLDER = "deepspeed"
"""Name of the folder, in that of a checkpoint, in which DeepSpeed's files lie."""
