//! Command lines of programs that may be links to one binary: parsing, version, shell completion, exit
//! status.

use std::ffi::OsString;
use std::future::Future;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap_complete::Shell;

/// A program of a multi-call binary.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Name, as in `argv[0]`.
    pub name: &'static str,
    /// One line for `--help`.
    pub about: &'static str,
    /// Runs it; the first argument is the name.
    pub main: fn(Vec<OsString>) -> ExitCode,
}

/// Version of this build. `COIL_GIT_VERSION` at build time (set for images) adds the exact revision.
#[must_use]
pub fn version() -> &'static str {
    match option_env!("COIL_GIT_VERSION") {
        Some(git) if !git.is_empty() => git,
        _ => env!("CARGO_PKG_VERSION"),
    }
}

/// Arguments of this process.
#[must_use]
pub fn process_args() -> Vec<OsString> {
    std::env::args_os().collect()
}

/// Parses arguments. `--help`, `--version`, `completion SHELL` and mistakes are dealt with here and end
/// in an exit status: 0 for what was asked for, 1 for mistakes.
///
/// # Errors
/// The status to exit with.
pub fn parse<P: Parser>(name: &'static str, args: &[OsString]) -> Result<P, ExitCode> {
    let command = || {
        P::command()
            .name(name)
            .bin_name(name)
            .version(version())
            .after_help("`completion bash|zsh|fish` prints completions for a shell.")
    };
    if args.get(1).is_some_and(|a| a == "completion") {
        return Err(completion(name, args.get(2), command()));
    }
    let parsed =
        command().try_get_matches_from(args).and_then(|mut matches| P::from_arg_matches_mut(&mut matches));
    parsed.map_err(|error| {
        let mistake = error.use_stderr();
        if error.print().is_err() || mistake { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    })
}

fn completion(name: &str, shell: Option<&OsString>, mut command: clap::Command) -> ExitCode {
    let shell = shell.and_then(|s| s.to_str()).and_then(|s| s.parse::<Shell>().ok());
    let Some(shell) = shell else {
        eprintln!("usage: {name} completion bash|zsh|fish|elvish|powershell");
        return ExitCode::FAILURE;
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    // Whoever reads may have read enough.
    match std::io::stdout().write_all(&script) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Parses arguments and runs an asynchronous program on a multi-threaded runtime. An error is logged with
/// its causes, or printed if logging has not started, and the status is then 1.
pub fn run<P, F, Fut>(name: &'static str, args: Vec<OsString>, body: F) -> ExitCode
where
    P: Parser,
    F: FnOnce(P) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    let parsed = match parse::<P>(name, &args) {
        Ok(parsed) => parsed,
        Err(status) => return status,
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{name}: cannot start the asynchronous runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(body(parsed));
    // Blocking work that a task left behind must not keep the process.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if tracing::dispatcher::has_been_set() {
                tracing::error!(program = name, error = format!("{error:#}"), "ended with an error");
            } else {
                eprintln!("{name}: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Finds the program that a multi-call binary should be: by `argv[0]`, else by the first argument, which
/// is then removed. Returns the program and its arguments.
#[must_use]
pub fn dispatch<'a>(programs: &'a [Program], args: &[OsString]) -> Option<(&'a Program, Vec<OsString>)> {
    let by_name = |text: &OsString| {
        let name = std::path::Path::new(text).file_name()?;
        programs.iter().find(|p| name == p.name)
    };
    if let Some(program) = args.first().and_then(by_name) {
        return Some((program, args.to_vec()));
    }
    let program = programs.iter().find(|p| args.get(1).is_some_and(|a| a == p.name))?;
    Some((program, args.get(1..)?.to_vec()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::telemetry::LogArgs;

    /// A test.
    #[derive(Parser, Debug)]
    struct Args {
        #[arg(long, default_value_t = true, action = clap::ArgAction::Set,
              num_args = 0..=1, require_equals = true, default_missing_value = "true")]
        enable: bool,
        #[command(flatten)]
        log: LogArgs,
    }

    fn os(args: &[&str]) -> Vec<OsString> {
        args.iter().map(OsString::from).collect()
    }

    #[test]
    fn flags_of_the_original_are_accepted() {
        let args = parse::<Args>(
            "test",
            &os(&[
                "test",
                "--zap-stacktrace-level=panic",
                "--zap-devel",
                "--zap-encoder=json",
                "--zap-log-level",
                "debug",
                "-v",
                "4",
                "-v=2",
                "--vmodule=a=1",
                "--logtostderr",
                "--alsologtostderr=false",
                "--log_dir=/tmp",
                "--skip_headers",
                "--enable=false",
            ]),
        )
        .unwrap();
        assert!(!args.enable);
        assert!(parse::<Args>("test", &os(&["test", "--enable"])).unwrap().enable);
    }

    #[test]
    fn mistakes_exit_with_one_and_help_with_zero() {
        let status = |args: &[&str]| format!("{:?}", parse::<Args>("test", &os(args)).unwrap_err());
        assert_eq!(status(&["test", "--nonsense"]), format!("{:?}", ExitCode::FAILURE));
        assert_eq!(status(&["test", "completion"]), format!("{:?}", ExitCode::FAILURE));
        assert_eq!(status(&["test", "--help"]), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(status(&["test", "--version"]), format!("{:?}", ExitCode::SUCCESS));
    }

    #[test]
    fn dispatch_by_path_or_first_argument() {
        let programs = [
            Program { name: "one", about: "", main: |_| ExitCode::SUCCESS },
            Program { name: "two", about: "", main: |_| ExitCode::SUCCESS },
        ];
        let find = |args: &[&str]| dispatch(&programs, &os(args)).map(|(p, a)| (p.name, a.len()));
        assert_eq!(find(&["/usr/bin/one", "x"]), Some(("one", 2)));
        assert_eq!(find(&["hypercoil", "two", "x"]), Some(("two", 2)));
        assert_eq!(find(&["one", "two"]), Some(("one", 2)));
        assert_eq!(find(&["hypercoil", "three"]), None);
        assert_eq!(find(&["hypercoil"]), None);
    }
}
