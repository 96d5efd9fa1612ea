//! `vm-test`: the same object and the same tests on other kernels, and interoperability with the FOU of
//! the kernel itself, in virtual machines over this machine's root file system.
//!
//! `xtask/vm/vm-run.sh` downloads Debian's kernels and boots them; without hardware virtualisation they are
//! emulated. What does not apply to a kernel is left out by name and with a reason, and counted.

mod exceptions;
mod kernels;
mod plan;
mod report;

use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::ebpf::{BuildEbpf, cargo};
use crate::process::{output, say, tee, tee_marked};
use crate::test::Tally;
use crate::{host, root, target_dir};

use kernels::Kernel;
use plan::Program;
use report::Outcome;
pub use report::Report;

/// Runs the datapath's tests, and those of interoperability, on other kernels.
#[derive(clap::Args, Debug)]
pub struct VmTest {
    /// `5.10`, `6.1`, `6.12`, `6.18`, `newest`, a Debian suite, or the folder of an unpacked kernel; by
    /// default all that have a number, and the newest
    kernels: Vec<String>,
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    json: bool,
    /// Which tests to run
    #[arg(long, value_enum, default_value_t = Suite::All)]
    suite: Suite,
    /// Run only tests whose names contain this
    #[arg(long)]
    only: Option<String>,
    /// Of the privileged tests run only those that load the programs, as `cargo xtask test`
    #[arg(long)]
    essential: bool,
    /// Seconds after which a virtual machine is ended
    #[arg(long, env = "COIL_VM_TIMEOUT", default_value_t = TIMEOUT)]
    timeout: u32,
    /// Virtual machines that run at the same time, each on one processor; default: one for each that there is
    #[arg(short, long, env = "COIL_VM_JOBS")]
    jobs: Option<NonZeroUsize>,
    /// Show the consoles of the virtual machines
    #[arg(long)]
    console: bool,
}

/// A set of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    /// Both
    All,
    /// The privileged tests of the agent: load, attach, scenarios, traffic
    Privileged,
    /// The datapath against the kernel's own tunnels
    Interop,
}

/// Seconds that the tests of one virtual machine take at most, emulated and with other things going on.
const TIMEOUT: u32 = 3600;

/// Test programs of `coil-agent`, by the names of their targets.
const PROGRAMS: &[(&str, Suite)] = &[("privileged", Suite::Privileged), ("interop", Suite::Interop)];

/// What a virtual machine needs.
const TOOLS: &[host::Tool] = &[
    host::Tool { program: "qemu-system-x86_64", package: "qemu-system-x86" },
    host::Tool { program: "busybox", package: "busybox-static" },
    host::Tool { program: "modprobe", package: "kmod" },
    host::Tool { program: "cpio", package: "cpio" },
    host::Tool { program: "xz", package: "xz-utils" },
    host::Tool { program: "zstd", package: "zstd" },
    host::Tool {
        program: "/usr/share/keyrings/debian-archive-keyring.gpg",
        package: "debian-archive-keyring",
    },
];

