//! Network name spaces and threads in them.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, setns};

use super::{run, run_with_input, unique};

/// A network name space, removed at the end.
pub(crate) struct NetNs {
    name: String,
}

impl NetNs {
    pub(crate) fn new(what: &str) -> Self {
        let name = unique(what);
        run(&format!("ip netns add {name}"));
        let space = Self { name };
        space.ip("link set lo up");
        space
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Runs `ip` inside.
    #[track_caller]
    pub(crate) fn ip(&self, arguments: &str) -> String {
        run(&format!("ip -n {} {arguments}", self.name))
    }

    /// Runs several commands of `ip` inside, with options such as `-6`, in one process: starting one is
    /// dear in an emulated machine.
    #[track_caller]
    pub(crate) fn ip_batch<S: AsRef<str>>(&self, options: &str, commands: &[S]) {
        let text: String = commands.iter().map(|command| format!("{}\n", command.as_ref())).collect();
        run_with_input(&format!("ip {options} -n {} -batch -", self.name), &text);
    }

    /// Runs a command inside.
    #[track_caller]
    pub(crate) fn exec(&self, command: &str) -> String {
        run(&format!("ip netns exec {} {command}", self.name))
    }

    /// Sets a kernel parameter.
    pub(crate) fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let value = value.to_owned();
        self.run(move || std::fs::write(path, value).unwrap());
    }

    /// Starts a thread inside.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let space = File::open(self.path()).unwrap();
        std::thread::spawn(move || {
            setns(space, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    /// Runs something inside and waits for it.
    #[track_caller]
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match self.spawn(work).join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Index of an interface.
    pub(crate) fn ifindex(&self, name: &str) -> u32 {
        let text = self.ip(&format!("-o link show dev {name}"));
        text.split(':').next().unwrap().trim().parse().unwrap()
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for arguments in ["-br address", "route", "-6 route"] {
                let output = Command::new("ip")
                    .args(["-n", &self.name])
                    .args(arguments.split(' '))
                    .output()
                    .map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
                eprintln!("{}: ip {arguments}\n{}", self.name, output.unwrap_or_default());
            }
        }
        if let Err(error) = Command::new("ip").args(["netns", "del", &self.name]).status() {
            eprintln!("cannot remove name space {}: {error}", self.name);
        }
    }
}
