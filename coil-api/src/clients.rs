//! Who is a client of which Egress: pure matching over pods, used by `coild`, `coil-egress` and the
//! controller alike, so that all three always agree.
//!
//! A pod is a client of an Egress if its annotation `egress.coil.cybozu.com/<namespace of the Egress>`
//! names it, or if a selector of `spec.clients` selects it. Pods on the host network have no address of
//! their own and finished pods have given theirs back: neither is ever a client.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use crate::egress::{Egress, EgressClient};
use crate::labels::{self, Expected, SyntaxError};
use crate::names::ANNOTATION_EGRESS_PREFIX;

/// Namespace and name of an Egress.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EgressRef {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl EgressRef {
    /// A reference.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// The reference to an object.
    #[must_use]
    pub fn of(egress: &Egress) -> Self {
        Self::new(egress.namespace().unwrap_or_default(), egress.name_any())
    }
}

impl fmt::Display for EgressRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What the matching needs to know of a pod.
#[derive(Clone, Copy, Debug)]
pub struct PodFacts<'a> {
    /// Namespace.
    pub namespace: &'a str,
    /// Labels.
    pub labels: &'a BTreeMap<String, String>,
    /// Annotations.
    pub annotations: &'a BTreeMap<String, String>,
    /// Uses the network of its node.
    pub host_network: bool,
    /// `Succeeded` or `Failed`: its address may already belong to another pod.
    pub finished: bool,
}

impl<'a> From<&'a Pod> for PodFacts<'a> {
    fn from(pod: &'a Pod) -> Self {
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        Self {
            namespace: pod.metadata.namespace.as_deref().unwrap_or_default(),
            labels: pod.labels(),
            annotations: pod.annotations(),
            host_network: pod.spec.as_ref().and_then(|s| s.host_network).unwrap_or(false),
            finished: matches!(phase, Some("Succeeded" | "Failed")),
        }
    }
}

impl PodFacts<'_> {
    /// Whether the pod can be a client of anything.
    #[must_use]
    pub fn eligible(&self) -> bool {
        !self.host_network && !self.finished
    }
}

/// Why a pod is a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientReason {
    /// Its annotation names the Egress.
    Annotation,
    /// A selector of the Egress selects it.
    Selector,
}

/// A part of an annotation that cannot name an Egress.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// The key does not end with the name of a namespace.
    #[error("annotation {key:?}: {source}")]
    Namespace {
        /// The key.
        key: String,
        /// What is wrong with it.
        source: SyntaxError,
    },
    /// An item of the value is not the name of an Egress. White space is not trimmed.
    #[error("annotation {key:?}, item {index}: {source}")]
    Item {
        /// The key.
        key: String,
        /// Position in the list, from 0.
        index: usize,
        /// What is wrong with it.
        source: SyntaxError,
    },
}

/// What the annotations of a pod ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// Egresses that are named.
    pub egresses: BTreeSet<EgressRef>,
    /// Parts that cannot be read. A pod with any of these must fail closed.
    pub errors: Vec<AnnotationError>,
}

/// Reads all Egress annotations of a pod.
#[must_use]
pub fn named_egresses(annotations: &BTreeMap<String, String>) -> Named {
    let mut named = Named::default();
    for (key, value) in annotations {
        let Some(namespace) = key.strip_prefix(ANNOTATION_EGRESS_PREFIX) else {
            continue;
        };
        if let Err(source) = labels::check(namespace, Expected::Dns1123Label) {
            named.errors.push(AnnotationError::Namespace { key: key.clone(), source });
            continue;
        }
        for (index, name) in value.split(',').enumerate() {
            match labels::check(name, Expected::Subdomain) {
                Ok(()) => {
                    named.egresses.insert(EgressRef::new(namespace, name));
                }
                Err(source) => named.errors.push(AnnotationError::Item { key: key.clone(), index, source }),
            }
        }
    }
    named
}

/// Whether the annotations name one Egress; cheaper than [`named_egresses`].
#[must_use]
pub fn names(annotations: &BTreeMap<String, String>, egress_namespace: &str, egress_name: &str) -> bool {
    annotations.iter().any(|(key, value)| {
        key.strip_prefix(ANNOTATION_EGRESS_PREFIX) == Some(egress_namespace)
            && value.split(',').any(|name| name == egress_name)
    })
}

/// Whether an entry of `spec.clients` of an Egress selects a pod.
#[must_use]
pub fn selected_by(
    client: &EgressClient,
    egress_namespace: &str,
    pod: &PodFacts<'_>,
    namespace_labels: &BTreeMap<String, String>,
) -> bool {
    let by_namespace = match (&client.namespace_selector, &client.pod_selector) {
        (None, None) => return false,
        (Some(selector), _) => labels::selects(selector, namespace_labels),
        (None, Some(_)) => pod.namespace == egress_namespace,
    };
    by_namespace && client.pod_selector.as_ref().is_none_or(|selector| labels::selects(selector, pod.labels))
}

