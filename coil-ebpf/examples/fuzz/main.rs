//! Fuzzes the datapath library for as long as one likes; `cargo xtask fuzz` builds and calls this.
//!
//! Arguments are words like `seconds=60`: `seconds`, `runs`, `seed`, `corpus` (a folder), `grow` (a folder that
//! new cases are written to), and `replay` (a file) in place of all others.

#![expect(unsafe_code, reason = "counters of coverage are memory that the compiler adds")]

mod coverage;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use coil_ebpf::testing::fuzz::{
    check::Failure,
    corpus::{self, Random},
    play,
};

/// How often it says how far it is.
const PROGRESS: Duration = Duration::from_secs(5);

struct Arguments {
    seconds: Option<u64>,
    runs: Option<u64>,
    seed: u64,
    corpus: PathBuf,
    grow: Option<PathBuf>,
    replay: Option<PathBuf>,
}

impl Arguments {
    fn parse() -> Result<Self, String> {
        let mut arguments =
            Self { seconds: None, runs: None, seed: 1, corpus: corpus::folder(), grow: None, replay: None };
        for argument in std::env::args().skip(1) {
            let (name, value) = argument.split_once('=').ok_or(format!("{argument}: not NAME=VALUE"))?;
            let number = || value.parse::<u64>().map_err(|error| format!("{argument}: {error}"));
            match name {
                "seconds" => arguments.seconds = Some(number()?),
                "runs" => arguments.runs = Some(number()?),
                "seed" => arguments.seed = number()?,
                "corpus" => arguments.corpus = value.into(),
                "grow" => arguments.grow = Some(value.into()),
                "replay" => arguments.replay = Some(value.into()),
                _ => return Err(format!("{argument}: unknown")),
            }
        }
        Ok(arguments)
    }
}

/// Cases that have taken edges that none before them had.
#[derive(Default)]
struct Pool {
    cases: Vec<Vec<u8>>,
    /// Classes of each edge that were seen.
    edges: Vec<u8>,
}

impl Pool {
    /// Plays a case, and keeps it if it has shown something new; true if it has.
    fn play(&mut self, case: &[u8]) -> Result<bool, Box<Failure>> {
        coverage::take(|_, _| {});
        let run = play::run(case);
        let mut new = false;
        coverage::take(|edge, class| {
            if self.edges.len() <= edge {
                self.edges.resize(edge + 1, 0);
            }
            new |= self.edges[edge] & class == 0;
            self.edges[edge] |= class;
        });
        run?;
        if new || (!coverage::is_there() && self.cases.len() < 1000) {
            self.cases.push(case.to_vec());
        }
        Ok(new)
    }

    /// Plays a case of which it is known how it ends; how many edges were taken by now.
    fn look(&mut self, case: &[u8]) -> usize {
        match self.play(case) {
            Ok(_) | Err(_) => self.taken(),
        }
    }

    fn taken(&self) -> usize {
        self.edges.iter().filter(|classes| **classes != 0).count()
    }
}

/// Makes a failing case small, writes it down and says how to see it again.
fn report(case: &[u8], failure: &Failure, folder: &Path) -> io::Result<()> {
    println!("FAILED: {}\nmaking the case small ...", failure.what.lines().next().unwrap_or_default());
    let kind: String = failure.what.chars().take(30).collect();
    let least =
        corpus::least(case, |case| play::run(case).is_err_and(|failure| failure.what.starts_with(&kind)));
    let failure = play::run(&least).err();
    let what = failure.map_or_else(String::new, |failure| failure.to_string());
    let path = folder.join(format!("{}.hex", corpus::name(&least)));
    fs::write(&path, corpus::text(what.lines().next_back().unwrap_or_default(), &least))?;
    println!(
        "{what}\n\nwritten to {}\nto see it again: cargo xtask fuzz --replay {}",
        path.display(),
        path.display()
    );
    Ok(())
}

