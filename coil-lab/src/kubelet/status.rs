//! The status of a pod, computed from what its containers do. Pure.

use super::container::{Ended, Phase, Restart, View};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};
use std::net::IpAddr;

/// One container's part.
pub(super) struct Part<'a> {
    pub(super) name: &'a str,
    pub(super) image: &'a str,
    /// `None`: not started yet.
    pub(super) view: Option<View>,
}

/// All that a status is made of.
pub(super) struct Facts<'a> {
    pub(super) uid: &'a str,
    /// Conditions that the object has now: ours among them, and others that we keep.
    pub(super) conditions: &'a [Value],
    pub(super) now: Timestamp,
    pub(super) since: Timestamp,
    pub(super) host_addresses: &'a [IpAddr],
    /// Empty until the sandbox is made.
    pub(super) addresses: &'a [IpAddr],
    pub(super) sandbox: bool,
    pub(super) init: Vec<Part<'a>>,
    pub(super) containers: Vec<Part<'a>>,
    pub(super) restart: Restart,
    /// The pod is being deleted.
    pub(super) ending: bool,
}

/// Computes the status.
pub(super) fn status(facts: &Facts<'_>) -> Value {
    let initialized =
        facts.sandbox && facts.init.iter().all(|part| part.view.as_ref().is_some_and(done_or_sidecar));
    let ready = initialized
        && !facts.containers.is_empty()
        && facts.containers.iter().all(|part| part.view.as_ref().is_some_and(|view| view.ready));
    let mut conditions: Vec<Value> = facts
        .conditions
        .iter()
        .filter(|condition| !OURS.contains(&condition["type"].as_str().unwrap_or_default()))
        .cloned()
        .collect();
    for (kind, value, reason) in [
        ("PodReadyToStartContainers", facts.sandbox, ""),
        ("Initialized", initialized, "ContainersNotInitialized"),
        ("Ready", ready, "ContainersNotReady"),
        ("ContainersReady", ready, "ContainersNotReady"),
        ("PodScheduled", true, ""),
    ] {
        conditions.push(condition(facts, kind, value, reason));
    }
    let mut status = Map::new();
    status.insert("phase".into(), json!(phase(facts, initialized)));
    status.insert("conditions".into(), json!(conditions));
    status.insert("startTime".into(), json!(time(facts.since)));
    status.insert("hostIP".into(), json!(facts.host_addresses.first()));
    status.insert("hostIPs".into(), addresses(facts.host_addresses));
    if !facts.addresses.is_empty() {
        status.insert("podIP".into(), json!(facts.addresses.first()));
        status.insert("podIPs".into(), addresses(facts.addresses));
    }
    let list =
        |parts: &[Part<'_>]| -> Value { parts.iter().map(|part| container(facts.uid, part)).collect() };
    if !facts.init.is_empty() {
        status.insert("initContainerStatuses".into(), list(&facts.init));
    }
    status.insert("containerStatuses".into(), list(&facts.containers));
    Value::Object(status)
}

const OURS: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

fn phase(facts: &Facts<'_>, initialized: bool) -> &'static str {
    let failed_init = facts.init.iter().any(
        |part| matches!(&part.view, Some(View { phase: Phase::Ended(ended), final_: true, .. }) if ended.code != 0),
    );
    if failed_init && facts.restart == Restart::Never {
        return "Failed";
    }
    let ends: Vec<&Ended> = facts
        .containers
        .iter()
        .filter_map(|part| match &part.view {
            Some(View { phase: Phase::Ended(ended), final_: true, .. }) => Some(ended),
            _ => None,
        })
        .collect();
    // A pod that is deleted ends its containers whatever the restart policy says; it then has failed only if one did.
    let over = facts.ending || facts.restart != Restart::Always;
    if over && !facts.containers.is_empty() && ends.len() == facts.containers.len() {
        return if ends.iter().all(|ended| ended.code == 0) { "Succeeded" } else { "Failed" };
    }
    if initialized && facts.containers.iter().any(|part| part.view.as_ref().is_some_and(has_begun)) {
        return "Running";
    }
    "Pending"
}

/// Whether it runs or has run: a container that never could keeps its pod pending.
fn has_begun(view: &View) -> bool {
    view.restarts > 0 || !matches!(view.phase, Phase::Waiting { .. })
}

fn done_or_sidecar(view: &View) -> bool {
    match &view.phase {
        Phase::Ended(ended) => ended.code == 0,
        Phase::Running { .. } => view.started && !view.final_ && view.ready,
        Phase::Waiting { .. } => false,
    }
}

fn condition(facts: &Facts<'_>, kind: &str, value: bool, reason: &str) -> Value {
    let text = if value { "True" } else { "False" };
    let before = facts.conditions.iter().find(|condition| condition["type"] == kind);
    let since = before
        .filter(|condition| condition["status"] == text)
        .map(|condition| condition["lastTransitionTime"].clone())
        .filter(Value::is_string)
        .unwrap_or_else(|| json!(time(facts.now)));
    let mut condition = json!({ "type": kind, "status": text, "lastTransitionTime": since });
    if !value && !reason.is_empty() {
        let waiting: Vec<&str> = facts
            .containers
            .iter()
            .filter(|part| !part.view.as_ref().is_some_and(|view| view.ready))
            .map(|part| part.name)
            .collect();
        condition["reason"] = json!(reason);
        condition["message"] = json!(format!("containers with unready status: [{}]", waiting.join(" ")));
    }
    condition
}

fn container(uid: &str, part: &Part<'_>) -> Value {
    let Some(view) = &part.view else {
        return json!({
            "name": part.name, "image": part.image, "imageID": "", "ready": false, "started": false,
            "restartCount": 0,
            "state": { "waiting": { "reason": "ContainerCreating" } },
        });
    };
    let id = format!("coil-lab://{uid}/{}/{}", part.name, view.restarts);
    let state = match &view.phase {
        Phase::Waiting { reason, message } if message.is_empty() => {
            json!({ "waiting": { "reason": reason } })
        }
        Phase::Waiting { reason, message } => json!({ "waiting": { "reason": reason, "message": message } }),
        Phase::Running { since } => json!({ "running": { "startedAt": time(*since) } }),
        Phase::Ended(ended) => terminated(ended, &id),
    };
    let mut status = json!({
        "name": part.name,
        "image": part.image,
        "imageID": "",
        "containerID": id,
        "ready": view.ready,
        "started": view.started,
        "restartCount": view.restarts,
        "state": state,
    });
    if let Some(last) = &view.last {
        status["lastState"] =
            terminated(last, &format!("coil-lab://{uid}/{}/{}", part.name, view.restarts - 1));
    }
    status
}

fn terminated(ended: &Ended, id: &str) -> Value {
    let mut inner = json!({
        "exitCode": ended.code,
        "reason": if ended.code == 0 { "Completed" } else { "Error" },
        "startedAt": time(ended.since),
        "finishedAt": time(ended.until),
        "containerID": id,
    });
    if let Some(signal) = ended.signal {
        inner["signal"] = json!(signal);
    }
    if !ended.message.is_empty() {
        inner["message"] = json!(ended.message);
    }
    json!({ "terminated": inner })
}

fn addresses(list: &[IpAddr]) -> Value {
    list.iter().map(|address| json!({ "ip": address })).collect()
}

fn time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn view(phase: Phase, ready: bool) -> View {
        let final_ = matches!(phase, Phase::Ended(_));
        View { phase, pid: None, started: true, ready, restarts: 0, last: None, final_ }
    }

    fn ended(code: i32) -> Phase {
        let now = Timestamp::UNIX_EPOCH;
        Phase::Ended(Ended { code, signal: None, since: now, until: now, message: String::new() })
    }

    fn of(views: Vec<Option<View>>, restart: Restart, ending: bool) -> Value {
        let containers = views.into_iter().map(|view| Part { name: "c", image: "i", view }).collect();
        status(&Facts {
            uid: "u",
            conditions: &[json!({ "type": "Custom", "status": "True" })],
            now: Timestamp::UNIX_EPOCH,
            since: Timestamp::UNIX_EPOCH,
            host_addresses: &[],
            addresses: &["10.0.0.1".parse().unwrap()],
            sandbox: true,
            init: Vec::new(),
            containers,
            restart,
            ending,
        })
    }

    fn ready(status: &Value) -> &Value {
        let conditions = status["conditions"].as_array().unwrap();
        &conditions.iter().find(|condition| condition["type"] == "Ready").unwrap()["status"]
    }

    #[test]
    fn phases() {
        let running = Phase::Running { since: Timestamp::UNIX_EPOCH };
        let crash = Phase::Waiting { reason: "CrashLoopBackOff", message: String::new() };
        let up = of(vec![Some(view(running.clone(), true))], Restart::Always, false);
        assert_eq!((&up["phase"], ready(&up)), (&json!("Running"), &json!("True")));
        assert_eq!(up["podIP"], "10.0.0.1");
        assert_eq!(up["conditions"][0]["type"], "Custom");
        let half = of(vec![Some(view(running.clone(), true)), None], Restart::Always, false);
        assert_eq!((&half["phase"], ready(&half)), (&json!("Running"), &json!("False")));
        let mut looping = view(crash, false);
        looping.restarts = 1;
        assert_eq!(of(vec![Some(looping)], Restart::Always, false)["phase"], "Running");
        assert_eq!(of(vec![None], Restart::Always, false)["phase"], "Pending");
        assert_eq!(of(vec![Some(view(ended(0), false))], Restart::Never, false)["phase"], "Succeeded");
        assert_eq!(of(vec![Some(view(ended(1), false))], Restart::Never, false)["phase"], "Failed");
        assert_eq!(of(vec![Some(view(ended(143), false))], Restart::Always, true)["phase"], "Failed");
    }
}
