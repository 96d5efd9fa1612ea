//! Runs scenarios under the names of tests, in labs that serve many of them.
//!
//! A lab comes up with the first of its scenarios that is wanted, and goes with the next lab or at the end, whatever
//! happened. All are marked as ignored, since they need root, the eBPF object and the built programs: `cargo xtask
//! test` runs them.

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use coil_lab::drive::fresh;
use coil_lab::{Lab, Options};
use libtest_mimic::{Arguments, Failed, Trial};

use super::{Scenario, state};

/// A lab and what is to happen in it.
pub struct Group {
    /// In front of the names of its scenarios, unless empty.
    pub name: &'static str,
    /// What the lab is like.
    pub options: Options,
    /// What happens in it, in this order.
    pub scenarios: Vec<Scenario>,
}

/// Runs what the command line asks for.
pub fn main(groups: Vec<Group>) -> ExitCode {
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => Arc::new(runtime),
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let labs = Arc::new(Mutex::new(Labs { current: None }));
    let mut trials = Vec::new();
    for (number, Group { name, options, scenarios }) in groups.into_iter().enumerate() {
        for scenario in scenarios {
            let title =
                if name.is_empty() { scenario.name.to_owned() } else { format!("{name}::{}", scenario.name) };
            let (labs, runtime, options) = (labs.clone(), runtime.clone(), options.clone());
            let trial = Trial::test(title, move || {
                let lab = labs
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .of(&runtime, number, &options)
                    .map_err(Failed::from)?;
                runtime.block_on((scenario.run)(&lab)).map_err(|error| {
                    eprintln!("{}", state(&lab));
                    Failed::from(format!("{error:#}"))
                })
            });
            trials.push(trial.with_ignored_flag(true));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    let removed = labs.lock().unwrap_or_else(PoisonError::into_inner).end();
    match removed {
        Ok(()) => conclusion.exit_code(),
        Err(error) => {
            eprintln!("the lab: {error}");
            println!("test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out");
            ExitCode::FAILURE
        }
    }
}

/// The labs, of which there is one at a time.
struct Labs {
    /// The number of its group, and the lab or why there is none.
    current: Option<(usize, Result<Arc<Lab>, String>)>,
}

impl Labs {
    /// The lab of a group, made if need be. One that did not come up is not tried again.
    fn of(
        &mut self,
        runtime: &tokio::runtime::Runtime,
        group: usize,
        options: &Options,
    ) -> Result<Arc<Lab>, String> {
        if let Some((number, lab)) = &self.current
            && *number == group
        {
            return lab.clone();
        }
        self.end()?;
        let up = runtime.block_on(fresh(options.clone(), |step| eprintln!("{step}")));
        let lab = up.map(Arc::new).map_err(|error| format!("the lab: {error:#}"));
        self.current = Some((group, lab.clone()));
        lab
    }

    /// Removes the one that is up.
    fn end(&mut self) -> Result<(), String> {
        match self.current.take() {
            Some((_, Ok(_))) => Lab::down(|step| eprintln!("{step}")).map_err(|error| error.to_string()),
            _ => Ok(()),
        }
    }
}
