//! What the tuner answers on machines that are simulated: workers whose pass takes as long as a machine would take for the
//! placement that they are given.

use serde::{Deserialize, Serialize};

use super::*;
use crate::plan::FixedOverhead;

/// A machine, and what the planner knows of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Machine {
    /// How many units there are, and their size in parts of 128 KiB.
    units: usize,
    parts: usize,
    /// As in [`Costs`].
    costs: [f64; 7],
    /// How far a process and a run may take longer, relatively.
    noise: f64,
    /// What the planner is told.
    told: Bandwidths,
    /// On the device and in RAM, in units.
    budget: [usize; 2],
}

impl Machine {
    fn units(&self, file: &Path) -> (Checkpoint, Vec<Unit>) {
        units(file, &vec![self.parts; self.units])
    }

    fn bytes(&self) -> usize {
        self.parts * PART
    }

    /// Seconds of a pass, without noise.
    fn pass(&self, plan: &Plan) -> f64 {
        Line::new(plan, 4, 0.0).pass(Costs(self.costs))
    }

    fn candidates(&self, file: &Path) -> Candidates {
        let (checkpoint, units) = self.units(file);
        // A little more than the units, as slots are rounded to pages.
        let [device_bytes, host_bytes] = self.budget.map(|count| count * (self.bytes() + 8192));
        let budget = Budget { device_bytes: Some(device_bytes), host_bytes };
        let candidate = |placement: Placement| {
            let mut units = units.clone();
            placement.apply_to(&mut units)?;
            let plan = Some(Plan::new(&checkpoint, &units, &placement.settings, Sharing::Own)?);
            Ok::<_, Error>(Candidate { plan, ..placement.into() })
        };
        let default = budget.plan(&checkpoint, &units, FixedOverhead::default(), self.told).unwrap();
        let values =
            Values { n_gpu: vec![1, 2], n_cpu_pinned: vec![0, 1, 2, 4, 8], n_cpu: vec![0, 1, 2], ..Values::default() };
        Candidates::new(candidate(default).unwrap(), &values, |settings| {
            candidate(budget.plan_with(&checkpoint, &units, FixedOverhead::default(), self.told, settings)?)
        })
        .unwrap()
    }

    /// The tuner's answer, and seconds of a pass with the default, with the answer and with the best there is.
    fn answer(&self, by_plan: bool) -> (Answer, [f64; 3]) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let candidates = self.candidates(file.path());
        println!("{} candidates, {} do not fit", candidates.all.len(), candidates.refused.len());
        let pass = |candidate: &Candidate| self.pass(candidate.plan.as_ref().unwrap());
        let default = pass(&candidates.all[0]);
        let best = candidates.all.iter().map(pass).fold(f64::INFINITY, f64::min);
        let arguments = ["--exact", "tuner::tests::machines::worker_on_a_machine"].map(OsString::from);
        let machine = serde_json::to_string(self).unwrap();
        let tuner = Tuner {
            candidates: candidates.all.clone(),
            search: if by_plan { Search::Plan { bandwidths: self.told } } else { Search::Grid },
            arguments: Some(arguments.into_iter().chain([machine.into(), file.path().into()]).collect()),
            patience: Duration::from_secs(60),
            ..Tuner::default()
        };
        let ranking = ranking(&tuner);
        let answer = ranking.answer.unwrap();
        let found = candidates.all.iter().find(|candidate| candidate.placement == answer.placement).map(pass).unwrap();
        println!(
            "default {:?} keeps {}: {default:.4} s; answer {:?} keeps {}: {found:.4} s, {:?}; best {best:.4} s; {} tried",
            candidates.all[0].placement.settings,
            candidates.all[0].placement.kept(),
            answer.placement.settings,
            answer.placement.kept(),
            answer.verdict,
            ranking.trials.len(),
        );
        (answer, [default, found, best])
    }
}

/// No test, but what the tests start again: a worker on a machine, which is its last argument but one.
#[test]
fn worker_on_a_machine() {
    let setup = |placement: Placement| {
        let mut arguments = env::args().rev();
        let file = arguments.next().unwrap();
        let machine: Machine = serde_json::from_str(&arguments.next().unwrap()).unwrap();
        let (checkpoint, mut units) = machine.units(Path::new(&file));
        placement.apply_to(&mut units)?;
        let seconds = machine.pass(&Plan::new(&checkpoint, &units, &placement.settings, Sharing::Own)?);
        let longer = move || 1.0 + machine.noise * fastrand::f64();
        let seconds = seconds * longer();
        Ok::<_, Error>(move || seconds * longer())
    };
    // By the machine's own clock, whatever else runs here.
    super::worker::worker_by(setup, |pass| Ok(pass()));
}

/// A link that, as far as the planner was told, carries what it gets at once, and in truth takes as long as the disk: there is
/// room for two units in RAM, of which the planner keeps one and reads into the other, in turn with the copies.
fn slow_link() -> Machine {
    let unit = (64 * PART) as f64;
    let costs = [6e-3 / unit, 1e-3 / unit, 6e-3 / unit, 2e-3, 0.02, 0.05, 1e-4];
    Machine {
        units: 8,
        parts: 64,
        costs,
        noise: 0.0,
        told: Bandwidths { disk: unit / 6e-3, copy: 1e12 },
        budget: [2, 2],
    }
}

/// A disk that is far away: bytes come fast, but long after they are asked for. Only many reads under way fill the line, which
/// takes slots from the units that the planner would keep.
fn far_disk() -> Machine {
    let unit = (64 * PART) as f64;
    let costs = [2e-3 / unit, 1e-3 / unit, 0.3e-3 / unit, 2e-3, 0.02, 0.05, 12e-3];
    Machine {
        units: 24,
        parts: 64,
        costs,
        noise: 0.0,
        told: Bandwidths { disk: unit / 2e-3, copy: unit / 0.3e-3 },
        budget: [3, 11],
    }
}

#[test]
fn where_the_default_is_wrong_the_answer_has_the_gain() {
    for (name, machine) in [("a slow link", slow_link()), ("a disk far away", far_disk())] {
        for by_plan in [false, true] {
            println!("{name}, by plan: {by_plan}");
            let (answer, [default, found, best]) = machine.answer(by_plan);
            assert!(default > 1.2 * best, "{name}: the default is right");
            assert!(default - found >= 0.9 * (default - best), "{name}: {answer:?}");
            assert!(matches!(answer.verdict, Comparison::Faster { .. }), "{answer:?}");
        }
    }
}

#[test]
fn where_nothing_is_better_noise_does_not_make_it_so() {
    // As the planner was told, and one whose layer function takes most of the time, so that all are alike.
    let near = |compute: f64| {
        let [disk, pin, copy, _, uneven, in_the_way, _] = far_disk().costs;
        Machine { costs: [disk, pin, copy, compute, uneven, in_the_way, 1e-5], ..far_disk() }
    };
    let [right, alike] = [2e-3, 0.08].map(near);
    for machine in [right, alike].map(|machine| Machine { noise: 0.2, ..machine }) {
        let (answer, [default, found, _]) = machine.answer(false);
        assert!(found <= 1.03 * default, "{found} s, not {default} s: {answer:?}");
    }
}
