//! All programs of Coil in one binary: which one it is says the name that it is called by, or else its
//! first argument. Dispatch only.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use ::coil_controller::programs::{Program, coil_controller, dispatch, version};
use coil_agent::programs::{coil, coil_egress, coil_installer, coil_router, coilctl, coild};

const NAME: &str = "hypercoil";

const PROGRAMS: &[Program] = &[
    Program { name: "coild", about: "Node agent: egress policy of the node's pods", main: coild::main_with },
    Program { name: "coil", about: "CNI plugin, started by the container runtime", main: coil::main_with },
    Program {
        name: "coil-installer",
        about: "Puts the CNI plugin and its configuration on a node",
        main: coil_installer::main_with,
    },
    Program {
        name: "coil-egress",
        about: "Gateway in egress pods: source NAT of their clients",
        main: coil_egress::main_with,
    },
    Program {
        name: "coil-router",
        about: "Routes to the pods of other nodes on a flat network",
        main: coil_router::main_with,
    },
    Program {
        name: "coilctl",
        about: "Shows what the datapath of a node does and why",
        main: coilctl::main_with,
    },
    Program {
        name: coilctl::PLUGIN,
        about: "The same as kubectl coil, on the nodes of a cluster",
        main: coilctl::plugin_with,
    },
    Program {
        name: "coil-controller",
        about: "Turns Egress objects into egress pods",
        main: coil_controller::main_with,
    },
];

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if let Some((program, args)) = dispatch(PROGRAMS, &args) {
        return (program.main)(args);
    }
    match args.get(1).and_then(|a| a.to_str()) {
        Some("--help" | "-h" | "help") => say(std::io::stdout(), &help()),
        Some("--version" | "-V") => say(std::io::stdout(), &format!("{NAME} {}\n", version())),
        Some(other) => {
            say(std::io::stderr(), &format!("{NAME}: no program is called {other}\n\n{}", help()));
            ExitCode::FAILURE
        }
        None => {
            say(std::io::stderr(), &help());
            ExitCode::FAILURE
        }
    }
}

fn help() -> String {
    let mut text = format!(
        "All programs of Coil in one binary.\n\nUsage: {NAME} PROGRAM [ARGUMENTS]\n   or: PROGRAM [ARGUMENTS], through a link named PROGRAM\n\nPrograms:\n"
    );
    for program in PROGRAMS {
        text.push_str(&format!("  {:<16} {}\n", program.name, program.about));
    }
    text.push_str("\nPROGRAM --help tells more.\n");
    text
}

fn say(mut output: impl Write, text: &str) -> ExitCode {
    if output.write_all(text.as_bytes()).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
