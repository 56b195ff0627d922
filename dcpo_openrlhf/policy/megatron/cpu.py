"""megatron-core on a CPU machine: policy/cpu.py, and the functions of megatron-core that ask a GPU for something."""

import torch

from dcpo_openrlhf.policy import cpu


def install() -> None:
    """Let this process run megatron-core from now on, in the calling thread. Idempotent."""
    cpu.install()  # before megatron-core is imported: it may bind what this replaces
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    from dcpo_openrlhf.policy.megatron.fused import packed_rotary

    rope_utils.fused_apply_rotary_pos_emb_thd = packed_rotary  # in Transformer Engine's place
    # activation recomputation keeps the generator's state in a way of its own; the CPU generator's is kept beside it
    random._get_cuda_rng_state = lambda *_, **__: torch.empty(0)  # type: ignore[assignment]
    random._set_cuda_rng_state = lambda *_, **__: None
    # counts of tokens become numbers for the collective on their way from the GPU: here they take no way
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
    )
