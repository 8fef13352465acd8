//! Configurations, read from changed copies of the speller's.

use std::fs;

use families::WindowRule;

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
        (serde_json::json!({ "model_type": "mistral", "layer_types": null }), "wwwwwwww"),
        (serde_json::json!({ "model_type": "mistral", "layer_types": types("..w.w..w") }), "..w.w..w"),
        (serde_json::json!({ "model_type": "ministral", "layer_types": null }), "wwwwwwww"),
        (serde_json::json!({ "model_type": "phi3", "layer_types": types("..w.w..w") }), "wwwwwwww"),
        (serde_json::json!({ "model_type": "gemma2", "layer_types": null }), "w.w.w.w."),
        (serde_json::json!({ "model_type": "gemma3_text", "layer_types": null }), "wwwww.ww"),
        (
            serde_json::json!({ "model_type": "gemma3_text", "layer_types": null, "sliding_window_pattern": 3 }),
            "ww.ww.ww",
        ),
        (serde_json::json!({ "model_type": "smollm3", "layer_types": null }), "........"),
        (serde_json::json!({ "model_type": "smollm3", "layer_types": null, "use_sliding_window": true }), "...w...w"),
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
        let has_window = (1..=12).any(|back| config.window(u32::MAX as usize - back).is_some());
        assert_eq!(has_window, family.windows != WindowRule::Never);
        assert!(!matches!(config.windows.0, LayerSet::Each(_)) && !matches!(config.second_rope, LayerSet::Each(_)));
    }
}

/// The frequencies of a short sequence.
fn frequencies(changes: Value) -> Vec<f32> {
    read(changes).unwrap().ropes[0].frequencies(1).into_owned()
}

#[test]
fn both_spellings_of_the_rope_keys_are_read() {
    let base = |changes: Value| frequencies(changes)[1];
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
    let scaled = |key| frequencies(serde_json::json!({ "rope_parameters": null, "rope_scaling": llama3(key) }));
    assert_eq!(scaled("type"), scaled("rope_type"));
    let plain = frequencies(serde_json::json!({}));
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

#[test]
fn a_model_whose_tokens_see_later_ones_is_refused() {
    let config = |family: &str, key: &str, value: Value| {
        let mut config = Map::from_iter([("num_hidden_layers".into(), 2.into())]);
        config.insert(key.into(), value);
        let family = FAMILIES.into_iter().find(|known| known.model_type == family).unwrap();
        ModelConfig::of(family, &config).map_err(|fault| format!("{fault:?}"))
    };
    for family in FAMILIES {
        for value in [false.into(), Value::Null] {
            assert!(config(family.model_type, "is_causal", value).unwrap_err().contains("later tokens (is_causal)"));
        }
        assert!(config(family.model_type, "is_causal", true.into()).is_ok());
        let refused = config(family.model_type, "use_bidirectional_attention", true.into()).is_err();
        assert_eq!(refused, family.model_type.starts_with("gemma"), "{}", family.model_type);
    }
}

#[test]
fn what_is_absent_has_the_default_of_the_class_and_what_is_null_has_not() {
    let without = |key: &str, changes: Value| {
        let mut changes = changes;
        changes[key] = Value::Null;
        read(changes).unwrap()
    };
    assert_eq!(without("rms_norm_eps", serde_json::json!({ "model_type": "phi3" })).rms_eps, 1e-5);
    assert_eq!(without("max_position_embeddings", serde_json::json!({ "model_type": "llama" })).max_positions, 2048);
    assert!(without("tie_word_embeddings", serde_json::json!({ "model_type": "smollm3" })).tied);
    let keys = |text: &str, family: &str| {
        let Value::Object(config) = serde_json::from_str(text).unwrap() else { panic!("no object") };
        let family = FAMILIES.into_iter().find(|known| known.model_type == family).unwrap();
        ModelConfig::of(family, &config).map_err(|fault| format!("{fault:?}"))
    };
    let small = r#"{"hidden_size": 64, "num_attention_heads": 16, "num_hidden_layers": 2"#;
    let of = |more: &str, family: &str| keys(&format!("{small}{more}}}"), family).unwrap();
    assert_eq!((of("", "mistral").kv_heads, of(r#", "num_key_value_heads": null"#, "mistral").kv_heads), (8, 16));
    assert_eq!((of("", "llama").kv_heads, of("", "smollm3").kv_heads), (16, 4));
    assert_eq!(
        (of("", "mistral").window(0), of(r#", "sliding_window": null"#, "mistral").window(0)),
        (Some(4096), None)
    );
    assert_eq!((of("", "gemma2").soft_caps.scores, of("", "gemma3_text").soft_caps.scores), (Some(50.0), None));
    assert_eq!(of(r#", "final_logit_softcapping": null"#, "gemma2").soft_caps.logits, None);
    assert_eq!((of("", "gemma2").multipliers.scores, of("", "granite").multipliers.scores), (1.0 / 16.0, 1.0));
    assert!(keys(&format!("{small}, \"vocab_size\": null}}"), "llama").unwrap_err().contains("vocab_size is null"));
}

#[test]
fn a_language_model_inside_another_is_read_with_what_the_whole_says() {
    let text = serde_json::json!({ "hidden_size": 64, "num_hidden_layers": 2, "eos_token_id": null });
    for inner in [Value::Null, "gemma3_text".into()] {
        let mut text = text.clone();
        text["model_type"] = inner;
        let text: Value = text
            .as_object()
            .unwrap()
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect::<Map<_, _>>()
            .into();
        let config = read(serde_json::json!({ "model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106] }));
        let config = config.unwrap();
        assert_eq!((config.hidden, config.family.model_type, config.stop), (64, "gemma3_text", vec![1, 106]));
    }
    let unknown = read(serde_json::json!({ "model_type": "mamba", "text_config": { "model_type": "mamba2" } }));
    assert!(unknown.unwrap_err().to_string().contains("model_type \"mamba\""));
}

#[test]
fn of_two_blocks_the_older_counts_and_within_it_its_own_base() {
    let block = |theta: f64| serde_json::json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": theta });
    let changes = serde_json::json!({ "rope_scaling": block(9.0), "rope_parameters": block(16.0), "rope_theta": 25.0 });
    assert_eq!(frequencies(changes)[1], (9f64.powf(-2.0 / 64.0) / 2.0) as f32);
    let changes = serde_json::json!({ "rope_scaling": {}, "rope_parameters": block(16.0) });
    assert_eq!(frequencies(changes)[1], (16f64.powf(-2.0 / 64.0) / 2.0) as f32);
}
