"""The policy as Ray actors, and what both trainers share; neither megatron-core nor DeepSpeed is imported here.

Door: actor; rows, token_stats, micro_batch, hf_folder and cpu for whoever computes with them.
"""
