use std::{collections::HashMap, env, fs, path::PathBuf};

use support::{
    folder,
    fuzz::mutants,
    gguf::{GgufFile, Meta},
};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::*;
use crate::text::Text;

#[test]
fn every_pre_tokeniser_splits_as_its_name_says() {
    let text = "It's 1234 o'clock!\n\n  We'LL see… \u{e9}t\u{e9}";
    let split = |pre: &Pre| -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        pre.pre_tokenizer().unwrap().pre_tokenize(&mut pieces).unwrap();
        let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        pieces.into_iter().map(|(_, (start, end), _)| text[start..end].to_owned()).collect()
    };
    let gpt2 = ["It", "'s", " 1234", " o", "'", "clock", "!", "\n\n ", " We", "'", "LL", " see", "…", " été"];
    let digits =
        ["It", "'s", " ", "1", "2", "3", "4", " o", "'", "clock", "!", "\n\n ", " We", "'", "LL", " see", "…", " été"];
    let three = ["It", "'s", " ", "123", "4", " o", "'clock", "!\n\n", " ", " We", "'LL", " see", "…", " été"];
    let single = ["It", "'s", " ", "1", "2", "3", "4", " o", "'clock", "!\n\n", " ", " We", "'LL", " see", "…", " été"];
    for pre in &PRES {
        let expected: &[&str] = match pre.name {
            "gpt-2" => &gpt2,
            "smollm" | "starcoder" | "refact" => &digits,
            "llama-bpe" | "dbrx" => &three,
            "qwen2" => &single,
            other => panic!("{other} has no test"),
        };
        assert_eq!(split(pre), expected, "{}", pre.name);
    }
}

/// A file with a tokenizer, which is opened.
fn opened(file: &GgufFile) -> Result<Text, String> {
    let folder = folder();
    let path = folder.path().join("m.gguf");
    fs::write(&path, file.bytes()).unwrap();
    Text::open(&path).map(|text| text.expect("it has a tokenizer")).map_err(|error| error.to_string())
}

fn texts(texts: &[&str]) -> Meta {
    Meta::Texts(texts.iter().map(|&text| text.to_owned()).collect())
}

/// A file with a tokenizer of bytes: letters, two merges, a special token, one of the user's and one that is not used.
fn of_bytes(pre: &str) -> GgufFile {
    let mut file = GgufFile::default();
    file.set("tokenizer.ggml.model", Meta::text("gpt2"));
    file.set("tokenizer.ggml.pre", Meta::text(pre));
    file.set("tokenizer.ggml.tokens", texts(&["a", "b", "Ġ", "ab", "aba", "<s>", "[x]", "[unused]", "1", "Ã", "©"]));
    file.set("tokenizer.ggml.token_type", Meta::Ints(vec![1, 1, 1, 1, 1, 3, 4, 5, 1, 1, 1]));
    file.set("tokenizer.ggml.merges", texts(&["a b"]));
    file
}

#[test]
fn bytes_are_merged_special_tokens_are_whole_and_unused_ones_are_no_text() {
    let mut file = of_bytes("gpt-2");
    let text = opened(&file).unwrap();
    assert_eq!(text.encode("abab<s>b[x] a1é").unwrap(), [3, 3, 5, 1, 6, 2, 0, 8, 9, 10]);
    assert_eq!(text.encode("aba").unwrap(), [3, 0]);
    assert_eq!(text.decode(&[3, 5, 6, 2, 7, 9, 10]).unwrap(), "ab[x] é");
    assert!(!text.has_words(5) && text.has_words(6) && !text.has_words(7));
    // A piece that is a token needs no merges where the name says so, and BOS comes first.
    file.set("tokenizer.ggml.pre", Meta::text("llama-bpe"));
    file.set("tokenizer.ggml.bos_token_id", Meta::U32(5));
    assert_eq!(opened(&file).unwrap().encode("aba").unwrap(), [5, 4]);
    file.set("tokenizer.ggml.add_bos_token", Meta::Bool(false));
    assert_eq!(opened(&file).unwrap().encode("aba").unwrap(), [4]);
    file.set("tokenizer.ggml.pre", Meta::text("qwen2"));
    assert_eq!(opened(&file).unwrap().encode("e\u{301}").unwrap(), [9, 10], "it is composed");
}

