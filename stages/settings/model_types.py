"""Which kinds of model are read from a folder, by `model_type` in config.json: what `config` knows without torch.

The code of the families is in stages/model/families/; a test holds it against these words.
"""

# model_type -> the name in messages and tables; each is read through transformers' class where no own class takes it
KNOWN = {
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "glm4_moe": "GLM-4-MoE",
    "granitemoe": "GraniteMoE",
    "gpt_oss": "GPT-OSS",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "olmo2": "OLMo-2",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
SOFTMAX_TYPE = "offramp_softmax_moe"  # of this project alone: no such type in transformers, on purpose
CONFIDENCE_TYPE = "offramp_confidence_moe"  # nor this
DENSE = ("qwen3", "qwen2", "llama", "mistral")  # our own dense class, unless a setting asks for more
