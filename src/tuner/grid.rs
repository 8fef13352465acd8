//! From lists of values to the configurations that can differ.

use crate::{
    error::{Error, Result},
    plan::Settings,
};

/// Gives a setting a value.
type Set = fn(&mut Settings, usize);

/// The values to try, setting by setting; every combination is a configuration. They mean what they mean in [`Settings`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Values {
    /// Units buffered ahead on the device.
    pub n_gpu: Vec<usize>,
    /// Units buffered in pinned RAM.
    pub n_cpu_pinned: Vec<usize>,
    /// Units buffered in pageable RAM.
    pub n_cpu: Vec<usize>,
    /// Units handed over at once from the device's buffer; what is more than the buffer holds means all of it.
    pub batch_gpu: Vec<usize>,
    /// The same from pinned RAM.
    pub batch_cpu_pinned: Vec<usize>,
    /// The same from pageable RAM.
    pub batch_cpu: Vec<usize>,
}

impl Default for Values {
    /// The default settings alone.
    fn default() -> Self {
        let usual = Settings::default();
        Self {
            n_gpu: vec![usual.n_gpu],
            n_cpu_pinned: vec![usual.n_cpu_pinned],
            n_cpu: vec![usual.n_cpu],
            batch_gpu: vec![usual.batch_gpu],
            batch_cpu_pinned: vec![usual.batch_cpu_pinned],
            batch_cpu: vec![usual.batch_cpu],
        }
    }
}

impl Values {
    /// Checks that there are values for each setting, and that each may work with some of the others.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the setting and the value.
    pub fn validate(&self) -> Result<()> {
        let usual = Settings::default();
        let lists: [(&'static str, &[usize], Set); 6] = [
            ("n_gpu", &self.n_gpu, |settings, n| settings.n_gpu = n),
            ("n_cpu_pinned", &self.n_cpu_pinned, |settings, n| settings.n_cpu_pinned = n),
            ("n_cpu", &self.n_cpu, |settings, n| settings.n_cpu = n),
            // A batch above its ring is a full ring.
            ("batch_gpu", &self.batch_gpu, |_, _| ()),
            ("batch_cpu_pinned", &self.batch_cpu_pinned, |_, _| ()),
            ("batch_cpu", &self.batch_cpu, |_, _| ()),
        ];
        for (name, values, set) in lists {
            if values.is_empty() {
                return Err(Error::setting(name, "has no value to try; give at least one"));
            }
            for &value in values {
                let mut settings = usual.clone();
                set(&mut settings, value);
                settings.validate()?;
            }
        }
        Ok(())
    }

    /// The configurations that can differ, in the order of the lists, the last of which varies fastest. A batch of a stage that
    /// is skipped is none, a batch of one is handing over one by one, and a batch above its ring is a full ring.
    pub fn configurations(&self, common: &Settings) -> Vec<Settings> {
        let mut all = vec![common.clone()];
        let mut vary = |values: &[usize], set: fn(&mut Settings, usize)| {
            let with = |settings: &Settings, value: usize| {
                let mut settings = settings.clone();
                set(&mut settings, value);
                settings
            };
            all = all.iter().flat_map(|settings| values.iter().map(move |&value| with(settings, value))).collect();
        };
        vary(&self.n_gpu, |settings, n| settings.n_gpu = n);
        vary(&self.n_cpu_pinned, |settings, n| settings.n_cpu_pinned = n);
        vary(&self.n_cpu, |settings, n| settings.n_cpu = n);
        vary(&self.batch_gpu, |settings, batch| settings.batch_gpu = handed_over(batch, settings.n_gpu));
        vary(&self.batch_cpu_pinned, |settings, batch| {
            settings.batch_cpu_pinned = handed_over(batch, settings.n_cpu_pinned)
        });
        vary(&self.batch_cpu, |settings, batch| settings.batch_cpu = handed_over(batch, settings.n_cpu));
        let mut distinct = Vec::<Settings>::with_capacity(all.len());
        for settings in all {
            if !distinct.contains(&settings) {
                distinct.push(settings);
            }
        }
        distinct
    }
}

/// The batch that comes to the same in a ring of `n`: 0, or from 2 up to `n`.
fn handed_over(batch: usize, n: usize) -> usize {
    match batch.min(n) {
        1 => 0,
        batch => batch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short(settings: &Settings) -> [usize; 6] {
        let Settings { n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, .. } = *settings;
        [n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu]
    }

    #[test]
    fn configurations_that_cannot_differ_are_one() {
        let values = Values {
            n_gpu: vec![1, 2],
            n_cpu_pinned: vec![0, 3],
            n_cpu: vec![0],
            batch_gpu: vec![0, 1, 2],
            batch_cpu_pinned: vec![0, 2, 3, 9],
            batch_cpu: vec![0, 4],
        };
        let found: Vec<_> = values.configurations(&Settings::default()).iter().map(short).collect();
        let expected = [
            [1, 0, 0, 0, 0, 0],
            [1, 3, 0, 0, 0, 0],
            [1, 3, 0, 0, 2, 0],
            [1, 3, 0, 0, 3, 0],
            [2, 0, 0, 0, 0, 0],
            [2, 0, 0, 2, 0, 0],
            [2, 3, 0, 0, 0, 0],
            [2, 3, 0, 0, 2, 0],
            [2, 3, 0, 0, 3, 0],
            [2, 3, 0, 2, 0, 0],
            [2, 3, 0, 2, 2, 0],
            [2, 3, 0, 2, 3, 0],
        ];
        assert_eq!(found, expected);
        assert!(values.configurations(&Settings::default()).iter().all(|settings| settings.validate().is_ok()));
    }

    #[test]
    fn what_the_lists_leave_open_is_common_and_an_empty_list_leaves_no_configuration() {
        let common = Settings { reader: crate::plan::Reader::Pread, ..Settings::default() };
        assert_eq!(Values::default().configurations(&common), std::slice::from_ref(&common));
        assert!(Values { n_cpu: vec![], ..Values::default() }.configurations(&common).is_empty());
    }
}