impl VmTest {
    /// Runs the verb.
    pub fn run(&self) -> Result<ExitCode> {
        host::need_root("cargo xtask vm-test")?;
        prepare()?;
        BuildEbpf::default().run()?;
        let programs = self.programs()?;
        let wanted: Vec<_> = if self.kernels.is_empty() {
            kernels::DEFAULT.iter().map(|name| (*name).to_owned()).collect()
        } else {
            self.kernels.clone()
        };
        let kernels = wanted
            .iter()
            .map(|name| Kernel::get(name).with_context(|| format!("getting kernel {name}")))
            .collect::<Result<Vec<_>>>()?;
        let reports = self.on_each(&kernels, &programs)?;
        eprintln!("{}", report::table(&reports));
        for report in &reports {
            for (test, reason) in &report.left_out {
                eprintln!("{}: left out: {test}: {reason}", report.kernel);
            }
        }
        if self.json {
            println!("{}", report::json(&reports));
        }
        let total = reports.iter().fold(Tally::default(), |mut sum, report| {
            sum.add(report.tally());
            sum
        });
        println!("{}", crate::test::closing_line("vm-test", total));
        Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// The test programs, built, with the tests that are asked for.
    fn programs(&self) -> Result<Vec<Program>> {
        let mut programs = Vec::new();
        for (name, suite) in PROGRAMS {
            if [Suite::All, *suite].contains(&self.suite) {
                let filters = match &self.only {
                    Some(only) => vec![only.as_str()],
                    None if self.essential && *name == "privileged" => ESSENTIAL.to_vec(),
                    None => vec![],
                };
                let path = kept(&build(name, &["test", "--test", name])?)?;
                let program = Program::list(name, &path, &filters)?;
                if self.only.is_none() && program.is_empty() {
                    bail!("{name} has no test {filters:?}");
                }
                programs.push(program);
            }
        }
        if let Some(only) = &self.only
            && programs.iter().all(Program::is_empty)
        {
            bail!("there is no test whose name contains {only:?}");
        }
        Ok(programs)
    }

    /// Runs the programs on each kernel, in as many machines at once as there are jobs. Machines of one kernel share its
    /// tests, so that no processor is idle while the last kernel is at work.
    fn on_each(&self, kernels: &[Kernel], programs: &[Program]) -> Result<Vec<Report>> {
        let jobs = self.jobs.or_else(|| std::thread::available_parallelism().ok());
        let jobs = jobs.map_or(1, NonZeroUsize::get);
        let mut machines = Vec::new();
        for (index, kernel) in kernels.iter().enumerate() {
            let scripts = plan::scripts(programs, kernel.version, jobs);
            let count = scripts.len();
            let machine = |(number, script)| {
                let mark = match (jobs, count) {
                    (1, _) => String::new(),
                    (_, 1) => format!("{}: ", kernel.release),
                    _ => format!("{} {}/{count}: ", kernel.release, number + 1),
                };
                (index, mark, script)
            };
            machines.extend(scripts.into_iter().enumerate().map(machine));
        }
        let next = AtomicUsize::new(0);
        let work = || {
            let mut parts = Vec::new();
            while let number = next.fetch_add(1, Ordering::Relaxed)
                && let Some((index, mark, script)) = machines.get(number)
                && let Some(kernel) = kernels.get(*index)
            {
                parts.push((*index, self.on(kernel, script, mark)));
            }
            parts
        };
        let parts: Vec<(usize, Result<Report>)> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs.min(machines.len())).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .flat_map(|worker| worker.join().unwrap_or_else(|cause| resume_unwind(cause)))
                .collect()
        });
        let whole = |kernel: &Kernel| {
            let mut report = Report::new(&kernel.release);
            report.left_out = plan::left_out(programs, kernel.version);
            report
        };
        let mut reports: Vec<_> = kernels.iter().map(whole).collect();
        for (index, part) in parts {
            let part = part?;
            if let Some(report) = reports.get_mut(index) {
                report.add(part);
            }
        }
        for (report, kernel) in reports.iter_mut().zip(kernels) {
            for program in programs {
                report.expect(program.name, program.applying(kernel.version));
            }
        }
        Ok(reports)
    }

    /// Boots a kernel and runs a script in it; the mark stands before each line of what it prints.
    fn on(&self, kernel: &Kernel, script: &str, mark: &str) -> Result<Report> {
        say(format!("{mark}booting {}, then running its tests", kernel.release));
        let start = Instant::now();
        let mut report = Report::new(&kernel.release);
        let mut command = runner();
        // One processor: an emulated kernel that patches its code while another runs it has been seen to crash.
        command.args(["run", "-c", "1", "-t", &self.timeout.to_string(), "-s"]).arg(target_dir());
        // In the machine /tmp is its own, and the working copy may be below it.
        command.arg("-s").arg(root().join("coil-ebpf/corpus"));
        if self.console {
            command.arg("-v");
        }
        command.arg(&kernel.folder).args(["--", "bash", "-c", script]);
        let succeeded = tee_marked(mark, &mut command, |line| report.line(line))?;
        report.seconds = start.elapsed().as_secs();
        if !succeeded && report.tally().failed == 0 {
            report.outcomes.push((format!("{mark}the virtual machine"), Outcome::Failed));
        }
        Ok(report)
    }
}