fn replay(path: &Path) -> Result<ExitCode, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let case = corpus::parse(&text).ok_or(format!("{}: no case", path.display()))?;
    match play::run(&case) {
        Ok(hops) => {
            let shown = Failure { what: "as it should be".to_owned(), hops };
            println!("{shown:#}");
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) => {
            println!("{failure:#}");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn fuzz(arguments: &Arguments) -> Result<ExitCode, String> {
    let failed = |error: io::Error| error.to_string();
    let start = Instant::now();
    let mut pool = Pool::default();
    let known = corpus::read(&arguments.corpus)
        .map_err(|error| format!("{}: {error}", arguments.corpus.display()))?;
    for (name, case) in &known {
        if let Err(failure) = pool.play(case) {
            println!("{name} of the corpus fails: {failure}");
            return Ok(ExitCode::FAILURE);
        }
    }
    let guided = if coverage::is_there() { "guided by coverage" } else { "not guided" };
    println!(
        "{} cases in the corpus, {} edges; seed {}, {guided}",
        known.len(),
        pool.taken(),
        arguments.seed
    );
    let mut random = Random(arguments.seed);
    let (mut runs, mut said) = (0, start);
    let over = |runs: u64| {
        arguments.runs.is_some_and(|most| runs >= most)
            || arguments.seconds.is_some_and(|most| start.elapsed() >= Duration::from_secs(most))
    };
    let mut grown: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    while !over(runs) {
        let count = pool.cases.len();
        let case = if count == 0 || random.below(16) == 0 {
            random.case()
        } else {
            let (one, other) = (random.below(count), random.below(count));
            random.changed(&pool.cases[one], &pool.cases[other])
        };
        runs += 1;
        match pool.play(&case) {
            Ok(false) => {}
            Ok(true) => {
                grown.insert(corpus::name(&case), case);
            }
            Err(failure) => {
                report(&case, &failure, &arguments.corpus).map_err(failed)?;
                println!("failed after {runs} runs and {} s", start.elapsed().as_secs());
                return Ok(ExitCode::FAILURE);
            }
        }
        if said.elapsed() >= PROGRESS {
            said = Instant::now();
            let seconds = start.elapsed().as_secs().max(1);
            println!(
                "{seconds:>6} s {runs:>9} runs {:>6}/s {:>6} cases {:>6} edges",
                runs / seconds,
                pool.cases.len(),
                pool.taken()
            );
        }
    }
    if let Some(folder) = &arguments.grow {
        let added = grow(folder, &known, grown.into_values().collect()).map_err(failed)?;
        println!("{added} cases written to {}", folder.display());
    }
    println!("passed: {runs} runs in {} s, {} edges", start.elapsed().as_secs(), pool.taken());
    Ok(ExitCode::SUCCESS)
}

/// Writes those of the new cases down that take edges which neither the corpus nor one before them takes, those
/// that take most first.
fn grow(folder: &Path, known: &[(String, Vec<u8>)], new: Vec<Vec<u8>>) -> io::Result<usize> {
    let mut pool = Pool::default();
    for (_, case) in known {
        pool.look(case);
    }
    let edges_of = |case: &[u8]| {
        let mut alone = Pool::default();
        alone.look(case)
    };
    let mut new: Vec<_> = new.into_iter().map(|case| (edges_of(&case), case)).collect();
    new.sort_by_key(|(edges, case)| (std::cmp::Reverse(*edges), case.len()));
    let mut added = 0;
    for (_, case) in new {
        let before = pool.taken();
        if pool.play(&case).is_ok() && pool.taken() > before {
            let path = folder.join(format!("{}.hex", corpus::name(&case)));
            fs::write(path, corpus::text("", &case))?;
            added += 1;
        }
    }
    Ok(added)
}

fn main() -> ExitCode {
    let run = Arguments::parse().and_then(|arguments| match &arguments.replay {
        Some(path) => replay(path),
        None => fuzz(&arguments),
    });
    run.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::from(2)
    })
}
