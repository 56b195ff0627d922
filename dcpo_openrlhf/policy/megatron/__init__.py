"""Everything that knows megatron-core's ranks: mesh, model, layers, weight names, updates, checkpoints, offloading.

Door: mesh, model, step, checkpoint, memory; cpu before any of them on a CPU machine.
"""
