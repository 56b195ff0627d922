"""Random Hugging Face model folders of a few hundred kilobytes, made in code: a real tokenizer, no download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
WORDS = ("system", "user", "assistant", "answer", "what", "is", "the", "number", "Ġthe", "Ġis", "Ġanswer")
MAX_POSITIONS = 256
# Wide enough that the next-token distribution is far from uniform and greedy decoding does not repeat one token.
INIT_STD = 0.12
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIGMOID: dict[str, object] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
}
ARCHITECTURE_FIELDS: dict[str, dict[str, object]] = {
    # a family of recipe/families.py, or a variant of one that names its model_type
    "llama": {},
    "llama_bias": {"model_type": "llama", "attention_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False, "rms_norm_eps": 1e-5},
    # biases and norms of queries and keys are in some sizes of the family alone
    "glm4_moe": SIGMOID | {"attention_bias": True, "use_qk_norm": True},
}
MIXTURES = [name for name, fields in ARCHITECTURE_FIELDS.items() if "num_experts_per_tok" in fields]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens: <|im_start|>, <|im_end|> (end of turn), a pad token, a ChatML template."""
    tokens = [PAD, TURN_START, TURN_END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair[0] + pair[1] not in tokens:
                merges.append(pair)
                tokens.append(pair[0] + pair[1])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(
    path: str | Path,
    *,
    architecture: str = "llama",
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 128,
    tie: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    **more: object,
) -> Path:
    """Folder `path` with config, weights, tokenizer and generation config of a random model; returned as a Path.

    `architecture` is a key of ARCHITECTURE_FIELDS; `more` are further fields of its config.
    The vocabulary is not divisible by 128, so padding is exercised.
    Keep hidden / heads at 32 or more: the smallest head that vLLM's CPU attention takes.
    """
    path = Path(path)
    tokenizer = make_tokenizer()
    fields = {"vocab_size": len(tokenizer), "model_type": architecture} | ARCHITECTURE_FIELDS[architecture] | more
    if architecture.startswith(("qwen3", "glm4")):
        fields["head_dim"] = hidden // heads
    if architecture in MIXTURES:
        fields["moe_intermediate_size"] = ffn
    config = AutoConfig.for_model(
        **fields,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tie,
        initializer_range=INIT_STD,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    _randomise_biases_and_norms(model)
    torch.set_rng_state(generator_state)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_biased_model(path: str | Path) -> Path:
    """A random model whose output layer favours "7", so that about half of its responses end in that integer."""
    path = make_tiny_model(path, tie=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        hidden = policy.model(**tokenizer("What is 3 + 4?", return_tensors="pt")).last_hidden_state[0].mean(0)
        (seven,) = tokenizer("7", add_special_tokens=False)["input_ids"]
        policy.lm_head.weight[seven] += 6.0 * hidden / hidden.pow(2).sum()
    policy.save_pretrained(path)
    return path


def _randomise_biases_and_norms(model: torch.nn.Module) -> None:
    """Biases and norm weights away from their 0 and 1, so that a test sees it when one of them is left out."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, INIT_STD)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(0.0, INIT_STD)
