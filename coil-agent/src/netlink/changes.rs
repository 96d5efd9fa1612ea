//! When the kernel's interfaces, rules or routes have changed.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use rtnetlink::MulticastGroup;

/// What the kernel tells of changes, which come in bursts.
pub struct Changes {
    what: &'static str,
    /// Dropped, and thereby stopped, with this.
    connection: Pin<Box<dyn Future<Output = ()> + Send>>,
    messages: BoxStream<'static, ()>,
    connected: bool,
}

impl Changes {
    /// Subscribes. `what` names it in the log.
    ///
    /// # Errors
    ///
    /// The kernel does not tell of such changes.
    pub fn subscribe(what: &'static str, groups: &[MulticastGroup]) -> io::Result<Self> {
        let (connection, _handle, messages) = rtnetlink::new_multicast_connection(groups)?;
        Ok(Self {
            what,
            connection: Box::pin(connection),
            messages: messages.map(|_| ()).boxed(),
            connected: true,
        })
    }

    /// Returns `settle` after the first change, together with what else changes in that time, and after `period`
    /// without one, in case that a message was lost. If the kernel tells no more, only the period is left.
    pub async fn next(&mut self, settle: Duration, period: Duration) {
        if tokio::time::timeout(period, self.change()).await.is_ok() {
            // More of the same burst; that it ends by the clock is what is meant.
            let burst = async {
                loop {
                    self.change().await;
                }
            };
            tokio::time::timeout(settle, burst).await.unwrap_or(());
        }
    }

    async fn change(&mut self) {
        while self.connected {
            tokio::select! {
                () = &mut self.connection => self.connected = false,
                message = self.messages.next() => match message {
                    Some(()) => return,
                    None => self.connected = false,
                },
            }
            tracing::warn!(what = self.what, "the kernel no longer tells of changes");
        }
        std::future::pending().await
    }
}
