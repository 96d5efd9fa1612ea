//! Streams a pod's log file.

use std::io::SeekFrom;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::error::{ApiError, ApiResult};
use super::obj;
use super::server::ApiServer;

/// How often a followed file is looked at.
const POLL: Duration = Duration::from_millis(200);

/// The body of a log answer: the last `tail` lines of the file, at most `limit` bytes, and what is added while the pod
/// is there if `follow`.
pub async fn stream(
    server: Arc<ApiServer>,
    file: PathBuf,
    namespace: &str,
    pod: &str,
    tail: Option<usize>,
    limit: Option<usize>,
    follow: bool,
) -> ApiResult<Body> {
    let mut bytes = read_from(&file, 0).await.map_err(ApiError::internal)?;
    let end = bytes.len();
    if let Some(lines) = tail {
        bytes.drain(..start_of_tail(&bytes, lines));
    }
    if let Some(limit) = limit {
        bytes.truncate(limit);
    }
    if !follow || limit.is_some() {
        return Ok(Body::from(bytes));
    }
    let follow = Follow {
        server,
        file,
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        position: u64::try_from(end).unwrap_or(0),
        first: Some(bytes),
    };
    Ok(Body::from_stream(futures::stream::unfold(follow, Follow::next)))
}

fn start_of_tail(bytes: &[u8], lines: usize) -> usize {
    if lines == 0 {
        return bytes.len();
    }
    let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    body.iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n')
        .nth(lines - 1)
        .map_or(0, |(index, _)| index + 1)
}

async fn read_from(file: &Path, position: u64) -> std::io::Result<Vec<u8>> {
    let mut file = tokio::fs::File::open(file).await?;
    file.seek(SeekFrom::Start(position)).await?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).await?;
    Ok(bytes)
}

struct Follow {
    server: Arc<ApiServer>,
    file: PathBuf,
    namespace: String,
    pod: String,
    position: u64,
    first: Option<Vec<u8>>,
}

impl Follow {
    async fn next(mut self) -> Option<(std::io::Result<Bytes>, Self)> {
        if let Some(first) = self.first.take() {
            return Some((Ok(Bytes::from(first)), self));
        }
        loop {
            let is_over = self.is_over();
            match read_from(&self.file, self.position).await {
                Ok(bytes) if !bytes.is_empty() => {
                    self.position += u64::try_from(bytes.len()).unwrap_or(0);
                    return Some((Ok(Bytes::from(bytes)), self));
                }
                Ok(_) if is_over => return None,
                Ok(_) => tokio::time::sleep(POLL).await,
                Err(error) => return Some((Err(error), self)).filter(|_| !is_over),
            }
        }
    }

    fn is_over(&self) -> bool {
        let pod = self
            .server
            .resource("", "pods")
            .and_then(|pods| self.server.get(&pods, Some(&self.namespace), &self.pod));
        self.server.stopped().is_cancelled()
            || pod.is_ok_and(|pod| ["Succeeded", "Failed"].contains(&obj::text(&pod, &["status", "phase"])))
            || self
                .server
                .resource("", "pods")
                .is_ok_and(|pods| self.server.get(&pods, Some(&self.namespace), &self.pod).is_err())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails() {
        for (text, lines, expected) in
            [("a\nb\nc\n", 2, "b\nc\n"), ("a\nb", 1, "b"), ("a\n", 5, "a\n"), ("a\n", 0, ""), ("", 3, "")]
        {
            assert_eq!(&text[start_of_tail(text.as_bytes(), lines)..], expected);
        }
    }
}
