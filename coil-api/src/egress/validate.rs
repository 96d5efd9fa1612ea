//! What the schema says of an Egress, and what it cannot say, in code: the last word on an object
//! whatever admitted it.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::{Egress, EgressPdb, EgressPodTemplate, EgressSpec, MAX_CLIENTS, MAX_DESTINATIONS};
use crate::destination::parse_destination;
use crate::labels::{self, Expected};
use crate::violation::{Problem, Violation};

/// Everything that is wrong with an Egress. Nothing of it is immutable, so `old` (the object before an
/// update) changes nothing today.
#[must_use]
pub fn validate(new: &Egress, _old: Option<&Egress>) -> Vec<Violation> {
    let mut found = Vec::new();
    if let Err(error) = labels::check(&new.name_any(), Expected::Dns1035Label) {
        found.push(Violation::new("metadata.name", error));
    }
    spec(&new.spec, &mut found);
    found
}

fn spec(spec: &EgressSpec, found: &mut Vec<Violation>) {
    if spec.destinations.is_empty() {
        found.push(Violation::new("spec.destinations", Problem::Empty));
    }
    networks("spec.destinations", &spec.destinations, found);
    networks("spec.excludedDestinations", &spec.excluded_destinations, found);
    clients(spec, found);
    at_least("spec.replicas", i64::from(spec.replicas), 1, found);
    strategy(spec, found);
    if let Some(template) = &spec.template {
        pod_template(template, found);
    }
    if let Some(seconds) = spec
        .session_affinity_config
        .as_ref()
        .and_then(|config| config.client_ip.as_ref())
        .and_then(|client_ip| client_ip.timeout_seconds)
    {
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        at_least(field, i64::from(seconds), 1, found);
        at_most(field, i64::from(seconds), 86400, found);
    }
    if let Some(budget) = &spec.pod_disruption_budget {
        pod_disruption_budget(budget, found);
    }
}

fn networks(field: &str, texts: &[String], found: &mut Vec<Violation>) {
    length(field, texts.len(), MAX_DESTINATIONS, found);
    for (index, text) in texts.iter().enumerate() {
        if let Err(error) = parse_destination(text) {
            found.push(Violation::new(format!("{field}[{index}]"), error));
        }
    }
}

fn clients(spec: &EgressSpec, found: &mut Vec<Violation>) {
    length("spec.clients", spec.clients.len(), MAX_CLIENTS, found);
    for (index, client) in spec.clients.iter().enumerate() {
        let field = format!("spec.clients[{index}]");
        if client.namespace_selector.is_none() && client.pod_selector.is_none() {
            found.push(Violation::new(&field, Problem::Empty));
        }
        if let Some(selector) = &client.namespace_selector {
            labels::check_selector(&format!("{field}.namespaceSelector"), selector, found);
        }
        if let Some(selector) = &client.pod_selector {
            labels::check_selector(&format!("{field}.podSelector"), selector, found);
        }
    }
}

fn strategy(spec: &EgressSpec, found: &mut Vec<Violation>) {
    let Some(strategy) = &spec.strategy else {
        return;
    };
    let kind = strategy.type_.as_deref().unwrap_or_default();
    if !matches!(kind, "Recreate" | "RollingUpdate") {
        found.push(Violation::new(
            "spec.strategy.type",
            Problem::NotOneOf { value: kind.to_owned(), allowed: "Recreate, RollingUpdate" },
        ));
    }
    if let Some(rolling) = &strategy.rolling_update {
        let field = "spec.strategy.rollingUpdate";
        if kind == "Recreate" {
            found.push(Violation::new(field, Problem::Exclusive("type Recreate")));
        }
        if let Some(value) = &rolling.max_surge {
            int_or_percent(&format!("{field}.maxSurge"), value, found);
        }
        if let Some(value) = &rolling.max_unavailable {
            int_or_percent(&format!("{field}.maxUnavailable"), value, found);
        }
    }
}

fn pod_template(template: &EgressPodTemplate, found: &mut Vec<Violation>) {
    if let Some(metadata) = &template.metadata {
        keys("spec.template.metadata.labels", &metadata.labels, found);
        for (key, value) in &metadata.labels {
            if let Err(error) = labels::check(value, Expected::LabelValue) {
                found.push(Violation::new(format!("spec.template.metadata.labels[{key}]"), error));
            }
        }
        keys("spec.template.metadata.annotations", &metadata.annotations, found);
    }
    match template.spec.as_ref().map(super::RawPodSpec::parse) {
        Some(Err(error)) => {
            found.push(Violation::new("spec.template.spec", Problem::PodSpec(error.to_string())));
        }
        Some(Ok(pod)) if pod.host_network == Some(true) => found.push(Violation::new(
            "spec.template.spec.hostNetwork",
            Problem::Unusable {
                value: "true",
                why: "packets must leave with an address of the egress pod, not of its node",
            },
        )),
        Some(Ok(_)) | None => {}
    }
}

fn pod_disruption_budget(budget: &EgressPdb, found: &mut Vec<Violation>) {
    let field = "spec.podDisruptionBudget";
    if budget.min_available.is_some() && budget.max_unavailable.is_some() {
        found.push(Violation::new(format!("{field}.minAvailable"), Problem::Exclusive("maxUnavailable")));
    }
    if let Some(value) = &budget.min_available {
        int_or_percent(&format!("{field}.minAvailable"), value, found);
    }
    if let Some(value) = &budget.max_unavailable {
        int_or_percent(&format!("{field}.maxUnavailable"), value, found);
    }
}

fn keys(field: &str, map: &BTreeMap<String, String>, found: &mut Vec<Violation>) {
    for key in map.keys() {
        if let Err(error) = labels::check(key, Expected::LabelKey) {
            found.push(Violation::new(field, error));
        }
    }
}

fn int_or_percent(field: &str, value: &IntOrString, found: &mut Vec<Violation>) {
    match value {
        IntOrString::Int(number) => at_least(field, i64::from(*number), 0, found),
        IntOrString::String(text) => {
            let digits =
                text.strip_suffix('%').filter(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()));
            if digits.and_then(|d| d.parse::<u64>().ok()).is_none_or(|n| n > 100) {
                found.push(Violation::new(field, Problem::Percentage(text.clone())));
            }
        }
    }
}

fn length(field: &str, length: usize, most: usize, found: &mut Vec<Violation>) {
    if length > most {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        at_most(field, number(length), number(most), found);
    }
}

fn at_least(field: &str, value: i64, minimum: i64, found: &mut Vec<Violation>) {
    if value < minimum {
        found.push(Violation::new(field, Problem::TooSmall { value, minimum }));
    }
}

fn at_most(field: &str, value: i64, maximum: i64, found: &mut Vec<Violation>) {
    if value > maximum {
        found.push(Violation::new(field, Problem::TooLarge { value, maximum }));
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