/// Why a pod is a client of an Egress; `None` if it is not. `namespace_labels` are those of the pod's
/// namespace; while they are unknown, pass none: only selectors that ask for nothing match then.
#[must_use]
pub fn client_reason(
    egress: &EgressRef,
    clients: &[EgressClient],
    pod: &PodFacts<'_>,
    namespace_labels: &BTreeMap<String, String>,
) -> Option<ClientReason> {
    if !pod.eligible() {
        return None;
    }
    if names(pod.annotations, &egress.namespace, &egress.name) {
        return Some(ClientReason::Annotation);
    }
    clients
        .iter()
        .any(|client| selected_by(client, &egress.namespace, pod, namespace_labels))
        .then_some(ClientReason::Selector)
}

/// Whether a pod is a client of an Egress.
#[must_use]
pub fn client_of(egress: &Egress, pod: &Pod, namespace_labels: &BTreeMap<String, String>) -> bool {
    client_reason(&EgressRef::of(egress), &egress.spec.clients, &PodFacts::from(pod), namespace_labels)
        .is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn selector(pairs: &[(&str, &str)]) -> LabelSelector {
        LabelSelector { match_labels: Some(map(pairs)), match_expressions: None }
    }

    #[test]
    fn annotations_are_read_without_trimming() {
        let named = named_egresses(&map(&[
            ("egress.coil.cybozu.com/internet", "egress,fast"),
            ("egress.coil.cybozu.com/other", "a, b,,egress"),
            ("egress.coil.cybozu.com/UPPER", "x"),
            ("unrelated/internet", "nope"),
        ]));
        let want: BTreeSet<_> =
            [("internet", "egress"), ("internet", "fast"), ("other", "a"), ("other", "egress")]
                .map(|(ns, name)| EgressRef::new(ns, name))
                .into();
        assert_eq!(named.egresses, want);
        let texts: Vec<_> = named.errors.iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), 3, "{texts:?}");
        assert!(texts[0].contains("UPPER"), "{texts:?}");
        assert!(texts[1].contains("item 1: \" b\""), "{texts:?}");
        assert!(texts[2].contains("item 2: \"\""), "{texts:?}");
    }

    #[test]
    fn an_empty_annotation_is_an_error() {
        let named = named_egresses(&map(&[("egress.coil.cybozu.com/internet", "")]));
        assert!(named.egresses.is_empty());
        assert_eq!(named.errors.len(), 1);
    }

    #[test]
    fn reasons() {
        let egress = EgressRef::new("internet", "egress");
        let team = EgressClient { namespace_selector: Some(selector(&[("team", "a")])), pod_selector: None };
        let local =
            EgressClient { namespace_selector: None, pod_selector: Some(selector(&[("app", "web")])) };
        let both = EgressClient {
            namespace_selector: Some(LabelSelector::default()),
            pod_selector: Some(selector(&[("app", "web")])),
        };
        let none = EgressClient::default();
        let annotated = map(&[("egress.coil.cybozu.com/internet", "other,egress")]);
        let (web, plain) = (map(&[("app", "web")]), map(&[]));
        let facts = |namespace, labels, annotations| PodFacts {
            namespace,
            labels,
            annotations,
            host_network: false,
            finished: false,
        };
        let ask = |clients: &[EgressClient], pod: &PodFacts<'_>, ns: &[(&str, &str)]| {
            client_reason(&egress, clients, pod, &map(ns))
        };

        let pod = facts("demo", &web, &annotated);
        assert_eq!(ask(&[], &pod, &[]), Some(ClientReason::Annotation));
        assert_eq!(ask(&[], &PodFacts { host_network: true, ..pod }, &[]), None);
        assert_eq!(ask(&[], &PodFacts { finished: true, ..pod }, &[]), None);

        let pod = facts("demo", &web, &plain);
        assert_eq!(ask(&[], &pod, &[]), None);
        assert_eq!(ask(std::slice::from_ref(&team), &pod, &[("team", "a")]), Some(ClientReason::Selector));
        assert_eq!(ask(std::slice::from_ref(&team), &pod, &[("team", "b")]), None);
        assert_eq!(ask(std::slice::from_ref(&local), &pod, &[]), None);
        assert_eq!(ask(&[local], &facts("internet", &web, &plain), &[]), Some(ClientReason::Selector));
        assert_eq!(ask(std::slice::from_ref(&both), &pod, &[]), Some(ClientReason::Selector));
        assert_eq!(ask(&[both], &facts("demo", &plain, &plain), &[]), None);
        assert_eq!(ask(&[none], &pod, &[]), None);
    }

    #[test]
    fn a_name_that_contains_the_name_is_another_one() {
        let annotations = map(&[("egress.coil.cybozu.com/internet", "egress2,my-egress, egress")]);
        assert!(!names(&annotations, "internet", "egress"));
        assert!(names(&annotations, "internet", "egress2"));
        assert!(!names(&annotations, "inter", "egress2"));
    }
}
