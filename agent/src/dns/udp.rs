//! Questions over UDP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::PodNames;
use super::message::Transport;
use crate::accept::ended;
use crate::drain::{DrainWatch, Queued};

/// Questions are short; what is longer is cut, and then no question.
const LONGEST: usize = 4096;
/// How long to wait after an error that only time can mend.
const PAUSE: Duration = Duration::from_millis(50);

/// Answers what arrives until the pod leaves or the agent drains; then what has arrived before,
/// unless another agent does.
pub(super) async fn serve(names: Arc<PodNames>, socket: UdpSocket, drain: DrainWatch) {
    let socket = Arc::new(socket);
    let mut later = JoinSet::new();
    let mut buffer = vec![0; LONGEST];
    let pod = names.pod.clone();
    let mut end = std::pin::pin!(ended(&pod, drain));
    let queued = loop {
        tokio::select! {
            received = socket.recv_from(&mut buffer) => match received {
                Ok((length, from)) => {
                    respond(&names, &socket, &mut later, buffer.get(..length), from);
                }
                // The kernel tells here of answers that nobody took.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
                Err(error) => {
                    tracing::warn!(workload = %names.pod.uid, %error, "cannot read questions");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(_) = later.join_next() => {}
            queued = &mut end => break queued,
        }
    };
    while queued == Queued::Taken
        && let Ok((length, from)) = socket.try_recv_from(&mut buffer)
    {
        respond(&names, &socket, &mut later, buffer.get(..length), from);
    }
    while later.join_next().await.is_some() {}
}

/// Answers at once where nothing has to be waited for.
fn respond(
    names: &Arc<PodNames>,
    socket: &Arc<UdpSocket>,
    later: &mut JoinSet<()>,
    message: Option<&[u8]>,
    from: SocketAddr,
) {
    // The agent does not talk with itself, whoever pretends that it does.
    let own = socket.local_addr().is_ok_and(|own| own.port() == from.port());
    let Some(message) = message.filter(|_| !own) else { return };
    let mut answering = Box::pin(names.clone().respond(message.to_vec(), Transport::Udp));
    match answering.as_mut().now_or_never() {
        Some(answer) => send(socket, answer, from),
        None => {
            let socket = socket.clone();
            later.spawn(async move { send(&socket, answering.await, from) });
        }
    }
}

/// A client whose answer finds no room asks again.
fn send(socket: &UdpSocket, answer: Option<Vec<u8>>, to: SocketAddr) {
    if let Some(answer) = answer
        && let Err(error) = socket.try_send_to(&answer, to)
    {
        tracing::debug!(target: "dns", %to, %error, "answer not sent");
    }
}
