//! What other processes ask of the supervisor: a JSON line to a socket, and a JSON line back.

use crate::paths;
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::io;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

/// A request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Request {
    /// Cut a node's power and start it again.
    Reboot(String),
    /// Cut a node's power.
    Off(String),
    /// Start a node that has no power.
    On(String),
}

/// What became of it: nothing to add, or why not.
pub(crate) type Answer = Result<(), String>;

/// Asks the supervisor of the lab that is up.
pub(crate) async fn ask(request: &Request) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(paths::control()).await?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).await?;
    if answer.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&answer)?)
}

/// A request with the way to answer it.
pub(super) type Asked = (Request, oneshot::Sender<Answer>);

/// Takes requests, one after the other.
pub(super) fn listen() -> anyhow::Result<mpsc::Receiver<Asked>> {
    let path = paths::control();
    let listener =
        UnixListener::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(serve(stream, sender.clone()))),
                Err(error) => {
                    warn!(%error, "no more requests are taken");
                    return;
                }
            }
        }
    });
    Ok(receiver)
}

async fn serve(stream: UnixStream, sender: mpsc::Sender<Asked>) {
    if let Err(error) = exchange(stream, sender).await {
        warn!("a request: {error:#}");
    }
}

async fn exchange(stream: UnixStream, sender: mpsc::Sender<Asked>) -> anyhow::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read).read_line(&mut line).await.context("reading it")?;
    let request = serde_json::from_str(&line).context("it is no request")?;
    let (answer, answered) = oneshot::channel();
    sender.send((request, answer)).await.ok().context("the lab ends")?;
    let answer = answered.await.context("the lab ends")?;
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    write.write_all(&line).await.context("answering it")
}
