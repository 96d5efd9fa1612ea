//! What the programs may do, on an API server that enforces roles: pods have the tokens of their service accounts, and
//! these the roles of the product's manifests. The embedded API refuses nobody anything, so there these cannot run.

use anyhow::{Context, Result, ensure};
use coil_lab::drive::{exec, get};
use coil_lab::{Lab, Target, paths};

use crate::support::scenarios;

scenarios! {
    roles_are_enforced,
    programs_are_refused_nothing,
}

/// In the message of an authorizer. (Other things are forbidden too: to create in a namespace that goes.)
const REFUSAL: &str = "is forbidden: User ";

/// An agent can do what its role says and no more: the other scenarios prove something.
async fn roles_are_enforced(lab: &Lab) -> Result<()> {
    let selector = "app.kubernetes.io/component=coild";
    let pods = get(lab, &["--namespace", "kube-system", "pod", "--selector", selector]).await?;
    let pod = &pods["items"][0];
    let uid = pod["metadata"]["uid"].as_str().context("no pod of coild")?;
    let node = pod["spec"]["nodeName"].as_str().context("a pod without a node")?;
    let config = paths::account(uid).join("kubeconfig").to_string_lossy().into_owned();
    let kubectl = lab.kubectl().to_string_lossy().into_owned();
    for (verb, resource, answer) in
        [("watch", "pods", "yes"), ("delete", "pods", "no"), ("list", "secrets", "no")]
    {
        let question = format!(
            "{kubectl} --kubeconfig {config} auth can-i {verb} {resource} --all-namespaces 2>/dev/null; true"
        );
        let said = exec(lab, &Target::Node(node.to_owned()), &["sh", "-c", &question]).await?;
        ensure!(said.trim() == answer, "coild may {verb} {resource}: {said}");
    }
    Ok(())
}

/// In all that the scenarios made them do.
async fn programs_are_refused_nothing(_: &Lab) -> Result<()> {
    let mut read = Vec::new();
    for entry in std::fs::read_dir(paths::logs())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Logs of containers; the others are those of the lab itself.
        if !name.contains('_') {
            continue;
        }
        let text = std::fs::read_to_string(&path).with_context(|| name.clone())?;
        let refused = text.lines().find(|line| line.contains(REFUSAL));
        ensure!(refused.is_none(), "{name}: {}", refused.unwrap_or_default());
        read.push(name);
    }
    for program in ["coild", "coil-controller", "egress"] {
        ensure!(read.iter().any(|name| name.contains(program)), "no log of {program}: {read:?}");
    }
    Ok(())
}
