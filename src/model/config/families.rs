//! The model families: where each differs from the common decoder, and what transformers 5 takes where its `config.json` lacks a
//! key. A family is a row of [`FAMILIES`], and at most an operation that no other has.

use super::keys::Fallback::{self, Count, Flag, Number, Word};

/// Where a model family differs from the common decoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Family {
    /// As `config.json` names it.
    pub(in crate::model) model_type: &'static str,
    pub(crate) norms: Norms,
    /// What is added to the weights of all norms.
    pub(crate) norm_offset: f32,
    pub(crate) head_norm: HeadNorm,
    pub(super) biases: Biases,
    /// Query, key and value, and gate and up, are one matrix each.
    pub(crate) is_fused: bool,
    pub(super) windows: WindowRule,
    /// The embedding is multiplied by the root of its width.
    pub(super) scales_embedding: bool,
    /// Scores are divided by the root of `query_pre_attn_scalar`, not of the heads' width.
    pub(super) query_scalar: bool,
    pub(super) caps: Caps,
    /// Embedding, scores, what layers add, and logits are multiplied by keys of the configuration.
    pub(super) has_multipliers: bool,
    pub(super) rope: RopeRule,
    /// The key of the MLP's activation.
    pub(super) activation: &'static str,
    /// What keys have that are absent.
    pub(super) fallbacks: &'static [(&'static str, Fallback)],
}

/// Where a layer's norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Norms {
    /// Before attention, and before the MLP.
    Before,
    /// Before and after either.
    Around,
    /// After either.
    After,
}

/// What is normed of queries and keys before they are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadNorm {
    None,
    /// Each head.
    Each,
    /// All heads of a token together.
    Together,
}

/// Which projections have biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Biases {
    None,
    /// Query, key and value.
    Qkv,
    /// Those of attention if `attention_bias` is set.
    Attention,
    /// And those of the MLP if `mlp_bias` is.
    AttentionAndMlp,
}

/// What goes through a soft cap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caps {
    None,
    /// The logits, by `final_logit_softcapping`.
    Logits,
    /// And the scores, by `attn_logit_softcapping`.
    ScoresAndLogits,
}

/// When a configuration's `sliding_window` counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WindowRule {
    Never,
    /// In all layers.
    Always,
    /// In layers of type `sliding_attention`; in all where `layer_types` does not say.
    ByType,
    /// If `use_sliding_window` is set, in layers of that type; where `layer_types` does not say, from layer
    /// `max_window_layers` on.
    IfEnabled,
    /// In layers of that type; where `layer_types` does not say, in every second, from the first on.
    Alternate,
    /// The same in all but every `sliding_window_pattern`-th.
    Pattern,
    /// In layers of that type; where `layer_types` does not say, in those without rope if `use_sliding_window` is set.
    WithoutRope,
}

/// What a configuration's rope keys mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RopeRule {
    Common,
    /// May turn a part of each head (`partial_rotary_factor`); `su` and `yarn` are older names of `longrope`.
    Partial,
    /// One for layers with a window, one for the others.
    ByType,
    /// Some layers have none (`no_rope_layers`).
    SomeLayers,
}

/// The common decoder: Llama 2 and 3.
const LLAMA: Family = Family {
    model_type: "llama",
    norms: Norms::Before,
    norm_offset: 0.0,
    head_norm: HeadNorm::None,
    biases: Biases::AttentionAndMlp,
    is_fused: false,
    windows: WindowRule::Never,
    scales_embedding: false,
    query_scalar: false,
    caps: Caps::None,
    has_multipliers: false,
    rope: RopeRule::Common,
    activation: "hidden_act",
    fallbacks: &[
        ("vocab_size", Count(32_000)),
        ("hidden_size", Count(4096)),
        ("intermediate_size", Count(11_008)),
        ("num_hidden_layers", Count(32)),
        ("num_attention_heads", Count(32)),
        ("hidden_act", Word("silu")),
        ("max_position_embeddings", Count(2048)),
        ("rms_norm_eps", Number(1e-6)),
        ("rope_theta", Number(1e4)),
        ("eos_token_id", Count(2)),
    ],
};

