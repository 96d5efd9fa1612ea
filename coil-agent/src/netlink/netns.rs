//! Work inside another network name space, on a thread of its own.

use std::fs::File;
use std::path::Path;

use nix::sched::{CloneFlags, setns};

use super::NetlinkError;

/// Runs `work` with the network name space at `path` entered, and waits for it.
///
/// The thread ends with the work, so no other code ever runs in the wrong name space. `work` gets a
/// name space, not a runtime: whoever needs tokio inside builds a current-thread runtime there.
pub async fn in_netns<T, F>(path: &Path, work: F) -> Result<T, NetlinkError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let error = |source| NetlinkError::Namespace { path: path.to_path_buf(), source };
    let namespace = File::open(path).map_err(error)?;
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new()
        .name("netns".into())
        .spawn(move || {
            let result = setns(&namespace, CloneFlags::CLONE_NEWNET).map(|()| work());
            // A receiver that is gone has lost interest in the result.
            drop(sender.send(result));
        })
        .map_err(error)?;
    let result = receiver.await;
    // The thread has sent and returns, or has panicked: joining does not block for long.
    match (result, thread.join()) {
        (Ok(result), Ok(())) => result.map_err(|errno| error(errno.into())),
        (_, Err(panic)) => std::panic::resume_unwind(panic),
        (Err(_), Ok(())) => Err(error(std::io::ErrorKind::Interrupted.into())),
    }
}
