//! Configurations, read from changed copies of the speller's.

use std::fs;

use super::*;

/// Reads the speller's configuration with some keys changed; `null` removes one.
fn read(changes: Value) -> Result<ModelConfig> {
    let speller = Path::new("examples/speller");
    let folder = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(speller.join("config.json")).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    if let Some(generation) = config.get("generation") {
        fs::write(folder.path().join("generation_config.json"), generation.to_string()).unwrap();
    }
    ModelConfig::read(folder.path())
}

#[test]
fn a_window_counts_where_the_family_and_the_layer_types_say() {
    let some = |text: &str| text.chars().map(|c| (c == 'w').then_some(5)).collect::<Vec<_>>();
    let types = |text: &str| -> Value {
        text.chars().map(|c| if c == 'w' { "sliding_attention" } else { "full_attention" }).collect()
    };
    for (changes, windows) in [
        (serde_json::json!({}), "........"),
        (serde_json::json!({ "use_sliding_window": true }), "........"),
        (serde_json::json!({ "use_sliding_window": true, "layer_types": types("..w.w..w") }), "..w.w..w"),
        (serde_json::json!({ "use_sliding_window": false, "layer_types": types("wwwwwwww") }), "........"),
        (serde_json::json!({ "use_sliding_window": true, "layer_types": null, "max_window_layers": 3 }), "...wwwww"),
        (serde_json::json!({ "use_sliding_window": true, "layer_types": null, "max_window_layers": null }), "........"),
        (serde_json::json!({ "model_type": "mistral" }), "wwwwwwww"),
        (serde_json::json!({ "model_type": "llama" }), "........"),
    ] {
        let mut changes = changes;
        changes["sliding_window"] = 5.into();
        let config = read(changes.clone()).unwrap();
        let found: Vec<_> = (0..config.layers).map(|layer| config.window(layer)).collect();
        assert_eq!(found, some(windows), "{changes}");
    }
}

#[test]
fn what_a_file_says_of_its_layers_takes_no_memory() {
    for family in FAMILIES {
        let changes = serde_json::json!({ "model_type": family.model_type, "num_hidden_layers": u32::MAX,
            "layer_types": null, "sliding_window": 5, "use_sliding_window": true });
        let config = read(changes).unwrap();
        assert_eq!(config.layers, u32::MAX as usize);
        assert_eq!(config.window(u32::MAX as usize - 1).is_some(), family.window != WindowRule::Never);
        assert!(matches!(config.windows, Windows::From(..)));
    }
}

#[test]
fn both_spellings_of_the_rope_keys_are_read() {
    let base = |changes: Value| read(changes).unwrap().inv_freq[1];
    let (old, new) = (
        serde_json::json!({ "rope_parameters": null, "rope_theta": 9.0 }),
        serde_json::json!({
        "rope_parameters": { "rope_theta": 9.0, "rope_type": "default", "type": "default" }, "rope_theta": 4.0 }),
    );
    let expected = 9f64.powf(-2.0 / 64.0) as f32;
    assert_eq!((base(old), base(new)), (expected, expected));
    let llama3 = |key: &str| {
        serde_json::json!({ key: "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64 })
    };
    let scaled =
        |key| read(serde_json::json!({ "rope_parameters": null, "rope_scaling": llama3(key) })).unwrap().inv_freq;
    assert_eq!(scaled("type"), scaled("rope_type"));
    let plain = read(serde_json::json!({})).unwrap().inv_freq;
    assert_eq!((scaled("type")[0], scaled("type")[31]), (plain[0], plain[31] / 8.0));
}

#[test]
fn stop_tokens_are_those_of_the_generation_configuration_first() {
    let stop = |changes: Value| read(changes).unwrap().stop;
    assert_eq!(stop(serde_json::json!({ "eos_token_id": 7 })), [7]);
    assert_eq!(stop(serde_json::json!({ "eos_token_id": 7, "generation": { "eos_token_id": [8, 9] } })), [8, 9]);
    assert_eq!(stop(serde_json::json!({ "eos_token_id": 7, "generation": {} })), [7]);
    assert!(stop(serde_json::json!({ "eos_token_id": null })).is_empty());
}

#[test]
fn biases_follow_family_and_flags() {
    let names = |changes: Value| {
        let tensors = read(changes).unwrap().layer_tensors();
        let biases = tensors.into_iter().filter_map(|(name, _)| name.strip_suffix(".bias"));
        biases.map(|name| name.split('.').next_back().unwrap()[..1].to_owned()).collect::<String>()
    };
    assert_eq!(names(serde_json::json!({})), "qkv");
    assert_eq!(names(serde_json::json!({ "model_type": "llama", "attention_bias": true })), "qkvo");
    assert_eq!(
        names(serde_json::json!({ "model_type": "llama", "mlp_bias": true, "tie_word_embeddings": null })),
        "gud"
    );
}

#[test]
fn numbers_that_cannot_be_computed_with_are_refused_by_key() {
    let rope = |key: &str, value: f64| {
        let mut rope = serde_json::json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64.0 });
        rope[key] = value.into();
        serde_json::json!({ "rope_parameters": rope })
    };
    for (changes, part) in [
        (serde_json::json!({ "rms_norm_eps": -1.0 }), "rms_norm_eps is -1"),
        (serde_json::json!({ "rms_norm_eps": 1e300 }), "rms_norm_eps"),
        (serde_json::json!({ "rope_parameters": { "rope_theta": 0.0 } }), "rope_theta is 0"),
        (rope("factor", 0.0), "factor of the llama3 rope scaling is 0"),
        (rope("low_freq_factor", 4.0), "not below"),
        (serde_json::json!({ "head_dim": 63 }), "head_dim is 63"),
        (serde_json::json!({ "num_attention_heads": 3, "num_key_value_heads": 2 }), "cannot share"),
        (serde_json::json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor"),
        (serde_json::json!({ "eos_token_id": -1 }), "eos_token_id"),
        (serde_json::json!({ "layer_types": ["full_attention"] }), "layer_types names 1 layers of 8"),
        (serde_json::json!({ "layer_types": vec!["linear_attention"; 8] }), "linear_attention"),
    ] {
        let message = read(changes.clone()).unwrap_err().to_string();
        assert!(message.contains("config.json") && message.contains(part), "{changes}: {message}");
    }
}
