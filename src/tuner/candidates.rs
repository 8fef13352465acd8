//! What a search tries: the default, and the best placement with each combination of the values.

use super::Values;
use crate::{
    error::Result,
    plan::{Part, Placement, Plan, Settings},
};

/// A way to run.
#[derive(Clone, Debug, Default)]
pub struct Candidate {
    /// The rings, and where units are kept.
    pub placement: Placement,
    /// What the streamer will do. A search by plan forecasts from it; others can do without.
    pub plan: Option<Plan>,
    /// What memory it takes, for the record.
    pub memory: Vec<Part>,
}

impl From<Placement> for Candidate {
    fn from(placement: Placement) -> Self {
        Self { placement, ..Self::default() }
    }
}

/// Settings that are not tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The settings.
    pub settings: Settings,
    /// Why not: for the most part since they do not fit into the budget.
    pub reason: String,
}

/// The candidates of a search, no two of which run alike.
#[derive(Clone, Debug)]
pub struct Candidates {
    /// The first is the default: what the planner chooses by itself.
    pub all: Vec<Candidate>,
    /// Combinations of values that are left out.
    pub refused: Vec<Refusal>,
}

impl Candidates {
    /// The default, and for each combination of the values what `fit` makes of it: the placement that is fastest with these
    /// settings within the budget. Those that `fit` refuses are left out, and those that run as one before them does.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for a value with which no combination could work.
    pub fn new(
        default: Candidate,
        values: &Values,
        mut fit: impl FnMut(&Settings) -> Result<Candidate>,
    ) -> Result<Self> {
        values.validate()?;
        let combinations = values.configurations(&default.placement.settings);
        let mut known = vec![default.placement.essence()];
        let (mut all, mut refused) = (vec![default], Vec::new());
        for settings in combinations {
            match fit(&settings) {
                Ok(candidate) if known.contains(&candidate.placement.essence()) => {}
                Ok(candidate) => {
                    known.push(candidate.placement.essence());
                    all.push(candidate);
                }
                Err(error) => refused.push(Refusal { settings, reason: error.to_string() }),
            }
        }
        Ok(Self { all, refused })
    }
}