#[test]
fn what_a_file_says_of_a_tokenizer_that_is_not_understood_is_refused_by_name() {
    for (key, value, part) in [
        ("model", Meta::text("bert"), "tokenizer.ggml.model \"bert\" is not known, but gpt2, llama"),
        ("pre", Meta::text("odd"), "tokenizer.ggml.pre \"odd\" is not known, but gpt-2, smollm"),
        ("pre", Meta::U32(1), "tokenizer.ggml.pre is 1, expected a text"),
        ("tokens", Meta::U32(1), "tokenizer.ggml.tokens is 1, expected a list"),
        ("token_type", Meta::Ints(vec![1]), "token_type is a list of 1, for 11 tokens"),
        ("merges", texts(&["ab"]), "tokenizer.ggml.merges has \"ab\", no two texts"),
        ("merges", texts(&["a z"]), "m.gguf: "),
        ("bos_token_id", Meta::U32(11), "tokenizer.ggml.bos_token_id is 11, of 11 tokens"),
        ("tokens", texts(&["a"; 11]), "the tokens 0 and 1 are both \"a\""),
    ] {
        let mut file = of_bytes("gpt-2");
        file.set(&format!("tokenizer.ggml.{key}"), value);
        let said = opened(&file).map(|_| ()).unwrap_err();
        assert!(said.contains(part) && said.contains("m.gguf"), "{said} lacks {part}");
    }
    for key in ["merges", "tokens"] {
        let mut file = of_bytes("gpt-2");
        file.remove(&format!("tokenizer.ggml.{key}"));
        assert!(opened(&file).map(|_| ()).unwrap_err().contains(&format!("lacks the key tokenizer.ggml.{key}")));
    }
}

#[test]
fn the_chat_template_and_its_tokens_are_those_of_the_file_whatever_lies_beside() {
    let folder = folder();
    let path = folder.path().join("m.gguf");
    fs::write(folder.path().join("chat_template.jinja"), "of another model").unwrap();
    let mut file = of_bytes("smollm");
    fs::write(&path, file.bytes()).unwrap();
    let text = Text::open(&path).unwrap().unwrap();
    assert!(text.template().unwrap().is_none() && text.end_of_turn().is_none());
    file.set("tokenizer.chat_template", Meta::text("{{ bos_token }}{{ eos_token }}!"));
    file.set("tokenizer.ggml.bos_token_id", Meta::U32(5));
    file.set("tokenizer.ggml.eos_token_id", Meta::U32(6));
    fs::write(&path, file.bytes()).unwrap();
    let text = Text::open(&path).unwrap().unwrap();
    let template = text.template().unwrap().unwrap();
    assert_eq!((template.render(&[], None).unwrap().as_str(), template.file()), ("<s>[x]!", path.as_path()));
    assert_eq!(text.end_of_turn(), Some(6));
    fs::write(&path, GgufFile::default().bytes()).unwrap();
    assert!(Text::open(&path).unwrap().is_none());
}

/// Tokens with scores as SentencePiece has them: all bytes, some letters, and words of two or more tokens.
fn scored(rng: &mut fastrand::Rng) -> (GgufFile, Vec<String>, Vec<f32>) {
    let mut all: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    let mut kinds = vec![2, 3, 3];
    all.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    kinds.resize(all.len(), 6);
    all.extend(["▁", "a", "b", "c", "é"].map(str::to_owned));
    let letters = all.len() - 5;
    while all.len() < letters + 60 {
        let pick = |rng: &mut fastrand::Rng| all[rng.usize(letters..all.len())].clone();
        let word = pick(rng) + &pick(rng);
        if !all.contains(&word) && word.chars().count() < 7 {
            all.push(word);
        }
    }
    kinds.resize(all.len(), 1);
    // No two alike, so that the order is SentencePiece's.
    let mut scores: Vec<f32> = (0..all.len()).map(|i| -(i as f32)).collect();
    rng.shuffle(&mut scores[letters..]);
    let mut file = GgufFile::default();
    file.set("tokenizer.ggml.model", Meta::text("llama"));
    file.set("tokenizer.ggml.tokens", Meta::Texts(all.clone()));
    file.set("tokenizer.ggml.token_type", Meta::Ints(kinds));
    file.set("tokenizer.ggml.scores", Meta::Floats(scores.clone()));
    for (name, id) in [("unknown", 0), ("bos", 1), ("eos", 2)] {
        file.set(&format!("tokenizer.ggml.{name}_token_id"), Meta::U32(id));
    }
    (file, all, scores)
}

/// What SentencePiece does: of all neighbours that together are a token, those with the best score are merged, over and over; what
/// is no token then becomes its bytes.
fn by_score(text: &str, tokens: &[String], scores: &[f32]) -> Vec<u32> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, text)| (text.as_str(), id)).collect();
    let mut pieces: Vec<String> = text.replace(' ', "▁").chars().map(String::from).collect();
    loop {
        let mut best = None::<(f32, usize)>;
        for at in 1..pieces.len() {
            let joined = pieces[at - 1].clone() + &pieces[at];
            if let Some(&id) = ids.get(joined.as_str())
                && best.is_none_or(|(score, _)| scores[id] > score)
            {
                best = Some((scores[id], at));
            }
        }
        let Some((_, at)) = best else { break };
        let right = pieces.remove(at);
        pieces[at - 1] += &right;
    }
    let id = |piece: &str| ids.get(piece).map(|&id| vec![id as u32]);
    let bytes = |piece: &str| piece.bytes().map(|byte| 3 + u32::from(byte)).collect();
    pieces.iter().flat_map(|piece| id(piece).unwrap_or_else(|| bytes(piece))).collect()
}

