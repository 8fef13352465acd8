//! All that decides how a stream runs, in one value that can be kept in a file.

use serde::{Deserialize, Serialize};

use super::{Home, Settings, Unit};
use crate::error::{Error, Result};

/// What a planner decides: how deep the rings are, and where each unit is kept between passes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Placement {
    /// The rings, and how files are read.
    pub settings: Settings,
    /// Where the units live between passes, in their order.
    pub homes: Vec<Home>,
    /// How the host keeps its static tensors, in a word of the host's; empty if there is only one way. The pipeline does not
    /// read it. A decoder's words are those of [`Tables`](crate::model::Tables).
    pub statics: String,
}

/// As it is stored: the homes as a list of ranges, which stays short.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    settings: Settings,
    units: usize,
    homes: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    statics: String,
}

/// The most units that a stored placement may have: far more than any model, so that a broken file does not take all memory.
const MOST_UNITS: usize = 1 << 20;

impl From<Placement> for Stored {
    fn from(placement: Placement) -> Self {
        let homes = placement.list();
        Self { settings: placement.settings, units: placement.homes.len(), homes, statics: placement.statics }
    }
}

impl TryFrom<Stored> for Placement {
    type Error = Error;

    fn try_from(stored: Stored) -> Result<Self> {
        if stored.units > MOST_UNITS {
            return Err(Error::setting("placement", format!("is for {} units, more than any model has", stored.units)));
        }
        let placement = Self::new(stored.settings, stored.units, &stored.homes)?;
        Ok(Self { statics: stored.statics, ..placement })
    }
}

impl Placement {
    /// Of so many units, with homes from a text such as `0-7=pinned,8-11=gpu`, as [`Home::parse`] takes it; those that it does
    /// not name live on disk.
    ///
    /// # Errors
    /// [`Error::Setting`] for settings that cannot work, and as [`Home::parse`].
    pub fn new(settings: Settings, units: usize, homes: &str) -> Result<Self> {
        settings.validate()?;
        let mut placed = vec![Home::Disk; units];
        Home::assign(homes, &mut placed, |place, home| *place = home)?;
        Ok(Self { settings, homes: placed, statics: String::new() })
    }

    /// The homes as [`new`](Self::new) takes them, such as `0-7=pinned,8-11=gpu`; empty if all units live on disk.
    pub fn list(&self) -> String {
        let mut runs = Vec::<(usize, usize, Home)>::new();
        for (number, &home) in self.homes.iter().enumerate() {
            match runs.last_mut() {
                Some((_, last, before)) if *before == home => *last = number,
                _ => runs.push((number, number, home)),
            }
        }
        let kept = runs.iter().filter(|(.., home)| *home != Home::Disk);
        let texts = kept.map(|&(first, last, home)| match first == last {
            true => format!("{first}={}", home.word()),
            false => format!("{first}-{last}={}", home.word()),
        });
        texts.collect::<Vec<_>>().join(",")
    }

    /// Gives the units their homes.
    ///
    /// # Errors
    /// [`Error::Setting`] if this was made for another number of units.
    pub fn apply_to(&self, units: &mut [Unit]) -> Result<()> {
        self.check_count(units.len())?;
        units.iter_mut().zip(&self.homes).for_each(|(unit, home)| _ = unit.home(*home));
        Ok(())
    }

    /// Checks that it is for so many units.
    pub(crate) fn check_count(&self, units: usize) -> Result<()> {
        if self.homes.len() == units {
            return Ok(());
        }
        let cause = format!("is for {} units, there are {units}; make one for this checkpoint", self.homes.len());
        Err(Error::setting("placement", cause))
    }

    /// How many units are not read in every pass.
    pub fn kept(&self) -> usize {
        self.homes.iter().filter(|home| **home != Home::Disk).count()
    }

    /// The same but for settings that make no difference: rings through which nothing goes once all units are in their homes
    /// are as short as can be. Two placements that come to the same run alike.
    pub(crate) fn essence(&self) -> Self {
        let mut same = self.clone();
        let some = |home: Home| self.homes.contains(&home);
        let settings = &mut same.settings;
        if !some(Home::Disk) && !some(Home::Ram) {
            // Nothing is read or pinned.
            (settings.n_cpu, settings.batch_cpu, settings.n_cpu_pinned, settings.batch_cpu_pinned) = (0, 0, 0, 0);
            if !some(Home::Pinned) {
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
            let homes = (0..1 + rng.usize(..12)).map(|_| Home::ALL[rng.usize(..4)]).collect();
            let settings = Settings { n_gpu: 1 + rng.usize(..3), ..Settings::default() };
            let placement = Placement { settings, homes, statics: ["", "in-file"][rng.usize(..2)].into() };
            let text = serde_json::to_string(&placement).unwrap();
            assert_eq!(serde_json::from_str::<Placement>(&text).unwrap(), placement, "{text}");
            let mut units = vec![Unit::new("unit"); placement.homes.len()];
            placement.apply_to(&mut units).unwrap();
            assert!(units.iter().zip(&placement.homes).all(|(unit, home)| unit.home == *home));
            units.push(Unit::new("one more"));
            let said = placement.apply_to(&mut units).unwrap_err().to_string();
            assert!(said.contains(&format!("there are {}; make one", units.len())), "{said}");
        }
        let text = |units: usize, homes: &str, n_gpu: usize| {
            format!("{{\"settings\":{{\"n_gpu\":{n_gpu}}},\"units\":{units},\"homes\":\"{homes}\"}}")
        };
        assert_eq!(serde_json::from_str::<Placement>(&text(3, "1-2=gpu", 1)).unwrap().list(), "1-2=gpu");
        for (wrong, cause) in [
            (text(3, "3=gpu", 1), "there are 3 units"),
            (text(3, "1=attic", 1), "HOME being disk, ram, pinned or gpu"),
            (text(3, "", 0), "n_gpu: must be at least 1"),
            (text(usize::MAX, "", 1), "more than any model has"),
        ] {
            let said = serde_json::from_str::<Placement>(&wrong).unwrap_err().to_string();
            assert!(said.contains(cause), "{said}");
        }
    }

    #[test]
    fn rings_through_which_nothing_goes_make_no_difference() {
        let of = |homes: &str, [n_gpu, n_cpu_pinned, n_cpu]: [usize; 3]| {
            let settings = Settings { n_gpu, n_cpu_pinned, n_cpu, ..Settings::default() };
            Placement::new(settings, 4, homes).unwrap().essence()
        };
        assert_eq!(of("0-3=gpu", [1, 2, 0]), of("0-3=gpu", [4, 0, 2]));
        assert_eq!(of("0=gpu,1-3=pinned", [2, 2, 0]), of("0=gpu,1-3=pinned", [2, 0, 2]));
        assert_ne!(of("0=gpu,1-3=pinned", [1, 2, 0]), of("0=gpu,1-3=pinned", [2, 2, 0]));
        assert_ne!(of("0-2=gpu", [1, 2, 0]), of("0-2=gpu", [1, 1, 0]));
        assert_ne!(of("0-2=gpu,3=ram", [1, 2, 0]), of("0-2=gpu,3=ram", [1, 1, 0]));
    }
}