/// What [`one_kernel`] came to.
pub enum OneKernel {
    /// It ran.
    Ran(Report),
    /// There is no such kernel or no virtual machine to be had, and why.
    Unavailable(anyhow::Error),
}

/// Of the privileged tests, what `cargo xtask test` runs in a virtual machine: an older verifier takes all
/// programs. Everything else takes several times as long there as outside.
const ESSENTIAL: &[&str] = &["verifier::"];

/// One kernel as part of `cargo xtask test`: the essential privileged tests, and all of interoperability.
pub fn one_kernel() -> Result<OneKernel> {
    let kernel = match prepare().and_then(|()| Kernel::get(kernels::FOR_TEST)) {
        Ok(kernel) => kernel,
        Err(error) => return Ok(OneKernel::Unavailable(error)),
    };
    let verb = VmTest {
        kernels: vec![],
        json: false,
        suite: Suite::All,
        only: None,
        essential: true,
        timeout: TIMEOUT,
        jobs: None,
        console: false,
    };
    let reports = verb.on_each(&[kernel], &verb.programs()?)?;
    eprintln!("{}", report::table(&reports));
    let report = reports.into_iter().next().context("no report of the kernel")?;
    Ok(OneKernel::Ran(report))
}

/// Installs what is missing.
fn prepare() -> Result<()> {
    host::ensure(host::LAB)?;
    host::ensure(TOOLS)
}

/// The script that knows virtual machines; kernels are kept below `target`, or in `VMLAB_DIR`.
fn runner() -> Command {
    let mut command = Command::new("bash");
    command.arg(root().join("xtask/vm/vm-run.sh"));
    if std::env::var_os("VMLAB_DIR").is_none() {
        command.env("VMLAB_DIR", target_dir().join("vm"));
    }
    command
}

/// Builds a benchmark of `coil-agent` and finds it.
pub fn benchmark(name: &str) -> Result<PathBuf> {
    kept(&build(name, &["bench", "--profile", "dev", "--bench", name])?)
}

/// A copy of a program that stays as it is while somebody builds another.
fn kept(program: &Path) -> Result<PathBuf> {
    let folder = target_dir().join("vm/programs");
    std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let copy = folder.join(program.file_name().context("a program without a name")?);
    let fresh = copy.with_extension(std::process::id().to_string());
    std::fs::copy(program, &fresh).with_context(|| format!("copying {}", program.display()))?;
    std::fs::rename(&fresh, &copy).with_context(|| format!("renaming {}", fresh.display()))?;
    Ok(copy)
}

/// Runs a benchmark in a virtual machine in which every instruction takes a nanosecond.
pub fn counted(program: &Path, arguments: &[&str], each: impl FnMut(&str)) -> Result<()> {
    prepare()?;
    let kernel = Kernel::get(kernels::FOR_BENCH)?;
    say(format!("{}: booting, with instructions counted as time", kernel.release));
    let mut command = runner();
    command.args(["run", "-a", "icount", "-t", &TIMEOUT.to_string(), "-s"]).arg(target_dir());
    command.arg(&kernel.folder).arg("--").arg(program).args(arguments);
    if !tee(&mut command, each)? {
        bail!("the benchmark failed in the virtual machine");
    }
    Ok(())
}

/// Builds a test program or benchmark of `coil-agent` and finds it.
fn build(name: &str, select: &[&str]) -> Result<PathBuf> {
    say(format!("building {name}"));
    let messages =
        output(cargo().args(select).args(["--package", "coil-agent", "--no-run", "--message-format=json"]))?;
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).context("reading what cargo says")?;
        if message["target"]["name"] == name
            && let Some(path) = message["executable"].as_str()
        {
            return Ok(Path::new(path).to_owned());
        }
    }
    bail!("cargo has built no test program {name}")
}
