// SPDX-License-Identifier: GPL-2.0-or-later
//! How conversions of several vCPUs at once scale: in time, subjects in turn, so that what else the
//! machine does strikes all of them alike.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::level1::{Task, memory_for, quote};

use super::Bench;
use super::plan::{MAIN, Measurement};
use super::report::RATIO;
use super::rows::{Line, Row};

/// How often each subject runs with each number of vCPUs.
const ROUNDS: usize = 3;
const CPUS: [u32; 3] = [1, 2, 4];
const SUBJECTS: [(&str, &str); 2] = [("floor", ""), MAIN];

/// Time per page by row, subject and number of vCPUs.
type Times = BTreeMap<(String, usize, u32), Vec<f64>>;

pub(super) fn measure(
    bench: &Bench,
    measurement: &Measurement,
    limit: Duration,
) -> Result<Vec<Row>> {
    let task = Task {
        name: measurement.name(),
        script: script(measurement),
        memory: memory_for(0),
        limit: Some(limit),
        programs: vec![bench.floor.clone()],
        log: Some("bench-scale".to_owned()),
        in_place: Some(false),
        ..Task::default()
    };
    let mut times = Times::new();
    let mut now = None;
    let mut last = String::new();
    let status = bench.lab.run(bench.ctx, &task, |line| {
        now = of_whom(line).or(now);
        if let (Some((subject, cpus)), Some(line)) = (now, Line::parse(line)) {
            let times = times.entry((line.row.clone(), subject, cpus)).or_default();
            times.push(line.mean / line.units);
        }
        line.clone_into(&mut last);
    })?;
    ensure!(status == 0, "exit status {status}: {last}");
    rows(&times)
}

/// All runs, each after a line that says whose it is.
fn script(measurement: &Measurement) -> String {
    let mut script = "set -e\n".to_owned();
    for _ in 0..ROUNDS {
        for cpus in CPUS {
            for (index, subject) in SUBJECTS.into_iter().enumerate() {
                let mut words = measurement.with(subject).words();
                words.extend(["--cpus".to_owned(), cpus.to_string()]);
                script += &format!("echo '# next {index} {cpus}'\n{}\n", quote(words));
            }
        }
    }
    script
}

fn of_whom(line: &str) -> Option<(usize, u32)> {
    let (subject, cpus) = line.trim().strip_prefix("# next ")?.split_once(' ')?;
    Some((subject.parse().ok()?, cpus.parse().ok()?))
}

/// How many times as much several vCPUs get done as one does. The shortest time counts: what else the
/// machine does can only add to it.
fn rows(times: &Times) -> Result<Vec<Row>> {
    let best: BTreeMap<_, f64> = times
        .iter()
        .filter_map(|(key, times)| Some((key.clone(), times.iter().copied().reduce(f64::min)?)))
        .collect();
    let of_several = best.iter().filter(|((_, _, cpus), _)| *cpus > 1);
    of_several
        .map(|((row, subject, cpus), time)| {
            let one = best.get(&(row.clone(), *subject, 1));
            let one = one.with_context(|| format!("{row} was not measured with one vCPU"))?;
            let (subject, variant) = *SUBJECTS.get(*subject).context("an unknown subject")?;
            Ok(Row {
                row: format!("{row}-{cpus}"),
                subject: subject.to_owned(),
                variant: variant.to_owned(),
                value: (one / time * 1000.0).round() / 1000.0,
                unit: RATIO.to_owned(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_as_much_by_two() {
        let key = |cpus| ("scale-4k".to_owned(), 1, cpus);
        let times = Times::from([
            (key(1), vec![90.0, 10.0, 12.0]),
            (key(2), vec![6.0, 5.0, 30.0]),
        ]);
        let rows = rows(&times).expect("rows");
        assert_eq!((rows[0].row.as_str(), rows[0].value), ("scale-4k-2", 2.0));
        assert_eq!(rows[0].subject, "ours");
    }

    #[test]
    fn a_line_says_whose_run_follows() {
        assert_eq!(of_whom("# next 1 4"), Some((1, 4)));
        assert_eq!(of_whom("# bench=scale started"), None);
    }
}