/// Mistral's keys, and Ministral's.
const MISTRAL_FALLBACKS: &[(&str, Fallback)] = &[
    ("vocab_size", Count(32_000)),
    ("hidden_size", Count(4096)),
    ("intermediate_size", Count(14_336)),
    ("num_hidden_layers", Count(32)),
    ("num_attention_heads", Count(32)),
    ("num_key_value_heads", Count(8)),
    ("hidden_act", Word("silu")),
    ("max_position_embeddings", Count(131_072)),
    ("rms_norm_eps", Number(1e-6)),
    ("rope_theta", Number(1e4)),
    ("sliding_window", Count(4096)),
    ("eos_token_id", Count(2)),
];

/// Where transformers finds `layer_types` in a Mistral configuration it takes the model for this.
pub(super) const MINISTRAL: Family = Family {
    model_type: "ministral",
    biases: Biases::None,
    windows: WindowRule::ByType,
    fallbacks: MISTRAL_FALLBACKS,
    ..LLAMA
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    biases: Biases::Qkv,
    windows: WindowRule::IfEnabled,
    fallbacks: &[
        ("vocab_size", Count(151_936)),
        ("hidden_size", Count(4096)),
        ("intermediate_size", Count(22_016)),
        ("num_hidden_layers", Count(32)),
        ("num_attention_heads", Count(32)),
        ("num_key_value_heads", Count(32)),
        ("hidden_act", Word("silu")),
        ("max_position_embeddings", Count(32_768)),
        ("rms_norm_eps", Number(1e-6)),
        ("rope_theta", Number(1e4)),
        ("sliding_window", Count(4096)),
        ("max_window_layers", Count(28)),
    ],
    ..LLAMA
};

/// Gemma's norms and embedding.
const GEMMA2: Family = Family {
    model_type: "gemma2",
    norms: Norms::Around,
    norm_offset: 1.0,
    biases: Biases::Attention,
    windows: WindowRule::Alternate,
    scales_embedding: true,
    query_scalar: true,
    caps: Caps::ScoresAndLogits,
    activation: "hidden_activation",
    fallbacks: &[
        ("vocab_size", Count(256_000)),
        ("hidden_size", Count(2304)),
        ("intermediate_size", Count(9216)),
        ("num_hidden_layers", Count(26)),
        ("num_attention_heads", Count(8)),
        ("num_key_value_heads", Count(4)),
        ("head_dim", Count(256)),
        ("hidden_activation", Word("gelu_pytorch_tanh")),
        ("max_position_embeddings", Count(8192)),
        ("rms_norm_eps", Number(1e-6)),
        ("rope_theta", Number(1e4)),
        ("tie_word_embeddings", Flag(true)),
        ("query_pre_attn_scalar", Number(256.0)),
        ("sliding_window", Count(4096)),
        ("attn_logit_softcapping", Number(50.0)),
        ("final_logit_softcapping", Number(30.0)),
        ("eos_token_id", Count(1)),
    ],
    ..LLAMA
};

