//! `kubectl coil`: the same commands from where `kubectl` works, run on the nodes by `kubectl exec`.
//!
//! Where this node has a datapath of its own nothing is sent anywhere.
//!
//! This is the one place that starts another program: a plugin of kubectl does well to ask kubectl, which knows the
//! operator's contexts, credentials and proxies. Daemons never come here.

use std::ffi::OsString;
use std::io;
use std::process::{Command, ExitStatus, Output};

use serde_json::Value;

use super::args::{self, PodRef};

/// Where `coild` runs.
const NAMESPACE: &str = "kube-system";
const SELECTOR: &str = "app.kubernetes.io/name=coil,app.kubernetes.io/component=coild";

/// Why a command could not be sent to a node.
#[derive(Debug, thiserror::Error)]
pub enum KubectlError {
    /// kubectl cannot be started.
    #[error("cannot run kubectl")]
    Start(#[from] io::Error),
    /// kubectl failed.
    #[error("kubectl {what}: {message}")]
    Failed {
        /// What it was to do.
        what: &'static str,
        /// What it said.
        message: String,
    },
    /// What it printed is no JSON.
    #[error("kubectl printed something unexpected")]
    Json(#[from] serde_json::Error),
    /// There is no such pod, or it is on no node yet.
    #[error("there is no pod {pod} on any node")]
    NoPod {
        /// The pod.
        pod: PodRef,
    },
    /// There is no agent where one is needed.
    #[error("no coild runs {place}")]
    NoAgent {
        /// Where.
        place: String,
    },
}

/// An agent.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Agent {
    pod: String,
    node: String,
}

fn agents(list: &Value) -> Vec<Agent> {
    let items = list["items"].as_array().into_iter().flatten();
    let mut agents: Vec<Agent> = items
        .filter(|pod| pod["status"]["phase"] == "Running")
        .filter_map(|pod| {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            Some(Agent { pod: text(&pod["metadata"]["name"])?, node: text(&pod["spec"]["nodeName"])? })
        })
        .collect();
    agents.sort_by(|a, b| a.node.cmp(&b.node));
    agents
}

/// The pod that a command is about, if it is about one.
fn subject(command: &args::Command) -> Option<&PodRef> {
    match command {
        args::Command::Conntrack(options) => options.pod.as_ref(),
        args::Command::Policy(options) => options.pod.as_ref(),
        args::Command::Explain(options) => Some(&options.pod),
        args::Command::Monitor(options) => options.pod.as_ref(),
        args::Command::Egress(_) | args::Command::Drops(_) | args::Command::Maps(_) => None,
    }
}

/// Arguments of `kubectl get` that say where the subject runs.
fn where_is(subject: &PodRef) -> Vec<String> {
    let mut arguments: Vec<String> = ["get", "pods", "-o", "json"].map(str::to_owned).into();
    match subject {
        PodRef::Name(namespace, name) => {
            arguments.extend([
                "--namespace".into(),
                namespace.clone(),
                "--field-selector".into(),
                format!("metadata.name={name}"),
            ]);
        }
        PodRef::Address(address) => {
            arguments.extend([
                "--all-namespaces".into(),
                "--field-selector".into(),
                format!("status.podIP={address}"),
            ]);
        }
        PodRef::Word(_) => arguments.push("--all-namespaces".into()),
    }
    arguments
}

/// The node of the subject among pods.
fn node_of(subject: &PodRef, list: &Value) -> Option<String> {
    let mut items = list["items"].as_array().into_iter().flatten();
    let found = match subject {
        PodRef::Word(word) => items
            .find(|pod| pod["metadata"]["uid"] == word.as_str() || pod["metadata"]["name"] == word.as_str()),
        PodRef::Name(..) | PodRef::Address(_) => items.next(),
    };
    found?["spec"]["nodeName"].as_str().map(str::to_owned)
}

/// Arguments of `kubectl exec` for an agent.
fn exec(agent: &Agent, arguments: &[OsString]) -> Vec<OsString> {
    let head =
        ["exec", "--namespace", NAMESPACE, agent.pod.as_str(), "--container", "coild", "--", super::NAME];
    head.into_iter().map(OsString::from).chain(arguments.iter().cloned()).collect()
}

fn json(what: &'static str, arguments: &[String]) -> Result<Value, KubectlError> {
    let Output { status, stdout, stderr } = Command::new("kubectl").args(arguments).output()?;
    if !status.success() {
        return Err(KubectlError::Failed {
            what,
            message: String::from_utf8_lossy(&stderr).trim().to_owned(),
        });
    }
    Ok(serde_json::from_slice(&stdout)?)
}

/// Runs a command on the nodes that it is about; `raw` are its arguments without the program's name. The
/// worst status counts.
pub fn run(parsed: &args::Args, raw: &[OsString]) -> Result<u8, KubectlError> {
    let list = json(
        "get",
        &["get", "pods", "--namespace", NAMESPACE, "--selector", SELECTOR, "-o", "json"].map(str::to_owned),
    )?;
    let mut chosen = agents(&list);
    let node = match (&parsed.node, subject(&parsed.command)) {
        (Some(node), _) => Some(node.clone()),
        (None, Some(subject)) => match (node_of(subject, &json("get", &where_is(subject))?), subject) {
            (None, PodRef::Name(..)) => return Err(KubectlError::NoPod { pod: subject.clone() }),
            (node, _) => node,
        },
        (None, None) => None,
    };
    if let Some(node) = &node {
        chosen.retain(|agent| agent.node == *node);
    }
    if chosen.is_empty() {
        let place = node.map_or_else(|| "in this cluster".to_owned(), |node| format!("on node {node}"));
        return Err(KubectlError::NoAgent { place });
    }
    let code = |status: ExitStatus| status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    let mut worst = 0;
    if matches!(parsed.command, args::Command::Monitor(_)) {
        // These go on, so all at a time.
        let mut children = Vec::new();
        for agent in &chosen {
            children.push(Command::new("kubectl").args(exec(agent, raw)).spawn()?);
        }
        for mut child in children {
            worst = worst.max(code(child.wait()?));
        }
        return Ok(worst);
    }
    let several = chosen.len() > 1;
    for agent in &chosen {
        if several {
            eprintln!("node {}:", agent.node);
        }
        worst = worst.max(code(Command::new("kubectl").args(exec(agent, raw)).status()?));
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    fn pod(name: &str, node: &str, phase: &str) -> Value {
        json!({"metadata": {"name": name, "uid": format!("uid-{name}")}, "spec": {"nodeName": node}, "status": {"phase": phase}})
    }

    #[test]
    fn agents_that_run_sorted_by_node() {
        let list = json!({"items": [pod("c", "w2", "Running"), pod("b", "w1", "Running"), pod("a", "w3", "Pending")]});
        let found: Vec<_> = agents(&list).into_iter().map(|agent| (agent.node, agent.pod)).collect();
        assert_eq!(found, [("w1".into(), "b".into()), ("w2".into(), "c".into())]);
        assert!(agents(&json!({})).is_empty());
    }

    #[test]
    fn the_node_of_a_pod() {
        let list = json!({"items": [pod("a", "w1", "Running"), pod("b", "w2", "Running")]});
        assert_eq!(node_of(&"uid-b".parse().unwrap(), &list).as_deref(), Some("w2"));
        assert_eq!(node_of(&"ns/a".parse().unwrap(), &list).as_deref(), Some("w1"));
        assert_eq!(node_of(&"c".parse().unwrap(), &list), None);
        assert!(where_is(&"ns/a".parse().unwrap()).contains(&"metadata.name=a".to_owned()));
    }

    #[test]
    fn commands_go_to_the_container_of_coild() {
        let agent = Agent { pod: "coild-x".into(), node: "w1".into() };
        let arguments: Vec<OsString> = ["drops", "-o", "json"].map(OsString::from).into();
        let text: Vec<String> =
            exec(&agent, &arguments).into_iter().map(|a| a.to_string_lossy().into_owned()).collect();
        assert_eq!(
            text.join(" "),
            "exec --namespace kube-system coild-x --container coild -- coilctl drops -o json"
        );
    }
}
