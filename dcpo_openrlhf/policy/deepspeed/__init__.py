"""The other trainer, OpenRLHF's DeepSpeed ZeRO; imports no megatron-core.

Door: model, step, checkpoint, memory.
"""

CHECKPOINT_FOLDER = "deepspeed"
"""Name of the folder, in that of a checkpoint, in which DeepSpeed's files lie."""
