"""DCPO (arXiv 2601.12730) for language models: Megatron-core trains, vLLM generates, entropy is held at its target."""

import warnings

# torch.cuda imports pynvml, which only says that it has a successor: not a user's business
warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
