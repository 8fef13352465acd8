"""Turns a GGUF file of SmolLM2 into a Hugging Face folder: weights as their blocks stand for them, rounded to BF16 unless
they are to stay F32, tokenizer and chat template. Takes gguf and numpy; ci/smollm2 runs it.

    python3 from-gguf.py FILE FOLDER [--f32]
"""
import json, os, sys
import numpy as np
from gguf import GGUFReader, dequantize

NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}

source, folder, *exact = sys.argv[1:]
reader = GGUFReader(source)
fields = {name: field.contents() for name, field in reader.fields.items()}
of_llama = lambda key: fields[f"llama.{key}"]
stored = {t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
heads, layers = (of_llama("attention.head_count"), of_llama("attention.head_count_kv")), of_llama("block_count")


def halves(weight, heads):
    """GGUF has the elements of a pair that rotates side by side, Hugging Face half a head apart."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def stored_as(weight):
    """F32; or BF16, to the nearest, of two as near the even one."""
    if exact:
        return np.ascontiguousarray(weight, np.float32)
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


state = {"model.embed_tokens.weight": stored["token_embd.weight"], "model.norm.weight": stored["output_norm.weight"]}
if "output.weight" in stored:
    state["lm_head.weight"] = stored["output.weight"]
for layer in range(layers):
    for theirs, ours in NAMES.items():
        weight = stored[f"blk.{layer}.{theirs}.weight"]
        if theirs in ("attn_q", "attn_k"):
            weight = halves(weight, heads[theirs == "attn_k"])
        state[f"model.layers.{layer}.{ours}.weight"] = weight

os.makedirs(folder, exist_ok=True)
header, end = {}, 0
for name, weight in state.items():
    bytes_of_it = (4 if exact else 2) * weight.size
    header[name] = {"dtype": "F32" if exact else "BF16", "shape": weight.shape, "data_offsets": [end, end + bytes_of_it]}
    end += bytes_of_it
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(f"{folder}/model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for weight in state.values():
        file.write(stored_as(weight).tobytes())
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32" if exact else "bfloat16",
    "hidden_size": of_llama("embedding_length"), "intermediate_size": of_llama("feed_forward_length"),
    "num_hidden_layers": layers, "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
    "max_position_embeddings": of_llama("context_length"), "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    "rms_norm_eps": round(of_llama("attention.layer_norm_rms_epsilon"), 9), "rope_theta": of_llama("rope.freq_base"),
    "tie_word_embeddings": "lm_head.weight" not in state, "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
}
tokens, special = fields["tokenizer.ggml.tokens"], 3
byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
tokenizer = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": byte_level,
    "added_tokens": [
        {"id": number, "content": tokens[number], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for number, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == special],
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
    "model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)},
              "merges": [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]]},
}
with open(f"{folder}/tokenizer.json", "w") as file:
    json.dump(tokenizer, file, ensure_ascii=False)
with open(f"{folder}/tokenizer_config.json", "w") as file:
    json.dump({"eos_token": tokens[config["eos_token_id"]], "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
               "chat_template": fields["tokenizer.chat_template"]}, file, indent=1)
# Last, so that a folder with a configuration is whole.
with open(f"{folder}/config.json", "w") as file:
    json.dump(config, file, indent=1)