pub(super) const FAMILIES: [Family; 11] = [
    LLAMA,
    Family { model_type: "mistral", windows: WindowRule::Always, ..MINISTRAL },
    MINISTRAL,
    QWEN2,
    Family {
        model_type: "qwen3",
        head_norm: HeadNorm::Each,
        biases: Biases::Attention,
        fallbacks: &[
            ("vocab_size", Count(151_936)),
            ("hidden_size", Count(4096)),
            ("intermediate_size", Count(22_016)),
            ("num_hidden_layers", Count(32)),
            ("num_attention_heads", Count(32)),
            ("num_key_value_heads", Count(32)),
            ("head_dim", Count(128)),
            ("hidden_act", Word("silu")),
            ("max_position_embeddings", Count(32_768)),
            ("rms_norm_eps", Number(1e-6)),
            ("rope_theta", Number(1e4)),
            ("sliding_window", Count(4096)),
            ("max_window_layers", Count(28)),
        ],
        ..QWEN2
    },
    // Phi-3, and Phi-4, which is called so too.
    Family {
        model_type: "phi3",
        biases: Biases::None,
        is_fused: true,
        windows: WindowRule::Always,
        rope: RopeRule::Partial,
        fallbacks: &[
            ("vocab_size", Count(32_064)),
            ("hidden_size", Count(3072)),
            ("intermediate_size", Count(8192)),
            ("num_hidden_layers", Count(32)),
            ("num_attention_heads", Count(32)),
            ("hidden_act", Word("silu")),
            ("max_position_embeddings", Count(4096)),
            ("original_max_position_embeddings", Number(4096.0)),
            ("rms_norm_eps", Number(1e-5)),
            ("rope_theta", Number(1e4)),
            ("eos_token_id", Count(32_000)),
        ],
        ..LLAMA
    },
    GEMMA2,
    Family {
        model_type: "gemma3_text",
        head_norm: HeadNorm::Each,
        windows: WindowRule::Pattern,
        caps: Caps::Logits,
        rope: RopeRule::ByType,
        fallbacks: &[
            ("vocab_size", Count(262_208)),
            ("hidden_size", Count(2304)),
            ("intermediate_size", Count(9216)),
            ("num_hidden_layers", Count(26)),
            ("num_attention_heads", Count(8)),
            ("num_key_value_heads", Count(4)),
            ("head_dim", Count(256)),
            ("hidden_activation", Word("gelu_pytorch_tanh")),
            ("max_position_embeddings", Count(131_072)),
            ("rms_norm_eps", Number(1e-6)),
            ("rope_theta", Number(1e6)),
            ("rope_local_base_freq", Number(1e4)),
            ("tie_word_embeddings", Flag(true)),
            ("query_pre_attn_scalar", Number(256.0)),
            ("sliding_window", Count(4096)),
            ("sliding_window_pattern", Count(6)),
            ("eos_token_id", Count(1)),
        ],
        ..GEMMA2
    },
    Family {
        model_type: "smollm3",
        windows: WindowRule::WithoutRope,
        rope: RopeRule::SomeLayers,
        fallbacks: &[
            ("vocab_size", Count(128_256)),
            ("hidden_size", Count(2048)),
            ("intermediate_size", Count(11_008)),
            ("num_hidden_layers", Count(36)),
            ("num_attention_heads", Count(16)),
            ("num_key_value_heads", Count(4)),
            ("hidden_act", Word("silu")),
            ("max_position_embeddings", Count(32_768)),
            ("rms_norm_eps", Number(1e-6)),
            ("rope_theta", Number(2e6)),
            ("no_rope_layer_interval", Count(4)),
            ("tie_word_embeddings", Flag(true)),
            ("eos_token_id", Count(128_001)),
        ],
        ..LLAMA
    },
    Family { model_type: "granite", has_multipliers: true, fallbacks: GRANITE_FALLBACKS, ..LLAMA },
    Family {
        model_type: "olmo2",
        norms: Norms::After,
        head_norm: HeadNorm::Together,
        biases: Biases::Attention,
        fallbacks: &[
            ("vocab_size", Count(50_304)),
            ("hidden_size", Count(4096)),
            ("intermediate_size", Count(11_008)),
            ("num_hidden_layers", Count(32)),
            ("num_attention_heads", Count(32)),
            ("hidden_act", Word("silu")),
            ("max_position_embeddings", Count(2048)),
            ("rms_norm_eps", Number(1e-5)),
            ("rope_theta", Number(1e4)),
            ("eos_token_id", Count(50_279)),
        ],
        ..LLAMA
    },
];

const GRANITE_FALLBACKS: &[(&str, Fallback)] = &[
    ("vocab_size", Count(32_000)),
    ("hidden_size", Count(4096)),
    ("intermediate_size", Count(11_008)),
    ("num_hidden_layers", Count(32)),
    ("num_attention_heads", Count(32)),
    ("hidden_act", Word("silu")),
    ("max_position_embeddings", Count(2048)),
    ("rms_norm_eps", Number(1e-6)),
    ("rope_theta", Number(1e4)),
    ("embedding_multiplier", Number(1.0)),
    ("logits_scaling", Number(1.0)),
    ("residual_multiplier", Number(1.0)),
    ("attention_multiplier", Number(1.0)),
    ("eos_token_id", Count(2)),
];
