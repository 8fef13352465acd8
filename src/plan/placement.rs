//! All that decides how a stream runs, in one value that can be kept in a file.

use serde::{Deserialize, Serialize};

use super::{Settings, Tier, Unit};
use crate::error::{Error, Result};

/// What a planner decides: how deep the rings are, and where each unit is kept between passes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Placement {
    /// The rings, and how files are read.
    pub settings: Settings,
    /// Where the units are kept between passes, in their order.
    pub tiers: Vec<Tier>,
    /// How the host keeps its static tensors, in a word of the host's; empty if there is only one way. The pipeline does not
    /// read it. A decoder's words are those of [`Tables`](crate::model::Tables).
    pub statics: String,
}

/// As it is stored: the tiers as a list of ranges, which stays short.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    settings: Settings,
    units: usize,
    tiers: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    statics: String,
}

/// The most units that a stored placement may have: far more than any model, so that a broken file does not take all memory.
const MOST_UNITS: usize = 1 << 20;

impl From<Placement> for Stored {
    fn from(placement: Placement) -> Self {
        let tiers = placement.list();
        Self { settings: placement.settings, units: placement.tiers.len(), tiers, statics: placement.statics }
    }
}

impl TryFrom<Stored> for Placement {
    type Error = Error;

    fn try_from(stored: Stored) -> Result<Self> {
        if stored.units > MOST_UNITS {
            return Err(Error::setting("placement", format!("is for {} units, more than any model has", stored.units)));
        }
        let placement = Self::new(stored.settings, stored.units, &stored.tiers)?;
        Ok(Self { statics: stored.statics, ..placement })
    }
}

impl Placement {
    /// Of so many units, with tiers from a text such as `0-7=pinned,8-11=gpu`, as [`Tier::parse`] takes it; those that it does
    /// not name stay on disk.
    ///
    /// # Errors
    /// [`Error::Setting`] for settings that cannot work, and as [`Tier::parse`].
    pub fn new(settings: Settings, units: usize, tiers: &str) -> Result<Self> {
        settings.validate()?;
        let mut placed = vec![Tier::Disk; units];
        Tier::assign(tiers, &mut placed, |place, tier| *place = tier)?;
        Ok(Self { settings, tiers: placed, statics: String::new() })
    }

    /// The tiers as [`new`](Self::new) takes them, such as `0-7=pinned,8-11=gpu`; empty if all units stay on disk.
    pub fn list(&self) -> String {
        let mut runs = Vec::<(usize, usize, Tier)>::new();
        for (number, &tier) in self.tiers.iter().enumerate() {
            match runs.last_mut() {
                Some((_, last, before)) if *before == tier => *last = number,
                _ => runs.push((number, number, tier)),
            }
        }
        let kept = runs.iter().filter(|(.., tier)| *tier != Tier::Disk);
        let texts = kept.map(|&(first, last, tier)| match first == last {
            true => format!("{first}={}", tier.word()),
            false => format!("{first}-{last}={}", tier.word()),
        });
        texts.collect::<Vec<_>>().join(",")
    }

    /// Gives the units their tiers.
    ///
    /// # Errors
    /// [`Error::Setting`] if this was made for another number of units.
    pub fn apply_to(&self, units: &mut [Unit]) -> Result<()> {
        self.check_count(units.len())?;
        units.iter_mut().zip(&self.tiers).for_each(|(unit, tier)| _ = unit.set_tier(*tier));
        Ok(())
    }

    /// Checks that it is for so many units.
    pub(crate) fn check_count(&self, units: usize) -> Result<()> {
        if self.tiers.len() == units {
            return Ok(());
        }
        let cause = format!("is for {} units, there are {units}; make one for this checkpoint", self.tiers.len());
        Err(Error::setting("placement", cause))
    }

    /// How many units are not read in every pass.
    pub fn kept(&self) -> usize {
        self.tiers.iter().filter(|tier| **tier != Tier::Disk).count()
    }

