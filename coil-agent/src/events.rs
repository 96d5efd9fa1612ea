//! Problems of pods as Events: those that last, each once, and again only after it was gone.

use std::collections::BTreeMap;
use std::time::Duration;

use coil_api::names;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::cni::error::causes;
use crate::cni::pod::ipam::AddFailure;
use crate::desired::PodUid;
use crate::desired::build::{PodProblems, Problem};
use crate::state::{Closed, Snapshot};

/// Time that a problem must have lasted before it is told.
const LASTING: Duration = Duration::from_millis(1500);
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

/// What has been seen, and told.
#[derive(Debug, Default)]
pub struct Told(BTreeMap<PodUid, BTreeMap<Problem, Seen>>);

#[derive(Clone, Copy, Debug)]
struct Seen {
    since: Instant,
    told: bool,
}

impl Told {
    /// Problems that are worth telling at `now`, and when to look again. A problem must have lasted: a
    /// pod and its Egress that are made together reach us one after the other. Those that are gone are
    /// forgotten.
    pub fn news(
        &mut self,
        problems: &BTreeMap<PodUid, PodProblems>,
        now: Instant,
    ) -> (Vec<News>, Option<Instant>) {
        let (mut news, mut again) = (Vec::new(), None::<Instant>);
        let mut before = std::mem::take(&mut self.0);
        for (uid, pod) in problems {
            let mut before = before.remove(uid).unwrap_or_default();
            let after = self.0.entry(uid.clone()).or_default();
            for problem in &pod.problems {
                let mut seen = before.remove(problem).unwrap_or(Seen { since: now, told: false });
                let due = seen.since + LASTING;
                if !seen.told && due <= now {
                    seen.told = true;
                    news.push(News {
                        uid: uid.clone(),
                        namespace: pod.key.namespace.clone(),
                        name: pod.key.name.clone(),
                        problem: problem.clone(),
                    });
                } else if !seen.told {
                    again = Some(again.map_or(due, |at| at.min(due)));
                }
                after.insert(problem.clone(), seen);
            }
        }
        (news, again)
    }
}

/// Publishes Events until the picture is gone.
pub async fn publish(
    client: Client,
    node: String,
    mut snapshots: watch::Receiver<Snapshot>,
) -> Result<(), Closed> {
    let mut publisher = Publisher::new(client, node);
    let mut told = Told::default();
    loop {
        let rest = snapshots.borrow_and_update().rest.clone();
        let (news, again) = told.news(&rest.problems, Instant::now());
        for news in &news {
            tracing::warn!(
                pod.namespace = news.namespace,
                pod.name = news.name,
                reason = news.problem.reason(),
                "{}",
                news.problem
            );
            publisher.publish(news).await;
        }
        let changed = snapshots.changed();
        match again {
            // At `at` there is something to tell, changed or not.
            Some(at) => tokio::time::timeout_at(at, changed).await.unwrap_or(Ok(())).map_err(|_| Closed)?,
            None => changed.await.map_err(|_| Closed)?,
        }
    }
}

/// Publishes Events about pods that could not be wired, until nobody can tell of any.
pub async fn publish_failures(client: Client, node: String, mut failures: mpsc::Receiver<AddFailure>) {
    let mut publisher = Publisher::new(client, node);
    while let Some(failure) = failures.recv().await {
        publisher
            .send(&failure_event(&failure), &pod_reference(&failure.namespace, &failure.name, &failure.uid))
            .await;
    }
}

fn failure_event(failure: &AddFailure) -> Event {
    Event {
        type_: EventType::Warning,
        reason: "FailedPodNetwork".into(),
        note: Some(cut(format!("{}: {}", failure.message, failure.details))),
        action: "SetUpPodNetwork".into(),
        secondary: None,
    }
}

struct Publisher {
    client: Client,
    reporter: Reporter,
    recorder: Recorder,
}

impl Publisher {
    fn new(client: Client, node: String) -> Self {
        let reporter = Reporter { controller: "coild".into(), instance: Some(node) };
        let recorder = Recorder::new(client.clone(), reporter.clone());
        Self { client, reporter, recorder }
    }

    async fn publish(&mut self, news: &News) {
        self.send(&event(news), &pod_reference(&news.namespace, &news.name, &news.uid)).await;
    }

    /// An Event is a courtesy: what it says is in the log and in the metrics too.
    async fn send(&mut self, event: &Event, reference: &ObjectReference) {
        let mut result = self.recorder.publish(event, reference).await;
        if matches!(&result, Err(kube::Error::Api(status)) if status.is_not_found()) {
            // The Event that this one repeats is gone; the recorder does not know.
            self.recorder = Recorder::new(self.client.clone(), self.reporter.clone());
            result = self.recorder.publish(event, reference).await;
        }
        match result {
            Ok(()) => {}
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_forbidden() => {
                // As a rule the namespace is being deleted.
                tracing::info!(error = status.message, "an Event was refused");
            }
            Err(error) => tracing::warn!(error = causes(&error), "cannot publish an Event"),
        }
    }
}

fn event(news: &News) -> Event {
    Event {
        type_: EventType::Warning,
        reason: news.problem.event_reason().into(),
        note: Some(cut(news.problem.to_string())),
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

fn cut(mut note: String) -> String {
    while note.len() > MAX_NOTE {
        note.pop();
    }
    note
}

fn pod_reference(namespace: &str, name: &str, uid: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: Some(namespace.into()),
        name: Some(name.into()),
        uid: Some(uid.into()),
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeSet;

    use super::*;
    use crate::index::ObjectKey;

    fn problems(texts: &[&str]) -> BTreeMap<PodUid, PodProblems> {
        let problems: BTreeSet<_> = texts.iter().map(|t| Problem::Annotation((*t).into())).collect();
        if problems.is_empty() {
            return BTreeMap::new();
        }
        let key = ObjectKey::new("demo", "a");
        [("1".to_owned(), PodProblems { key, problems })].into()
    }

    #[test]
    fn a_problem_that_lasts_is_told_once_until_it_is_gone() {
        let mut told = Told::default();
        let start = Instant::now();
        let later = |halves: u32| start + LASTING / 2 * halves;
        let count = |told: &mut Told, texts: &[&str], now| told.news(&problems(texts), now).0.len();
        assert_eq!(told.news(&problems(&["x"]), start), (vec![], Some(start + LASTING)));
        // One that goes away in time is never told.
        assert_eq!(count(&mut told, &[], later(1)), 0);
        assert_eq!(count(&mut told, &["x"], later(2)), 0);
        assert_eq!(count(&mut told, &["x", "y"], later(4)), 1);
        assert_eq!(count(&mut told, &["x", "y"], later(5)), 0);
        let (news, again) = told.news(&problems(&["x", "y"]), later(6));
        assert_eq!((news.len(), again), (1, None));
        assert_eq!(count(&mut told, &[], later(7)), 0);
        assert_eq!(count(&mut told, &["x"], later(8)), 0);
        assert_eq!(count(&mut told, &["x"], later(10)), 1);
    }

    #[test]
    fn a_note_is_cut_to_what_the_api_takes() {
        let news = News {
            uid: "1".into(),
            namespace: "demo".into(),
            name: "a".into(),
            problem: Problem::Annotation("ä".repeat(2000)),
        };
        let note = event(&news).note.unwrap();
        assert!(note.len() <= MAX_NOTE && note.len() > MAX_NOTE - 4);
    }
}
