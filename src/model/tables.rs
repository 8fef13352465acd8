//! Where the embedding table and the output head are kept. They are most of a small model's bytes, and gigabytes of a large one's.

use std::str::FromStr;

use crate::error::{Error, Result};

/// Where the embedding table and the output head are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tables {
    /// Both on the device.
    #[default]
    OnDevice,
    /// The embedding table stays in its file, from which each pass reads its tokens' rows. The head is on the device; where the
    /// two are one tensor, so is that.
    EmbeddingInFile,
    /// The same, and the head is streamed after the layers, as units that are no larger than these and have tiers as they do.
    /// The pass itself then finds its sequences' next tokens; all tokens' logits take passes of their own.
    HeadStreamed,
}

impl Tables {
    /// Of equally fast ones the first is taken.
    pub(super) const ALL: [Self; 3] = [Self::OnDevice, Self::EmbeddingInFile, Self::HeadStreamed];

    /// `on-device`, `embedding-in-file` or `head-streamed`.
    pub fn word(self) -> &'static str {
        match self {
            Self::OnDevice => "on-device",
            Self::EmbeddingInFile => "embedding-in-file",
            Self::HeadStreamed => "head-streamed",
        }
    }

    pub(super) fn reads_rows(self) -> bool {
        self != Self::OnDevice
    }

    pub(super) fn streams_head(self) -> bool {
        self == Self::HeadStreamed
    }
}

impl FromStr for Tables {
    type Err = Error;

    /// From its [`word`](Self::word).
    ///
    /// # Errors
    /// [`Error::Setting`] for any other.
    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|tables| tables.word() == text);
        let known = Self::ALL.map(Self::word).join(", ");
        found.ok_or_else(|| Error::setting("tables", format!("there is no way called {text:?}, but {known}")))
    }
}
