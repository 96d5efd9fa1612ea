//! What came out, read from the output of the test programs; the matrix.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::test::{Tally, parse_summary};

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Passed,
    /// It failed.
    Failed,
}

/// What ran on one kernel.
#[derive(Debug)]
pub struct Report {
    /// Release of the kernel.
    pub kernel: String,
    /// Program and test, in the order in which they ran.
    pub outcomes: Vec<(String, Outcome)>,
    /// Tests that do not apply, and why.
    pub left_out: Vec<(String, String)>,
    /// How long it all took, one machine's time added to another's.
    pub seconds: u64,
    program: String,
    /// The test whose line has begun.
    begun: Option<String>,
    /// As the programs themselves count.
    summaries: Tally,
}

impl Report {
    /// Nothing yet.
    pub fn new(kernel: &str) -> Self {
        Self {
            kernel: kernel.to_owned(),
            outcomes: Vec::new(),
            left_out: Vec::new(),
            seconds: 0,
            program: String::new(),
            begun: None,
            summaries: Tally::default(),
        }
    }

    /// Reads a line of output. A test's own output may come between its name and its outcome.
    pub fn line(&mut self, line: &str) {
        if let Some(program) = line.strip_prefix("program ") {
            self.program = program.trim().to_owned();
            return;
        }
        if line.starts_with("test result: ") {
            self.summaries.add(parse_summary(line));
            return;
        }
        let rest = match line.strip_prefix("test ").and_then(|line| line.split_once(" ... ")) {
            Some((name, rest)) => {
                self.begun = Some(name.trim().to_owned());
                rest
            }
            None => line,
        };
        let outcome = match rest.trim() {
            "ok" => Outcome::Passed,
            "FAILED" => Outcome::Failed,
            _ => return,
        };
        if let Some(name) = self.begun.take() {
            self.outcomes.push((format!("{}::{name}", self.program), outcome));
        }
    }

    /// Adds what another machine with the same kernel has run.
    pub fn add(&mut self, part: Self) {
        self.outcomes.extend(part.outcomes);
        self.seconds += part.seconds;
        self.summaries.add(part.summaries);
        self.begun = self.begun.take().or(part.begun);
    }

    /// What was to run and has no outcome has failed.
    pub fn expect<'a>(&mut self, program: &str, tests: impl Iterator<Item = &'a String>) {
        for test in tests {
            let name = format!("{program}::{test}");
            if !self.outcomes.iter().any(|(ran, _)| *ran == name) {
                self.outcomes.push((name, Outcome::Failed));
            }
        }
    }

    /// Counts; a test whose outcome cannot be read makes a failure.
    pub fn tally(&self) -> Tally {
        let count = |wanted| {
            let found = self.outcomes.iter().filter(|(_, outcome)| *outcome == wanted).count();
            u64::try_from(found).unwrap_or(u64::MAX)
        };
        let (passed, mut failed) = (count(Outcome::Passed), count(Outcome::Failed));
        if self.summaries.passed > passed || self.summaries.failed > failed || self.begun.is_some() {
            failed += 1;
        }
        Tally { passed, failed, ignored: u64::try_from(self.left_out.len()).unwrap_or(u64::MAX) }
    }
}

/// All tests that ran against all kernels.
pub fn table(reports: &[Report]) -> String {
    let names: BTreeSet<_> =
        reports.iter().flat_map(|report| report.outcomes.iter().map(|(name, _)| name)).collect();
    let width = names.iter().map(|name| name.len()).max().unwrap_or(0);
    let mut text = format!("\n{:width$}", "test");
    for report in reports {
        text.push_str(&format!("  {}", report.kernel));
    }
    for name in names {
        text.push_str(&format!("\n{name:width$}"));
        for report in reports {
            let outcome = report.outcomes.iter().find(|(test, _)| test == name);
            let word = match outcome {
                Some((_, Outcome::Passed)) => "ok",
                Some((_, Outcome::Failed)) => "FAILED",
                None => "-",
            };
            text.push_str(&format!("  {word:>0$}", report.kernel.len()));
        }
    }
    text.push_str(&format!("\n{:width$}", "passed/failed/left out"));
    for report in reports {
        let tally = report.tally();
        let counts = format!("{}/{}/{}", tally.passed, tally.failed, tally.ignored);
        text.push_str(&format!("  {counts:>0$}", report.kernel.len()));
    }
    text.push('\n');
    text
}

/// The same for machines.
pub fn json(reports: &[Report]) -> Value {
    let kernels: Vec<_> = reports
        .iter()
        .map(|report| {
            let tally = report.tally();
            let tests: BTreeMap<_, _> = report
                .outcomes
                .iter()
                .map(|(name, outcome)| (name, if *outcome == Outcome::Passed { "ok" } else { "failed" }))
                .collect();
            let left_out: Vec<_> = report
                .left_out
                .iter()
                .map(|(test, reason)| json!({ "test": test, "reason": reason }))
                .collect();
            json!({
                "kernel": report.kernel, "passed": tally.passed, "failed": tally.failed,
                "seconds": report.seconds, "tests": tests, "left_out": left_out,
            })
        })
        .collect();
    json!({ "kernels": kernels })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_read_with_noise_between() {
        let mut report = Report::new("6.1");
        for line in [
            "program privileged",
            "running 3 tests",
            "test a::b ... ok",
            "test a::c ... 12 scenarios",
            "more",
            "ok",
            "test d/e ... FAILED",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
        ] {
            report.line(line);
        }
        assert_eq!(report.tally(), Tally { passed: 2, failed: 1, ignored: 0 });
        assert_eq!(report.outcomes[1], ("privileged::a::c".to_owned(), Outcome::Passed));
        assert!(table(&[report]).contains("2/1/0"));
    }

    #[test]
    fn parts_add_up() {
        let [mut first, mut second] = ["a", "b"].map(|test| {
            let mut report = Report::new("6.1");
            report.line("program privileged");
            report.line(&format!("test {test} ... ok"));
            report.line("test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 121 filtered out");
            report
        });
        second.line("test c ... thread panicked");
        first.add(second);
        assert_eq!(first.tally(), Tally { passed: 2, failed: 1, ignored: 0 });
    }

    #[test]
    fn a_test_that_has_not_run_is_a_failure() {
        let mut report = Report::new("6.1");
        report.line("program privileged");
        report.line("test a ... ok");
        report.expect("privileged", ["a".to_owned(), "b".to_owned()].iter());
        assert_eq!(report.tally(), Tally { passed: 1, failed: 1, ignored: 0 });
        assert_eq!(report.outcomes[1].0, "privileged::b");
    }

    #[test]
    fn an_outcome_that_is_missing_is_a_failure() {
        let mut report = Report::new("6.1");
        report.line("test a ... thread panicked");
        assert_eq!(report.tally().failed, 1);
        let mut report = Report::new("6.1");
        report.line("test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
        assert_eq!(report.tally().failed, 1);
    }
}
