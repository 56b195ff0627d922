"""Everything that knows megatron-core's ranks: mesh, model, layers, weight names, updates, checkpoints, offloading.

Door: mesh, model, senders, step, checkpoint, memory; cpu before any of them on a CPU machine.
"""

import importlib.util
import sys
from types import ModuleType


def _do_without_triton() -> None:
    """Make `import megatron.core` work where triton (0.7 GB, GPU kernels) is not installed.

    megatron-core 0.19's experts import two of its kernels, for CUDA graphs over paged activations, which nothing here
    switches on; what else of it wants triton asks first.
    """
    name = "megatron.core.transformer.moe.ops.paged_stash"
    if name in sys.modules or importlib.util.find_spec("triton") is not None:
        return
    stub = ModuleType(name)
    stub.__dict__.update(GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None)
    sys.modules[name] = stub


_do_without_triton()
