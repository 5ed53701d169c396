//! Questions over TCP (RFC 7766): each after its length in two bytes, answered as they are ready.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::PodNames;
use super::message::Transport;
use crate::accept::ended;
use crate::drain::{DrainWatch, Queued};

/// How long a client may take to ask, to go on asking, or to take an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many connections one listener has at once; further ones wait in its queue.
const CONNECTIONS: usize = 64;
/// How many questions of one connection may wait for their answers before more are read.
const PIPELINED: usize = 16;
/// How long to wait after an error that only time can mend, such as too many open files.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves connections until the pod leaves or the agent drains; then those that are queued.
pub(super) async fn serve(names: Arc<PodNames>, listener: TcpListener, drain: DrainWatch) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut end = std::pin::pin!(ended(&names.pod, drain.clone()));
    loop {
        let accepted = async {
            let Ok(room) = room.clone().acquire_owned().await else { std::future::pending().await };
            (listener.accept().await, room)
        };
        tokio::select! {
            (accepted, room) = accepted => match accepted {
                Ok((stream, _)) => {
                    let (names, end) = (names.clone(), hushed(names.clone(), drain.clone()));
                    connections.spawn(async move {
                        converse(names, stream, end).await;
                        drop(room);
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(workload = %names.pod.uid, %error, "cannot accept questions");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = &mut end => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Ready when no further question is to be read. When another agent goes on, it is there for new
/// connections: the client of an open one has sent its question, or will.
async fn hushed(names: Arc<PodNames>, drain: DrainWatch) {
    match ended(&names.pod, drain.clone()).await {
        Queued::Taken => {}
        Queued::Left => drain.expired().await,
    }
}

/// Answers the questions of one connection until its client ends, or is silent for too long. At
/// the end of serving no further question is read.
async fn converse(names: Arc<PodNames>, mut stream: TcpStream, end: impl Future<Output = ()>) {
    let mut end = std::pin::pin!(end);
    let mut input = BytesMut::new();
    let mut answering = FuturesUnordered::new();
    let mut reading = true;
    while reading || !answering.is_empty() {
        while answering.len() < PIPELINED
            && let Some(message) = take_message(&mut input)
        {
            answering.push(names.clone().respond(message, Transport::Tcp));
        }
        let more = reading && answering.len() < PIPELINED;
        tokio::select! {
            read = stream.read_buf(&mut input), if more => reading = matches!(read, Ok(1..)),
            Some(answer) = answering.next(), if !answering.is_empty() => {
                if write(&mut stream, answer).await.is_err() {
                    return;
                }
            }
            () = &mut end, if reading => reading = false,
            () = tokio::time::sleep(PATIENCE), if answering.is_empty() => return,
        }
    }
}

/// The first whole message, taken out of what was read.
fn take_message(input: &mut BytesMut) -> Option<Vec<u8>> {
    let length = usize::from(u16::from_be_bytes(*input.first_chunk()?));
    let message = input.get(2..2 + length)?.to_vec();
    input.advance(2 + length);
    Some(message)
}

async fn write(stream: &mut TcpStream, answer: Option<Vec<u8>>) -> io::Result<()> {
    let Some(answer) = answer else { return Ok(()) };
    let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(2 + answer.len());
    framed.extend(length.to_be_bytes());
    framed.extend(answer);
    timeout(PATIENCE, stream.write_all(&framed)).await.map_err(|_| io::ErrorKind::TimedOut)?
}
