//! Which tests run in which virtual machine.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::exceptions;
use crate::process::output;

/// A test program, and those of its tests that are asked for.
#[derive(Debug)]
pub struct Program {
    /// Name of its target.
    pub name: &'static str,
    path: PathBuf,
    /// All of its privileged tests.
    all: Vec<String>,
    /// Those that are asked for.
    tests: Vec<String>,
}

impl Program {
    /// Asks a program for its privileged tests. Asked for are those whose names contain one of the filters; without any, all.
    pub fn list(name: &'static str, path: &Path, filters: &[&str]) -> Result<Self> {
        let listed = output(Command::new(path).args(["--ignored", "--list", "--format", "terse"]))?;
        let test = |line: &str| {
            let test = line.strip_suffix(": test");
            Ok(test.with_context(|| format!("{name} lists a test as {line:?}"))?.to_owned())
        };
        let all: Vec<String> = listed.lines().map(test).collect::<Result<_>>()?;
        let asked = |test: &&String| filters.is_empty() || filters.iter().any(|filter| test.contains(filter));
        let tests = all.iter().filter(asked).cloned().collect();
        Ok(Self { name, path: path.to_owned(), all, tests })
    }

    /// Whether no test is asked for.
    pub fn is_empty(&self) -> bool {
        self.tests.is_empty()
    }

    /// The asked-for tests that apply to a kernel.
    pub fn applying(&self, version: (u32, u32)) -> impl Iterator<Item = &String> {
        self.tests.iter().filter(move |test| self.exception(test, version).is_none())
    }

    fn exception(&self, test: &str, version: (u32, u32)) -> Option<&'static exceptions::Exception> {
        exceptions::of(self.name, version).find(|exception| test.contains(exception.test))
    }
}

/// The asked-for tests that do not apply to a kernel, and why.
pub fn left_out(programs: &[Program], version: (u32, u32)) -> Vec<(String, String)> {
    let of_one = |program: &Program| {
        let pairs = program.tests.iter().filter_map(|test| {
            let exception = program.exception(test, version)?;
            Some((format!("{}::{test}", program.name), exception.reason.to_owned()))
        });
        pairs.collect::<Vec<_>>()
    };
    programs.iter().flat_map(of_one).collect()
}

/// What machines of one kernel run, as shell scripts: so many that each gets every so-manieth of the tests that apply,
/// so that they end at about the same time; fewer when there are not enough tests.
pub fn scripts(programs: &[Program], version: (u32, u32), machines: usize) -> Vec<String> {
    let script = |machine| {
        let mut script = String::new();
        for program in programs {
            let share: BTreeSet<_> = program.applying(version).skip(machine).step_by(machines).collect();
            if share.is_empty() {
                continue;
            }
            // By what they leave out, since not every harness takes several names.
            let others = program.all.iter().filter(|test| !share.contains(test));
            let skips: String = others.map(|test| format!(" --skip '{test}'")).collect();
            // One at a time: an emulated machine gains nothing by more, and their output stays in order.
            script.push_str(&format!(
                "echo 'program {}'; '{}' --ignored --nocapture --test-threads=1 --exact{skips} || result=1\n",
                program.name,
                program.path.display(),
            ));
        }
        (!script.is_empty()).then(|| format!("result=0\n{script}exit $result\n"))
    };
    (0..machines).filter_map(script).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: (u32, u32) = (5, 10);
    const NEW: (u32, u32) = (6, 18);

    fn programs(tests: &[&str]) -> Vec<Program> {
        let tests: Vec<_> = tests.iter().map(|test| (*test).to_owned()).collect();
        let all = tests.iter().cloned().chain(["not asked for".to_owned()]).collect();
        vec![Program { name: "privileged", path: "/bin/p".into(), all, tests }]
    }

    #[test]
    fn each_test_that_applies_runs_on_one_machine() {
        let programs = programs(&["a", "merged::b", "c", "d"]);
        // All but those that a script leaves out.
        let runs = |version, test: &str| {
            let scripts = scripts(&programs, version, 2);
            assert_eq!(scripts.len(), 2);
            scripts.iter().filter(|script| !script.contains(&format!(" --skip '{test}'"))).count()
        };
        for test in ["a", "merged::b", "c", "d"] {
            assert_eq!(runs(NEW, test), 1, "{test}");
        }
        assert_eq!(runs(NEW, "not asked for"), 0);
        assert_eq!(runs(OLD, "merged::b"), 0);
        assert!(left_out(&programs, NEW).is_empty());
        assert_eq!(left_out(&programs, OLD)[0].0, "privileged::merged::b");
    }

    #[test]
    fn no_machine_is_without_a_test() {
        assert_eq!(scripts(&programs(&["a"]), NEW, 3).len(), 1);
        assert!(scripts(&programs(&[]), NEW, 3).is_empty());
    }
}
