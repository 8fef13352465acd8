//! What tensors are called: GGUF's names as the decoder knows them.

use std::collections::HashSet;

/// Outside the layers.
const OUTSIDE: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Of a layer: what stands between its number and `weight` or `bias`.
const IN_LAYERS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
    ("ffn_down", "mlp.down_proj"),
];

/// Finds the decoder's names for those of a file.
pub(super) struct Names<'a>(HashSet<&'a str>);

impl<'a> Names<'a> {
    /// Of a file with these tensors.
    pub(super) fn new(stored: impl Iterator<Item = &'a str>) -> Self {
        Self(stored.collect())
    }

    /// The decoder's name; the file's own, if the decoder has no such tensor.
    pub(super) fn known_as(&self, name: &str) -> String {
        let outside = OUTSIDE.iter().find(|(theirs, _)| *theirs == name).map(|(_, ours)| (*ours).to_owned());
        outside.or_else(|| self.in_layer(name)).unwrap_or_else(|| name.to_owned())
    }

    fn in_layer(&self, name: &str) -> Option<String> {
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (module, parameter) = rest.rsplit_once('.')?;
        let has = |module: &str| self.0.contains(format!("blk.{layer}.{module}.weight").as_str());
        let ours = match module {
            // The norm before the MLP has the name of Llama's, unless there is one after attention too.
            "ffn_norm" if has("post_attention_norm") => "pre_feedforward_layernorm",
            "ffn_norm" => "post_attention_layernorm",
            "ffn_gate" => "mlp.gate_proj",
            // Without a gate beside it, it is both.
            "ffn_up" if has("ffn_gate") => "mlp.up_proj",
            "ffn_up" => "mlp.gate_up_proj",
            _ => IN_LAYERS.iter().find(|(theirs, _)| *theirs == module)?.1,
        };
        Some(format!("model.layers.{layer}.{ours}.{parameter}"))
    }
}