    /// The same but for settings that make no difference: rings through which nothing goes once all kept units are filled
    /// are as short as can be. Two placements that come to the same run alike.
    #[cfg(any(test, feature = "tuner"))]
    pub(crate) fn essence(&self) -> Self {
        let mut same = self.clone();
        let some = |tier: Tier| self.tiers.contains(&tier);
        let settings = &mut same.settings;
        if !some(Tier::Disk) && !some(Tier::Ram) && !some(Tier::PinnedPacked) {
            // Nothing is read or pinned.
            (settings.n_cpu, settings.batch_cpu, settings.n_cpu_pinned, settings.batch_cpu_pinned) = (0, 0, 0, 0);
            if !some(Tier::Pinned) && !some(Tier::GpuPacked) {
                (settings.n_gpu, settings.batch_gpu) = (1, 0);
            }
        }
        same
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_comes_back_as_it_was_stored_and_what_it_does_not_suit_is_refused() {
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..100 {
            let tiers = (0..1 + rng.usize(..12)).map(|_| Tier::ALL[rng.usize(..6)]).collect();
            let settings = Settings { n_gpu: 1 + rng.usize(..3), ..Settings::default() };
            let placement = Placement { settings, tiers, statics: ["", "in-file"][rng.usize(..2)].into() };
            let text = serde_json::to_string(&placement).unwrap();
            assert_eq!(serde_json::from_str::<Placement>(&text).unwrap(), placement, "{text}");
            let mut units = vec![Unit::new("unit"); placement.tiers.len()];
            placement.apply_to(&mut units).unwrap();
            assert!(units.iter().zip(&placement.tiers).all(|(unit, tier)| unit.tier == *tier));
            units.push(Unit::new("one more"));
            let said = placement.apply_to(&mut units).unwrap_err().to_string();
            assert!(said.contains(&format!("there are {}; make one", units.len())), "{said}");
        }
        let text = |units: usize, tiers: &str, n_gpu: usize| {
            format!("{{\"settings\":{{\"n_gpu\":{n_gpu}}},\"units\":{units},\"tiers\":\"{tiers}\"}}")
        };
        assert_eq!(serde_json::from_str::<Placement>(&text(3, "1-2=gpu", 1)).unwrap().list(), "1-2=gpu");
        for (wrong, cause) in [
            (text(3, "3=gpu", 1), "there are 3 units"),
            (text(3, "1=attic", 1), "TIER being disk, ram, pinned, gpu, gpu-packed or pinned-packed"),
            (text(3, "", 0), "n_gpu: must be at least 1"),
            (text(usize::MAX, "", 1), "more than any model has"),
        ] {
            let said = serde_json::from_str::<Placement>(&wrong).unwrap_err().to_string();
            assert!(said.contains(cause), "{said}");
        }
    }

    #[test]
    fn rings_through_which_nothing_goes_make_no_difference() {
        let of = |tiers: &str, [n_gpu, n_cpu_pinned, n_cpu]: [usize; 3]| {
            let settings = Settings { n_gpu, n_cpu_pinned, n_cpu, ..Settings::default() };
            Placement::new(settings, 4, tiers).unwrap().essence()
        };
        assert_eq!(of("0-3=gpu", [1, 2, 0]), of("0-3=gpu", [4, 0, 2]));
        assert_eq!(of("0=gpu,1-3=pinned", [2, 2, 0]), of("0=gpu,1-3=pinned", [2, 0, 2]));
        assert_ne!(of("0=gpu,1-3=pinned", [1, 2, 0]), of("0=gpu,1-3=pinned", [2, 2, 0]));
        assert_eq!(of("0=gpu,1-3=gpu-packed", [1, 2, 0]), of("0=gpu,1-3=gpu-packed", [1, 0, 2]));
        assert_ne!(of("0=gpu,1-3=gpu-packed", [1, 2, 0]), of("0=gpu,1-3=gpu-packed", [2, 2, 0]));
        assert_ne!(of("0-2=gpu", [1, 2, 0]), of("0-2=gpu", [1, 1, 0]));
        assert_ne!(of("0-2=gpu,3=ram", [1, 2, 0]), of("0-2=gpu,3=ram", [1, 1, 0]));
    }
}