#[test]
fn pieces_are_merged_by_their_scores_as_sentencepiece_does() {
    let mut rng = fastrand::Rng::with_seed(11);
    for _ in 0..20 {
        let (mut file, tokens, scores) = scored(&mut rng);
        let with_prefix = opened(&file).unwrap();
        file.set("tokenizer.ggml.add_space_prefix", Meta::Bool(false));
        file.set("tokenizer.ggml.add_bos_token", Meta::Bool(false));
        let without = opened(&file).unwrap();
        for _ in 0..50 {
            let letters = ["a", "b", "c", "é", " ", "😀"];
            let text: String = (0..rng.usize(1..20)).map(|_| letters[rng.usize(..letters.len())]).collect();
            assert_eq!(without.encode(&text).unwrap(), by_score(&text, &tokens, &scores), "{text:?}");
            let expected = [vec![1], by_score(&format!(" {text}"), &tokens, &scores)].concat();
            let found = with_prefix.encode(&text).unwrap();
            assert_eq!(found, expected, "{text:?}");
            assert_eq!(
                (with_prefix.decode(&found).unwrap(), without.decode(&found[1..]).unwrap()),
                (text.clone(), format!(" {text}"))
            );
        }
    }
}

#[test]
fn a_tokenizer_is_read_or_refused_and_takes_any_text() {
    let (scored, ..) = scored(&mut fastrand::Rng::with_seed(1));
    let folder = folder();
    let path = folder.path().join("m.gguf");
    for (name, seed) in [("gguf-bytes", of_bytes("qwen2")), ("gguf-scores", scored)] {
        mutants(name, &seed.bytes(), |bytes| {
            fs::write(&path, bytes).unwrap();
            let Ok(Some(text)) = Text::open(&path) else { return false };
            text.encode("ab a <s>é[x]\u{0}").is_ok_and(|tokens| text.decode(&tokens).is_ok())
        });
    }
}

#[test]
fn tokens_beside_scores_have_a_length_that_can_be_split() {
    let (mut file, mut tokens, _) = scored(&mut fastrand::Rng::with_seed(2));
    *tokens.last_mut().unwrap() = "a".repeat(1025);
    file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    let said = opened(&file).map(|_| ()).unwrap_err();
    assert!(said.contains("m.gguf: has a token of 1025 bytes; 1024 are the most"), "{said}");
    file.remove("tokenizer.ggml.scores");
    assert!(opened(&file).map(|_| ()).unwrap_err().contains("lacks the key tokenizer.ggml.scores"));
}

#[test]
#[ignore = "takes SmolLM2, which ci/smollm2 makes: LAYER_STREAMER_SMOLLM2 names its folder; .ci/run runs it"]
fn smollm2_s_gguf_file_has_the_tokens_of_its_tokenizer_json() {
    let model = PathBuf::from(env::var_os("LAYER_STREAMER_SMOLLM2").expect("it names SmolLM2's folder"));
    let [of_json, of_file] = [model.clone(), model.join("q4.gguf")].map(|path| Text::open(&path).unwrap().unwrap());
    let mut rng = fastrand::Rng::with_seed(3);
    let pieces = [
        "The quick brown fox",
        " jumps",
        "\n",
        "\n\n",
        "\t",
        "  ",
        "   ",
        "1234567",
        " 3.14",
        "don't",
        "WE'LL",
        "été",
        "中文字",
        "😀",
        "<|im_start|>",
        "<|im_end|>",
        "user\n",
        "fn main() {",
        "}",
        "\u{a0}",
        "e\u{301}",
        "…",
        "ß",
        "\r\n",
        "0",
        "<|im_",
    ];
    let random = |rng: &mut fastrand::Rng| (0..rng.usize(1..12)).map(|_| pieces[rng.usize(..pieces.len())]).collect();
    let mut texts: Vec<String> = (0..3000).map(|_| random(&mut rng)).collect();
    // Whatever characters there are.
    texts.extend((0..3000).map(|_| (0..rng.usize(1..30)).map(|_| rng.char(..)).collect::<String>()));
    for file in ["README.md", "docs/architecture.md", "src/model/config.rs", "examples/speller/train.py"] {
        texts.push(fs::read_to_string(support::root().join(file)).unwrap());
    }
    let mut count = 0;
    for text in &texts {
        let [expected, found] = [&of_json, &of_file].map(|tokenizer| tokenizer.encode(text).unwrap());
        assert_eq!(found, expected, "{text:?}");
        assert_eq!(of_file.decode(&found).unwrap(), of_json.decode(&expected).unwrap());
        count += found.len();
    }
    println!("{} texts, {count} tokens", texts.len());
    let messages = [crate::text::Message::new("user", "Who are you?")];
    let [expected, found] =
        [&of_json, &of_file].map(|text| text.template().unwrap().unwrap().render(&messages, None).unwrap());
    assert_eq!(found, expected);
    assert_eq!(of_file.end_of_turn(), of_json.end_of_turn());
}
