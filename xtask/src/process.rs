//! Running other programs: what is run is printed, a failure names it.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Tells the user what is going on.
pub fn say(message: impl AsRef<str>) {
    eprintln!("==> {}", message.as_ref());
}

/// The command as one would type it.
pub fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs to the end; an unsuccessful exit is an error.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start: {}", shown(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", shown(command));
    }
    Ok(())
}

/// Runs to the end and returns standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start: {}", shown(command)))?;
    if !output.status.success() {
        bail!("{} ended with {}", shown(command), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{}: output is not text", shown(command)))
}

/// Runs to the end, passes standard output on and shows each line of it to `each`; true if the exit
/// was successful.
pub fn tee(command: &mut Command, each: impl FnMut(&str)) -> Result<bool> {
    tee_marked("", command, each)
}

/// As [`tee`], with a mark before each line that is passed on, for one of several that run beside each other.
pub fn tee_marked(mark: &str, command: &mut Command, mut each: impl FnMut(&str)) -> Result<bool> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start: {}", shown(command)))?;
    let stdout = child.stdout.take().context("child without standard output")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.with_context(|| format!("reading the output of {}", shown(command)))?;
        let mut ours = std::io::stdout().lock();
        ours.write_all(mark.as_bytes())?;
        ours.write_all(&line)?;
        ours.write_all(b"\n")?;
        ours.flush()?;
        drop(ours);
        each(&String::from_utf8_lossy(&line));
    }
    let status = child.wait().with_context(|| format!("waiting for {}", shown(command)))?;
    Ok(status.success())
}
