//! How long a watch waits before it tries again.
//!
//! A server that cannot be reached is asked every two seconds at most: that costs it nothing while it is
//! away, and little when it is back, since waits differ by chance. One that answers, if only with errors,
//! has work enough and is given more time.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher;

/// The first wait, which then doubles.
const FIRST: Duration = Duration::from_millis(400);
/// Longest wait while there is no answer.
const UNANSWERED: Duration = Duration::from_secs(2);
/// Longest wait while there are answers.
const ANSWERED: Duration = Duration::from_secs(10);

/// The events of a watch, which after an error waits before it goes on.
pub fn patient<K: Send + 'static>(
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static,
) -> BoxStream<'static, watcher::Result<watcher::Event<K>>> {
    let start = (events.boxed(), Waits::default(), None);
    stream::unfold(start, |(mut events, mut waits, wait)| async move {
        if let Some(wait) = wait {
            tokio::time::sleep(wait).await;
        }
        let event = events.next().await?;
        let wait = waits.after(&event);
        Some((event, (events, waits, wait)))
    })
    .boxed()
}

/// The waits of watches that someone else makes and whose errors we do not see.
pub fn backoff() -> impl Backoff + 'static {
    Waits::default()
}

fn is_unanswered(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => {
            matches!(error, kube::Error::Service(_) | kube::Error::HyperError(_))
        }
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => false,
    }
}

#[derive(Default)]
struct Waits {
    failures: u32,
}

impl Waits {
    /// How long to wait after what a watch has told.
    fn after<T>(&mut self, event: &watcher::Result<T>) -> Option<Duration> {
        match event {
            Ok(_) => {
                self.reset();
                None
            }
            Err(error) => Some(self.next(if is_unanswered(error) { UNANSWERED } else { ANSWERED })),
        }
    }

    /// Doubles with each failure; between half and all of it, so that those that failed together do not
    /// come back together.
    fn next(&mut self, longest: Duration) -> Duration {
        let most = FIRST.saturating_mul(1 << self.failures.min(10)).min(longest);
        self.failures = self.failures.saturating_add(1);
        let chance = u32::try_from(RandomState::new().hash_one(self.failures) % 1000).unwrap_or(0);
        most / 2 + most / 2 * chance / 1000
    }

    fn reset(&mut self) {
        self.failures = 0;
    }
}

impl Iterator for Waits {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(Self::next(self, UNANSWERED))
    }
}

impl Backoff for Waits {
    fn reset(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeSet;

    use kube::core::Status;

    use super::*;

    fn away() -> watcher::Result<()> {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        Err(watcher::Error::WatchStartFailed(kube::Error::Service(refused.into())))
    }

    fn busy() -> watcher::Result<()> {
        let status = Status { code: 429, ..Status::default() };
        Err(watcher::Error::WatchStartFailed(kube::Error::Api(Box::new(status))))
    }

    fn waits(events: impl IntoIterator<Item = watcher::Result<()>>) -> Vec<Option<Duration>> {
        let mut waits = Waits::default();
        events.into_iter().map(|event| waits.after(&event)).collect()
    }

    #[test]
    fn a_server_that_is_away_is_asked_every_two_seconds() {
        let waits: Vec<Duration> = waits((0..100).map(|_| away())).into_iter().flatten().collect();
        assert_eq!(waits.len(), 100);
        assert!(waits[0] <= FIRST && waits[1] <= 2 * FIRST, "{waits:?}");
        assert!(waits[4..].iter().all(|wait| (UNANSWERED / 2..=UNANSWERED).contains(wait)), "{waits:?}");
        let different: BTreeSet<_> = waits[4..].iter().collect();
        assert!(different.len() > 30, "no chance in it: {waits:?}");
    }

    #[test]
    fn a_server_that_answers_with_errors_gets_more_time() {
        let waits = waits((0..20).map(|_| busy()));
        let longest = waits.iter().flatten().max().unwrap();
        assert!((ANSWERED / 2..=ANSWERED).contains(longest), "{waits:?}");
        assert!(!is_unanswered(&watcher::Error::WatchError(Box::default())));
    }

    #[test]
    fn an_event_resets() {
        let events = (0..10).map(|_| away()).chain([Ok(()), away()]);
        let waits = waits(events);
        assert_eq!(waits[10], None);
        assert!(waits[11].unwrap() <= FIRST, "{waits:?}");
    }

    #[tokio::test]
    async fn events_and_errors_come_in_order() {
        let items = vec![
            Ok(watcher::Event::Init),
            Err(watcher::Error::NoResourceVersion),
            Ok(watcher::Event::Apply(7)),
        ];
        let told: Vec<_> = patient(stream::iter(items)).collect().await;
        assert!(matches!(told[0], Ok(watcher::Event::Init)));
        assert!(told[1].is_err());
        assert!(matches!(told[2], Ok(watcher::Event::Apply(7))));
        assert_eq!(told.len(), 3);
    }
}
