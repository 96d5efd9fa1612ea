//! Problems of pods as Events, each told once, and again only after it was gone.

use std::collections::{BTreeMap, BTreeSet};

use coil_api::names;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::watch;

use crate::cni::error::causes;
use crate::desired::PodUid;
use crate::desired::build::{PodProblems, Problem};
use crate::state::{Closed, Snapshot};

/// Longest note that the API takes, in bytes.
const MAX_NOTE: usize = 1024;

/// A problem that nobody has been told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// UID of the pod.
    pub uid: PodUid,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What is wrong.
    pub problem: Problem,
}

/// What has been told.
#[derive(Debug, Default)]
pub struct Told(BTreeMap<PodUid, BTreeSet<Problem>>);

impl Told {
    /// Problems that are new; those that are gone are forgotten.
    pub fn news(&mut self, problems: &BTreeMap<PodUid, PodProblems>) -> Vec<News> {
        let mut news = Vec::new();
        for (uid, pod) in problems {
            let told = self.0.get(uid);
            let new = pod.problems.iter().filter(|problem| told.is_none_or(|told| !told.contains(problem)));
            news.extend(new.map(|problem| News {
                uid: uid.clone(),
                namespace: pod.key.namespace.clone(),
                name: pod.key.name.clone(),
                problem: problem.clone(),
            }));
        }
        self.0 = problems.iter().map(|(uid, pod)| (uid.clone(), pod.problems.clone())).collect();
        news
    }
}

/// Publishes Events until the picture is gone.
pub async fn publish(
    client: kube::Client,
    node: String,
    mut snapshots: watch::Receiver<Snapshot>,
) -> Result<(), Closed> {
    let reporter = Reporter { controller: "coild".into(), instance: Some(node) };
    let recorder = Recorder::new(client, reporter);
    let mut told = Told::default();
    loop {
        let rest = snapshots.borrow_and_update().rest.clone();
        for news in told.news(&rest.problems) {
            tracing::warn!(
                pod.namespace = news.namespace,
                pod.name = news.name,
                reason = news.problem.reason(),
                "{}",
                news.problem
            );
            // An Event is a courtesy: it is in the log and in the metrics too.
            if let Err(error) = recorder.publish(&event(&news), &reference(&news)).await {
                tracing::warn!(error = causes(&error), "cannot publish an Event");
            }
        }
        snapshots.changed().await.map_err(|_| Closed)?;
    }
}

fn event(news: &News) -> Event {
    let mut note = news.problem.to_string();
    while note.len() > MAX_NOTE {
        note.pop();
    }
    Event {
        type_: EventType::Warning,
        reason: news.problem.event_reason().into(),
        note: Some(note),
        action: "ConfigureEgress".into(),
        // Events about different Egresses of one pod must not be merged.
        secondary: egress(&news.problem),
    }
}

fn egress(problem: &Problem) -> Option<ObjectReference> {
    let name = match problem {
        Problem::MissingEgress(name) | Problem::InvalidEgress(name, _) => name,
        Problem::Annotation(_) | Problem::Conflict(..) => return None,
    };
    Some(ObjectReference {
        api_version: Some(format!("{}/{}", names::GROUP, names::VERSION)),
        kind: Some("Egress".into()),
        namespace: Some(name.namespace.clone()),
        name: Some(name.name.clone()),
        ..ObjectReference::default()
    })
}

fn reference(news: &News) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: Some(news.namespace.clone()),
        name: Some(news.name.clone()),
        uid: Some(news.uid.clone()),
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::index::ObjectKey;

    fn problems(texts: &[&str]) -> BTreeMap<PodUid, PodProblems> {
        let problems = texts.iter().map(|t| Problem::Annotation((*t).into())).collect();
        let key = ObjectKey::new("demo", "a");
        [("1".to_owned(), PodProblems { key, problems })].into()
    }

    #[test]
    fn each_problem_is_told_once_until_it_is_gone() {
        let mut told = Told::default();
        assert_eq!(told.news(&problems(&["x"])).len(), 1);
        assert_eq!(told.news(&problems(&["x"])).len(), 0);
        assert_eq!(told.news(&problems(&["x", "y"])).len(), 1);
        assert_eq!(told.news(&BTreeMap::new()).len(), 0);
        assert_eq!(told.news(&problems(&["x"])).len(), 1);
    }

    #[test]
    fn a_note_is_cut_to_what_the_api_takes() {
        let mut told = Told::default();
        let news = told.news(&problems(&[&"ä".repeat(2000)])).remove(0);
        let note = event(&news).note.unwrap();
        assert!(note.len() <= MAX_NOTE && note.len() > MAX_NOTE - 4);
    }
}
