//! Texts that end an answer: the answer ends before them.

/// Passes on a text piece by piece, up to the first of these texts. What may yet become one is held back.
pub struct StopTexts {
    stops: Vec<String>,
    held: String,
}

impl StopTexts {
    /// None of `stops` is empty.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new() }
    }

    /// What of the text is certain now, and the text that ended it, if one did. Nothing is to follow that.
    pub fn push(&mut self, piece: &str) -> (String, Option<String>) {
        self.held.push_str(piece);
        let first = self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop))).min();
        if let Some((at, stop)) = first {
            let stop = stop.clone();
            self.held.truncate(at);
            return (self.rest(), Some(stop));
        }
        let may_stop = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let at = self.held.char_indices().map(|(at, _)| at).find(may_stop).unwrap_or(self.held.len());
        let held = self.held.split_off(at);
        (std::mem::replace(&mut self.held, held), None)
    }

    /// What was held back, where nothing follows.
    pub fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes out piece by piece, what is left, and the text that ended it.
    fn passed(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, Option<String>) {
        let mut texts = StopTexts::new(&stops.iter().map(ToString::to_string).collect::<Vec<_>>());
        let mut out = Vec::new();
        for piece in pieces {
            let (text, stop) = texts.push(piece);
            out.push(text);
            if stop.is_some() {
                return (out, texts.rest(), stop);
            }
        }
        (out, texts.rest(), None)
    }

    #[test]
    fn a_text_ends_before_the_first_stop_text_however_it_is_cut_into_pieces() {
        let text = "one two, é three";
        for stop in ["two", ", é", "é t", "three", "o"] {
            let expected = text.split(stop).next().unwrap();
            for cut in text.char_indices().map(|(at, _)| at) {
                let (out, rest, found) = passed(&[stop, "never"], &[&text[..cut], &text[cut..]]);
                assert_eq!(
                    (out.concat().as_str(), rest.as_str(), found.as_deref()),
                    (expected, "", Some(stop)),
                    "{cut}"
                );
            }
        }
        assert_eq!(passed(&["b", "ab"], &["xab"]).0, ["x"], "the one that begins first");
    }

    #[test]
    fn only_what_may_become_a_stop_text_is_held_back() {
        let (out, rest, found) = passed(&["###", "#!"], &["a#", "b##", "#c", "d#"]);
        assert_eq!((out.concat(), rest, found), ("a#b".into(), String::new(), Some("###".into())));
        let (out, rest, found) = passed(&["###"], &["a#", "b", "##"]);
        assert_eq!((out, rest, found), (vec!["a".into(), "#b".into(), String::new()], "##".into(), None));
    }
}
